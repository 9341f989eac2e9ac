"""RMSNorm with an output gate in Triton: one launch forward, one and a sum backward."""

# Triton turns annotations and defaults of jitted functions into objects of its own.
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false
# pyright: reportReturnType=false, reportAssignmentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import INTERPRETED
from ..jit import on_own_device

__all__ = ["norm_triton_backward", "norm_triton_forward"]

# Rows of one program.
ROWS = 16 if INTERPRETED else 32


@triton.jit
def _load(pointer, row, column, mask, WIDTH: tl.constexpr):
    place = row[:, None] * WIDTH + column[None, :]
    return tl.load(pointer + place, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["rows", "eps"])
def norm_kernel(
    inputs,
    gate,
    weight,
    outputs,
    rows,
    eps,
    GATED: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS rows of x / sqrt(mean x^2 + eps) * weight * SiLU(gate)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (column < WIDTH)[None, :]
    x = _load(inputs, row, column, mask, WIDTH)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, 1) / WIDTH + eps)
    y = x * scale[:, None] * tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)[None, :]
    if GATED:
        g = _load(gate, row, column, mask, WIDTH)
        y = y * g / (1.0 + tl.exp(-g))
    tl.store(outputs + row[:, None] * WIDTH + column[None, :], y.to(outputs.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "eps"])
def norm_adjoint_kernel(
    inputs,
    gate,
    weight,
    d_outputs,
    d_inputs,
    d_gate,
    d_weight,
    rows,
    eps,
    GATED: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of inputs and gate, and this program's part of the weight's, (programs, WIDTH)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (column < WIDTH)[None, :]
    place = row[:, None] * WIDTH + column[None, :]
    x = _load(inputs, row, column, mask, WIDTH)
    dy = _load(d_outputs, row, column, mask, WIDTH)
    w = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)[None, :]
    scale = (1.0 / tl.sqrt(tl.sum(x * x, 1) / WIDTH + eps))[:, None]
    normal = x * scale
    if GATED:
        g = _load(gate, row, column, mask, WIDTH)
        sigmoid = 1.0 / (1.0 + tl.exp(-g))
        d_g = dy * normal * w * sigmoid * (1.0 + g * (1.0 - sigmoid))
        tl.store(d_gate + place, d_g.to(d_gate.dtype.element_ty), mask=mask)
        dy = dy * g * sigmoid
    tl.store(d_weight + tl.program_id(0).to(tl.int64) * WIDTH + column, tl.sum(dy * normal, 0), mask=column < WIDTH)
    dy = dy * w
    dx = scale * (dy - normal * (tl.sum(dy * normal, 1) / WIDTH)[:, None])
    tl.store(d_inputs + place, dx.to(d_inputs.dtype.element_ty), mask=mask)


@on_own_device
def norm_triton_forward(inputs: Tensor, gate: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """The norm of contiguous (..., D)."""
    width = inputs.shape[-1]
    rows = inputs.numel() // width
    outputs = torch.empty_like(inputs)
    norm_kernel[(triton.cdiv(rows, ROWS),)](
        inputs,
        inputs if gate is None else gate,
        weight,
        outputs,
        rows,
        eps,
        GATED=gate is not None,
        WIDTH=width,
        ROWS=ROWS,
        BLOCK=triton.next_power_of_2(width),
        num_warps=4,
    )
    return outputs


@on_own_device
def norm_triton_backward(
    inputs: Tensor, gate: Tensor | None, weight: Tensor, d_outputs: Tensor, eps: float
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of inputs, gate and weight."""
    width = inputs.shape[-1]
    rows = inputs.numel() // width
    programs = triton.cdiv(rows, ROWS)
    d_inputs, d_gate = torch.empty_like(inputs), None if gate is None else torch.empty_like(gate)
    partial = torch.empty(programs, width, dtype=torch.float32, device=inputs.device)
    norm_adjoint_kernel[(programs,)](
        inputs,
        inputs if gate is None else gate,
        weight,
        d_outputs,
        d_inputs,
        d_inputs if d_gate is None else d_gate,
        partial,
        rows,
        eps,
        GATED=gate is not None,
        WIDTH=width,
        ROWS=ROWS,
        BLOCK=triton.next_power_of_2(width),
        num_warps=4,
    )
    return d_inputs, d_gate, partial.sum(0).to(weight.dtype)
