"""Gated KalmaNet: validation, dispatch, autograd."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..dispatch import HAS_TRITON, NAMESPACE, Implementation, choose
from ..segments import Segments
from .chunked import Inputs, block_count, gka_chunked_backward, gka_chunked_forward, gka_step
from .limits import MAX_STEP, refusal
from .reference import GKASolver, GKAState, gated_kalmanet_reference

if HAS_TRITON or TYPE_CHECKING:
    from .triton_backward import gka_triton_backward
    from .triton_common import plan
    from .triton_forward import TritonInputs, gka_triton_forward
    from .triton_step import gka_triton_step

__all__ = ["IMPLEMENTATIONS", "gated_kalmanet", "gated_kalmanet_step"]

IMPLEMENTATIONS = ("triton", "torch", "reference") if HAS_TRITON else ("torch", "reference")
_NAME = "gated_kalmanet"


def gated_kalmanet(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None = None,
    solution_mix: Tensor | None = None,
    *,
    key_log_decay: Tensor | None = None,
    input_gate: Tensor | None = None,
    solver: GKASolver = GKASolver(),
    scale: float | None = None,
    initial_state: GKAState | None = None,
    segments: Segments | None = None,
    implementation: Implementation = "auto",
) -> tuple[Tensor, GKAState]:
    """Online ridge regression of values on keys, read out at the query. Constant memory, whole past.

        H_t = exp(key_log_decay_t) H_{t-1} + (b_t k_t)(b_t k_t)^T          b_t = input_gate_t
        U_t = exp(log_decay_t) U_{t-1} + (b_t v_t)(b_t k_t)^T
        x_t = (H_t + lambda_t I)^-1 q_t          lambda_t = ridge_ratio ||H_t||_F
        y_t = scale * U_t (q_t + solution_mix_t (x_t - q_t))
                                                                 [arXiv 2511.21016, section 3; gka/README.md eqs. 1-6]

    With `solution_mix` 1 and one shared decay, y_t / scale = S_t q_t for the S that minimises
    sum_i decay_{t,i} ||S b_i k_i - b_i v_i||^2 + lambda_t ||S||_F^2: exact weighted least squares over the whole past.

    Args:
        query: (B, T, H, Dk), any float dtype, T >= 1. Keys of norm about 1 are the usual case, nothing requires it.
        key: (B, T, G, Dk), G divides H; query head h reads head h // (H / G). Never repeated over time in memory.
        value: (B, T, Gv, Dv), Gv divides H.
        log_decay: (B, T, H), <= 0, natural log of what the value state keeps at each step, nothing at -inf; no decay
            when None.
        solution_mix: (B, T, H) in [0, 1]; 1 (pure ridge regression) when None, 0 is gated linear attention.
        key_log_decay: (B, T, H), the same for the Gram matrix; `log_decay` when None.
        input_gate: (B, T, H), factor on key and value of each query head; 1 when None.
        solver: how x_t is computed.
        scale: factor on the output; Dk ** -0.5 when None.
        initial_state: states before the first token; empty when None.
        segments: packed sequences and padding.
        implementation: "auto", "triton" (CUDA; float16, bfloat16 and float32, widths to 128, iterative solvers),
            "torch" (chunk-parallel, implicit gradient) or "reference" (loop over time, autograd).

    Returns:
        `(outputs, final_state)`: (B, T, H, Dv) in the dtype of `query`, zero at padding, and the states after the
        last token in float32 (float64 when `query` is float64). Both are differentiable once; where nothing has been
        read yet the output is 0.

    Raises:
        ValueError: a shape or the solver does not fit.
        NotImplementedError: the implementation does not exist or cannot serve the device.
    """
    solver.check(_NAME)
    _check(query, key, value, log_decay, solution_mix, key_log_decay, input_gate, initial_state)
    batch, length, heads, width = query.shape
    if segments is not None:
        segments.check(_NAME, batch, length)
    refused = refusal(query.dtype, width, value.shape[-1], solver)
    choice = choose(_NAME, implementation, IMPLEMENTATIONS, query.device, refused)
    if choice.implementation == "triton":
        return _triton(
            _triton_inputs(query, key, value, log_decay, key_log_decay, solution_mix, input_gate),
            solver,
            width**-0.5 if scale is None else scale,
            initial_state,
            segments or Segments(),
        )
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    factor = width**-0.5 if scale is None else scale
    zeros = torch.zeros(batch, length, heads, dtype=dtype, device=query.device)

    def gate(tensor: Tensor | None, default: Tensor) -> Tensor:
        return default if tensor is None else tensor.to(dtype)

    numbers = None if segments is None else segments.numbers()
    log_decay = gate(log_decay, zeros)
    inputs = Inputs(
        query.to(dtype),
        key.to(dtype),
        value.to(dtype),
        log_decay,
        gate(key_log_decay, log_decay),
        gate(solution_mix, zeros + 1),
        gate(input_gate, zeros + 1),
        None if numbers is None else numbers.expand(batch, length),
    )
    if initial_state is None:
        gram = zeros.new_zeros(batch, heads, width, width)
        value_key = zeros.new_zeros(batch, heads, value.shape[-1], width)
    else:
        gram, value_key = (s.to(dtype) for s in initial_state)

    if choice.implementation == "reference":
        outputs, state = gated_kalmanet_reference(
            *inputs[:4],
            inputs.solution_mix,
            key_log_decay=inputs.key_log_decay,
            input_gate=inputs.input_gate,
            solver=solver,
            scale=factor,
            initial_state=GKAState(gram, value_key),
            segments=segments,
        )
        return outputs.to(query.dtype), state

    if segments is not None and segments.valid is not None:
        inputs = _neutral(inputs, segments.valid.expand(batch, length))
    outputs, gram, value_key = _run(inputs, gram, value_key, solver, factor)
    return outputs.to(query.dtype), GKAState(gram, value_key)


def gated_kalmanet_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None = None,
    solution_mix: Tensor | None = None,
    *,
    state: GKAState,
    key_log_decay: Tensor | None = None,
    input_gate: Tensor | None = None,
    solver: GKASolver = GKASolver(),
    scale: float | None = None,
    in_place: bool = False,
    every_state: bool = False,
    implementation: Implementation = "auto",
) -> tuple[Tensor, GKAState, GKAState | None]:
    """`gated_kalmanet` for the few tokens of a generation step: no gradient, states in place, states of every token.

    On a CUDA device up to 8 tokens take one launch that reads and writes both states once; equation, arguments and
    dtypes are those of `gated_kalmanet`.

    Args:
        query: (B, T, H, Dk), T small; see `gated_kalmanet`.
        key: (B, T, G, Dk).
        value: (B, T, Gv, Dv).
        log_decay: (B, T, H) or None.
        solution_mix: (B, T, H) or None.
        state: float32 states before the first token.
        key_log_decay: (B, T, H) or None.
        input_gate: (B, T, H) or None.
        solver: how x_t is computed.
        scale: factor on the output; Dk ** -0.5 when None.
        in_place: overwrite `state` and return it.
        every_state: also return the states after each token, (B, T, H, Dk, Dk) and (B, T, H, Dv, Dk): what
            speculative decoding needs to take back rejected tokens.
        implementation: as in `gated_kalmanet`.

    Returns:
        `(outputs, final_state, states)`, the last None unless `every_state`.

    Raises:
        ValueError: a shape or the solver does not fit.
        NotImplementedError: the implementation does not exist or cannot serve the call.
    """
    name = "gated_kalmanet_step"
    solver.check(name)
    _check(query, key, value, log_decay, solution_mix, key_log_decay, input_gate, state, name, "state")
    length, width = query.shape[1], query.shape[-1]
    refused = refusal(query.dtype, width, value.shape[-1], solver)
    choice = choose(name, implementation, IMPLEMENTATIONS, query.device, refused)
    fits = length <= MAX_STEP and all(s.is_contiguous() and s.dtype == torch.float32 for s in state)
    if choice.implementation == "triton" and fits:
        factor = width**-0.5 if scale is None else scale
        inputs = _triton_inputs(query, key, value, log_decay, key_log_decay, solution_mix, input_gate)
        outputs, gram, value_key, *every = gka_triton_step(inputs, state, solver, factor, in_place, every_state)
        return outputs, GKAState(gram, value_key), GKAState(*every) if every_state else None
    outputs, states, current = [], [], state
    step = 1 if every_state else length
    with torch.no_grad():
        for start in range(0, length, step):
            here = slice(start, start + step)
            gates = [None if t is None else t[:, here] for t in (log_decay, solution_mix, key_log_decay, input_gate)]
            result, current = gated_kalmanet(
                *(t[:, here] for t in (query, key, value)),
                *gates[:2],
                key_log_decay=gates[2],
                input_gate=gates[3],
                solver=solver,
                scale=scale,
                initial_state=current,
                implementation=implementation,
            )
            outputs.append(result)
            states.append(current)
    if in_place:
        current = GKAState(*(target.copy_(source) for target, source in zip(state, current, strict=True)))
    every = GKAState(*(torch.stack(pair, dim=1) for pair in zip(*states, strict=True))) if every_state else None
    return torch.cat(outputs, dim=1), current, every


def _triton_inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    key_log_decay: Tensor | None,
    solution_mix: Tensor | None,
    input_gate: Tensor | None,
) -> TritonInputs:
    if log_decay is None and key_log_decay is not None:
        # The kernels read one decay for both states or two: a value state that keeps everything has one of 0.
        log_decay = torch.zeros_like(key_log_decay)
    tensors = (query, key, value, log_decay, key_log_decay, solution_mix, input_gate)
    return TritonInputs._make([*(None if t is None else t.contiguous() for t in tensors), None])


def _triton(
    inputs: TritonInputs, solver: GKASolver, scale: float, initial: GKAState | None, segments: Segments
) -> tuple[Tensor, GKAState]:
    batch, length = inputs.query.shape[:2]
    if segments.valid is not None:
        valid = segments.valid.expand(batch, length)
        gate = inputs.input_gate
        if gate is None:
            gate = torch.ones(*inputs.query.shape[:3], dtype=torch.float32, device=inputs.query.device)
        masked = [
            None if t is None else torch.where(valid.view(batch, length, *[1] * (t.ndim - 2)), t, 0)
            for t in inputs._replace(input_gate=gate)[:7]
        ]
        inputs = _triton_inputs(*masked)  # pyright: ignore[reportArgumentType] - the first three are there
    numbers = segments.numbers()
    if numbers is not None:
        inputs = inputs._replace(numbers=numbers.to(torch.int32).expand(batch, length).contiguous())
    states = (None, None) if initial is None else tuple(s.float().contiguous() for s in initial)
    differentiable = torch.is_grad_enabled() and any(
        t.requires_grad for t in (*inputs[:7], *states) if isinstance(t, Tensor)
    )
    if length <= MAX_STEP and not differentiable:
        if states[0] is None:
            shape = (batch, inputs.query.shape[2], inputs.value.shape[-1], inputs.query.shape[-1])
            value_key = inputs.query.new_zeros(shape, dtype=torch.float32)
            states = (value_key.new_zeros(*shape[:2], shape[3], shape[3]), value_key)
        outputs, gram, value_key = _triton_step(*inputs, *states, *solver, scale)
    else:
        outputs, gram, value_key = _triton_forward(*inputs, *states, *solver, scale, differentiable)[:3]
    return outputs, GKAState(gram, value_key)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    solution_mix: Tensor | None,
    key_log_decay: Tensor | None,
    input_gate: Tensor | None,
    state: GKAState | None,
    function: str = _NAME,
    state_name: str = "initial_state",
) -> None:
    if query.ndim != 4 or query.shape[1] < 1 or not query.is_floating_point():
        raise ValueError(
            f"{function}: `query` must be a float tensor of shape (B, T >= 1, H, Dk), got {tuple(query.shape)} "
            f"{query.dtype}."
        )
    batch, length, heads, width = query.shape
    for name, tensor in (("key", key), ("value", value)):
        if tensor.ndim != 4 or tensor.shape[:2] != query.shape[:2] or heads % tensor.shape[2]:
            raise ValueError(
                f"{function}: `{name}` must have shape ({batch}, {length}, G, D) with G dividing the {heads} heads of "
                f"`query`, got {tuple(tensor.shape)}."
            )
    if key.shape[-1] != width:
        raise ValueError(f"{function}: `key` must have the width {width} of `query`, got {key.shape[-1]}.")
    gates = {
        "log_decay": log_decay,
        "solution_mix": solution_mix,
        "key_log_decay": key_log_decay,
        "input_gate": input_gate,
    }
    for name, tensor in gates.items():
        if tensor is not None and tuple(tensor.shape) != (batch, length, heads):
            raise ValueError(
                f"{function}: `{name}` must have shape ({batch}, {length}, {heads}), got {tuple(tensor.shape)}."
            )
    if state is not None:
        wanted = {"key_gram": (batch, heads, width, width), "value_key": (batch, heads, value.shape[-1], width)}
        for (name, shape), tensor in zip(wanted.items(), state, strict=True):
            if tuple(tensor.shape) != shape:
                raise ValueError(
                    f"{function}: `{state_name}.{name}` must have shape {shape}, got {tuple(tensor.shape)}."
                )


def _neutral(inputs: Inputs, valid: Tensor) -> Inputs:
    """Padding as the identity transition: keys, values and queries 0, decays 1. Whatever stood there is discarded."""
    token, vector = valid[..., None], valid[..., None, None]
    return Inputs(
        torch.where(vector, inputs.query, 0),
        torch.where(vector, inputs.key, 0),
        torch.where(vector, inputs.value, 0),
        torch.where(token, inputs.log_decay, 0),
        torch.where(token, inputs.key_log_decay, 0),
        torch.where(token, inputs.solution_mix, 0),
        torch.where(token, inputs.input_gate, 0),
        inputs.numbers,
    )


def _run(
    inputs: Inputs, gram: Tensor, value_key: Tensor, solver: GKASolver, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    differentiable = torch.is_grad_enabled() and any(
        t.requires_grad for t in (*inputs[:7], gram, value_key) if isinstance(t, Tensor)
    )
    if inputs.query.shape[1] == 1 and not differentiable:
        return _step(*inputs, gram, value_key, *solver, scale)
    return _forward(*inputs, gram, value_key, *solver, scale, differentiable)[:3]


# The three functions below are what torch sees: opaque operators with a fake version, so that torch.compile and
# torch.export neither unroll the loop over chunks nor specialise on the length.


@torch.library.custom_op(f"{NAMESPACE}::gka_step", mutates_args=())
def _step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    key_log_decay: Tensor,
    solution_mix: Tensor,
    input_gate: Tensor,
    numbers: Tensor | None,
    gram: Tensor,
    value_key: Tensor,
    method: str,
    iterations: int,
    ridge_ratio: float,
    ridge_gradient: bool,
    tolerance: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = Inputs(query, key, value, log_decay, key_log_decay, solution_mix, input_gate, numbers)
    solver = _solver(method, iterations, ridge_ratio, ridge_gradient, tolerance)
    with torch.autocast(query.device.type, enabled=False):
        return gka_step(inputs, gram, value_key, solver, scale)


@torch.library.custom_op(f"{NAMESPACE}::gka_chunked", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    key_log_decay: Tensor,
    solution_mix: Tensor,
    input_gate: Tensor,
    numbers: Tensor | None,
    gram: Tensor,
    value_key: Tensor,
    method: str,
    iterations: int,
    ridge_ratio: float,
    ridge_gradient: bool,
    tolerance: float,
    scale: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = Inputs(query, key, value, log_decay, key_log_decay, solution_mix, input_gate, numbers)
    solver = _solver(method, iterations, ridge_ratio, ridge_gradient, tolerance)
    with torch.autocast(query.device.type, enabled=False):
        return gka_chunked_forward(inputs, gram, value_key, solver, scale, keep)


@torch.library.custom_op(f"{NAMESPACE}::gka_chunked_backward", mutates_args=())
def _backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    key_log_decay: Tensor,
    solution_mix: Tensor,
    input_gate: Tensor,
    numbers: Tensor | None,
    gram: Tensor,
    value_key: Tensor,
    solutions: Tensor,
    grams: Tensor,
    value_keys: Tensor,
    d_outputs: Tensor,
    d_gram: Tensor,
    d_value_key: Tensor,
    method: str,
    iterations: int,
    ridge_ratio: float,
    ridge_gradient: bool,
    tolerance: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = Inputs(query, key, value, log_decay, key_log_decay, solution_mix, input_gate, numbers)
    solver = _solver(method, iterations, ridge_ratio, ridge_gradient, tolerance)
    with torch.autocast(query.device.type, enabled=False):
        saved = (solutions, grams, value_keys)
        gradients = gka_chunked_backward(inputs, saved, d_outputs, d_gram, d_value_key, gram, solver, scale)
        return gradients  # pyright: ignore[reportReturnType] - nine tensors


def _solver(method: str, iterations: int, ridge_ratio: float, ridge_gradient: bool, tolerance: float) -> GKASolver:
    return GKASolver(method, iterations, ridge_ratio, ridge_gradient, tolerance)  # pyright: ignore[reportArgumentType]


@_step.register_fake
def _step_fake(query, key, value, *rest):
    return query.new_empty(*query.shape[:3], value.shape[-1]), rest[5].clone(), rest[6].clone()


@_forward.register_fake
def _forward_fake(query, key, value, *rest):
    gram, value_key, method, keep = rest[5], rest[6], rest[7], rest[-1]
    outputs = query.new_empty(*query.shape[:3], value.shape[-1])
    if not keep:
        return outputs, torch.empty_like(gram), torch.empty_like(value_key), *(gram.new_empty(0) for _ in range(3))
    blocks = block_count(query, value.shape[-1], method)
    return (
        outputs,
        torch.empty_like(gram),
        torch.empty_like(value_key),
        torch.empty_like(query),
        gram.new_empty(blocks, *gram.shape),
        gram.new_empty(blocks, *value_key.shape),
    )


@_backward.register_fake
def _backward_fake(query, key, value, log_decay, key_log_decay, solution_mix, input_gate, numbers, gram, value_key, *_):
    leaves = (query, key, value, log_decay, key_log_decay, solution_mix, input_gate, gram, value_key)
    return tuple(torch.empty_like(t) for t in leaves)


def _setup_context(ctx, inputs, output):
    tensors, ctx.numbers = inputs[:10], inputs[10:-1]
    ctx.save_for_backward(*tensors, *output[3:])


def _autograd_backward(ctx, d_outputs, d_gram, d_value_key, *_):
    gradients = _backward(
        *ctx.saved_tensors, d_outputs.contiguous(), d_gram.contiguous(), d_value_key.contiguous(), *ctx.numbers
    )
    return *gradients[:7], None, *gradients[7:], *[None] * (len(ctx.numbers) + 1)


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)


# The same for Triton. Absent tensors travel as None, and come back from the backward pass as empty tensors.


@torch.library.custom_op(f"{NAMESPACE}::gka_triton_step", mutates_args=())
def _triton_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    key_log_decay: Tensor | None,
    solution_mix: Tensor | None,
    input_gate: Tensor | None,
    numbers: Tensor | None,
    gram: Tensor,
    value_key: Tensor,
    method: str,
    iterations: int,
    ridge_ratio: float,
    ridge_gradient: bool,
    tolerance: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = TritonInputs(query, key, value, log_decay, key_log_decay, solution_mix, input_gate, numbers)
    solver = _solver(method, iterations, ridge_ratio, ridge_gradient, tolerance)
    outputs, gram, value_key, *_ = gka_triton_step(inputs, (gram, value_key), solver, scale, in_place=False)
    return outputs, gram, value_key


@torch.library.custom_op(f"{NAMESPACE}::gka_triton_forward", mutates_args=())
def _triton_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    key_log_decay: Tensor | None,
    solution_mix: Tensor | None,
    input_gate: Tensor | None,
    numbers: Tensor | None,
    gram: Tensor | None,
    value_key: Tensor | None,
    method: str,
    iterations: int,
    ridge_ratio: float,
    ridge_gradient: bool,
    tolerance: float,
    scale: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = TritonInputs(query, key, value, log_decay, key_log_decay, solution_mix, input_gate, numbers)
    initial = None if gram is None or value_key is None else (gram, value_key)
    solver = _solver(method, iterations, ridge_ratio, ridge_gradient, tolerance)
    return gka_triton_forward(inputs, initial, solver, scale, keep)


@torch.library.custom_op(f"{NAMESPACE}::gka_triton_backward", mutates_args=())
def _triton_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    key_log_decay: Tensor | None,
    solution_mix: Tensor | None,
    input_gate: Tensor | None,
    numbers: Tensor | None,
    gram: Tensor | None,
    value_key: Tensor | None,
    solutions: Tensor,
    solution_sizes: Tensor,
    norms: Tensor,
    d_outputs: Tensor,
    d_gram: Tensor | None,
    d_value_key: Tensor | None,
    method: str,
    iterations: int,
    ridge_ratio: float,
    ridge_gradient: bool,
    tolerance: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = TritonInputs(query, key, value, log_decay, key_log_decay, solution_mix, input_gate, numbers)
    initial = None if gram is None or value_key is None else (gram, value_key)
    solver = _solver(method, iterations, ridge_ratio, ridge_gradient, tolerance)
    gradients = gka_triton_backward(
        inputs, initial, solutions, solution_sizes, norms, d_outputs, d_gram, d_value_key, solver, scale
    )
    return tuple(query.new_empty(0) if g is None else g for g in gradients)  # pyright: ignore[reportReturnType]


@_triton_step.register_fake
def _triton_step_fake(query, key, value, *rest):
    return query.new_empty(*query.shape[:3], value.shape[-1]), torch.empty_like(rest[5]), torch.empty_like(rest[6])


@_triton_forward.register_fake
def _triton_forward_fake(query, key, value, *rest):
    iterations, keep = rest[8], rest[-1]
    batch, length, heads, width = query.shape
    config = plan(query, value.shape[-1])
    new = torch.empty_like(query, dtype=torch.float32).new_empty
    outputs = query.new_empty(batch, length, heads, value.shape[-1])
    states = new(batch, heads, width, width), new(batch, heads, value.shape[-1], width)
    if not keep or iterations == 0:
        return outputs, *states, new(0), new(0), new(0)
    filled = -(-length // config.chunk) * config.chunk
    norms = new(batch, heads, filled)
    return outputs, *states, torch.empty_like(query, dtype=config.storage), norms, torch.empty_like(norms)


@_triton_backward.register_fake
def _triton_backward_fake(query, *rest):
    return tuple(query.new_empty(0) if t is None else torch.empty_like(t) for t in (query, *rest[:6], *rest[7:9]))


def _triton_setup_context(ctx, inputs, output):
    # A state that nothing looks at has no gradient, not one of zeros.
    ctx.set_materialize_grads(False)
    _setup_context(ctx, inputs, output)


def _triton_autograd(ctx, d_outputs, d_gram, d_value_key, *_):
    saved = ctx.saved_tensors  # unpacked once: activation checkpointing allows no more
    leaves, (query, _, value) = saved[:10], saved[:3]
    if d_outputs is None:
        d_outputs = query.new_zeros(*query.shape[:3], value.shape[-1])
    states = (None if d is None else d.contiguous() for d in (d_gram, d_value_key))
    gradients = list(_triton_backward(*saved, d_outputs.contiguous(), *states, *ctx.numbers))
    gradients = gradients[:7] + [None] + gradients[7:]
    gradients = [None if leaf is None else g for leaf, g in zip(leaves, gradients, strict=True)]
    return *gradients, *[None] * (len(ctx.numbers) + 1)


_triton_forward.register_autograd(_triton_autograd, setup_context=_triton_setup_context)
