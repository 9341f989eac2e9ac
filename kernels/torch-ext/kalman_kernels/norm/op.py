"""RMSNorm with an output gate: validation, dispatch, autograd."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from ..dispatch import HAS_TRITON, NAMESPACE, Implementation, choose
from ..numerics import widen

if HAS_TRITON or TYPE_CHECKING:
    from .triton_norm import norm_triton_backward, norm_triton_forward

__all__ = ["IMPLEMENTATIONS", "gated_rms_norm"]

IMPLEMENTATIONS = ("triton", "torch") if HAS_TRITON else ("torch",)
_NAME = "gated_rms_norm"


def gated_rms_norm(
    inputs: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    eps: float = 1e-6,
    implementation: Implementation = "auto",
) -> Tensor:
    """RMSNorm over the last axis, times a SiLU gate.

        y = x / sqrt(mean(x^2) + eps) * weight * SiLU(gate)

    Args:
        inputs: (..., D), any float dtype; computed in at least float32.
        gate: the shape of `inputs`, or None for no gate.
        weight: (D,).
        eps: added to the mean square.
        implementation: "auto", "triton" (CUDA) or "torch".

    Returns:
        (..., D) in the dtype of `inputs`.

    Raises:
        ValueError: a shape does not match.
        NotImplementedError: the implementation does not exist or cannot serve the call.
    """
    if weight.shape != inputs.shape[-1:]:
        raise ValueError(f"{_NAME}: `weight` must have shape ({inputs.shape[-1]},), got {tuple(weight.shape)}.")
    if gate is not None and gate.shape != inputs.shape:
        raise ValueError(f"{_NAME}: `gate` must have shape {tuple(inputs.shape)}, got {tuple(gate.shape)}.")
    refusal = "float64" if inputs.dtype == torch.float64 else None
    if choose(_NAME, implementation, IMPLEMENTATIONS, inputs.device, refusal).implementation == "triton":
        return _forward(inputs.contiguous(), None if gate is None else gate.contiguous(), weight.contiguous(), eps)
    wide = widen(inputs)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * widen(weight)
    if gate is not None:
        wide = wide * F.silu(widen(gate))
    return wide.to(inputs.dtype)


@torch.library.custom_op(f"{NAMESPACE}::gated_rms_norm", mutates_args=())
def _forward(inputs: Tensor, gate: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    return norm_triton_forward(inputs, gate, weight, eps)


@torch.library.custom_op(f"{NAMESPACE}::gated_rms_norm_backward", mutates_args=())
def _backward(
    inputs: Tensor, gate: Tensor | None, weight: Tensor, d_outputs: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    d_inputs, d_gate, d_weight = norm_triton_backward(inputs, gate, weight, d_outputs, eps)
    return d_inputs, inputs.new_empty(0) if d_gate is None else d_gate, d_weight


@_forward.register_fake
def _forward_fake(inputs, *_):
    return torch.empty_like(inputs)


@_backward.register_fake
def _backward_fake(inputs, gate, weight, *_):
    d_gate = inputs.new_empty(0) if gate is None else torch.empty_like(gate)
    return torch.empty_like(inputs), d_gate, torch.empty_like(weight)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _autograd_backward(ctx, d_outputs):
    inputs, gate, weight = ctx.saved_tensors
    d_inputs, d_gate, d_weight = _backward(inputs, gate, weight, d_outputs.contiguous(), ctx.eps)
    return d_inputs, None if gate is None else d_gate, d_weight, None


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
