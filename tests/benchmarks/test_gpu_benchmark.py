"""What the GPU benchmark counts, where there is no GPU."""

from types import SimpleNamespace

import gka_gpu
import gpu_timing
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
        way = step.way(4, 4096, 128, torch.float16, GKASolver("cg", 20), True)
        layout = step.token_layout(4096, 128, False, 90)
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


@pytest.mark.parametrize(
    ("found", "printed", "clock"),
    [(None, "", None), ("/x", "1815\n", 1815), ("/x", "[N/A]\n", None), ("/x", "No devices were found\n", None)],
)
def test_a_clock_is_that_of_the_device_or_unknown(found, printed, clock, monkeypatch):
    asked = []

    def answered(command, **_):
        asked.extend(command)
        return SimpleNamespace(stdout=printed)

    monkeypatch.setattr(gpu_timing.shutil, "which", lambda _: found)
    monkeypatch.setattr(gpu_timing.subprocess, "run", answered)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(uuid="12-34"))
    assert gpu_timing.clock_mhz() == clock
    assert (found is None) != ("--id=GPU-12-34" in asked)


def test_a_step_moves_its_states_and_all_that_a_token_brings(monkeypatch, capsys):
    """Two rows of one head of width 4 in bfloat16, a convolution of four taps."""
    batch, heads, width = 2, 1, 4
    states = [torch.zeros(batch, heads, width, width) for _ in range(2)]

    def half(*shape):
        return torch.zeros(*shape, dtype=torch.bfloat16)

    contexts, taps = [half(batch, width, 3) for _ in range(3)], [half(width, 4) for _ in range(3)]
    floats = [torch.zeros(heads) for _ in range(2)]

    def mixer_inputs(batch, heads, width, tokens=1, _=None):
        vector, number = half(batch, tokens, heads, width), half(batch, tokens, heads)
        around = (*contexts, *taps, *floats, half(width), *states, None)
        return gka_gpu.MixerInputs(*[vector] * 3, *[number] * 3, vector, *around)

    monkeypatch.setattr(gka_gpu, "DECODE", [(batch, heads, width)])
    monkeypatch.setattr(gka_gpu, "mixer_inputs", mixer_inputs)
    number = half(batch, 1, heads)
    monkeypatch.setattr(gka_gpu, "step_inputs", lambda b, n, h, w: ([half(b, n, h, w)] * 3 + [number] * 2, number))
    for name in ("milliseconds", "replayed"):
        monkeypatch.setattr(gka_gpu, name, lambda _: {"median_ms": 1e-9})
    monkeypatch.setattr(gka_gpu, "clock_mhz", lambda: None)
    rows = []
    gka_gpu.decode(rows, lambda: None, copy_tb_per_s=1000.0)
    (row,) = rows
    moved, vectors = 2 * 2 * 4 * batch * width**2, 2 * batch * width
    assert row["state_bytes_moved"] == moved
    # Query, key, value and output of each token; three numbers.
    numbers = 3 * 2 * batch
    assert row["step"]["bytes_moved"] == moved + 4 * vectors + numbers
    assert row["step_4_tokens"]["bytes_moved"] == moved + 16 * vectors + numbers
    # The output gate, too, contexts read and written, taps and the parameters of decay and norm.
    around = 2 * 3 * 3 * vectors + 3 * 4 * 2 * width + 2 * 4 + 2 * width
    assert row["mixer_step"]["bytes_moved"] == moved + 5 * vectors + numbers + around
    assert row["mixer_step_4_tokens"]["bytes_moved"] == moved + 4 * (5 * vectors + numbers) + around
    assert row["step"]["tb_per_s"] == row["step"]["bytes_moved"]
    assert row["step"]["share_of_copy"] == row["step"]["bytes_moved"] / 1000
