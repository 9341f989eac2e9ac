"""Kalman Linear Attention: validation, dispatch, autograd."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..dispatch import HAS_TRITON, NAMESPACE, Implementation, choose
from ..in_place import in_place_op
from ..segments import Segments
from .reference import KLAState, kalman_linear_attention_reference
from .scan import Inputs, block_count, kla_chunked_backward, kla_chunked_forward

if HAS_TRITON or TYPE_CHECKING:
    from .triton_backward import kla_triton_backward
    from .triton_forward import KEPT, TritonInputs, kla_triton_forward

__all__ = ["IMPLEMENTATIONS", "kalman_linear_attention", "kalman_linear_attention_step"]

IMPLEMENTATIONS = ("triton", "torch", "reference") if HAS_TRITON else ("torch", "reference")
# Of the Triton kernels; tokens of one launch of the step.
MAX_STATES, MAX_STEP = 128, 64
_NAME = "kalman_linear_attention"
# The published implementation's floor of the process noise.
NOISE_FLOOR = 1e-12


def kalman_linear_attention(
    value: Tensor,
    value_precision: Tensor,
    key: Tensor,
    query: Tensor,
    decay: Tensor,
    process_noise: Tensor,
    *,
    initial_state: KLAState | None = None,
    segments: Segments | None = None,
    decode_from_prior: bool = False,
    output_variance: bool = True,
    implementation: Implementation = "auto",
) -> tuple[Tensor, Tensor | None, KLAState]:
    """M x S scalar Kalman filters in information form, read out at the query, with posterior variance.

        z_t = a z_{t-1} + N(0, p) ,   v_t = k_t z_t + N(0, 1 / L_t)                  a = decay, p = process_noise
        den_t = a^2 + p lam_{t-1}
        lam_t = lam_{t-1} / den_t + L_t k_t^2                                        L_t = value_precision
        eta_t = (a / den_t) eta_{t-1} + L_t v_t k_t
        mean_t[m] = sum_s q_t[s] eta_t[m, s] / lam_t[m, s] ,   variance_t[m] = sum_s q_t[s]^2 / lam_t[m, s]
                                                        [arXiv 2602.10743, theorems 1 and 2; kla/README.md eqs. 1-4]

    Args:
        value: (B, T, M) observations v_t, any float dtype, T >= 1.
        value_precision: (B, T, M), >= 0, inverse variances of the observation noise.
        key: (B, T, S), shared by all channels.
        query: (B, T, S).
        decay: (M, S), > 0.
        process_noise: (M, S), >= 0, variance that every step adds. Below 1e-12 it counts as 1e-12, with its gradient
            there: without noise the precision would grow until it overflows.
        initial_state: belief before the first token, precision > 0; precision 1 and information 0 when None.
        segments: packed sequences (each starts from precision 1, information 0) and padding (nothing happens).
        decode_from_prior: read out what the filter expects of the next step, a mean and a^2 variance + p.
        output_variance: whether variances are wanted; without them they cost nothing.
        implementation: "auto", "triton", "torch" (both parallel over chunks of time, with the hand-derived gradient) or
            "reference" (loop over time).

    Returns:
        `(mean, variance, final_state)`: (B, T, M) twice in the dtype of `value`, 0 at padding, and the belief after
        the last token in float32 (float64 when `value` is float64). All are differentiable once. `variance` is None
        without `output_variance`.

    Raises:
        ValueError: a shape does not fit.
        NotImplementedError: the implementation does not exist.
    """
    _check(value, value_precision, key, query, decay, process_noise, initial_state)
    batch, length, channels = value.shape
    if segments is not None:
        segments.check(_NAME, batch, length)
    choice = choose(_NAME, implementation, IMPLEMENTATIONS, value.device, _refusal(value, key))
    if segments is not None and segments.valid is not None:
        # Whatever stands at padding is discarded, NaN included.
        present = segments.valid[..., None]
        value, value_precision, key, query = (torch.where(present, t, 0) for t in (value, value_precision, key, query))
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    decay, process_noise = decay.to(dtype), _floored(process_noise.to(dtype))
    if choice.implementation == "triton":
        inputs = _triton_inputs(value, value_precision, key, query, decay, process_noise, segments)
        state = [None, None] if initial_state is None else [s.float().contiguous() for s in initial_state]
        keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*inputs, *state))
        kept = KEPT if keep else 0
        mean, variance, precision, information, *_ = _triton_forward(
            *inputs, *state, decode_from_prior, kept, output_variance
        )
        return mean, variance if output_variance else None, KLAState(precision, information)
    tensors = [*(t.to(dtype) for t in (value, value_precision, key, query)), decay, process_noise]
    if initial_state is None:
        precision = torch.ones(batch, channels, key.shape[-1], dtype=dtype, device=value.device)
        information = torch.zeros_like(precision)
    else:
        precision, information = (s.to(dtype) for s in initial_state)
    if choice.implementation == "reference":
        mean, variance, state = kalman_linear_attention_reference(
            *tensors,
            initial_state=KLAState(precision, information),
            segments=segments,
            decode_from_prior=decode_from_prior,
        )
        return mean.to(value.dtype), variance.to(value.dtype) if output_variance else None, state
    segments = segments or Segments()
    reset, valid = (None if t is None else t.expand(batch, length) for t in segments)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (*tensors, precision, information))
    mean, variance, precision, information, *_ = _forward(
        *tensors, reset, valid, precision, information, decode_from_prior, keep, output_variance
    )
    variance = variance.to(value.dtype) if output_variance else None
    return mean.to(value.dtype), variance, KLAState(precision, information)


def kalman_linear_attention_step(
    value: Tensor,
    value_precision: Tensor,
    key: Tensor,
    query: Tensor,
    decay: Tensor,
    process_noise: Tensor,
    *,
    state: KLAState,
    segments: Segments | None = None,
    decode_from_prior: bool = False,
    output_variance: bool = True,
    in_place: bool = False,
    every_state: bool = False,
    implementation: Implementation = "auto",
) -> tuple[Tensor, Tensor | None, KLAState, KLAState | None]:
    """`kalman_linear_attention` for the next few tokens of a cached sequence, without gradients, in one launch.

    Args:
        value: (B, T, M), and what follows as in `kalman_linear_attention`.
        value_precision: (B, T, M).
        key: (B, T, S).
        query: (B, T, S).
        decay: (M, S).
        process_noise: (M, S).
        state: the belief before the first of the tokens.
        segments: packed sequences and padding.
        decode_from_prior: read out what the filter expects of the next step.
        output_variance: whether variances are wanted.
        in_place: overwrite the tensors of `state` with the new belief.
        every_state: also return the belief after each token, (T, B, M, S): what a rollback goes back to.
        implementation: "auto", "triton", "torch" or "reference".

    Returns:
        `(mean, variance, state, states)`; `states` is None unless `every_state`.

    Raises:
        ValueError: a shape does not fit.
        NotImplementedError: the implementation does not exist or cannot serve the call.
    """
    name = "kalman_linear_attention_step"
    _check(value, value_precision, key, query, decay, process_noise, state, name, "state")
    batch, length, _ = value.shape
    if segments is not None:
        segments.check(name, batch, length)
    choice = choose(name, implementation, IMPLEMENTATIONS, value.device, _refusal(value, key))
    fits = all(s.is_contiguous() and s.dtype == torch.float32 for s in state)
    if choice.implementation == "triton" and fits and length <= MAX_STEP:
        decay, process_noise = decay.float(), _floored(process_noise.float())
        inputs = _triton_inputs(value, value_precision, key, query, decay, process_noise, segments)
        current = state if in_place else KLAState(*(s.clone() for s in state))
        mean, variance, *kept = _triton_step(
            *inputs, current.precision, current.information, decode_from_prior, every_state, output_variance
        )
        variance = variance if output_variance else None
        every = None
        if every_state:
            every = KLAState(*(torch.cat([k[1:], c[None]]) for k, c in zip(kept, current, strict=True)))
        return mean, variance, current, every
    outputs, current, states = [], state, []
    segments = segments or Segments()
    # All at once where only the last belief matters.
    size = 1 if every_state else length
    with torch.no_grad():
        for start in range(0, length, size):
            here = slice(start, start + size)
            *output, current = kalman_linear_attention(
                value[:, here],
                value_precision[:, here],
                key[:, here],
                query[:, here],
                decay,
                process_noise,
                initial_state=current,
                segments=Segments(*(None if t is None else t[:, here] for t in segments)),
                decode_from_prior=decode_from_prior,
                output_variance=output_variance,
                implementation=implementation,
            )
            outputs.append(output)
            states.append(current)
    means, variances = zip(*outputs, strict=True)
    mean = torch.cat(means, dim=1)
    variance = torch.cat(variances, dim=1) if output_variance else None
    every = KLAState(*(torch.stack(t) for t in zip(*states, strict=True))) if every_state else None
    if in_place:
        for old, new in zip(state, current, strict=True):
            old.copy_(new)
        current = state
    return mean, variance, current, every


def _floored(process_noise: Tensor) -> Tensor:
    """Raised by a constant: the gradient passes, nothing dies at the floor."""
    return process_noise + (NOISE_FLOOR - process_noise.detach()).clamp_min(0)


def _refusal(value: Tensor, key: Tensor) -> str | None:
    """What the Triton kernels cannot take about a call."""
    if value.dtype == torch.float64:
        return "float64"
    return f"more than {MAX_STATES} states ({key.shape[-1]})" if key.shape[-1] > MAX_STATES else None


def _triton_inputs(
    value: Tensor,
    value_precision: Tensor,
    key: Tensor,
    query: Tensor,
    decay: Tensor,
    process_noise: Tensor,
    segments: Segments | None,
) -> TritonInputs:
    """Contiguous, with one mark per token for starts and padding."""
    marks = None
    if segments is not None and any(t is not None for t in segments):
        shape = value.shape[:2]
        marks = torch.zeros(shape, dtype=torch.int8, device=value.device)
        if segments.reset is not None:
            marks = marks + segments.reset.expand(shape)
        if segments.valid is not None:
            marks = marks + 2 * (~segments.valid).expand(shape)
    return TritonInputs(
        *(t.contiguous() for t in (value, value_precision, key, query, decay, process_noise)), marks=marks
    )


def _check(
    value: Tensor,
    value_precision: Tensor,
    key: Tensor,
    query: Tensor,
    decay: Tensor,
    process_noise: Tensor,
    state: KLAState | None,
    function: str = _NAME,
    state_name: str = "initial_state",
) -> None:
    if value.ndim != 3 or value.shape[1] < 1 or not value.is_floating_point():
        raise ValueError(
            f"{function}: `value` must be a float tensor of shape (B, T >= 1, M), got {tuple(value.shape)} "
            f"{value.dtype}."
        )
    batch, length, channels = value.shape
    if key.ndim != 3 or tuple(key.shape[:2]) != (batch, length):
        raise ValueError(f"{function}: `key` must have shape ({batch}, {length}, S), got {tuple(key.shape)}.")
    states = key.shape[-1]
    wanted = {
        "value_precision": (value_precision, (batch, length, channels)),
        "query": (query, (batch, length, states)),
        "decay": (decay, (channels, states)),
        "process_noise": (process_noise, (channels, states)),
    }
    if state is not None:
        wanted[f"{state_name}.precision"] = (state.precision, (batch, channels, states))
        wanted[f"{state_name}.information"] = (state.information, (batch, channels, states))
    for name, (tensor, shape) in wanted.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{function}: `{name}` must have shape {shape}, got {tuple(tensor.shape)}.")


@torch.library.custom_op(f"{NAMESPACE}::kla_chunked", mutates_args=())
def _forward(
    value: Tensor,
    value_precision: Tensor,
    key: Tensor,
    query: Tensor,
    decay: Tensor,
    process_noise: Tensor,
    reset: Tensor | None,
    valid: Tensor | None,
    precision: Tensor,
    information: Tensor,
    prior: bool,
    keep: bool,
    spread: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = Inputs(value, value_precision, key, query, decay, process_noise, reset, valid)
    with torch.autocast(value.device.type, enabled=False):
        return kla_chunked_forward(inputs, precision, information, prior, keep, spread)


@torch.library.custom_op(f"{NAMESPACE}::kla_chunked_backward", mutates_args=())
def _backward(
    value: Tensor,
    value_precision: Tensor,
    key: Tensor,
    query: Tensor,
    decay: Tensor,
    process_noise: Tensor,
    reset: Tensor | None,
    valid: Tensor | None,
    precisions: Tensor,
    informations: Tensor,
    d_mean: Tensor,
    d_variance: Tensor,
    d_precision: Tensor,
    d_information: Tensor,
    prior: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = Inputs(value, value_precision, key, query, decay, process_noise, reset, valid)
    with torch.autocast(value.device.type, enabled=False):
        gradients = kla_chunked_backward(
            inputs, (precisions, informations), d_mean, d_variance, d_precision, d_information, prior
        )
        return tuple(g.clone() for g in gradients)  # pyright: ignore[reportReturnType] - eight tensors


@_forward.register_fake
def _forward_fake(
    value, value_precision, key, query, decay, process_noise, reset, valid, precision, information, *rest
):
    variance = torch.empty_like(value) if rest[-1] else value.new_empty(0)
    outputs = torch.empty_like(value), variance, torch.empty_like(precision), torch.empty_like(precision)
    if not rest[-2]:
        return *outputs, precision.new_empty(0), precision.new_empty(0)
    kept = precision.new_empty(block_count(value, key.shape[-1]), *precision.shape)
    return *outputs, kept, torch.empty_like(kept)


@_backward.register_fake
def _backward_fake(value, value_precision, key, query, decay, process_noise, *rest):
    leaves = (value, value_precision, key, query, decay, process_noise, rest[6], rest[7])
    return tuple(torch.empty_like(t) for t in leaves)


def _setup_context(ctx, inputs, output):
    *tensors, _, _, prior, _, _ = inputs
    ctx.prior = prior
    ctx.save_for_backward(*tensors, *output[4:])


def _autograd_backward(ctx, *cotangents):
    mean, variance, *states = (c.contiguous() for c in cotangents[:4])
    if variance.numel() == 0:
        variance = torch.zeros_like(mean)
    gradients = _backward(*ctx.saved_tensors, mean, variance, *states, ctx.prior)
    return *gradients[:6], None, None, *gradients[6:], None, None, None


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)


@torch.library.custom_op(f"{NAMESPACE}::kla_triton", mutates_args=())
def _triton_forward(
    value: Tensor,
    value_precision: Tensor,
    key: Tensor,
    query: Tensor,
    decay: Tensor,
    process_noise: Tensor,
    marks: Tensor | None,
    precision: Tensor | None,
    information: Tensor | None,
    prior: bool,
    keep: int,
    spread: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = TritonInputs(value, value_precision, key, query, decay, process_noise, marks)
    return kla_triton_forward(inputs, precision, information, prior, keep, spread)


@torch.library.custom_op(f"{NAMESPACE}::kla_triton_backward", mutates_args=())
def _triton_backward(
    value: Tensor,
    value_precision: Tensor,
    key: Tensor,
    query: Tensor,
    decay: Tensor,
    process_noise: Tensor,
    marks: Tensor | None,
    precisions: Tensor,
    informations: Tensor,
    d_mean: Tensor,
    d_variance: Tensor | None,
    d_precision: Tensor,
    d_information: Tensor,
    prior: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = TritonInputs(value, value_precision, key, query, decay, process_noise, marks)
    kept = precisions, informations
    return kla_triton_backward(inputs, kept, d_mean, d_variance, d_precision, d_information, prior)


@in_place_op("kla_triton_step", ("precision", "information"))
def _triton_step(
    value: Tensor,
    value_precision: Tensor,
    key: Tensor,
    query: Tensor,
    decay: Tensor,
    process_noise: Tensor,
    marks: Tensor | None,
    precision: Tensor,
    information: Tensor,
    prior: bool,
    every: bool,
    spread: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = TritonInputs(value, value_precision, key, query, decay, process_noise, marks)
    state = precision, information
    mean, variance, _, _, *kept = kla_triton_forward(inputs, *state, prior, int(every), spread, state)
    return mean, variance, kept[0], kept[1]


@_triton_forward.register_fake
def _triton_forward_fake(value, value_precision, key, query, decay, process_noise, marks, *rest):
    precision = decay.new_empty(value.shape[0], *decay.shape)
    keep, spread = rest[-2:]
    variance = torch.empty_like(value) if spread else value.new_empty(0)
    kept = precision.new_empty(-(-value.shape[1] // keep), *precision.shape) if keep else precision.new_empty(0)
    outputs = torch.empty_like(value), variance, precision, torch.empty_like(precision)
    return *outputs, kept, torch.empty_like(kept)


@_triton_backward.register_fake
def _triton_backward_fake(value, value_precision, key, query, decay, process_noise, *rest):
    leaves = (value, value_precision, key, query, decay, process_noise)
    state = decay.new_empty(value.shape[0], *decay.shape)
    return *(torch.empty_like(t) for t in leaves), state, torch.empty_like(state)


@_triton_step.register_fake
def _triton_step_fake(value, value_precision, key, query, decay, process_noise, marks, precision, *rest):
    every, spread = rest[-2:]
    kept = precision.new_empty(value.shape[1], *precision.shape) if every else precision.new_empty(0)
    variance = torch.empty_like(value) if spread else value.new_empty(0)
    return torch.empty_like(value), variance, kept, torch.empty_like(kept)


def _triton_setup_context(ctx, inputs, output):
    ctx.prior = inputs[9]
    ctx.has_state = inputs[7] is not None
    # Zeros for the kept beliefs would be the largest tensors of a backward pass.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:7], *output[4:])


def _triton_autograd_backward(ctx, *cotangents):
    saved = ctx.saved_tensors
    state = saved[0].shape[0], *saved[4].shape
    mean, variance, *states = cotangents[:4]
    cotangents = [
        torch.zeros_like(saved[0]) if mean is None else mean.contiguous(),
        None if variance is None or variance.numel() == 0 else variance.contiguous(),
        *(saved[4].new_zeros(state) if c is None else c.contiguous() for c in states),
    ]
    gradients = _triton_backward(*saved, *cotangents, ctx.prior)
    states = gradients[6:] if ctx.has_state else (None, None)
    return *gradients[:6], None, *states, None, None, None


_triton_forward.register_autograd(_triton_autograd_backward, setup_context=_triton_setup_context)
