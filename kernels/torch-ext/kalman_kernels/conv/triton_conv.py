"""Short causal depthwise convolution in Triton, with what follows it in a recurrent layer: SiLU and unit norm."""

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

__all__ = ["conv_triton_backward", "conv_triton_forward"]

# Tokens of one program, and channels where no norm asks for a width.
TOKENS, CHANNELS = (8, 8) if INTERPRETED else (32, 64)


@triton.jit
def _tap(
    inputs,
    past,
    numbers,
    batch,
    token,
    channel,
    mask,
    length,
    channels,
    lag,
    HAS_STATE: tl.constexpr,
    PACKED: tl.constexpr,
    TAPS: tl.constexpr,
):
    """x_{t-lag}, (tokens, channels) float32: of the same sequence, from the past before the first token, else 0."""
    source = token - lag
    row = (source >= 0) & (token < length)
    if PACKED:
        own = tl.load(numbers + batch * length + token, mask=token < length, other=0)
        theirs = tl.load(numbers + batch * length + source, mask=row, other=-1)
        row = row & (own == theirs)
    x = tl.load(
        inputs + (batch * length + source)[:, None] * channels + channel[None, :], mask=row[:, None] & mask, other=0.0
    ).to(tl.float32)
    if HAS_STATE:
        row = (source < 0) & (token < length)
        if PACKED:
            row = row & (own == 0)
        place = (batch * channels + channel)[None, :] * (TAPS - 1) + (TAPS - 1 + source)[:, None]
        x += tl.load(past + place, mask=row[:, None] & mask, other=0.0).to(tl.float32)
    return x


@triton.jit
def _convolved(
    inputs,
    weight,
    past,
    numbers,
    batch,
    token,
    channel,
    inside,
    length,
    channels,
    HAS_STATE: tl.constexpr,
    PACKED: tl.constexpr,
    TAPS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The convolution alone, (TOKENS, BLOCK) float32."""
    total = tl.zeros((TOKENS, BLOCK), tl.float32)
    mask = inside[None, :]
    for lag in tl.static_range(TAPS):
        tap = tl.load(weight + channel * TAPS + (TAPS - 1 - lag), mask=inside, other=0.0).to(tl.float32)
        x = _tap(inputs, past, numbers, batch, token, channel, mask, length, channels, lag, HAS_STATE, PACKED, TAPS)
        total += x * tap[None, :]
    return total


@triton.jit(do_not_specialize=["length", "tiles"])
def conv_kernel(
    inputs,
    weight,
    past,
    numbers,
    outputs,
    length,
    tiles,
    channels,
    HAS_STATE: tl.constexpr,
    PACKED: tl.constexpr,
    SILU: tl.constexpr,
    UNIT: tl.constexpr,
    TAPS: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """WIDTH channels of TOKENS tokens of one row."""
    program = tl.program_id(0).to(tl.int64)
    batch, token = program // tiles, (program % tiles) * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, BLOCK)
    channel = tl.program_id(1) * WIDTH + column
    inside = (column < WIDTH) & (channel < channels)
    total = _convolved(
        inputs,
        weight,
        past,
        numbers,
        batch,
        token,
        channel,
        inside,
        length,
        channels,
        HAS_STATE,
        PACKED,
        TAPS,
        TOKENS,
        BLOCK,
    )
    if SILU:
        total = total / (1.0 + tl.exp(-total))
    if UNIT:
        total = total / (tl.sqrt(tl.sum(total * total, 1)) + 1e-6)[:, None]
    place = (batch * length + token)[:, None] * channels + channel[None, :]
    tl.store(outputs + place, total.to(outputs.dtype.element_ty), mask=(token < length)[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["length", "tiles"])
def conv_adjoint_kernel(
    inputs,
    weight,
    past,
    numbers,
    d_outputs,
    d_convolved,
    d_weight,
    length,
    tiles,
    channels,
    HAS_STATE: tl.constexpr,
    PACKED: tl.constexpr,
    SILU: tl.constexpr,
    UNIT: tl.constexpr,
    TAPS: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Through norm and SiLU to the convolved values, and this tile's part of the taps' gradient, (B tiles, C, TAPS)."""
    program = tl.program_id(0).to(tl.int64)
    batch, token = program // tiles, (program % tiles) * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, BLOCK)
    channel = tl.program_id(1) * WIDTH + column
    inside = (column < WIDTH) & (channel < channels)
    mask = inside[None, :]
    place = (batch * length + token)[:, None] * channels + channel[None, :]
    there = (token < length)[:, None] & mask
    gradient = tl.load(d_outputs + place, mask=there, other=0.0).to(tl.float32)
    if SILU | UNIT:
        total = _convolved(
            inputs,
            weight,
            past,
            numbers,
            batch,
            token,
            channel,
            inside,
            length,
            channels,
            HAS_STATE,
            PACKED,
            TAPS,
            TOKENS,
            BLOCK,
        )
        sigmoid = 1.0 / (1.0 + tl.exp(-total))
        value = total * sigmoid if SILU else total
        if UNIT:
            norm = tl.sqrt(tl.sum(value * value, 1))
            inverse = 1.0 / (norm + 1e-6)
            along = tl.sum(value * gradient, 1) * inverse * inverse * tl.where(norm > 0, 1.0 / norm, 0.0)
            gradient = gradient * inverse[:, None] - value * along[:, None]
        if SILU:
            gradient = gradient * sigmoid * (1.0 + total * (1.0 - sigmoid))
    tl.store(d_convolved + place, gradient.to(d_convolved.dtype.element_ty), mask=there)
    for lag in tl.static_range(TAPS):
        x = _tap(inputs, past, numbers, batch, token, channel, mask, length, channels, lag, HAS_STATE, PACKED, TAPS)
        target = d_weight + (program * channels + channel) * TAPS + (TAPS - 1 - lag)
        tl.store(target, tl.sum(x * gradient, 0), mask=inside)


@triton.jit(do_not_specialize=["length", "tiles"])
def conv_transposed_kernel(
    d_convolved,
    weight,
    numbers,
    d_inputs,
    length,
    tiles,
    channels,
    PACKED: tl.constexpr,
    TAPS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dx_t = sum_l weight[c, TAPS-1-l] d_convolved_{t+l}, of the same sequence."""
    program = tl.program_id(0).to(tl.int64)
    batch, token = program // tiles, (program % tiles) * TOKENS + tl.arange(0, TOKENS)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < channels
    total = tl.zeros((TOKENS, BLOCK), tl.float32)
    for lag in tl.static_range(TAPS):
        row = token + lag < length
        if PACKED:
            own = tl.load(numbers + batch * length + token, mask=token < length, other=-1)
            row = row & (own == tl.load(numbers + batch * length + token + lag, mask=row, other=-2))
        tap = tl.load(weight + channel * TAPS + (TAPS - 1 - lag), mask=inside, other=0.0).to(tl.float32)
        place = (batch * length + token + lag)[:, None] * channels + channel[None, :]
        total += (
            tl.load(d_convolved + place, mask=row[:, None] & inside[None, :], other=0.0).to(tl.float32) * tap[None, :]
        )
    place = (batch * length + token)[:, None] * channels + channel[None, :]
    tl.store(d_inputs + place, total.to(d_inputs.dtype.element_ty), mask=(token < length)[:, None] & inside[None, :])


def _sizes(inputs: Tensor, unit_width: int) -> tuple[int, int, int, int]:
    """Tiles of a row, blocks of channels, channels of a block, and the same as a power of two."""
    width = unit_width or CHANNELS
    return (
        triton.cdiv(inputs.shape[1], TOKENS),
        triton.cdiv(inputs.shape[2], width),
        width,
        triton.next_power_of_2(width),
    )


@on_own_device
def conv_triton_forward(
    inputs: Tensor, weight: Tensor, past: Tensor | None, numbers: Tensor | None, silu: bool, unit_width: int
) -> Tensor:
    """unit(silu(conv(inputs))), each optional; (B, T, C) contiguous, `numbers` int32, `unit_width` 0 for no norm."""
    batch, length, channels = inputs.shape
    tiles, blocks, width, block = _sizes(inputs, unit_width)
    outputs = torch.empty_like(inputs)
    conv_kernel[(batch * tiles, blocks)](
        inputs,
        weight,
        inputs if past is None else past,
        inputs if numbers is None else numbers,
        outputs,
        length,
        tiles,
        channels,
        HAS_STATE=past is not None,
        PACKED=numbers is not None,
        SILU=silu,
        UNIT=unit_width > 0,
        TAPS=weight.shape[1],
        WIDTH=width,
        TOKENS=TOKENS,
        BLOCK=block,
        num_warps=4,
    )
    return outputs


@on_own_device
def conv_triton_backward(
    inputs: Tensor,
    weight: Tensor,
    past: Tensor | None,
    numbers: Tensor | None,
    d_outputs: Tensor,
    silu: bool,
    unit_width: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of inputs, weight and past."""
    batch, length, channels = inputs.shape
    taps = weight.shape[1]
    tiles, blocks, width, block = _sizes(inputs, unit_width)
    packed = numbers is not None
    d_convolved, d_inputs = torch.empty_like(d_outputs), torch.empty_like(inputs)
    partial = torch.empty(batch * tiles, channels, taps, dtype=torch.float32, device=inputs.device)
    conv_adjoint_kernel[(batch * tiles, blocks)](
        inputs,
        weight,
        inputs if past is None else past,
        inputs if numbers is None else numbers,
        d_outputs,
        d_convolved,
        partial,
        length,
        tiles,
        channels,
        HAS_STATE=past is not None,
        PACKED=packed,
        SILU=silu,
        UNIT=unit_width > 0,
        TAPS=taps,
        WIDTH=width,
        TOKENS=TOKENS,
        BLOCK=block,
        num_warps=4,
    )
    conv_transposed_kernel[(batch * tiles, triton.cdiv(channels, CHANNELS))](
        d_convolved,
        weight,
        inputs if numbers is None else numbers,
        d_inputs,
        length,
        tiles,
        channels,
        PACKED=packed,
        TAPS=taps,
        TOKENS=TOKENS,
        BLOCK=triton.next_power_of_2(CHANNELS),
        num_warps=4,
    )
    d_past = None
    if past is not None:
        # Only the first tokens look into the past.
        d_past = torch.zeros_like(past, dtype=torch.float32)
        for token in range(min(taps - 1, length)):
            gradient = d_convolved[:, token].float()
            if numbers is not None:
                gradient = torch.where((numbers[:, token] == 0)[:, None], gradient, 0)
            for lag in range(token + 1, taps):
                d_past[..., taps - 1 + token - lag] += gradient * weight[:, taps - 1 - lag].float()
        d_past = d_past.to(past.dtype)
    return d_inputs, partial.sum(0).to(weight.dtype), d_past
