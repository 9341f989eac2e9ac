"""The Triton kernels in Triton's interpreter, at toy sizes, against the float64 direct solve (outputs and gradients).

Real sizes and dtypes: test_gka_triton_gpu.py.
"""

import subprocess
import sys

import pytest
import torch
from gka_inputs import (
    EXACT,
    NAMES,
    call,
    gradients,
    make_cotangents,
    make_inputs,
    make_segments,
    relative_error,
)

from kalman_kernels import GKASolver, GKAState, Segments, gated_kalmanet_step
from kalman_kernels.gka import MixerInputs, MixerOptions, gka_mixer_step

triton_common = pytest.importorskip("kalman_kernels.gka.triton_common")
triton_forward = pytest.importorskip("kalman_kernels.gka.triton_forward")
triton_step = pytest.importorskip("kalman_kernels.gka.triton_step")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU tests run the same kernels compiled")

CG = GKASolver("cg", 16)
WAYS = ("each", "spread", "few", "chunk")
SMALL = {"batch": 1, "heads": 2, "key_heads": 1, "value_heads": 1}


def errors(inputs, solver, segments, oracle):
    """Relative errors of output, states and the nine gradients."""
    wide = [t.double() for t in inputs]
    cotangents = make_cotangents(wide)
    cotangents[1] = (cotangents[1] + cotangents[1].mT) / 2
    with torch.no_grad():
        outputs, state = call(inputs, solver, segments, "triton")
        exact, exact_state = call(wide, oracle, segments)
    near = [c.to(t.dtype) for c, t in zip(cotangents, (outputs, *state), strict=True)]
    found = (outputs, *state, *gradients(inputs, near, solver=solver, segments=segments, implementation="triton"))
    expected = (exact, *exact_state, *gradients(wide, cotangents, solver=oracle, segments=segments))
    names = ("outputs", "key_gram", "value_key", *NAMES)
    return {n: relative_error(a, b) for n, a, b in zip(names, found, expected, strict=True)}


def halved(inputs, dtype):
    return [t.to(dtype) if i < 3 else t.float() for i, t in enumerate(inputs)]


@pytest.mark.parametrize(
    ("length", "kind", "solver", "spans", "shape"),
    [
        (9, "plain", CG, 0, {}),
        (37, "packed+padded", CG, 3, {}),
        (37, "packed", CG._replace(ridge_gradient=False), 2, {}),
        (70, "padded", GKASolver("chebyshev", 60), 3, {}),
        (20, "plain", CG, 0, {"width": 12, "value_width": 20, "heads": 3, "key_heads": 3, "value_heads": 1}),
    ],
)
def test_float32(length, kind, solver, spans, shape, monkeypatch):
    monkeypatch.setattr(triton_forward, "PROGRAMS", 4 * spans)
    monkeypatch.setattr(triton_forward, "SPAN_CHUNKS", 1)
    inputs = [t.float() for t in make_inputs(length, **SMALL | shape)]
    found = errors(inputs, solver, make_segments(kind, 1, length), EXACT._replace(ridge_gradient=solver.ridge_gradient))
    # Measured: 5e-6 in the input gate's gradient of a packed row, 2e-6 elsewhere.
    assert {n: e for n, e in found.items() if not e <= 2e-5} == {}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    inputs = halved(make_inputs(37, **SMALL), dtype)
    found = errors(inputs, CG, make_segments("packed+padded", 1, 37), EXACT)
    # The solve stops at a relative residual of 1e-3; bfloat16 results are rounded to 2e-3.
    assert {n: e for n, e in found.items() if not e <= 1e-2} == {}


def test_a_tolerance_ends_the_solve_early_and_as_in_torch():
    inputs = [t.float() for t in make_inputs(37, **SMALL)]
    loose, tight = (call(inputs, CG._replace(tolerance=t), None, "triton")[0] for t in (0.3, 0.0))
    same = call(inputs, CG._replace(tolerance=0.3), None, "torch")[0]
    exact = call([t.double() for t in inputs], EXACT)[0]
    assert 1e-3 < relative_error(loose, exact) < 0.3 and relative_error(tight, exact) < 1e-5
    assert relative_error(loose, same.double()) < 1e-2
    one = [t[:, :1] if i < 7 else t for i, t in enumerate(inputs)]
    loose, tight = (call(one, CG._replace(tolerance=t), None, "triton")[0] for t in (0.3, 0.0))
    assert relative_error(loose, tight.double()) > 1e-3


def test_without_a_solve():
    inputs = [t.float() for t in make_inputs(20, **SMALL)]
    nothing = GKASolver("cg", 0)
    found = errors(inputs, nothing, make_segments("packed", 1, 20), nothing)
    assert {n: e for n, e in found.items() if not e <= 2e-6} == {}


@pytest.mark.parametrize(
    "absent", [("log_decay",), ("key_log_decay",), ("log_decay", "key_log_decay"), ("solution_mix",)]
)
@pytest.mark.parametrize("length", [3, 20])
def test_absent_gates_are_what_they_are_in_torch(length, absent):
    inputs = dict(zip(NAMES, (t.float() for t in make_inputs(length, **SMALL)), strict=True))
    results = []
    for implementation, dtype in (("triton", torch.float32), ("torch", torch.float64)):
        leaves = {n: None if n in absent else t.to(dtype).requires_grad_() for n, t in inputs.items()}
        with torch.set_grad_enabled(length > 8):
            solver = CG if implementation == "triton" else EXACT
            outputs, state = call(list(leaves.values()), solver, None, implementation)
        found = [outputs, *state]
        if length > 8:
            wanted = [t for n, t in leaves.items() if t is not None and not n.startswith("initial_state")]
            found += torch.autograd.grad(outputs.square().sum() + state.value_key.sum(), wanted)
        results.append(found)
    assert all(relative_error(a, b) <= 2e-5 for a, b in zip(*results, strict=True))


def test_values_and_keys_far_from_one_survive_half_precision():
    inputs = make_inputs(30, **SMALL)
    inputs[1], inputs[2] = 300 * inputs[1], 1e4 * inputs[2]
    inputs[1][:, 10:20] *= 1e-3
    inputs[7], inputs[8] = 9e4 * inputs[7], 3e6 * inputs[8]
    found = errors(halved(inputs, torch.float32), CG, None, EXACT)
    assert {n: e for n, e in found.items() if not e <= 2e-5} == {}
    scaled = halved(inputs, torch.float16)
    with torch.no_grad():
        outputs, _ = call(scaled, CG, None, "triton", scale=1e-4)
        exact, _ = call([t.double() for t in scaled], EXACT, None, scale=1e-4)
    assert relative_error(outputs, exact) <= 5e-3


@pytest.mark.parametrize(("length", "way"), [(1, "each"), (4, "each"), (4, "spread")])
@pytest.mark.parametrize("solver", [GKASolver("cg", 24), GKASolver("chebyshev", 30), GKASolver("cg", 0)])
def test_a_step_is_the_reference_and_keeps_every_state(length, way, solver, monkeypatch):
    monkeypatch.setattr(triton_step, "way", lambda *_: way)
    inputs = [t.float() for t in make_inputs(length, **SMALL)]
    wide = [t.double() for t in inputs]
    options = {"every_state": True, "solver": solver}
    found = gated_kalmanet_step(
        *inputs[:5],
        state=GKAState(*inputs[7:]),
        key_log_decay=inputs[5],
        input_gate=inputs[6],
        implementation="triton",
        **options,
    )
    expected = gated_kalmanet_step(
        *wide[:5],
        state=GKAState(*wide[7:]),
        key_log_decay=wide[5],
        input_gate=wide[6],
        implementation="reference",
        **options,
    )
    pairs = zip((found[0], *found[1], *found[2]), (expected[0], *expected[1], *expected[2]), strict=True)
    assert all(relative_error(a, b) <= 5e-6 for a, b in pairs)
    assert all(torch.equal(every[:, -1], last) for every, last in zip(found[2], found[1], strict=True))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 5e-3), (torch.float32, 5e-6)])
def test_a_token_that_starts_a_sequence_meets_empty_states(dtype, bound):
    """In one row of two; the other goes on."""
    segments = Segments(reset=torch.tensor([[True], [False]]))
    inputs = halved(make_inputs(1, **SMALL | {"batch": 2}, width=20, value_width=20), dtype)
    with torch.no_grad():
        outputs, state = call(inputs, GKASolver("cg", 40), segments, "triton")
        exact, exact_state = call([t.double() for t in inputs], EXACT, segments)
    assert relative_error(outputs, exact) <= bound
    assert all(relative_error(a, b) <= 5e-6 for a, b in zip(state, exact_state, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("length", "kind"), [(2, "plain"), (5, "packed+padded"), (8, "packed")])
def test_several_half_precision_tokens(length, kind, way, dtype, monkeypatch):
    monkeypatch.setattr(triton_step, "way", lambda *_: way)
    if way == "few":
        length = min(length, 4)
    inputs = halved(make_inputs(length, **SMALL, width=12, value_width=20), dtype)
    segments = make_segments(kind, 1, length)
    if kind == "packed":
        # Three sequences, each with tokens enough to be told from the others.
        segments = Segments(reset=torch.tensor([[False, False, True, False, False, False, True, False]])[:, :length])
    with torch.no_grad():
        outputs, state = call(inputs, CG, segments, "triton")
        exact, exact_state = call([t.double() for t in inputs], EXACT, segments)
    # Outputs are rounded to their dtype; states are float32.
    assert relative_error(outputs, exact) <= {torch.float16: 5e-3, torch.bfloat16: 6e-3}[dtype]
    assert all(relative_error(a, b) <= 5e-7 for a, b in zip(state, exact_state, strict=True))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("nothing", [-1e9, -float("inf")])
def test_several_tokens_after_one_that_keeps_nothing(nothing, way, monkeypatch):
    monkeypatch.setattr(triton_step, "way", lambda *_: way)
    inputs = halved(make_inputs(4 if way == "few" else 6, **SMALL, width=12, value_width=20), torch.float16)
    for log_decay in (inputs[3], inputs[5]):
        log_decay[:, 1], log_decay[:, 2:] = nothing, -0.7
    with torch.no_grad():
        outputs, state = call(inputs, CG, None, "triton")
        exact, exact_state = call([t.double() for t in inputs], EXACT, None, "reference")
    # A chunk of rows in half precision: 1e-2.
    assert relative_error(outputs, exact) <= (2e-2 if way == "chunk" else 4e-3)
    assert all(relative_error(a, b) <= 5e-7 for a, b in zip(state, exact_state, strict=True))


@pytest.mark.parametrize(("length", "starts"), [(4, [0]), (4, [1]), (4, [0, 2, 3]), (3, [1]), (3, [0, 2]), (2, [0])])
def test_tokens_side_by_side_in_young_states(length, starts, monkeypatch):
    """Each new key is nearly all that its state holds."""
    monkeypatch.setattr(triton_step, "way", lambda *_: "few")
    inputs = halved(make_inputs(length, **SMALL, width=12, value_width=20), torch.float16)
    segments = Segments(reset=torch.tensor([[n in starts for n in range(length)]]))
    with torch.no_grad():
        outputs, state = call(inputs, CG, segments, "triton")
        exact, exact_state = call([t.double() for t in inputs], EXACT, segments)
    assert relative_error(outputs, exact) <= 4e-3
    assert all(relative_error(a, b) <= 5e-7 for a, b in zip(state, exact_state, strict=True))


def test_tokens_side_by_side_take_no_more_iterations_than_allowed(monkeypatch):
    monkeypatch.setattr(triton_step, "way", lambda *_: "few")
    inputs = halved(make_inputs(4, **SMALL, width=30), torch.float16)
    with torch.no_grad():
        found = [call(inputs, GKASolver("cg", n), None, "triton")[0] for n in (2, 3, 4)]
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])


@pytest.mark.parametrize("length", [2, 3, 4])
def test_tokens_side_by_side_keep_every_state(length, monkeypatch):
    monkeypatch.setattr(triton_step, "way", lambda *_: "few")
    inputs = halved(make_inputs(length, **SMALL, width=12, value_width=20), torch.float16)
    empty = GKAState(*(torch.zeros_like(t) for t in inputs[7:]))
    found, expected = (
        gated_kalmanet_step(
            *these[:5],
            state=GKAState(*(t.to(these[5].dtype) for t in empty)),
            key_log_decay=these[5],
            input_gate=these[6],
            solver=solver,
            every_state=True,
            implementation=implementation,
        )
        for these, solver, implementation in (
            (inputs, CG, "triton"),
            ([t.double() for t in inputs], EXACT, "reference"),
        )
    )
    assert relative_error(found[0], expected[0]) <= 4e-3
    pairs = zip((*found[1], *found[2]), (*expected[1], *expected[2]), strict=True)
    assert all(relative_error(a, b) <= 5e-7 for a, b in pairs)
    assert all(torch.equal(every[:, -1], last) for every, last in zip(found[2], found[1], strict=True))


@pytest.mark.parametrize("absent", [(), (3,), (5,), (3, 5), (4,), (6,)])
def test_tokens_side_by_side_without_gates(absent, monkeypatch):
    monkeypatch.setattr(triton_step, "way", lambda *_: "few")
    inputs = halved(make_inputs(3, **SMALL, width=16, value_width=16), torch.float16)
    found, expected = (
        gated_kalmanet_step(
            *(None if i in absent else t for i, t in enumerate(these[:5])),
            state=GKAState(*these[7:]),
            key_log_decay=None if 5 in absent else these[5],
            input_gate=None if 6 in absent else these[6],
            solver=solver,
            implementation=implementation,
        )
        for these, solver, implementation in (
            (inputs, CG, "triton"),
            ([t.double() for t in inputs], EXACT, "reference"),
        )
    )
    assert relative_error(found[0], expected[0]) <= 4e-3
    assert all(relative_error(a, b) <= 5e-7 for a, b in zip(found[1], expected[1], strict=True))


def test_how_tokens_are_taken():
    def ways(lengths, programs, dtype=torch.bfloat16, solver=CG, width=128, square=False):
        return [triton_step.way(n, programs, width, dtype, solver, square) for n in lengths]

    assert ways([1], 4096) == ["each"]
    assert ways([2, 4, 8], 64) == ["spread"] * 3
    assert ways([2, 3, 4, 5, 8], 128) == ["each", "few", "few", "chunk", "chunk"]
    assert ways([2, 3, 4, 8], 65) == ["each", "few", "few", "chunk"]
    assert ways([5], 100) == ["each"]
    assert ways([3, 4, 8], 4096, width=64) == ["each", "few", "chunk"]
    assert ways([3, 4, 8], 4096, width=32) == ["each", "chunk", "chunk"]
    assert ways([3, 8], 4096, torch.float32) == ["each", "each"]
    # A polynomial is no exact solve: a key cannot join it afterwards.
    assert ways([3, 4, 8], 4096, solver=GKASolver("chebyshev", 30)) == ["each", "chunk", "chunk"]
    # By a kernel of their own.
    for width in (64, 128):
        assert ways([1, 2, 3, 4, 5, 8], 512, width=width, square=True) == ["each", *["few"] * 3, "chunk", "chunk"]
        assert ways([2, 4], 64, width=width, square=True) == ["spread"] * 2
        assert ways([2, 4], 512, torch.float32, width=width, square=True) == ["each"] * 2
    assert ways([2, 4], 512, solver=GKASolver("chebyshev", 30), square=True) == ["each", "chunk"]


def test_which_states_have_a_kernel_of_their_own():
    assert triton_step.has_square(128, 128, 90, False) and triton_step.has_square(64, 64, 80, False)
    # No room for the states of several programs; not NVIDIA's; other widths; every state.
    assert not triton_step.has_square(128, 128, 89, False) and not triton_step.has_square(128, 128, 0, False)
    assert not triton_step.has_square(128, 64, 90, False) and not triton_step.has_square(32, 32, 90, False)
    assert not triton_step.has_square(128, 128, 90, True)
    assert triton_step.square_layout(4096, 128) == {"WARPS": 4, "num_warps": 4, "maxnreg": 168}
    assert triton_step.square_layout(133, 64) == {"WARPS": 2, "num_warps": 2, "maxnreg": 144}
    assert triton_step.square_layout(132, 64) == {"WARPS": 4, "num_warps": 4, "maxnreg": 128}


def test_several_tokens_do_not_gather_on_the_first_free_multiprocessors():
    assert triton_step.starts_early(1, 128, 128, 132)
    # Two launches of their own, one of them beside the other.
    assert triton_step.starts_early(4, 64, 128, 132)
    assert not triton_step.starts_early(4, 65, 128, 132) and not triton_step.starts_early(4, 395, 128, 132)
    assert triton_step.starts_early(4, 396, 128, 132)
    assert not triton_step.starts_early(8, 527, 64, 132) and triton_step.starts_early(8, 528, 64, 132)
    assert triton_step.starts_early(4, 65, 32, 132)


def test_programs_take_turns_where_some_wait_for_others_to_end():
    assert triton_step.turns("each", 265, 128, 132) == (264, 10)
    assert triton_step.turns("each", 264, 128, 132) == (0, 0)
    assert triton_step.turns("each", 793, 64, 132) == (792, 2)
    assert triton_step.turns("each", 9000, 32, 132) == (0, 0)
    assert triton_step.turns("chunk", 4096, 128, 132) == (264, 24)


@pytest.mark.parametrize("layout", [(True, 16), (False, 32), (True, 32)])
@pytest.mark.parametrize("way", WAYS)
def test_several_tokens_in_every_layout_of_their_states(way, layout, monkeypatch):
    monkeypatch.setattr(triton_step, "layout", lambda *_: layout)
    monkeypatch.setattr(triton_step, "way", lambda *_: way)
    check_layout(make_inputs(3, **SMALL, width=40, value_width=20))


@pytest.mark.parametrize("widths", [(40, 20), (20, 40)])
@pytest.mark.parametrize(("stages", "piece"), [(1, 32), (2, 16), (2, 32)])
def test_a_token_in_every_layout_of_its_states(stages, piece, widths, monkeypatch):
    layout = {"num_warps": 2, "STAGES": stages, "PIECE": piece}
    monkeypatch.setattr(triton_step, "token_layout", lambda *_: layout)
    check_layout(make_inputs(1, **SMALL, width=widths[0], value_width=widths[1]))


def check_layout(inputs):
    inputs = halved(inputs, torch.float16)
    with torch.no_grad():
        outputs, state = call(inputs, CG, None, "triton")
        exact, exact_state = call([t.double() for t in inputs], EXACT, None)
    assert relative_error(outputs, exact) <= 5e-3
    assert all(relative_error(a, b) <= 5e-7 for a, b in zip(state, exact_state, strict=True))


def test_layouts_by_width_and_heads():
    layout, token_layout = triton_step.layout, triton_step.token_layout
    assert [layout(heads, 64) for heads in (9, 4096)] == [(True, 16), (False, 16)]
    assert layout(9, 32) == layout(4096, 128) == (False, 16)
    near, ahead = {"num_warps": 4, "STAGES": 1, "PIECE": 16}, {"num_warps": 4, "STAGES": 2, "PIECE": 32}
    assert [token_layout(heads, 128, False, 90) for heads in (16, 4096)] == [near, ahead]
    assert token_layout(16, 128, True, 90) == ahead
    # Too little shared memory for two programs; no NVIDIA device.
    assert token_layout(4096, 128, True, 89) == token_layout(4096, 128, True, 0) == near
    limited = {"num_warps": 2, "maxnreg": 168}
    assert [token_layout(heads, 64, True, 90) for heads in (9, 4096)] == [near | limited, ahead | limited]
    assert token_layout(4096, 64, True, 0) == near | {"num_warps": 2}
    assert token_layout(4096, 32, True, 90) == near | {"num_warps": 1}


def test_a_small_ridge_is_solved_as_well():
    """Where the recursive residual of pipelined conjugate gradients would no longer be the true one."""
    solver = GKASolver("cg", 200, ridge_ratio=1e-4)
    inputs = halved(make_inputs(1, **SMALL, width=30), torch.float16)
    # Eigenvalues from 1 to 1e-3.
    basis = torch.linalg.qr(inputs[7])[0]
    inputs[7] = (basis * torch.logspace(0, -3, 30)) @ basis.mT
    with torch.no_grad():
        outputs, _ = call(inputs, solver, None, "triton")
        exact, _ = call([t.double() for t in inputs], EXACT._replace(ridge_ratio=1e-4), None)
    # Measured: 3e-4; pipelined ones 6e-2.
    assert relative_error(outputs, exact) <= 2e-3


def test_a_half_precision_step_goes_on_to_its_tolerance():
    """The value state is the identity and the output the solution."""
    inputs = halved(make_inputs(1, width=16, value_width=16, heads=8, key_heads=8, value_heads=8), torch.float16)
    for gate in (3, 5, 6):
        inputs[gate] = torch.zeros_like(inputs[gate])
    inputs[4] = torch.ones_like(inputs[4])
    # Queries among directions of eigenvalues from 0.3 on, so that rounding of the solution leaves little.
    basis = torch.linalg.qr(inputs[7])[0][..., :8]
    gram = (basis * torch.linspace(0.3, 1, 8)) @ basis.mT
    inputs[7], inputs[8] = gram, torch.eye(16).expand_as(inputs[8]).contiguous()
    inputs[0] = (basis @ torch.randn(8, 1, generator=torch.Generator().manual_seed(0))).mT[:, None, :, 0].half()
    solver = GKASolver("cg", 30, ridge_ratio=0.02)
    with torch.no_grad():
        found, _ = call(inputs, solver, None, "triton", scale=1.0)
    query, x = inputs[0][:, 0].double(), found[:, 0].double()
    ridge = 0.02 * gram.double().flatten(2).norm(dim=-1)[..., None]
    residual = query - (gram.double() @ x[..., None])[..., 0] - ridge * x
    assert (residual.norm(dim=-1) / query.norm(dim=-1)).max().item() <= 1.3e-3


@pytest.mark.parametrize("iterations", [1, 2, 3, 4, 6])
def test_iterations_of_a_half_precision_step_are_those_of_conjugate_gradients(iterations):
    inputs = halved(make_inputs(1, **SMALL, width=12), torch.float16)
    inputs[4] = torch.ones_like(inputs[4])

    def step(tensors, implementation):
        options = {"state": GKAState(*tensors[7:]), "key_log_decay": tensors[5], "input_gate": tensors[6]}
        solver = GKASolver("cg", iterations)
        return gated_kalmanet_step(*tensors[:5], **options, solver=solver, implementation=implementation)[0]

    expected = step([t.double() for t in inputs], "reference")
    # Measured: 3e-4, the rounding of outputs to float16.
    assert relative_error(step(inputs, "triton"), expected) <= 1e-3


def test_a_step_in_place_overwrites_the_states_it_was_given():
    inputs = [t.float() for t in make_inputs(2, **SMALL)]
    state = GKAState(inputs[7].clone(), inputs[8].clone())
    for implementation in ("triton", "torch"):
        given = GKAState(*(s.clone() for s in state))
        _, expected, none = gated_kalmanet_step(*inputs[:5], state=state, solver=CG, implementation=implementation)
        _, after, _ = gated_kalmanet_step(
            *inputs[:5], state=given, solver=CG, in_place=True, implementation=implementation
        )
        assert none is None
        assert all(a is g and torch.equal(g, e) for a, g, e in zip(after, given, expected, strict=True))


def test_compiles_without_a_graph_break_and_matches():
    inputs = [t.float() for t in make_inputs(12, **SMALL)]
    cotangents = make_cotangents(inputs)

    def loss(*leaves):
        outputs, state = call(list(leaves), CG, implementation="triton")
        return sum((a * b).sum() for a, b in zip((outputs, *state), cotangents, strict=True))

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in inputs]
        results.append(torch.autograd.grad(function(*leaves), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_registered_operators_are_well_formed():
    query, key, value, log_decay, mix, key_log_decay, gate, gram, value_key = (
        t.float() for t in make_inputs(9, **SMALL)
    )
    tensors = (query, key, value, log_decay, key_log_decay, mix, gate, None, gram, value_key)
    leaves = tuple(t if t is None else t.clone().requires_grad_() for t in tensors)
    arguments = ("cg", 3, 0.02, True, 0.0, 1.0)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        torch.ops.kalman_kernels.gka_triton_forward.default, (*leaves, *arguments, True), test_utils=checks
    )
    one = tuple(t[:, :1].contiguous() if t is not None and i < 7 else t for i, t in enumerate(tensors))
    torch.library.opcheck(torch.ops.kalman_kernels.gka_triton_step.default, (*one, *arguments), test_utils=checks)


def test_the_registered_mixer_step_is_well_formed_and_counts_versions():
    heads, width, taps = 2, 16, 4
    channels = heads * width
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    inputs = MixerInputs(
        *(normal(1, 1, heads, width) for _ in range(3)),
        *(normal(1, 1, heads) for _ in range(3)),
        normal(1, 1, heads, width),
        *(normal(1, channels, taps - 1) for _ in range(3)),
        *(normal(channels, taps) for _ in range(3)),
        normal(heads),
        normal(heads),
        normal(width),
        torch.eye(width).expand(1, heads, width, width).clone(),
        normal(1, heads, width, width),
        None,
    )
    options = MixerOptions(True, True, True, width**-0.5, 1e-6)
    torch.library.opcheck(torch.ops.kalman_kernels.gka_mixer_step.default, (*inputs, *CG, *options))
    before = [t if t is None else t._version for t in inputs]
    gka_mixer_step(inputs, CG, options)
    changed = [n for n, t, v in zip(inputs._fields, inputs, before, strict=True) if t is not None and t._version != v]
    assert changed == ["query_past", "key_past", "value_past", "key_gram", "value_key"]
    with pytest.raises(NotImplementedError, match="no gradient"):
        gka_mixer_step(inputs._replace(value=inputs.value.requires_grad_()), CG, options).sum().backward()


@pytest.mark.parametrize("decay", [-50.0, -60.0, -70.0, -80.0, -86.0, -1e9, -float("inf")])
def test_a_decay_that_forgets_nearly_everything(decay):
    """States and weights of 1e-30 and less neither overflow their scales nor spoil what is large beside them."""
    inputs = halved(make_inputs(48, **SMALL), torch.float16)
    for index in (3, 5):
        inputs[index][:, 16::16] = decay
    cotangents = [1e-4 * make_cotangents(inputs)[0], torch.zeros_like(inputs[7]), torch.zeros_like(inputs[8])]
    found = gradients(inputs, cotangents, solver=CG, implementation="triton")
    wide = [t.double() for t in inputs]
    exact = gradients(wide, [c.double() for c in cotangents], solver=EXACT)
    names = [n for n in NAMES if not n.startswith("initial_state")]
    bad = {n: relative_error(a, b) for n, a, b in zip(names, found, exact, strict=False)}
    # Measured: 2e-3. The decays' own gradients are 1e-30 beside what they are made of, where everything is forgotten.
    assert {n: e for n, e in bad.items() if not e <= (5e-2 if "decay" in n else 5e-3)} == {}


@pytest.mark.parametrize(
    ("capability", "stages"), [(90, (3, 2)), (80, (3, 2)), (89, (2, 1)), (120, (2, 1)), (0, (1, 1))]
)
def test_walks_keep_as_many_chunks_in_shared_memory_as_a_device_has_room_for(capability, stages, monkeypatch):
    monkeypatch.setattr(triton_common, "compute_capability", lambda device: capability)
    query = torch.zeros(1, 1, 1, 128)
    configs = [triton_common.plan(query.to(dtype), 128) for dtype in (torch.bfloat16, torch.float32)]
    found = [triton_common.launch_walk(config, "walk", query.device) for config in configs]
    assert found == [{"num_warps": 8, "num_stages": count} for count in stages]


def test_a_module_that_is_loaded_again_defines_its_operators_again():
    code = "import importlib; from kalman_kernels.gka import mixer; importlib.reload(mixer); print(mixer._mixer_step)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
