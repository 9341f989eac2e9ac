"""Kalman Linear Attention: validation, dispatch, autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import Implementation, choose
from ..segments import Segments
from .reference import KLAState, kalman_linear_attention_reference
from .scan import Inputs, block_count, kla_chunked_backward, kla_chunked_forward

__all__ = ["IMPLEMENTATIONS", "kalman_linear_attention"]

IMPLEMENTATIONS = ("torch", "reference")
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
    implementation: Implementation = "auto",
) -> tuple[Tensor, Tensor, KLAState]:
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
        implementation: "auto", "torch" (chunk-parallel, hand-derived gradient) or "reference" (loop over time).

    Returns:
        `(mean, variance, final_state)`: (B, T, M) twice in the dtype of `value`, 0 at padding, and the belief after
        the last token in float32 (float64 when `value` is float64). All are differentiable once.

    Raises:
        ValueError: a shape does not fit.
        NotImplementedError: the implementation does not exist.
    """
    _check(value, value_precision, key, query, decay, process_noise, initial_state)
    batch, length, channels = value.shape
    if segments is not None:
        segments.check(_NAME, batch, length)
    choice = choose(_NAME, implementation, IMPLEMENTATIONS, value.device)
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    tensors = [t.to(dtype) for t in (value, value_precision, key, query, decay, process_noise)]
    # Raised by a constant: the gradient passes, nothing dies at the floor.
    tensors[5] = tensors[5] + (NOISE_FLOOR - tensors[5].detach()).clamp_min(0)
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
        return mean.to(value.dtype), variance.to(value.dtype), state
    segments = segments or Segments()
    reset, valid = (None if t is None else t.expand(batch, length) for t in segments)
    if valid is not None:
        # Whatever stands at padding is discarded.
        tensors[:4] = [torch.where(valid[..., None], t, 0) for t in tensors[:4]]
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (*tensors, precision, information))
    mean, variance, precision, information, *_ = _forward(
        *tensors, reset, valid, precision, information, decode_from_prior, keep
    )
    return mean.to(value.dtype), variance.to(value.dtype), KLAState(precision, information)


def _check(
    value: Tensor,
    value_precision: Tensor,
    key: Tensor,
    query: Tensor,
    decay: Tensor,
    process_noise: Tensor,
    initial_state: KLAState | None,
) -> None:
    if value.ndim != 3 or value.shape[1] < 1 or not value.is_floating_point():
        raise ValueError(
            f"{_NAME}: `value` must be a float tensor of shape (B, T >= 1, M), got {tuple(value.shape)} {value.dtype}."
        )
    batch, length, channels = value.shape
    if key.ndim != 3 or tuple(key.shape[:2]) != (batch, length):
        raise ValueError(f"{_NAME}: `key` must have shape ({batch}, {length}, S), got {tuple(key.shape)}.")
    states = key.shape[-1]
    wanted = {
        "value_precision": (value_precision, (batch, length, channels)),
        "query": (query, (batch, length, states)),
        "decay": (decay, (channels, states)),
        "process_noise": (process_noise, (channels, states)),
    }
    if initial_state is not None:
        wanted["initial_state.precision"] = (initial_state.precision, (batch, channels, states))
        wanted["initial_state.information"] = (initial_state.information, (batch, channels, states))
    for name, (tensor, shape) in wanted.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{_NAME}: `{name}` must have shape {shape}, got {tuple(tensor.shape)}.")


@torch.library.custom_op("kalman_kernels::kla_chunked", mutates_args=())
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = Inputs(value, value_precision, key, query, decay, process_noise, reset, valid)
    with torch.autocast(value.device.type, enabled=False):
        return kla_chunked_forward(inputs, precision, information, prior, keep)


@torch.library.custom_op("kalman_kernels::kla_chunked_backward", mutates_args=())
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
    outputs = torch.empty_like(value), torch.empty_like(value), torch.empty_like(precision), torch.empty_like(precision)
    if not rest[-1]:
        return *outputs, precision.new_empty(0), precision.new_empty(0)
    kept = precision.new_empty(block_count(value, key.shape[-1]), *precision.shape)
    return *outputs, kept, torch.empty_like(kept)


@_backward.register_fake
def _backward_fake(value, value_precision, key, query, decay, process_noise, *rest):
    leaves = (value, value_precision, key, query, decay, process_noise, rest[6], rest[7])
    return tuple(torch.empty_like(t) for t in leaves)


def _setup_context(ctx, inputs, output):
    *tensors, _, _, prior, _ = inputs
    ctx.prior = prior
    ctx.save_for_backward(*tensors, *output[4:])


def _autograd_backward(ctx, *cotangents):
    gradients = _backward(*ctx.saved_tensors, *(c.contiguous() for c in cotangents[:4]), ctx.prior)
    return *gradients[:6], None, None, *gradients[6:], None, None


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
