"""The torch path on a CUDA device against the float64 reference on the CPU, output and every gradient."""

import pytest
import torch
from gka_inputs import EXACT, NAMES, call, gradients, make_cotangents, make_inputs, make_segments, relative_error

from kalman_kernels import GKASolver, Segments

pytestmark = pytest.mark.gpu


def on_gpu(segments):
    return None if segments is None else Segments(*(None if t is None else t.cuda() for t in segments))


@pytest.mark.parametrize("kind", ["plain", "packed", "padded", "packed+padded"])
@pytest.mark.parametrize("length", [1, 5, 63, 64, 65, 130, 1030])
@pytest.mark.parametrize(
    ("solver", "dtype", "bound"),
    [
        (EXACT, torch.float64, 1e-9),
        # Float32 against float64 with the same steps, measured on a CPU: 2.5e-5 in the gradient of the input gate.
        (GKASolver("cg", 48), torch.float32, 1e-4),
        (GKASolver("chebyshev", 30), torch.float32, 1e-4),
    ],
)
def test_torch_path(length, kind, solver, dtype, bound):
    inputs = make_inputs(length, width=32, value_width=24)
    cotangents, segments = make_cotangents(inputs), make_segments(kind, 2, length)
    implementation = "reference" if solver.method == "exact" else "torch"
    options = {"solver": solver, "implementation": implementation, "segments": segments}
    expected = (call(inputs, **options)[0], *gradients(inputs, cotangents, **options))
    there = [t.to("cuda", dtype) for t in inputs]
    options = {"solver": solver, "segments": on_gpu(segments), "implementation": "torch"}
    outputs = call(there, **options)[0]
    fast = (outputs, *gradients(there, [c.to("cuda", dtype) for c in cotangents], **options))
    errors = {n: relative_error(a.cpu(), b) for n, a, b in zip(("outputs", *NAMES), fast, expected, strict=True)}
    assert {n: e for n, e in errors.items() if not e <= bound} == {}


def test_the_result_is_deterministic():
    inputs = [t.cuda().float() for t in make_inputs(300, width=64, value_width=64)]
    cotangents = make_cotangents(inputs)
    runs = [gradients(inputs, cotangents, solver=GKASolver("cg", 12)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
