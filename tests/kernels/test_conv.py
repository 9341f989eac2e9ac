import pytest
import torch

from kalman_kernels import Segments, causal_conv
from kalman_kernels.conv import causal_conv_reference

LENGTHS = (1, 2, 3, 5, 65)


def make_inputs(length, taps=4, channels=6, batch=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(length)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    return normal(batch, length, channels), normal(channels, taps), normal(batch, channels, taps - 1)


def make_segments(kind, batch, length):
    generator = torch.Generator().manual_seed(7)
    reset = torch.rand(batch, length, generator=generator) < 0.2
    valid = torch.rand(batch, length, generator=generator) > 0.4
    return {"plain": None, "packed": Segments(reset), "padded": Segments(None, valid), "both": Segments(reset, valid)}[
        kind
    ]


@pytest.mark.parametrize("taps", [1, 2, 4])
def test_library_convolution_is_the_oracle(taps):
    inputs, weight, state = make_inputs(20, taps)
    outputs, final = causal_conv_reference(inputs, weight, state)
    line = torch.cat([state, inputs.mT], dim=-1)
    expected = torch.nn.functional.conv1d(line, weight[:, None], groups=6).mT
    torch.testing.assert_close(outputs, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(final, line[..., line.shape[-1] - taps + 1 :])


@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("kind", ["plain", "packed", "padded", "both"])
@pytest.mark.parametrize("length", LENGTHS)
def test_torch_against_reference_with_every_gradient(length, kind, taps):
    tensors, segments = make_inputs(length, taps), make_segments(kind, 2, length)
    results = []
    for implementation in ("torch", "reference"):
        leaves = [t.clone().requires_grad_() for t in tensors]
        outputs, final = causal_conv(*leaves, segments, implementation)
        weights = torch.arange(outputs.numel(), dtype=outputs.dtype).view_as(outputs)
        scalar = (outputs * weights).sum() + (final * (final.detach() + 2)).sum()
        results.append((outputs, final, *torch.autograd.grad(scalar, leaves, materialize_grads=True)))
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("unit_width", [None, 3])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("kind", ["plain", "packed"])
@pytest.mark.parametrize("length", [1, 2, 19])
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu), "cpu"])
def test_triton_against_float64_with_every_gradient(device, length, kind, activation, unit_width):
    pytest.importorskip("triton")
    if (device == "cuda") != torch.cuda.is_available():
        pytest.skip("compiled on a GPU, interpreted elsewhere")
    tensors = make_inputs(length)
    segments = make_segments(kind, 2, length)
    if segments is not None:
        segments = Segments(segments.reset.to(device))
    results = []
    for implementation, dtype in (("triton", torch.float32), ("torch", torch.float64)):
        leaves = [t.to(device, dtype).requires_grad_() for t in tensors]
        outputs, final = causal_conv(*leaves, segments, implementation, activation, unit_width)
        weights = torch.linspace(-1, 1, outputs.numel(), dtype=dtype, device=device).view_as(outputs)
        scalar = (outputs * weights).sum() + (final * (final.detach() + 2)).sum()
        results.append((outputs, final, *torch.autograd.grad(scalar, leaves, materialize_grads=True)))
    for fast, exact in zip(*results, strict=True):
        torch.testing.assert_close(fast.double(), exact, rtol=1e-4, atol=2e-5)


def test_split_and_carry_is_the_whole():
    inputs, weight, state = make_inputs(23)
    whole, final = causal_conv(inputs, weight, state)
    pieces = []
    for start, stop in ((0, 1), (1, 3), (3, 6), (6, 10), (10, 23)):
        out, state = causal_conv(inputs[:, start:stop], weight, state)
        pieces.append(out)
    torch.testing.assert_close(torch.cat(pieces, 1), whole)
    torch.testing.assert_close(state, final)


def test_left_padded_continuation_sees_the_past_behind_the_padding():
    inputs, weight, state = make_inputs(5)
    plain, final = causal_conv(inputs, weight, state)
    padded = torch.cat([torch.full_like(inputs[:, :3], float("nan")), inputs], dim=1)
    valid = torch.tensor([[False] * 3 + [True] * 5]).expand(2, -1)
    outputs, state = causal_conv(padded, weight, state, Segments(valid=valid))
    torch.testing.assert_close(outputs[:, 3:], plain)
    torch.testing.assert_close(state, final)
    assert (outputs[:, :3] == 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": torch.zeros(2, 6)}, "`inputs` must have shape"),
        ({"weight": torch.zeros(5, 4)}, "`weight` must have shape"),
        ({"initial_state": torch.zeros(2, 6, 4)}, "`initial_state` must have shape"),
        ({"segments": Segments(valid=torch.ones(2, 4, dtype=torch.bool))}, "`segments.valid` must have shape"),
        ({"implementation": "fast"}, "`implementation` must be one of"),
    ],
)
def test_refuses(change, message):
    inputs, weight, _ = make_inputs(5)
    with pytest.raises(ValueError, match=message):
        causal_conv(**{"inputs": inputs, "weight": weight, **change})


@pytest.mark.parametrize("options", [{"activation": "relu"}, {"unit_width": 4}, {"unit_width": 0}])
def test_bad_options_are_refused_by_name(options):
    inputs, weight, _ = make_inputs(3)
    with pytest.raises(ValueError, match=next(iter(options))):
        causal_conv(inputs, weight, **options)
