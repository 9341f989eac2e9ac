import pytest
import torch
from kla_inputs import KINDS, NAMES, RESULTS, call, differentiated, make_inputs, make_segments, relative_error
from statsmodels.tsa.statespace.kalman_filter import KalmanFilter

from kalman_kernels import KLAState, Segments, kalman_linear_attention
from kalman_kernels.kla import scan


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    """Several chunks and several blocks at test sizes."""
    monkeypatch.setattr(scan, "CHUNK", 8)
    monkeypatch.setitem(scan.BLOCK_ELEMENTS, "cpu", 2 * 5 * 4 * 3)


# 1. Is the mathematics right?


@pytest.mark.parametrize("implementation", ["reference", "torch"])
@pytest.mark.parametrize("prior", [False, True])
def test_joint_precision_of_the_trajectory(implementation, prior):
    """No recursion: the joint Gaussian of z_0 .. z_t given v_1 .. v_t, by inverting its precision."""
    inputs = make_inputs(5, batch=1, channels=2, states=3)
    value, observed, key, query, decay, noise, precision, information = inputs
    mean, variance, _ = call(inputs, decode_from_prior=prior, implementation=implementation)
    for t in (0, 2, 4):
        for m in range(2):
            expected_mean = expected_variance = 0.0
            for s in range(3):
                size = t + 2
                joint = torch.zeros(size, size, dtype=torch.float64)
                shift = torch.zeros(size, dtype=torch.float64)
                joint[0, 0] += precision[0, m, s]
                shift[0] += information[0, m, s]
                a, p = decay[m, s], noise[m, s]
                for i in range(t + 1):
                    joint[i, i] += a * a / p
                    joint[i, i + 1] -= a / p
                    joint[i + 1, i] -= a / p
                    joint[i + 1, i + 1] += 1 / p + observed[0, i, m] * key[0, i, s] ** 2
                    shift[i + 1] += observed[0, i, m] * value[0, i, m] * key[0, i, s]
                covariance = torch.linalg.inv(joint)
                z, spread = (covariance @ shift)[-1], covariance[-1, -1]
                if prior:
                    z, spread = a * z, a * a * spread + p
                expected_mean += query[0, t, s] * z
                expected_variance += query[0, t, s] ** 2 * spread
            torch.testing.assert_close(mean[0, t, m], expected_mean, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(variance[0, t, m], expected_variance, rtol=1e-10, atol=1e-12)


def test_statsmodels_is_a_witness():
    inputs = make_inputs(30, batch=1, channels=2, states=1)
    value, observed, key, query, decay, noise, precision, information = (t.numpy() for t in inputs)
    mean, variance, _ = call(inputs)
    for m in range(2):
        a, p = decay[m, 0], noise[m, 0]
        witness = KalmanFilter(k_endog=1, k_states=1)
        witness.bind(value[0, :, m].copy())
        witness["design"] = key[0, :, 0][None, None].copy()
        witness["obs_cov"] = (1 / observed[0, :, m])[None, None].copy()
        witness["transition"], witness["selection"], witness["state_cov"] = [[a]], [[1.0]], [[p]]
        start, spread = information[0, m, 0] / precision[0, m, 0], 1 / precision[0, m, 0]
        # What the filter believes of the first step before seeing it.
        witness.initialize_known(torch.tensor([a * start]).numpy(), torch.tensor([[a * a * spread + p]]).numpy())
        found = witness.filter()
        expected = torch.from_numpy(found.filtered_state[0] * query[0, :, 0])
        torch.testing.assert_close(mean[0, :, m], expected, rtol=1e-9, atol=1e-10)
        expected = torch.from_numpy(found.filtered_state_cov[0, 0] * query[0, :, 0] ** 2)
        torch.testing.assert_close(variance[0, :, m], expected, rtol=1e-9, atol=1e-10)


# 2. Is the gradient right?


def test_gradcheck_of_the_reference():
    inputs = [t.requires_grad_() for t in make_inputs(4, batch=1, channels=2, states=2)]

    def run(*tensors):
        mean, variance, state = call(list(tensors), implementation="reference", decode_from_prior=True)
        return mean, variance, *state

    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 5, 8, 63, 130, 1000])
def test_chunks_against_the_reference_with_every_gradient(length, kind, prior):
    inputs, segments = make_inputs(length), make_segments(kind, 2, length)
    options = {"segments": segments, "decode_from_prior": prior}
    fast = differentiated(inputs, implementation="torch", **options)
    slow = differentiated(inputs, implementation="reference", **options)
    errors = {n: relative_error(a, b) for n, a, b in zip(RESULTS, fast, slow, strict=True)}
    assert {n: e for n, e in errors.items() if not e <= 1e-12} == {}


# 3. Is it accurate, everywhere?


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"process_noise": 0.0},
        {"decay": 0.02},
        {"value_precision": 1e-8},
        {"value_precision": 1e4},
        {"key": 0.0},
        {"process_noise": 10.0},
    ],
)
def test_float32_and_the_edges_of_the_domain(change):
    inputs = make_inputs(300)
    for name, number in change.items():
        index = NAMES.index(name)
        inputs[index] = torch.full_like(inputs[index], number)
    exact = differentiated(inputs, implementation="reference")
    single = differentiated([t.float() for t in inputs])
    assert all(torch.isfinite(t).all() for t in single)
    errors = {n: relative_error(a, b) for n, a, b in zip(RESULTS, single, exact, strict=True) if b.norm() > 0}
    # Measured: 5e-7; gradients of the decay 5e-6.
    assert {n: e for n, e in errors.items() if not e <= 5e-5} == {}


# 4. Does it keep the contracts?


@pytest.mark.parametrize("implementation", ["torch", "reference"])
def test_split_and_carry_is_the_whole(implementation):
    inputs = make_inputs(40)
    mean, variance, last = call(inputs, implementation=implementation)
    state, pieces = KLAState(*inputs[6:]), []
    for start, stop in ((0, 1), (1, 4), (4, 25), (25, 40)):
        here = [t[:, start:stop] for t in inputs[:4]]
        *outputs, state = kalman_linear_attention(
            *here, *inputs[4:6], initial_state=state, implementation=implementation
        )
        pieces.append(outputs)
    for whole, parts in zip((mean, variance), zip(*pieces, strict=True), strict=True):
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-12, atol=1e-12)
    for a, b in zip(state, last, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_packed_segments_equal_separate_calls():
    inputs = make_inputs(30, batch=1)
    offsets = [0, 7, 8, 30]
    segments = Segments.from_cu_seqlens(torch.tensor(offsets), 30)
    mean, variance, last = kalman_linear_attention(*inputs[:6], segments=segments)
    for start, stop in zip(offsets, offsets[1:], strict=False):
        here = [t[:, start:stop] for t in inputs[:4]]
        alone = kalman_linear_attention(*here, *inputs[4:6])
        torch.testing.assert_close(mean[:, start:stop], alone[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(variance[:, start:stop], alone[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(last.precision, alone[2].precision)


def test_padding_changes_nothing_and_hides_what_stands_there():
    inputs = make_inputs(20)
    mean, _, last = call(inputs)
    valid = torch.zeros(2, 31, dtype=torch.bool)
    valid[0, 11:], valid[1, 4:24] = True, True
    padded = [torch.full((2, 31, *t.shape[2:]), float("nan"), dtype=t.dtype) for t in inputs[:4]]
    for wide, narrow in zip(padded, inputs[:4], strict=True):
        wide[valid] = narrow.flatten(0, 1)
    found, variance, state = kalman_linear_attention(
        *padded, *inputs[4:6], initial_state=KLAState(*inputs[6:]), segments=Segments(valid=valid)
    )
    torch.testing.assert_close(found[valid], mean.flatten(0, 1), rtol=1e-12, atol=1e-12)
    assert not found[~valid].any() and not variance[~valid].any()
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(state, last, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_and_float32_states(dtype):
    inputs = make_inputs(20)
    low = [t.to(dtype) if i < 4 else t.float() for i, t in enumerate(inputs)]
    mean, variance, state = call(low)
    exact = call([t.double() for t in low])
    assert mean.dtype == variance.dtype == dtype and state.precision.dtype == torch.float32
    assert relative_error(mean, exact[0]) <= 5e-3 and relative_error(variance, exact[1]) <= 5e-3


def test_compiles_without_a_graph_break_and_matches():
    inputs = [t.float() for t in make_inputs(19)]

    def loss(*leaves):
        mean, variance, state = call(list(leaves))
        return mean.square().sum() + variance.sum() + state.precision.sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)):
        leaves = [t.clone().requires_grad_() for t in inputs]
        results.append(torch.autograd.grad(function(*leaves), leaves))
    assert max(relative_error(a, b) for a, b in zip(*results, strict=True)) <= 1e-6


def test_registered_operators_are_well_formed():
    inputs = [t.float().requires_grad_() for t in make_inputs(9)]
    for spread in (False, True):
        arguments = (*inputs[:6], None, None, *inputs[6:], False, True, spread)
        torch.library.opcheck(torch.ops.kalman_kernels.kla_chunked.default, arguments)


# 5. Does it refuse?


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": torch.zeros(2, 0, 5)}, "`value` must be a float tensor"),
        ({"value_precision": torch.zeros(2, 6, 4)}, "`value_precision` must have shape"),
        ({"key": torch.zeros(2, 5, 4)}, "`key` must have shape"),
        ({"query": torch.zeros(2, 6, 3)}, "`query` must have shape"),
        ({"decay": torch.zeros(4, 5)}, "`decay` must have shape"),
        ({"process_noise": torch.zeros(5)}, "`process_noise` must have shape"),
        ({"initial_state": KLAState(torch.ones(2, 5, 3), torch.zeros(2, 5, 4))}, "`initial_state.precision`"),
        ({"segments": Segments(valid=torch.ones(2, 6))}, "`segments.valid` must be a bool"),
        ({"implementation": "cuda"}, "`implementation` must be one of"),
    ],
)
def test_refuses(change, message):
    inputs = [t.float() for t in make_inputs(6)]
    with pytest.raises(ValueError, match=message):
        kalman_linear_attention(**{**dict(zip(NAMES[:6], inputs[:6], strict=True)), **change})


@pytest.mark.parametrize("implementation", ["reference", "torch"])
@pytest.mark.parametrize("prior", [False, True])
def test_without_variances_the_rest_is_the_same(implementation, prior):
    results = []
    for output_variance in (True, False):
        leaves = [t.clone().requires_grad_() for t in make_inputs(20)]
        mean, variance, state = call(
            leaves, output_variance=output_variance, decode_from_prior=prior, implementation=implementation
        )
        assert (variance is None) != output_variance
        scalar = mean.square().sum() + state.precision.sum()
        results.append([mean, *torch.autograd.grad(scalar, leaves, materialize_grads=True)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
