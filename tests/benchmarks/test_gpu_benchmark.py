"""What the GPU benchmark counts, where there is no GPU."""

from types import SimpleNamespace

import gka_gpu
import pytest
import torch

from kalman_kernels import GKASolver


def tensors(query, key):
    heads, length = 2, 128
    rows = [t.expand(1, length, heads, -1).clone() for t in (query, key)]
    ones = torch.ones(1, length, heads)
    return [*rows, rows[1], -0.1 * ones, ones, ones]


def test_iterations_are_those_of_the_dimensions_that_a_query_and_the_keys_span():
    first, second = torch.eye(16)[:2]
    assert gka_gpu.iterations_taken(tensors(first, first)) == 2.0
    assert gka_gpu.iterations_taken(tensors(first + second, first)) == 2.0
    query, key, *rest = tensors(first + second, first)
    # Three eigenvalues meet the query: three iterations, in rounds of two.
    query = query + torch.eye(16)[2]
    key = torch.where(torch.arange(128)[None, :, None, None] % 3 == 0, 2 * torch.eye(16)[1], key)
    assert gka_gpu.iterations_taken([query, key, *rest]) == 4.0


def test_an_empty_state_takes_no_more_than_a_round():
    assert gka_gpu.iterations_taken(tensors(torch.eye(16)[0], torch.zeros(16))) <= 2.0


def test_bytes_are_counted_for_kernels_that_exist():
    forward = pytest.importorskip("kalman_kernels.gka.triton_forward")
    backward = pytest.importorskip("kalman_kernels.gka.triton_backward")
    for name in gka_gpu.NEEDED:
        assert hasattr(forward, f"{name}_kernel") or hasattr(backward, f"{name}_kernel"), name
    assert gka_gpu.CHUNK == 64


def test_tuning_a_step_tries_its_options_and_leaves_what_is_chosen(monkeypatch, capsys):
    step = pytest.importorskip("kalman_kernels.gka.triton_step")
    chosen, seen = (step.way, step.turns, step.token_layout), []

    def replayed(call):
        way = step.way(4, 4096, 128, torch.float16, GKASolver("cg", 20))
        layout = step.token_layout(4096, 128, False, True)
        seen.append((way, step.turns("each", 4096, 128, 132), (layout["STAGES"], layout["PIECE"])))
        return {"median_ms": 1e-3 * len(seen)}

    monkeypatch.setattr(gka_gpu, "replayed", replayed)
    for name in ("settled", "mixer_inputs"):
        monkeypatch.setattr(gka_gpu, name, lambda *_: None)
    monkeypatch.setattr(gka_gpu, "step_inputs", lambda *_: ((), None))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(multi_processor_count=100))
    gka_gpu.tune_step()
    assert (step.way, step.turns, step.token_layout) == chosen
    assert {way for way, *_ in seen} == {"each", "spread", "few", "chunk"}
    assert {(sleeps, layout) for _, (crowd, sleeps), layout in seen if crowd == 200} == {
        (sleeps, layout) for sleeps in (0, 5, 10, 15, 20) for layout in ((1, 16), (2, 16), (2, 32))
    }
    assert len(capsys.readouterr().out.splitlines()) == 24
