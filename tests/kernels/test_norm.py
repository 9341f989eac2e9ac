import pytest
import torch

from kalman_kernels import gated_rms_norm


def make_inputs(width, gated, device="cpu", dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shape = (2, 11, 3, width)
    inputs, gate = (torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(2))
    weight = torch.randn(width, generator=generator, dtype=torch.float64)
    return [t.to(device, dtype).requires_grad_() for t in ((inputs, gate, weight) if gated else (inputs, weight))]


def run(leaves, implementation):
    outputs = gated_rms_norm(leaves[0], leaves[1] if len(leaves) == 3 else None, leaves[-1], 1e-5, implementation)
    weights = torch.linspace(-1, 1, outputs.numel(), dtype=outputs.dtype, device=outputs.device).view_as(outputs)
    return [outputs, *torch.autograd.grad((outputs * weights).sum(), leaves)]


def test_the_library_norm_is_the_oracle():
    inputs, gate, weight = make_inputs(12, True)
    expected = torch.nn.functional.rms_norm(inputs, (12,), weight, 1e-5) * torch.nn.functional.silu(gate)
    torch.testing.assert_close(gated_rms_norm(inputs, gate, weight, 1e-5, "torch"), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("width", [12, 16])
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu), "cpu"])
def test_triton_against_float64_with_every_gradient(device, width, gated):
    pytest.importorskip("triton")
    if (device == "cuda") != torch.cuda.is_available():
        pytest.skip("compiled on a GPU, interpreted elsewhere")
    fast = run(make_inputs(width, gated, device, torch.float32), "triton")
    exact = run(make_inputs(width, gated, device), "torch")
    for a, b in zip(fast, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "name"), [({"weight": torch.ones(5)}, "weight"), ({"gate": torch.ones(2, 4)}, "gate")]
)
def test_refuses(change, name):
    arguments = {"inputs": torch.ones(3, 4), "gate": None, "weight": torch.ones(4), **change}
    with pytest.raises(ValueError, match=f"`{name}` must have shape"):
        gated_rms_norm(**arguments)
