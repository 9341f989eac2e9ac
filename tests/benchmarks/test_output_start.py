"""The benchmark of how GKA's output projections start: its noise is theirs, and it learns from both seeds."""

import output_start
import pytest
import torch


def test_noise_is_proportional_to_the_start():
    batch = torch.randint(100, (2, 32))
    sizes = {name: output_start.noise(output_start.build(name, 0), batch) for name in ("gka, 1", "gka, 0.1", "gka, 0")}
    assert (
        sizes["gka, 0.1"] == pytest.approx(0.1 * sizes["gka, 1"], rel=1e-3) and sizes["gka, 0"] == 0 < sizes["gka, 1"]
    )


def test_a_run_goes_from_its_seed(monkeypatch):
    monkeypatch.setattr(output_start, "STEPS", 25)
    monkeypatch.setattr(output_start, "WINDOW", 16)
    monkeypatch.setattr(output_start, "BATCH", 2)
    text = torch.arange(60 * 16).view(60, 16) % 7
    rows = [
        output_start.train(("softmax attention", seed), torch.device("cpu"), text, text[:4], 1.0) for seed in (0, 1)
    ]
    assert [step for step, _ in rows[0]["curve"]] == [25] and rows[0]["curve"] != rows[1]["curve"]
    assert rows[0]["curve"][0][1] < 12
