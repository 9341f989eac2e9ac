"""Short causal depthwise convolution with state, packed segments and padding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ..dispatch import HAS_TRITON, NAMESPACE, Implementation, choose
from ..numerics import unit_norm
from ..segments import Segments
from .reference import causal_conv_reference

if HAS_TRITON or TYPE_CHECKING:
    from .triton_conv import conv_triton_backward, conv_triton_forward

__all__ = ["IMPLEMENTATIONS", "causal_conv"]

IMPLEMENTATIONS = ("triton", "torch", "reference") if HAS_TRITON else ("torch", "reference")


def causal_conv(
    inputs: Tensor,
    weight: Tensor,
    initial_state: Tensor | None = None,
    segments: Segments | None = None,
    implementation: Implementation = "auto",
    activation: Literal["silu"] | None = None,
    unit_width: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal depthwise convolution over the last K tokens of the same sequence.

        y_t[c] = sum_{l=0}^{K-1} weight[c, K-1-l] * x_{t-l}[c]
        y_t <- SiLU(y_t)                                             with activation="silu"
        y_t[g] <- y_t[g] / (||y_t[g]|| + 1e-6)                       for every group g of `unit_width` channels

    "The token l steps before" skips padded positions and does not look past the start of a packed segment; before
    the first token of a row it looks into `initial_state`.

    Args:
        inputs: (B, T, C), any float dtype, T >= 1.
        weight: (C, K), the last tap is the current token (the layout of `nn.Conv1d(groups=C).weight[:, 0]`).
        initial_state: (B, C, K-1), the K-1 tokens before the first, oldest first; zeros when None.
        segments: packed sequences and padding.
        implementation: "auto", "triton" (CUDA, without padding), "torch" or "reference".
        activation: applied to the convolved values.
        unit_width: channels of a group that is brought to norm 1, after the activation; a divisor of C.

    Returns:
        `(outputs, final_state)`: (B, T, C) in the dtype of `inputs`, zero at padding, and (B, C, K-1), the last K-1
        tokens to carry into the next call.

    Raises:
        ValueError: a shape does not match.
        NotImplementedError: the implementation does not exist.
    """
    _check(inputs, weight, initial_state, segments)
    if activation not in (None, "silu"):
        raise ValueError(f"causal_conv: `activation` must be 'silu' or None, got {activation!r}.")
    if unit_width is not None and (unit_width < 1 or inputs.shape[2] % unit_width):
        raise ValueError(f"causal_conv: `unit_width` must divide the {inputs.shape[2]} channels, got {unit_width}.")
    segments = segments or Segments()
    refusal = "padding" if segments.valid is not None else "float64" if inputs.dtype == torch.float64 else None
    choice = choose("causal_conv", implementation, IMPLEMENTATIONS, inputs.device, refusal)
    if choice.implementation == "triton":
        numbers = segments.numbers()
        numbers = None if numbers is None else numbers.expand(inputs.shape[:2])
        return (
            _forward(
                inputs.contiguous(),
                weight.contiguous(),
                None if initial_state is None else initial_state.contiguous(),
                None if numbers is None else numbers.to(torch.int32).contiguous(),
                activation is not None,
                unit_width or 0,
            ),
            _final_state(inputs, initial_state, numbers, weight.shape[1] - 1),
        )
    if choice.implementation == "reference":
        outputs, state = causal_conv_reference(inputs, weight, initial_state, segments)
    else:
        outputs, state = _causal_conv_torch(inputs, weight, initial_state, segments)
    if activation is not None:
        outputs = torch.nn.functional.silu(outputs)
    if unit_width is not None:
        outputs = unit_norm(outputs.unflatten(-1, (-1, unit_width))).flatten(-2)
    return outputs, state


def _final_state(inputs: Tensor, past: Tensor | None, numbers: Tensor | None, context: int) -> Tensor:
    """The last `context` tokens of the row's last sequence, (B, C, context), of rows without padding."""
    length = inputs.shape[1]
    if length < context:
        if past is None:
            past = inputs.new_zeros(inputs.shape[0], inputs.shape[2], context)
        inputs = torch.cat([past.to(inputs.dtype).transpose(1, 2)[:, length:], inputs], dim=1)
        if numbers is not None:
            numbers = torch.nn.functional.pad(numbers, (context - length, 0))
    start = inputs.shape[1] - context
    tail = inputs[:, start:]
    if numbers is not None:
        tail = torch.where((numbers[:, start:] == numbers[:, -1:])[..., None], tail, 0)
    return tail.transpose(1, 2)


@torch.library.custom_op(f"{NAMESPACE}::causal_conv", mutates_args=())
def _forward(
    inputs: Tensor, weight: Tensor, past: Tensor | None, numbers: Tensor | None, silu: bool, unit_width: int
) -> Tensor:
    return conv_triton_forward(inputs, weight, past, numbers, silu, unit_width)


@torch.library.custom_op(f"{NAMESPACE}::causal_conv_backward", mutates_args=())
def _backward(
    inputs: Tensor,
    weight: Tensor,
    past: Tensor | None,
    numbers: Tensor | None,
    d_outputs: Tensor,
    silu: bool,
    unit_width: int,
) -> tuple[Tensor, Tensor, Tensor]:
    d_inputs, d_weight, d_past = conv_triton_backward(inputs, weight, past, numbers, d_outputs, silu, unit_width)
    return d_inputs, d_weight, inputs.new_empty(0) if d_past is None else d_past


@_forward.register_fake
def _forward_fake(inputs, *_):
    return torch.empty_like(inputs)


@_backward.register_fake
def _backward_fake(inputs, weight, past, *_):
    return (
        torch.empty_like(inputs),
        torch.empty_like(weight),
        inputs.new_empty(0) if past is None else torch.empty_like(past),
    )


def _setup_context(ctx, inputs, output):
    *tensors, silu, unit_width = inputs
    ctx.save_for_backward(*tensors)
    ctx.options = silu, unit_width


def _autograd_backward(ctx, d_outputs):
    saved = ctx.saved_tensors  # unpacked once: activation checkpointing allows no more
    d_inputs, d_weight, d_past = _backward(*saved, d_outputs.contiguous(), *ctx.options)
    return d_inputs, d_weight, None if saved[2] is None else d_past, None, None, None


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)


def _check(inputs: Tensor, weight: Tensor, initial_state: Tensor | None, segments: Segments | None) -> None:
    if inputs.ndim != 3 or inputs.shape[1] < 1:
        raise ValueError(f"causal_conv: `inputs` must have shape (B, T >= 1, C), got {tuple(inputs.shape)}.")
    batch, length, channels = inputs.shape
    if weight.ndim != 2 or weight.shape[0] != channels or weight.shape[1] < 1:
        raise ValueError(
            f"causal_conv: `weight` must have shape ({channels}, K >= 1) to match `inputs`, got {tuple(weight.shape)}."
        )
    wanted = (batch, channels, weight.shape[1] - 1)
    if initial_state is not None and tuple(initial_state.shape) != wanted:
        raise ValueError(f"causal_conv: `initial_state` must have shape {wanted}, got {tuple(initial_state.shape)}.")
    if segments is not None:
        segments.check("causal_conv", batch, length)


def _causal_conv_torch(
    inputs: Tensor, weight: Tensor, initial_state: Tensor | None, segments: Segments
) -> tuple[Tensor, Tensor]:
    batch, length, channels = inputs.shape
    context = weight.shape[1] - 1
    if initial_state is None:
        past = inputs.new_zeros(batch, context, channels)
    else:
        past = initial_state.to(inputs.dtype).transpose(1, 2)
    line = torch.cat([past, inputs], dim=1)  # (B, K-1+T, C)
    numbers = segments.numbers()
    if numbers is not None:
        numbers = torch.nn.functional.pad(numbers.expand(batch, length), (context, 0))
    if segments.valid is None:
        return _slide(line, numbers, weight), _last_tokens(line, numbers, context).transpose(1, 2)

    # Padding moves to the front (a stable sort keeps the order of the tokens): the past then touches the first token.
    valid = torch.nn.functional.pad(segments.valid.expand(batch, length), (context, 0), value=True)
    order = valid.byte().argsort(dim=1, stable=True)
    line = torch.where(valid[..., None], line, 0).gather(1, order[..., None].expand_as(line))
    if numbers is not None:
        numbers = numbers.gather(1, order)
    outputs = _slide(torch.nn.functional.pad(line, (0, 0, context, 0)), _pad_front(numbers, context), weight)
    back = order.argsort(dim=1)[..., None].expand_as(outputs)
    outputs = torch.where(valid[..., None], outputs.gather(1, back), 0)[:, context:]
    return outputs, _last_tokens(line, numbers, context).transpose(1, 2)


def _pad_front(numbers: Tensor | None, context: int) -> Tensor | None:
    return None if numbers is None else torch.nn.functional.pad(numbers, (context, 0), value=-1)


def _last_tokens(line: Tensor, numbers: Tensor | None, context: int) -> Tensor:
    """The last `context` tokens; a token of an earlier segment than the row's last one is no context: zero."""
    tail = line[:, line.shape[1] - context :]
    if numbers is None:
        return tail
    last = numbers.max(dim=1, keepdim=True).values
    return torch.where((numbers[:, line.shape[1] - context :] == last)[..., None], tail, 0)


def _slide(line: Tensor, numbers: Tensor | None, weight: Tensor) -> Tensor:
    """Convolve (B, K-1+T, C) to (B, T, C); a tap reaches only tokens with the same segment number."""
    taps = weight.shape[1]
    length = line.shape[1] - taps + 1
    weight = weight.to(line.dtype)
    outputs = line[:, taps - 1 :] * weight[:, taps - 1]
    for tap in range(taps - 1):
        term = line[:, tap : tap + length]
        if numbers is not None:
            term = torch.where((numbers[:, tap : tap + length] == numbers[:, taps - 1 :])[..., None], term, 0)
        outputs = torch.addcmul(outputs, term, weight[:, tap])
    return outputs
