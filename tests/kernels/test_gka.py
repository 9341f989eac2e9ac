import pytest
import torch
from gka_inputs import (
    EXACT,
    NAMES,
    call,
    gradients,
    least_squares,
    make_cotangents,
    make_inputs,
    make_segments,
    relative_error,
)
from sklearn.linear_model import Ridge
from torch.utils._python_dispatch import TorchDispatchMode

from kalman_kernels import GKASolver, GKAState, Segments, gated_kalmanet
from kalman_kernels.dispatch import choose
from kalman_kernels.gka import IMPLEMENTATIONS, chunked
from kalman_kernels.gka.reference import solve_ridge

LENGTHS = (1, 5, 63, 64, 65, 130)
KINDS = ("plain", "packed", "padded", "packed+padded")


def empty_state(inputs, shared_decay=True):
    options = {"initial_state": None}
    return options | ({"key_log_decay": None} if shared_decay else {})


# 1. Is the mathematics right? Oracles without a recursion, float64.


@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_weighted_least_squares_over_the_whole_prefix(implementation):
    inputs = make_inputs(40, width=7, value_width=5)
    inputs[4] = torch.ones_like(inputs[4])
    outputs, _ = call(inputs, implementation=implementation, scale=1.0, **empty_state(inputs))
    for b, t, h in ((0, 0, 0), (0, 5, 1), (1, 17, 3), (1, 39, 2)):
        expected, *_ = least_squares(inputs, b, t, h, EXACT.ridge_ratio)
        torch.testing.assert_close(outputs[b, t, h], expected, rtol=1e-9, atol=1e-10)


def test_scikit_learn_is_a_witness():
    inputs = make_inputs(30, width=6, value_width=4)
    inputs[4] = torch.ones_like(inputs[4])
    outputs, _ = call(inputs, scale=1.0, **empty_state(inputs))
    for t in (3, 12, 29):
        _, keys, values, weights, ridge = least_squares(inputs, 1, t, 2, EXACT.ridge_ratio)
        model = Ridge(alpha=ridge.item(), fit_intercept=False)
        model.fit(keys.numpy(), values.numpy(), sample_weight=weights.numpy())
        expected = torch.from_numpy(model.predict(inputs[0][1, t, 2][None].numpy()))[0]
        torch.testing.assert_close(outputs[1, t, 2], expected, rtol=1e-8, atol=1e-9)


def test_separate_decays_mix_and_scale_by_dense_sums():
    inputs = make_inputs(20)
    query, key, value, log_decay, mix, key_log_decay, gate, gram0, value_key0 = inputs
    outputs, state = call(inputs, scale=0.3)
    b, h, t = 1, 3, 19
    k, v = key[b, :, 1] * gate[b, :, h, None], value[b, :, 0] * gate[b, :, h, None]

    def kept(decay, i):
        return decay[b, i + 1 : t + 1, h].sum().exp()

    gram = kept(key_log_decay, -1) * gram0[b, h] + sum(
        kept(key_log_decay, i) * torch.outer(k[i], k[i]) for i in range(20)
    )
    value_key = kept(log_decay, -1) * value_key0[b, h] + sum(
        kept(log_decay, i) * torch.outer(v[i], k[i]) for i in range(20)
    )
    q = query[b, t, h]
    shifted = gram + 0.02 * torch.linalg.matrix_norm(gram) * torch.eye(8, dtype=gram.dtype)
    x = torch.linalg.inv(shifted) @ q
    expected = 0.3 * value_key @ (mix[b, t, h] * x + (1 - mix[b, t, h]) * q)
    torch.testing.assert_close(outputs[b, t, h], expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(state.key_gram[b, h], gram, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(state.value_key[b, h], value_key, rtol=1e-10, atol=1e-12)


# 2. Is the gradient right?


def test_gradcheck_of_the_reference():
    inputs = [t.requires_grad_() for t in make_inputs(5, batch=1, heads=2, key_heads=1, width=3, value_width=2)]

    def function(*leaves):
        outputs, state = call(list(leaves), implementation="reference")
        return outputs, *state

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("ridge_gradient", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", LENGTHS)
def test_outputs_and_all_gradients_against_autograd_of_the_exact_solve(length, kind, ridge_gradient):
    inputs, segments = make_inputs(length), make_segments(kind, 2, length)
    cotangents = make_cotangents(inputs)
    solver = GKASolver("exact", ridge_gradient=ridge_gradient)
    options = {"solver": solver, "segments": segments}
    fast, exact = (call(inputs, implementation=i, **options) for i in ("torch", "reference"))
    errors = {"outputs": relative_error(fast[0], exact[0])}
    errors |= {f"final {n}": relative_error(a, b) for n, a, b in zip("HU", fast[1], exact[1], strict=True)}
    fast, exact = (gradients(inputs, cotangents, implementation=i, **options) for i in ("torch", "reference"))
    errors |= {n: relative_error(a, b) for n, a, b in zip(NAMES, fast, exact, strict=True)}
    assert {n: e for n, e in errors.items() if not e <= 1e-9} == {}


# Conjugate gradients end after at most D products in exact arithmetic (D = 8 here); 30 Chebyshev products leave up to
# 3.2e-4 of x at ridge_ratio 0.02, measured 4e-4 in the gradients, 80 leave 3e-10.
@pytest.mark.parametrize(
    ("solver", "bound"),
    [(GKASolver("cg", 10), 1e-9), (GKASolver("chebyshev", 30), 8e-4), (GKASolver("chebyshev", 80), 1e-8)],
)
def test_iterative_solvers_have_the_exact_gradients(solver, bound):
    inputs = make_inputs(65)
    cotangents = make_cotangents(inputs)
    exact = gradients(inputs, cotangents, implementation="reference")
    errors = {
        n: relative_error(a, b)
        for n, a, b in zip(NAMES, gradients(inputs, cotangents, solver=solver), exact, strict=True)
    }
    assert {n: e for n, e in errors.items() if not e <= bound} == {}


@pytest.mark.parametrize("tolerance", [0.1, 1e-2, 1e-4])
def test_a_tolerance_is_kept_and_saves_products(tolerance, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(5, 40, 24, generator=generator, dtype=torch.float64)
    gram, query = rows.mT @ rows, torch.randn(5, 24, generator=generator, dtype=torch.float64)
    norm = gram.flatten(1).norm(dim=1)
    solver = GKASolver("cg", 60, tolerance=tolerance)
    x = solve_ridge(gram, query, norm, 0.02 * norm, solver)
    left = query - (gram @ x[..., None])[..., 0] - 0.02 * norm[:, None] * x
    relative = left.norm(dim=1) / query.norm(dim=1)
    assert tolerance / 100 < relative.max() <= tolerance

    inputs, products = make_inputs(130), []
    cotangents = make_cotangents(inputs)
    product = chunked._Ridge.product
    monkeypatch.setattr(chunked._Ridge, "product", lambda *a: products.append(0) or product(*a))
    found = gradients(inputs, cotangents, solver=solver)
    spent = len(products)
    assert spent < 0.7 * 2 * 60
    outputs = [call(inputs, implementation=kind, solver=solver)[0] for kind in ("torch", "reference")]
    assert relative_error(*outputs) <= 1e-9
    # The gradient is that of the equation, solved to the same tolerance; the reference's is that of its steps.
    errors = [relative_error(a, b) for a, b in zip(found, gradients(inputs, cotangents), strict=True)]
    assert tolerance / 1000 < max(errors) <= 10 * tolerance, errors


def test_blocks_do_not_change_the_result(monkeypatch):
    inputs = make_inputs(130)
    cotangents = make_cotangents(inputs)
    whole = gradients(inputs, cotangents)
    monkeypatch.setitem(chunked.BLOCK_ELEMENTS, "cpu", 1)
    monkeypatch.setitem(chunked.CHUNK, "cpu", 16)
    errors = {n: relative_error(a, b) for n, a, b in zip(NAMES, gradients(inputs, cotangents), whole, strict=True)}
    assert {n: e for n, e in errors.items() if not e <= 1e-10} == {}


# 3. Are the fast paths as accurate as plain code in the same precision?


@pytest.mark.parametrize("decay", [1e-4, 1e-2, 2.0])
def test_float32_conjugate_gradients_reach_the_exact_solve(decay):
    inputs = make_inputs(130, width=64, value_width=32, dtype=torch.float32)
    inputs[3], inputs[5] = inputs[3] * decay, inputs[5] * decay
    wide, cotangents = [t.double() for t in inputs], make_cotangents(inputs)
    exact = call(wide)[0]
    # Measured worst over the three decays: 2e-3, 2e-5 and 8e-7.
    for iterations, bound in ((12, 4e-3), (20, 5e-5), (32, 3e-6)):
        assert relative_error(call(inputs, solver=GKASolver("cg", iterations))[0], exact) <= bound
    fast = gradients(inputs, cotangents, solver=GKASolver("cg", 32))
    exact = gradients(wide, [c.double() for c in cotangents])
    errors = {n: relative_error(a, b) for n, a, b in zip(NAMES, fast, exact, strict=True)}
    assert {n: e for n, e in errors.items() if not e <= 3e-6} == {}


@pytest.mark.parametrize("solver", [GKASolver("chebyshev"), EXACT])
@pytest.mark.parametrize("decay", [1e-4, 1e-2, 2.0])
def test_float32_is_as_accurate_as_the_reference(solver, decay):
    inputs = make_inputs(130, width=32, value_width=32, dtype=torch.float32)
    inputs[3], inputs[5] = inputs[3] * decay, inputs[5] * decay
    wide = [t.double() for t in inputs]
    cotangents = make_cotangents(inputs)
    exact = gradients(wide, [c.double() for c in cotangents], solver=solver)
    fast = gradients(inputs, cotangents, solver=solver)
    plain = gradients(inputs, cotangents, solver=solver, implementation="reference")
    eager = gradients(wide, [c.double() for c in cotangents], solver=solver, implementation="reference")
    for name, f, e, p, r in zip(NAMES, fast, exact, plain, eager, strict=True):
        assert relative_error(f, e) <= 2 * relative_error(p, r) + 5e-6, name
    output = call(wide, solver=solver)[0]
    error = relative_error(call(inputs, solver=solver)[0], output)
    assert error <= 2 * relative_error(call(inputs, solver=solver, implementation="reference")[0], output) + 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs(dtype):
    inputs = make_inputs(40, dtype=dtype)
    outputs, state = call(inputs, solver=GKASolver("cg", 12))
    exact, _ = call([t.double() for t in inputs])
    assert outputs.dtype == dtype
    assert state.key_gram.dtype == state.value_key.dtype == torch.float32
    assert relative_error(outputs, exact) <= torch.finfo(dtype).eps


def test_autocast_does_not_lower_the_precision():
    inputs = make_inputs(40, dtype=torch.float32)
    plain, _ = call(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        inside, _ = call(inputs)
    assert torch.equal(plain, inside)


# 4. Does it compose?


@pytest.mark.parametrize("implementation", ["reference", "torch"])
@pytest.mark.parametrize("solver", [GKASolver("chebyshev"), GKASolver("cg", 12), GKASolver("chebyshev", 0), EXACT])
def test_split_and_carry_is_the_whole(solver, implementation):
    inputs = make_inputs(97)
    whole, final = call(inputs, solver=solver, implementation=implementation)
    pieces, state = [], GKAState(*inputs[7:])
    for start, stop in ((0, 1), (1, 2), (2, 35), (35, 96), (96, 97)):
        part = [t[:, start:stop] for t in inputs[:7]] + inputs[7:]
        out, state = call(part, solver=solver, implementation=implementation, initial_state=state)
        pieces.append(out)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(tuple(state), tuple(final), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("solver", [GKASolver("chebyshev", 7), GKASolver("cg", 5)])
def test_the_polynomial_is_the_same_at_the_same_count(solver):
    inputs = make_inputs(65, width=16)
    a, b = (call(inputs, solver=solver, implementation=i)[0] for i in ("torch", "reference"))
    assert relative_error(a, b) <= 1e-10


def test_packed_segments_equal_separate_calls():
    inputs = make_inputs(90, batch=1)
    cu_seqlens = torch.tensor([0, 11, 12, 64, 90])
    packed, _ = call(inputs, segments=Segments.from_cu_seqlens(cu_seqlens, 90), initial_state=None)
    parts = [
        call([t[:, a:b] for t in inputs[:7]] + inputs[7:], initial_state=None)[0]
        for a, b in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)
    ]
    torch.testing.assert_close(packed, torch.cat(parts, 1), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("implementation", ["reference", "torch"])
@pytest.mark.parametrize("layout", ["left", "right", "interior"])
def test_padding_changes_nothing(layout, implementation):
    tokens = make_inputs(37)
    plain, final = call(tokens, implementation=implementation)
    where = {"left": range(13, 50), "right": range(37), "interior": [*range(20), *range(33, 50)]}[layout]
    valid = torch.zeros(2, 50, dtype=torch.bool)
    valid[:, list(where)] = True
    padded = []
    for tensor in tokens[:7]:
        wide = torch.full((2, 50, *tensor.shape[2:]), float("nan"), dtype=tensor.dtype)
        wide[:, list(where)] = tensor
        padded.append(wide)
    outputs, state = call(padded + tokens[7:], segments=Segments(valid=valid), implementation=implementation)
    if implementation == "reference":
        outputs = outputs.nan_to_num()
    torch.testing.assert_close(outputs[:, list(where)], plain, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(tuple(state), tuple(final), rtol=1e-10, atol=1e-12)
    assert (outputs[:, ~valid[0]] == 0).all()


def test_nothing_read_yet_gives_zero_and_finite_gradients():
    inputs = make_inputs(20)
    inputs[1] = torch.zeros_like(inputs[1])
    for solver in (GKASolver("chebyshev"), GKASolver("cg"), EXACT):
        leaves = [t.clone().requires_grad_() for t in inputs[:7]]
        outputs, _ = call(leaves + inputs[7:], solver=solver, initial_state=None)
        assert (outputs == 0).all()
        assert all(torch.isfinite(g).all() for g in torch.autograd.grad(outputs.sum(), leaves, allow_unused=True))


def test_strong_decay_neither_overflows_nor_loses_gradients():
    inputs = make_inputs(65)
    inputs[3], inputs[5] = inputs[3] * 500, inputs[5] * 500
    cotangents = make_cotangents(inputs)
    fast, exact = (gradients(inputs, cotangents, implementation=i) for i in ("torch", "reference"))
    assert {
        n: e
        for n, e in ((n, relative_error(a, b)) for n, a, b in zip(NAMES, fast, exact, strict=True))
        if not e <= 1e-8
    } == {}


@pytest.mark.parametrize("nothing", [-1e9, -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_token_that_keeps_nothing_starts_anew(nothing, dtype):
    """Small decays behind it count, and nothing is NaN."""
    inputs = [t.to(dtype) for t in make_inputs(21)]
    for index in (3, 5):
        inputs[index][:, 7] = nothing
    cotangents = make_cotangents(inputs)
    fast, exact = (
        gradients([t.to(d) for t in inputs], [c.to(d) for c in cotangents], solver=EXACT, implementation=i)
        for i, d in (("torch", dtype), ("reference", torch.float64))
    )
    outputs, expected = (
        gated_kalmanet(*these[:5], key_log_decay=these[5], input_gate=these[6], solver=EXACT, implementation=i)[0]
        for these, i in ((inputs, "torch"), ([t.double() for t in inputs], "reference"))
    )
    bound = 1e-9 if dtype == torch.float64 else 2e-4
    found = {"outputs": relative_error(outputs, expected)}
    found |= {n: relative_error(a, b) for n, a, b in zip(NAMES, fast, exact, strict=True)}
    assert {n: e for n, e in found.items() if not e <= bound} == {}


# 5. Memory and compilation.


class LargestTensor(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def test_memory_is_linear_in_time_and_never_a_state_per_token():
    largest = {}
    for length in (256, 1024):
        query, key, value, log_decay, mix, key_log_decay, gate, gram, value_key = make_inputs(
            length, batch=1, heads=2, key_heads=1, width=64, value_width=64, dtype=torch.float32
        )
        inputs = chunked.Inputs(query, key, value, log_decay, key_log_decay, mix, gate, None)
        solver = GKASolver("cg", 2)
        with LargestTensor() as seen:
            outputs, *_, x, grams, value_keys = chunked.gka_chunked_forward(inputs, gram, value_key, solver, 1.0, True)
            saved = (x, grams, value_keys)
            chunked.gka_chunked_backward(inputs, saved, outputs, gram, value_key, gram, solver, 1.0)
        largest[length] = seen.elements
        # One token's states of all heads are 2 * 64 * 64 elements.
        assert seen.elements < length * 2 * 64 * 64 / 8
    assert largest[1024] <= 4 * largest[256]


@pytest.mark.parametrize("length", [1, 40])
def test_compiles_without_a_graph_break_and_matches(length):
    inputs = make_inputs(length, dtype=torch.float32)
    cotangents = make_cotangents(inputs)

    def loss(*leaves):
        outputs, state = call(list(leaves), solver=GKASolver("cg", 6))
        return sum((a * b).sum() for a, b in zip((outputs, *state), cotangents, strict=True))

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    results = []
    for function in (loss, compiled):
        leaves = [t.clone().requires_grad_() for t in inputs]
        results.append(torch.autograd.grad(function(*leaves), leaves))
    assert max(relative_error(a, b) for a, b in zip(*results, strict=True)) <= 1e-6


def test_registered_operators_are_well_formed():
    query, key, value, log_decay, mix, key_log_decay, gate, gram, value_key = make_inputs(9, dtype=torch.float32)
    tensors = (query, key, value, log_decay, key_log_decay, mix, gate, None, gram, value_key)
    leaves = tuple(t if t is None else t.clone().requires_grad_() for t in tensors)
    arguments = ("cg", 4, 0.02, True, 0.0, 1.0)
    torch.library.opcheck(torch.ops.kalman_kernels.gka_chunked.default, (*leaves, *arguments, True))
    one = tuple(t[:, :1] if t is not None and t.ndim > 2 and i < 7 else t for i, t in enumerate(tensors))
    torch.library.opcheck(torch.ops.kalman_kernels.gka_step.default, (*one, *arguments))


def test_activation_checkpointing_gives_the_same_gradients():
    inputs = make_inputs(33)
    results = []
    for checkpointed in (False, True):
        leaves = [t.clone().requires_grad_() for t in inputs]
        if checkpointed:
            out = torch.utils.checkpoint.checkpoint(lambda *a: call(list(a))[0], *leaves, use_reentrant=False)
        else:
            out = call(leaves)[0]
        results.append(torch.autograd.grad(out.square().sum(), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# 6. Does it refuse?


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(2, 0, 4, 8)}, "`query` must be a float tensor"),
        ({"query": torch.zeros(2, 5, 4, 8, dtype=torch.int64)}, "`query` must be a float tensor"),
        ({"key": torch.zeros(2, 5, 3, 8)}, "`key` must have shape"),
        ({"key": torch.zeros(2, 5, 2, 7)}, "`key` must have the width 8"),
        ({"value": torch.zeros(2, 6, 1, 6)}, "`value` must have shape"),
        ({"log_decay": torch.zeros(2, 5, 2)}, "`log_decay` must have shape"),
        ({"solution_mix": torch.zeros(2, 5)}, "`solution_mix` must have shape"),
        ({"key_log_decay": torch.zeros(2, 5, 2)}, "`key_log_decay` must have shape"),
        ({"input_gate": torch.zeros(5, 4)}, "`input_gate` must have shape"),
        ({"initial_state": GKAState(torch.zeros(2, 4, 8, 7), torch.zeros(2, 4, 6, 8))}, "`initial_state.key_gram`"),
        ({"initial_state": GKAState(torch.zeros(2, 4, 8, 8), torch.zeros(2, 4, 8, 6))}, "`initial_state.value_key`"),
        ({"segments": Segments(reset=torch.zeros(2, 6, dtype=torch.bool))}, "`segments.reset` must have shape"),
        ({"segments": Segments(valid=torch.ones(2, 5))}, "`segments.valid` must be a bool"),
        ({"solver": GKASolver("newton")}, "`solver.method` must be"),
        ({"solver": GKASolver("cg", -1)}, "`solver.iterations` must be"),
        ({"solver": GKASolver("cg", tolerance=1.0)}, "`solver.tolerance` must be >= 0 and < 1, got 1.0"),
        ({"solver": GKASolver(tolerance=0.1)}, "`solver.tolerance` is of solver.method='cg', got 0.1 with 'chebyshev'"),
        ({"solver": GKASolver(ridge_ratio=0.0)}, "`solver.ridge_ratio` must be > 0"),
        ({"implementation": "cuda"}, "`implementation` must be one of"),
    ],
)
def test_refuses(change, message):
    query, key, value = make_inputs(5, dtype=torch.float32)[:3]
    with pytest.raises(ValueError, match=message):
        gated_kalmanet(**{"query": query, "key": key, "value": value, **change})


@pytest.mark.parametrize(
    ("dtype", "solver", "width", "message"),
    [
        (torch.float64, GKASolver("cg"), 8, "does not take float64; use implementation='torch'"),
        (torch.float32, GKASolver("exact"), 8, "does not take solver.method='exact'"),
        (torch.float32, GKASolver("cg"), 130, "does not take widths above 128 .130 and 6."),
    ],
)
def test_the_triton_kernels_say_what_they_do_not_take(dtype, solver, width, message):
    pytest.importorskip("triton")
    query, key, value = make_inputs(3, dtype=dtype, width=width)[:3]
    with pytest.raises(NotImplementedError, match=message):
        gated_kalmanet(query, key, value, solver=solver, implementation="triton")


def test_auto_says_why():
    pytest.importorskip("triton")
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert choose("op", "auto", IMPLEMENTATIONS, cuda).implementation == "triton"
    assert choose("op", "auto", IMPLEMENTATIONS, cpu) == ("torch", "the device is 'cpu'")
    assert choose("op", "auto", IMPLEMENTATIONS, cuda, "float64") == ("torch", "the Triton kernels do not take float64")
    assert choose("op", "auto", ("torch", "reference"), cuda).implementation == "torch"
    with pytest.raises(NotImplementedError, match="use one of"):
        choose("op", "triton", ("torch", "reference"), cuda)
