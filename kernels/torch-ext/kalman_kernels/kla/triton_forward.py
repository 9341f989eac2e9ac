"""Kalman Linear Attention forward in Triton: spans of time side by side, a tile of filters in each warp.

A program walks BM channels with all their states through a span of tokens, states along registers and channels along
lanes. Where rows and channels are few, spans are walked twice: once as maps of the belief before them (README.md,
eq. 5), once from the belief that they really start with.
"""

# Triton turns annotations and defaults of jitted functions into objects of its own.
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false
# pyright: reportReturnType=false, reportAssignmentType=false

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import INTERPRETED
from ..jit import long, on_own_device

__all__ = ["CHECKPOINT", "KEPT", "TritonInputs", "beliefs", "kla_triton_forward", "tile_size"]

# Whether reciprocals are the processor's own, right to 1 unit in the last place.
FAST = tl.constexpr(not INTERPRETED and torch.version.cuda is not None)
# Programs that fill a device, and the fewest tokens of a span.
PROGRAMS, SPAN = 2048, 64
# Filters of a program.
TILE = 256
# Tokens between two beliefs kept for the backward pass, and between two that it computes again from them: as many as it
# can hold in registers.
KEPT, CHECKPOINT = 64, 4


class TritonInputs(NamedTuple):
    """Contiguous inputs in their own dtypes; decay and noise in float32."""

    value: Tensor  # (B, T, M)
    value_precision: Tensor  # (B, T, M)
    key: Tensor  # (B, T, S)
    query: Tensor  # (B, T, S)
    decay: Tensor  # (M, S)
    process_noise: Tensor  # (M, S)
    marks: Tensor | None  # (B, T) int8: 1 where a sequence starts, plus 2 at padding


@triton.jit
def reciprocal(x):
    """1 / x of a positive float32."""
    if FAST:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def tile_of(batches, channels, states, BS: tl.constexpr, BM: tl.constexpr):
    """The filters of a program: span, row, states, channels, which of them exist, offsets in (M, S)."""
    program, blocks = tl.program_id(0), tl.cdiv(channels, BM)
    state, channel = tl.arange(0, BS), (program % blocks) * BM + tl.arange(0, BM)
    inside = (state < states)[:, None] & (channel < channels)[None, :]
    flat = channel[None, :] * states + state[:, None]
    return program // (batches * blocks), (program // blocks) % batches, state, channel, inside, flat


@triton.jit
def advance(lam, eta, k, weight, v, a, squared, p, mark, MARKED: tl.constexpr):
    """The belief after a token, README eqs. 1 and 2; padding is the caller's."""
    if MARKED:
        lam = tl.where((mark & 1) > 0, 1.0, lam)
        eta = tl.where((mark & 1) > 0, 0.0, eta)
    inverse = reciprocal(squared + p * lam)
    seen = k[:, None] * weight[None, :]
    return lam * inverse + seen * k[:, None], a * inverse * eta + seen * v[None, :]


@triton.jit
def load_channels(pointer, row, token, channel, length, channels, limit):
    """(BM,) of a (B, T, M) tensor in float32; 0 from token `limit` on."""
    place = (long(row) * length + token) * channels + channel
    return tl.load(pointer + place, mask=channel < tl.where(token < limit, channels, 0), other=0.0).to(tl.float32)


@triton.jit
def load_states(pointer, row, token, state, length, states, limit):
    """(S,) of a (B, T, S) tensor in float32; 0 from token `limit` on."""
    place = (long(row) * length + token) * states + state
    return tl.load(pointer + place, mask=state < tl.where(token < limit, states, 0), other=0.0).to(tl.float32)


@triton.jit
def load_mark(marks, row, token, length):
    return tl.load(marks + long(row) * length + token, mask=token < length, other=2).to(tl.int32)


@triton.jit(do_not_specialize=["length", "begin", "end", "span", "batches"])
def walk_kernel(
    value,
    observed,
    key,
    query,
    decay,
    noise,
    marks,
    precision,
    information,
    mean_out,
    variance_out,
    kept_precision,
    kept_information,
    final_precision,
    final_information,
    length,
    begin,
    end,
    span,
    batches,
    channels,
    states,
    HAS_STATE: tl.constexpr,
    RESUME: tl.constexpr,
    MARKED: tl.constexpr,
    PRIOR: tl.constexpr,
    SPREAD: tl.constexpr,
    KEEP: tl.constexpr,
    STEPS: tl.constexpr,
    BS: tl.constexpr,
    BM: tl.constexpr,
):
    """One span of the tokens from `begin` to `end`, BM channels; README eqs. 1-4.

    Starts from beliefs (spans, B, M, S); KEEP: writes those before every STEPS-th token, (chunks, B, M, S). RESUME (a
    number of tokens): starts from beliefs before every RESUME-th token of the whole row, and only keeps.
    """
    number, row, state, channel, inside, flat = tile_of(batches, channels, states, BS, BM)
    size = long(channels * states)
    a = tl.load(decay + flat, mask=inside, other=1.0)
    p = tl.load(noise + flat, mask=inside, other=1.0)
    squared = a * a
    lam = tl.full((BS, BM), 1.0, tl.float32)
    eta = tl.zeros((BS, BM), tl.float32)
    if HAS_STATE:
        index = (begin + number * span) // RESUME if RESUME else number
        belief = (long(index) * batches + row) * size + flat
        lam = tl.load(precision + belief, mask=inside, other=1.0)
        eta = tl.load(information + belief, mask=inside, other=0.0)
    first = begin + number * span
    last = tl.minimum(first + span, end)
    v = load_channels(value, row, first, channel, length, channels, last)
    weight = load_channels(observed, row, first, channel, length, channels, last)
    k = load_states(key, row, first, state, length, states, last)
    q = load_states(query, row, first, state, length, states, last)
    for block in range(0, tl.cdiv(last - first, STEPS)):
        start_token = first + block * STEPS
        if KEEP:
            kept = (long((start_token - begin) // STEPS) * batches + row) * size + flat
            tl.store(kept_precision + kept, lam, mask=inside)
            tl.store(kept_information + kept, eta, mask=inside)
        for token in range(start_token, tl.minimum(start_token + STEPS, last)):
            # The next token is under way while this one is worked on.
            next_v = load_channels(value, row, token + 1, channel, length, channels, last)
            next_weight = load_channels(observed, row, token + 1, channel, length, channels, last)
            next_k = load_states(key, row, token + 1, state, length, states, last)
            next_q = load_states(query, row, token + 1, state, length, states, last)
            old_lam, old_eta = lam, eta
            mark = load_mark(marks, row, token, length) if MARKED else 0
            lam, eta = advance(lam, eta, k, weight, v, a, squared, p, mark, MARKED)
            if not RESUME:
                variance = reciprocal(lam)
                mean = eta * variance
                if PRIOR:
                    mean = a * mean
                    variance = squared * variance + p
                y = tl.sum(q[:, None] * mean, 0)
                if MARKED:
                    y = tl.where(mark < 2, y, 0.0)
                place = (long(row) * length + token) * channels + channel
                tl.store(mean_out + place, y.to(mean_out.dtype.element_ty), mask=channel < channels)
                if SPREAD:
                    spread = tl.sum((q * q)[:, None] * variance, 0)
                    if MARKED:
                        spread = tl.where(mark < 2, spread, 0.0)
                    tl.store(variance_out + place, spread.to(variance_out.dtype.element_ty), mask=channel < channels)
            if MARKED:
                lam, eta = tl.where(mark < 2, lam, old_lam), tl.where(mark < 2, eta, old_eta)
            v, weight, k, q = next_v, next_weight, next_k, next_q
    if not RESUME and last == length:
        belief = long(row) * size + flat
        tl.store(final_precision + belief, lam, mask=inside)
        tl.store(final_information + belief, eta, mask=inside)


@triton.jit(do_not_specialize=["length", "span", "batches"])
def maps_kernel(
    value,
    observed,
    key,
    decay,
    noise,
    marks,
    maps,
    length,
    span,
    batches,
    channels,
    states,
    MARKED: tl.constexpr,
    BS: tl.constexpr,
    BM: tl.constexpr,
):
    """A span as a map of the belief before it: seven numbers per filter, (7, spans - 1, B, M, S); README eq. 5.

    The last span is not among the programs: nothing starts from its end, and all others are whole, of an even length.
    """
    number, row, state, channel, inside, flat = tile_of(batches, channels, states, BS, BM)
    decays = tl.load(decay + flat, mask=inside, other=1.0)
    p = tl.load(noise + flat, mask=inside, other=1.0)
    squared = decays * decays
    a = tl.full((BS, BM), 1.0, tl.float32)
    d, g = a, a
    b = tl.zeros((BS, BM), tl.float32)
    c, e, f = b, b, b
    first = number * span
    last = first + span
    v = load_channels(value, row, first, channel, length, channels, last)
    weight = load_channels(observed, row, first, channel, length, channels, last)
    k = load_states(key, row, first, state, length, states, last)
    for pair in range(0, span // 2):
        for second in tl.static_range(2):
            token = first + 2 * pair + second
            next_v = load_channels(value, row, token + 1, channel, length, channels, last)
            next_weight = load_channels(observed, row, token + 1, channel, length, channels, last)
            next_k = load_states(key, row, token + 1, state, length, states, last)
            seen = k[:, None] * weight[None, :]
            added, moved = seen * k[:, None], seen * v[None, :]
            old_a, old_b, old_c, old_d, old_e, old_f, old_g = a, b, c, d, e, f, g
            if MARKED:
                mark = load_mark(marks, row, token, length)
                # Precision 1, information 0, whatever was: N = D, E = 0.
                resets = (mark & 1) > 0
                a, b = tl.where(resets, c, a), tl.where(resets, d, b)
                e, f, g = tl.where(resets, 0.0, e), tl.where(resets, 0.0, f), tl.where(resets, 0.0, g)
            c, d = squared * c + p * a, squared * d + p * b
            a, b = a + added * c, b + added * d
            e, f, g = decays * e + moved * c, decays * f + moved * d, decays * g
            if MARKED:
                valid = mark < 2
                a, b = tl.where(valid, a, old_a), tl.where(valid, b, old_b)
                c, d = tl.where(valid, c, old_c), tl.where(valid, d, old_d)
                e, f, g = tl.where(valid, e, old_e), tl.where(valid, f, old_f), tl.where(valid, g, old_g)
            v, weight, k = next_v, next_weight, next_k
        # A free factor keeps the numbers near 1: an exact power of two.
        total = (a + d).to(tl.int32, bitcast=True) & 0x7F800000
        factor = (0x7F000000 - total).to(tl.float32, bitcast=True)
        a, b, c, d = a * factor, b * factor, c * factor, d * factor
        e, f, g = e * factor, f * factor, g * factor
    size = long(channels * states)
    plane = tl.num_programs(0) // tl.cdiv(channels, BM) * size
    maps += (long(number) * batches + row) * size + flat
    tl.store(maps, a, mask=inside)
    tl.store(maps + plane, b, mask=inside)
    tl.store(maps + 2 * plane, c, mask=inside)
    tl.store(maps + 3 * plane, d, mask=inside)
    tl.store(maps + 4 * plane, e, mask=inside)
    tl.store(maps + 5 * plane, f, mask=inside)
    tl.store(maps + 6 * plane, g, mask=inside)


@triton.jit(do_not_specialize=["spans", "size"])
def apply_maps_kernel(maps, precision, information, starts, spans, size, HAS_STATE: tl.constexpr, BLOCK: tl.constexpr):
    """Beliefs before every span, (2, spans, B, M, S), from the maps of all spans; `size` is B M S.

    A map is (a, b, c, d, e, f, g): N' = a N + b D, D' = c N + d D, E' = e N + f D + g E.
    """
    place = long(tl.program_id(0)) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    lam = tl.full((BLOCK,), 1.0, tl.float32)
    eta = tl.zeros((BLOCK,), tl.float32)
    if HAS_STATE:
        lam = tl.load(precision + place, mask=inside, other=1.0)
        eta = tl.load(information + place, mask=inside, other=0.0)
    tl.store(starts + place, lam, mask=inside)
    tl.store(starts + long(size) * spans + place, eta, mask=inside)
    plane = long(size) * (spans - 1)
    for _ in range(1, spans):
        a = tl.load(maps + place, mask=inside, other=1.0)
        b = tl.load(maps + plane + place, mask=inside, other=0.0)
        c = tl.load(maps + 2 * plane + place, mask=inside, other=0.0)
        d = tl.load(maps + 3 * plane + place, mask=inside, other=1.0)
        e = tl.load(maps + 4 * plane + place, mask=inside, other=0.0)
        f = tl.load(maps + 5 * plane + place, mask=inside, other=0.0)
        g = tl.load(maps + 6 * plane + place, mask=inside, other=0.0)
        scale = 1.0 / (c * lam + d)
        eta = (e * lam + f + g * eta) * scale
        lam = (a * lam + b) * scale
        place += size
        tl.store(starts + place, lam, mask=inside)
        tl.store(starts + plane + size + place, eta, mask=inside)


def tile_size(states: int, channels: int, elements: int) -> tuple[int, int]:
    """(states, channels) of a tile with about `elements` filters."""
    rows = triton.next_power_of_2(states)
    return rows, min(max(1, elements // rows), triton.next_power_of_2(channels))


def span_tokens(length: int, programs: int, wanted: int) -> int:
    """Tokens of a span, a multiple of KEPT, so that there are about `wanted` programs."""
    spans = max(1, min(triton.cdiv(wanted, programs), length // SPAN))
    return triton.cdiv(triton.cdiv(length, spans), KEPT) * KEPT


@on_own_device
def kla_triton_forward(
    inputs: TritonInputs,
    precision: Tensor | None,
    information: Tensor | None,
    prior: bool,
    keep: int,
    spread: bool = True,
    final: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Means and variances (B, T, M) in the dtype of the value, the final belief in float32, and kept beliefs.

    Without `spread` an empty tensor instead of variances. Kept are the beliefs before every `keep`-th token
    (chunks, B, M, S), none when 0; `keep` divides KEPT. `final` are buffers for the final belief, with up to SPAN
    tokens also those of `precision` and `information` themselves.
    """
    batch, length, channels = inputs.value.shape
    states = inputs.key.shape[-1]
    device = inputs.value.device
    rows, width = tile_size(states, channels, TILE)
    programs = batch * -(-channels // width)
    span = span_tokens(length, programs, PROGRAMS)
    spans = -(-length // span)
    shape = (batch, channels, states)
    new = {"dtype": torch.float32, "device": device}
    starts: list[Tensor | None] = [precision, information]
    marks = inputs.value if inputs.marks is None else inputs.marks
    options = {"MARKED": inputs.marks is not None, "BS": rows, "BM": width, "num_warps": 1}
    sizes = (length, span, batch, channels, states)
    if spans > 1:
        maps = torch.empty(7, spans - 1, *shape, **new)
        maps_kernel[(programs * (spans - 1),)](
            *inputs[:3], inputs.decay, inputs.process_noise, marks, maps, *sizes, **options
        )
        before = torch.empty(2, spans, *shape, **new)
        size = batch * channels * states
        apply_maps_kernel[(-(-size // 256),)](
            maps,
            maps if precision is None else precision,
            maps if information is None else information,
            before,
            spans,
            size,
            HAS_STATE=precision is not None,
            BLOCK=256,
            num_warps=2,
        )
        starts = list(before)
        del maps
    mean = torch.empty_like(inputs.value)
    variance = torch.empty_like(inputs.value) if spread else inputs.value.new_empty(0)
    kept = [torch.empty(*((-(-length // keep), *shape) if keep else (0,)), **new) for _ in range(2)]
    ends = final if final is not None else (torch.empty(shape, **new), torch.empty(shape, **new))
    walk_kernel[(programs * spans,)](
        *inputs[:6],
        marks,
        *(inputs.decay if t is None else t for t in starts),
        mean,
        variance,
        *kept,
        *ends,
        length,
        0,
        length,
        *sizes[1:],
        HAS_STATE=starts[0] is not None,
        RESUME=0,
        PRIOR=prior,
        SPREAD=spread,
        KEEP=keep > 0,
        STEPS=keep or KEPT,
        **options,
    )
    return mean, variance, *ends, *kept


def beliefs(
    inputs: TritonInputs, kept: tuple[Tensor, Tensor], begin: int, end: int, prior: bool
) -> tuple[Tensor, Tensor]:
    """Beliefs before every CHECKPOINT-th token from `begin` to `end`, from those before every KEPT-th of the row."""
    batch, length, channels = inputs.value.shape
    states = inputs.key.shape[-1]
    rows, width = tile_size(states, channels, TILE)
    shape = (triton.cdiv(end - begin, CHECKPOINT), batch, channels, states)
    outputs = kept[0].new_empty(shape), kept[0].new_empty(shape)
    unused = inputs.decay
    walk_kernel[(batch * triton.cdiv(channels, width) * triton.cdiv(end - begin, KEPT),)](
        *inputs[:6],
        inputs.value if inputs.marks is None else inputs.marks,
        *kept,
        unused,
        unused,
        *outputs,
        unused,
        unused,
        length,
        begin,
        end,
        KEPT,
        batch,
        channels,
        states,
        HAS_STATE=True,
        RESUME=KEPT,
        PRIOR=prior,
        SPREAD=False,
        KEEP=True,
        STEPS=CHECKPOINT,
        MARKED=inputs.marks is not None,
        BS=rows,
        BM=width,
        num_warps=1,
    )
    return outputs
