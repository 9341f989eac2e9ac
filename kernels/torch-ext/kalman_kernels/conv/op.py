"""Short causal depthwise convolution with state, packed segments and padding."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import Implementation, choose
from ..segments import Segments
from .reference import causal_conv_reference

__all__ = ["IMPLEMENTATIONS", "causal_conv"]

IMPLEMENTATIONS = ("torch", "reference")


def causal_conv(
    inputs: Tensor,
    weight: Tensor,
    initial_state: Tensor | None = None,
    segments: Segments | None = None,
    implementation: Implementation = "auto",
) -> tuple[Tensor, Tensor]:
    """Causal depthwise convolution over the last K tokens of the same sequence.

        y_t[c] = sum_{l=0}^{K-1} weight[c, K-1-l] * x_{t-l}[c]

    "The token l steps before" skips padded positions and does not look past the start of a packed segment; before
    the first token of a row it looks into `initial_state`.

    Args:
        inputs: (B, T, C), any float dtype, T >= 1.
        weight: (C, K), the last tap is the current token (the layout of `nn.Conv1d(groups=C).weight[:, 0]`).
        initial_state: (B, C, K-1), the K-1 tokens before the first, oldest first; zeros when None.
        segments: packed sequences and padding.
        implementation: "auto", "torch" or "reference".

    Returns:
        `(outputs, final_state)`: (B, T, C) in the dtype of `inputs`, zero at padding, and (B, C, K-1), the last K-1
        tokens to carry into the next call.

    Raises:
        ValueError: a shape does not match.
        NotImplementedError: the implementation does not exist.
    """
    _check(inputs, weight, initial_state, segments)
    if choose("causal_conv", implementation, IMPLEMENTATIONS, inputs.device).implementation == "reference":
        return causal_conv_reference(inputs, weight, initial_state, segments)
    return _causal_conv_torch(inputs, weight, initial_state, segments or Segments())


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
