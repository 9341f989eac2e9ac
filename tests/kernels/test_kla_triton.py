"""The Triton kernels of Kalman Linear Attention: compiled on a GPU, at toy sizes in Triton's interpreter elsewhere."""

import pytest
import torch
from kla_inputs import KINDS, RESULTS, call, differentiated, make_inputs, make_segments, relative_error

from kalman_kernels import KLAState, kalman_linear_attention_step

pytest.importorskip("triton")
from kalman_kernels.kla import op, triton_backward, triton_forward

SMALL = {"batch": 2, "channels": 3, "states": 3}
DEVICES = [pytest.param("cuda", marks=pytest.mark.gpu), "cpu"]


def moved(segments, device):
    return segments and type(segments)(*(None if t is None else t.to(device) for t in segments))


def compare(inputs, device, dtype=torch.float32, segments=None, **options):
    """Relative errors against the float64 reference on the same rounded inputs."""
    rounded = [t.to(dtype) if i < 4 else t.float() for i, t in enumerate(inputs)]
    fast = differentiated(
        [t.to(device) for t in rounded], segments=moved(segments, device), implementation="triton", **options
    )
    exact = differentiated([t.double() for t in rounded], segments=segments, implementation="reference", **options)
    assert all(torch.isfinite(t).all() for t in fast)
    return {n: relative_error(a.cpu(), b) for n, a, b in zip(RESULTS, fast, exact, strict=True) if b.norm() > 0}


@pytest.mark.parametrize(
    ("kind", "prior", "device"),
    [
        *((kind, False, "cpu") for kind in KINDS),
        ("packed+padded", True, "cpu"),
        *(pytest.param(kind, prior, "cuda", marks=pytest.mark.gpu) for kind in KINDS for prior in (False, True)),
    ],
)
@pytest.mark.parametrize("length", [1, 5, 37])
def test_float32(length, kind, prior, device, monkeypatch):
    # Spans of 16 tokens, tiles of 2 channels, slabs of 32 tokens in the backward pass.
    monkeypatch.setattr(triton_forward, "SPAN", 16)
    for module in (triton_forward, triton_backward, op):
        monkeypatch.setattr(module, "KEPT", 16)
    monkeypatch.setattr(triton_forward, "tile_size", lambda states, channels, elements: (4, 2))
    monkeypatch.setattr(triton_backward, "tile_size", lambda states, channels, elements: (4, 2))
    monkeypatch.setattr(triton_backward, "SLAB", 32)
    monkeypatch.setattr(triton_backward, "PARTIAL_BYTES", 1)
    inputs, segments = make_inputs(length, **SMALL), make_segments(kind, 2, length)
    found = compare(inputs, device, segments=segments, decode_from_prior=prior)
    assert {n: e for n, e in found.items() if not e <= 5e-6} == {}


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["plain", "packed+padded"])
@pytest.mark.parametrize("length", [63, 130, 1000])
def test_float32_at_lengths_of_its_own(length, kind):
    inputs, segments = make_inputs(length, channels=40, states=16), make_segments(kind, 2, length)
    found = compare(inputs, "cuda", segments=segments)
    assert {n: e for n, e in found.items() if not e <= 5e-6} == {}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("prior", [False, True])
def test_without_variances_the_rest_is_the_same(prior, device):
    results = []
    for output_variance in (True, False):
        leaves = [t.float().to(device).requires_grad_() for t in make_inputs(9, **SMALL)]
        mean, variance, state = call(
            leaves, output_variance=output_variance, decode_from_prior=prior, implementation="triton"
        )
        assert (variance is None) != output_variance
        scalar = mean.square().sum() + state.precision.sum()
        results.append([mean, *torch.autograd.grad(scalar, leaves, materialize_grads=True)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, device):
    found = compare(make_inputs(20, **SMALL), device, dtype)
    # Inputs are widened: only results in the dtype of the inputs are rounded, to 2^-9 at most.
    assert {n: e for n, e in found.items() if not e <= 4e-3} == {}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("states", [1, 2, 5, 64])
def test_numbers_of_states(states, device):
    found = compare(make_inputs(9, batch=1, channels=3, states=states), device)
    assert {n: e for n, e in found.items() if not e <= 5e-6} == {}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "change", [{4: 0.02}, {5: 0.0}, {5: 10.0}, {1: 1e-8}, {1: 1e4}, {2: 0.0}], ids=lambda c: str(next(iter(c.items())))
)
def test_edges_of_the_domain(change, device, monkeypatch):
    monkeypatch.setattr(triton_forward, "SPAN", 16)
    for module in (triton_forward, triton_backward, op):
        monkeypatch.setattr(module, "KEPT", 16)
    length = 40 if device == "cpu" else 300
    inputs = make_inputs(length, **SMALL)
    for index, number in change.items():
        inputs[index] = torch.full_like(inputs[index], number)
    assert {n: e for n, e in compare(inputs, device).items() if not e <= 5e-5} == {}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("implementation", ["triton", "torch"])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("kind", ["plain", "packed+padded"])
def test_a_step_keeps_every_belief(kind, in_place, implementation, device):
    inputs, segments = make_inputs(4, **SMALL, dtype=torch.float32), make_segments(kind, 2, 4)
    expected = [call([t.double() for t in inputs], segments=segments)]
    for stop in (1, 2, 3):
        here = [t[:, :stop] if i < 4 else t for i, t in enumerate(inputs)]
        cut = segments and type(segments)(*(None if t is None else t[:, :stop] for t in segments))
        expected.append(call([t.double() for t in here], segments=cut))
    state = KLAState(*(t.to(device).clone() for t in inputs[6:]))
    mean, variance, final, every = kalman_linear_attention_step(
        *(t.to(device) for t in inputs[:6]),
        state=state,
        segments=moved(segments, device),
        in_place=in_place,
        every_state=True,
        implementation=implementation,
    )
    assert (final[0] is state[0]) == in_place
    assert torch.equal(state[0].cpu(), inputs[6]) != in_place
    for name, index in (("precision", 0), ("information", 1)):
        beliefs = torch.stack([e[2][index] for e in (*expected[1:], expected[0])])
        assert relative_error(getattr(every, name).cpu(), beliefs) <= 1e-6
        assert relative_error(final[index].cpu(), beliefs[-1]) <= 1e-6
    assert relative_error(mean.cpu(), expected[0][0]) <= 2e-6
    assert relative_error(variance.cpu(), expected[0][1]) <= 2e-6


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("implementation", ["triton", "torch", "reference"])
def test_what_stands_at_padding_is_discarded(implementation, device):
    inputs, segments = make_inputs(9, **SMALL, dtype=torch.float32), make_segments("padded", 2, 9)
    spoiled = [t.masked_fill(~segments.valid[..., None], float("nan")) if i < 4 else t for i, t in enumerate(inputs)]
    results = [
        differentiated(
            [t.to(device) for t in tensors],
            segments=moved(segments, device),
            decode_from_prior=True,
            implementation=implementation,
        )
        for tensors in (inputs, spoiled)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_more_states_than_the_kernels_hold_are_named():
    inputs = make_inputs(2, batch=1, channels=1, states=129, dtype=torch.float32)
    with pytest.raises(NotImplementedError, match="129"):
        call(inputs, implementation="triton")


def test_a_backward_pass_through_a_step_is_refused():
    *inputs, precision, information = (t.float() for t in make_inputs(1, **SMALL))
    inputs[0].requires_grad_()
    state = KLAState(precision.contiguous(), information.contiguous())
    mean = kalman_linear_attention_step(*inputs, state=state, implementation="triton")[0]
    with pytest.raises(NotImplementedError, match="no gradient"):
        mean.sum().backward()


@pytest.mark.parametrize("spread", [False, True])
def test_registered_operators_are_well_formed(spread):
    inputs = [t.float().requires_grad_() for t in make_inputs(5, **SMALL)]
    operators = torch.ops.kalman_kernels
    torch.library.opcheck(operators.kla_triton.default, (*inputs[:6], None, *inputs[6:], False, 64, spread))
    plain = [t.detach() for t in inputs]
    torch.library.opcheck(operators.kla_triton_step.default, (*plain[:6], None, *plain[6:], False, True, spread))
