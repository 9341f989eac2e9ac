"""Gated KalmaNet for a few tokens in Triton: one launch reads and writes both states once (README.md, eqs. 1-6)."""

# Triton turns annotations and defaults of jitted functions into objects of its own.
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false
# pyright: reportReturnType=false, reportAssignmentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..jit import long, on_own_device
from .mixer import MixerInputs, MixerOptions
from .reference import GKASolver
from .triton_common import TOLERANCE, dot, filled, power_of_two, scaled_rows, solve
from .triton_forward import TritonInputs, chunk_norm, decay_count, method

__all__ = ["gka_triton_mixer_step", "gka_triton_step"]


@triton.jit
def _row(vector, gram):
    """A vector as one row, laid out as the rows of `gram`: sums over it then stay inside a warp."""
    return tl.sum(tl.where(tl.arange(0, gram.shape[0])[:, None] == 0, vector[None, :], 0.0), 0)[None, :]


@triton.jit
def _times(gram, row):
    """gram row^T as a row, gram symmetric."""
    return tl.sum(gram * tl.trans(row), 0)[None, :]


@triton.jit
def _solve(gram, query, iterations, ridge, tolerance, METHOD: tl.constexpr):
    """(gram + ridge ||gram||_F I)^-1 query in float32, gram symmetric; README eqs. 3-5."""
    norm = tl.sqrt(tl.sum(tl.sum(gram * gram, 1), 0))
    ridge = ridge * norm
    query = _row(query, gram)
    x = tl.zeros_like(query)
    step = 0
    if METHOD == 1:
        residual, direction = query, query
        rr = tl.sum(query * query, 1)
        # An empty state (norm 0) is solved by 0.
        enough = tl.where(norm > 0, tolerance * rr, rr)
        busy = tl.max((rr > enough).to(tl.int32), 0)
        while (step < iterations) & (busy > 0):
            image = _times(gram, direction) + ridge * direction
            length = (rr / tl.sum(direction * image, 1))[:, None]
            x += length * direction
            residual -= length * image
            following = tl.sum(residual * residual, 1)
            direction = residual + (following / rr)[:, None] * direction
            rr = following
            busy = tl.max((rr > enough).to(tl.int32), 0)
            step += 1
    if METHOD == 2:
        span = tl.where(norm > 0, 2.0 / (2.0 * ridge + norm), 0.0)
        quarter = 0.0625 * span * span * norm * norm
        omega = 2.0
        change = span * query
        x += change
        while step < iterations:
            omega = 1.0 / (1.0 - quarter * omega)
            image = _times(gram, x) + ridge * x
            change = (omega - 1.0) * change + (omega * span) * (query - image)
            x += change
            step += 1
    return tl.sum(x, 0)


@triton.jit
def _tokens(raw, stride, past, weight, index, length, channels, inside, MIXER: tl.constexpr, TAPS: tl.constexpr):
    """(tokens, channels) in float32, 0 outside. MIXER: sum_l weight[c, TAPS-1-l] x_{t-l}[c] of them.

    Tokens before the first then come from `past` (channels, TAPS - 1).
    """
    there = (index < length)[:, None] & inside[None, :]
    if MIXER:
        total = tl.zeros([index.shape[0], channels.shape[0]], tl.float32)
        for lag in tl.static_range(TAPS):
            token = index[:, None] - lag
            x = tl.load(raw + token * stride + channels[None, :], mask=there & (token >= 0), other=0.0).to(tl.float32)
            before = past + channels[None, :] * (TAPS - 1) + (TAPS - 1 + token)
            x += tl.load(before, mask=there & (token < 0), other=0.0).to(tl.float32)
            total += x * tl.load(weight + channels * TAPS + (TAPS - 1 - lag), mask=inside, other=0.0).to(tl.float32)
    else:
        total = tl.load(raw + index[:, None] * stride + channels[None, :], mask=there, other=0.0).to(tl.float32)
    return total


@triton.jit
def _silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _round(x, pointer):
    """What a tensor of the pointer's dtype would have held."""
    return x.to(pointer.dtype.element_ty).to(tl.float32)


@triton.jit
def _unit(x, pointer):
    """Rows of norm 1, rounded."""
    return _round(x / (tl.sqrt(tl.sum(x * x, 1)) + 1e-6)[:, None], pointer)


@triton.jit
def _gate(pointer, there, MIXER: tl.constexpr):
    """Input gates; MIXER: before their sigmoid."""
    gate = tl.load(pointer, mask=there, other=0.0).to(tl.float32)
    if MIXER:
        gate = _round(_round(1.0 / (1.0 + tl.exp(-gate)), pointer) + 1e-6, pointer)
    return gate


@triton.jit
def _kept(pointer, there, rate, bias, MIXER: tl.constexpr):
    """What a state keeps: exp of log decays; MIXER: of -exp(A_log) softplus(a + dt_bias)."""
    log = tl.load(pointer, mask=there, other=0.0).to(tl.float32)
    if MIXER:
        x = log + tl.load(bias).to(tl.float32)
        softplus = tl.where(x > 20.0, x, tl.log(1.0 + tl.exp(tl.minimum(x, 20.0))))
        log = -tl.exp(tl.load(rate).to(tl.float32)) * softplus
    return tl.exp(log)


@triton.jit
def _picked(vector, here):
    """The entry of a vector, or row of a tile, for which `here` is true."""
    if len(vector.shape) == 1:
        return tl.sum(tl.where(here, vector, 0.0), 0)
    else:
        return tl.sum(tl.where(here[:, None], vector, 0.0), 0)


@triton.jit
def _operand(state):
    """A float32 state as a float16 operand with elements up to 2^14, and its unit."""
    scale, inverse = power_of_two(tl.max(tl.max(tl.abs(state), 1), 0))
    return (state * (inverse * 16384.0)).to(tl.float16), scale * (1.0 / 16384.0)


@triton.jit
def _noted(into, decay, through, row, keep, here):
    """Decays up to one more token: `into` (N,) from the state, `decay` (N, N) from token (second axis) to token."""
    through = through * keep
    row = row * keep + tl.where(here, 1.0, 0.0)
    return tl.where(here, through, into), tl.where(here[:, None], row[None, :], decay), through, row


@triton.jit
def _solved_jointly(queries, keys, gram, unit, into, decay, gate, iterations, ridge, tolerance, METHOD: tl.constexpr):
    """H_t^-1 q_t of all tokens at once, by the solver of the chunk-parallel kernels: the state is read as one operand.

    H_t = into_t H_0 + sum_s decay_ts gate_s^2 k_s k_s^T, H_0 = unit * gram.
    """
    keys, key_scale = scaled_rows(keys, tl.float16)
    weight = gate * gate * key_scale * key_scale
    norm = chunk_norm(keys, gram, into * unit, decay, weight, "ieee")
    inverse = tl.where(norm > 0, 1.0 / norm, 0.0)
    size = tl.sqrt(tl.sum(queries * queries, 1))
    x, _ = solve(
        queries * tl.where(size > 0, 1.0 / size, 0.0)[:, None],
        keys,
        gram,
        into * unit * inverse,
        (decay * weight[None, :] * inverse[:, None]).to(tl.float16),
        iterations,
        ridge,
        tolerance,
        METHOD,
        tl.float16,
        "ieee",
    )
    return x * (size * inverse)[:, None]


@triton.jit(do_not_specialize=["length", "iterations", "ridge", "tolerance", "scale", "eps"])
def step_kernel(
    query,
    key,
    value,
    log_decay,
    key_log_decay,
    solution_mix,
    input_gate,
    output_gate,
    numbers,
    valid,
    query_past,
    key_past,
    value_past,
    query_taps,
    key_taps,
    value_taps,
    decay_rate,
    decay_bias,
    norm_weight,
    gram_in,
    value_key_in,
    gram_out,
    value_key_out,
    grams,
    value_keys,
    outputs,
    length,
    heads,
    query_heads,
    key_heads,
    value_heads,
    iterations,
    ridge,
    tolerance,
    scale,
    eps,
    METHOD: tl.constexpr,
    MIXER: tl.constexpr,
    DECAYS: tl.constexpr,
    GATED: tl.constexpr,
    MIXED: tl.constexpr,
    OUTPUT_GATED: tl.constexpr,
    PACKED: tl.constexpr,
    PADDED: tl.constexpr,
    EVERY: tl.constexpr,
    TAPS: tl.constexpr,
    KEY_SILU: tl.constexpr,
    VALUE_CONV: tl.constexpr,
    VALUE_SILU: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    JOINT: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
):
    """At most TOKENS tokens of one head. MIXER takes raw projections and does what surrounds the operator in a layer.

    DECAYS: 0 none, 1 one for both states, 2 two, 3 for the value state alone. EVERY also stores all states. JOINT
    solves and reads for all tokens at once, from float16 operands; otherwise one after the other in float32. EARLY
    loads both states before it begins.
    """
    line = long(tl.program_id(0))
    batch, head = line // heads, line % heads
    rows, columns, value_rows = tl.arange(0, BLOCK), tl.arange(0, BLOCK), tl.arange(0, VALUE_BLOCK)
    index = tl.arange(0, TOKENS)
    inside, value_inside, there = columns < WIDTH, value_rows < VALUE_WIDTH, index < length
    mask = (rows < WIDTH)[:, None] & inside[None, :]
    offset = rows[:, None] * WIDTH + columns[None, :]
    gram = tl.load(gram_in + line * WIDTH * WIDTH + offset, mask=mask, other=0.0)
    value_mask = value_inside[:, None] & inside[None, :]
    value_offset = value_rows[:, None] * WIDTH + columns[None, :]
    if EARLY:
        state = tl.load(value_key_in + line * VALUE_WIDTH * WIDTH + value_offset, mask=value_mask, other=0.0)

    first = batch * length
    place = (first + index) * heads + head
    stride = key_heads * WIDTH
    past = key_past + batch * stride * (TAPS - 1)
    channels = (head // (heads // key_heads)) * WIDTH + columns
    keys = _tokens(key + first * stride, stride, past, key_taps, index, length, channels, inside, MIXER, TAPS)
    stride = query_heads * WIDTH
    past = query_past + batch * stride * (TAPS - 1)
    channels = (head // (heads // query_heads)) * WIDTH + columns
    queries = _tokens(query + first * stride, stride, past, query_taps, index, length, channels, inside, MIXER, TAPS)
    if MIXER:
        keys, queries = _round(keys, key), _round(queries, query)
        if KEY_SILU:
            keys, queries = _round(_silu(keys), key), _round(_silu(queries), query)
        keys, queries = _unit(keys, key), _unit(queries, query)
    gate = tl.full([TOKENS], 1.0, tl.float32)
    if GATED:
        gate = _gate(input_gate + place, there, MIXER)
    keep = tl.full([TOKENS], 1.0, tl.float32)
    value_keep = keep
    if DECAYS > 0:
        value_keep = _kept(log_decay + place, there, decay_rate + head, decay_bias + head, MIXER)
    if DECAYS == 1:
        keep = value_keep
    if DECAYS == 2:
        keep = tl.exp(tl.load(key_log_decay + place, mask=there, other=0.0).to(tl.float32))
    mix = tl.full([TOKENS], 1.0, tl.float32)
    if MIXED:
        mix = tl.load(solution_mix + place, mask=there, other=0.0).to(tl.float32)
        if MIXER:
            mix = _round(1.0 / (1.0 + tl.exp(-mix)), solution_mix)
    if PACKED:
        number = tl.load(numbers + first + index, mask=there, other=0)
        same = number == tl.load(numbers + first + index - 1, mask=there & (index > 0), other=0)
        keep, value_keep = tl.where(same, keep, 0.0), tl.where(same, value_keep, 0.0)
    if PADDED:
        real = tl.load(valid + first + index, mask=there, other=0) != 0
        keys, queries = tl.where(real[:, None], keys, 0.0), tl.where(real[:, None], queries, 0.0)
        keep, value_keep = tl.where(real, keep, 1.0), tl.where(real, value_keep, 1.0)

    if JOINT:
        past_gram, unit = _operand(gram)
        into, row, through = tl.zeros([TOKENS], tl.float32), tl.zeros([TOKENS], tl.float32), 1.0
        decay = tl.zeros([TOKENS, TOKENS], tl.float32)
    for token in range(0, length):
        here = index == token
        kept = _picked(keep, here)
        k = _picked(keys, here) * _picked(gate, here)
        gram = gram * kept + k[:, None] * k[None, :]
        if EVERY:
            at = (first + token) * heads + head
            tl.store(grams + at * WIDTH * WIDTH + offset, gram, mask=mask)
        if JOINT:
            into, decay, through, row = _noted(into, decay, through, row, kept, here)
        elif METHOD != 0:
            q = _picked(queries, here)
            x = _solve(gram, q, iterations, ridge, tolerance, METHOD)
            queries = tl.where(here[:, None], (q + _picked(mix, here) * (x - q))[None, :], queries)
    tl.store(gram_out + line * WIDTH * WIDTH + offset, gram, mask=mask)
    if JOINT & (METHOD != 0):
        x = _solved_jointly(queries, keys, past_gram, unit, into, decay, gate, iterations, ridge, tolerance, METHOD)
        queries += mix[:, None] * (x - queries)

    if not EARLY:
        state = tl.load(value_key_in + line * VALUE_WIDTH * WIDTH + value_offset, mask=value_mask, other=0.0)
    stride = value_heads * VALUE_WIDTH
    past = value_past + batch * stride * (TAPS - 1)
    channels = (head // (heads // value_heads)) * VALUE_WIDTH + value_rows
    values = _tokens(
        value + first * stride,
        stride,
        past,
        value_taps,
        index,
        length,
        channels,
        value_inside,
        MIXER & VALUE_CONV,
        TAPS,
    )
    if MIXER & VALUE_CONV:
        values = _round(values, value)
    if VALUE_SILU:
        values = _round(_silu(values), value)
    if PADDED:
        values = tl.where(real[:, None], values, 0.0)
    keys, values = keys * gate[:, None], values * gate[:, None]
    if JOINT:
        past_state, unit = _operand(state)
        row, through = tl.zeros([TOKENS], tl.float32), 1.0
    y = tl.zeros([TOKENS, VALUE_BLOCK], tl.float32)
    for token in range(0, length):
        here = index == token
        kept = _picked(value_keep, here)
        state = state * kept + _picked(values, here)[:, None] * _picked(keys, here)[None, :]
        if EVERY:
            at = (first + token) * heads + head
            tl.store(value_keys + at * VALUE_WIDTH * WIDTH + value_offset, state, mask=value_mask)
        if JOINT:
            into, decay, through, row = _noted(into, decay, through, row, kept, here)
        else:
            read = tl.sum(state * _picked(queries, here)[None, :], 1)
            y = tl.where(here[:, None], read[None, :], y)
    tl.store(value_key_out + line * VALUE_WIDTH * WIDTH + value_offset, state, mask=value_mask)
    if JOINT:
        inner = dot(queries, tl.trans(keys), "tf32x3") * decay
        queries, query_scale = scaled_rows(queries, tl.float16)
        y = dot(queries, tl.trans(past_state), "ieee") * (into * unit * query_scale)[:, None]
        y += dot(inner, values, "tf32x3")
    y = y * scale
    stored = there[:, None] & value_inside[None, :]
    target = place[:, None] * VALUE_WIDTH + value_rows[None, :]
    if MIXER:
        y = _round(y, outputs)
        y = y / tl.sqrt(tl.sum(y * y, 1) / VALUE_WIDTH + eps)[:, None]
        y = y * tl.load(norm_weight + value_rows, mask=value_inside, other=0.0).to(tl.float32)[None, :]
        if OUTPUT_GATED:
            y = y * _silu(tl.load(output_gate + target, mask=stored, other=0.0).to(tl.float32))
    tl.store(outputs + target, y.to(outputs.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["length"])
def shift_kernel(
    query,
    key,
    value,
    query_past,
    key_past,
    value_past,
    valid,
    length,
    query_channels,
    key_channels,
    value_channels,
    PADDED: tl.constexpr,
    TAPS: tl.constexpr,
    PAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The last TAPS - 1 tokens of each of three convolutions, (B, C, TAPS - 1), in place. PADDED: a single token."""
    batch, which = long(tl.program_id(1)), tl.program_id(2)
    tokens = length
    if PADDED:
        # A token that is padding does not move the window: as if there were none.
        length = length * (tl.load(valid + batch) != 0).to(tl.int32)
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if which == 0:
        _shift(query, query_past, tokens * query_channels, batch, channel, length, query_channels, TAPS, PAST)
    elif which == 1:
        _shift(key, key_past, tokens * key_channels, batch, channel, length, key_channels, TAPS, PAST)
    else:
        _shift(value, value_past, tokens * value_channels, batch, channel, length, value_channels, TAPS, PAST)


@triton.jit
def _shift(raw, past, stride, batch, channel, length, channels, TAPS: tl.constexpr, PAST: tl.constexpr):
    slot = tl.arange(0, PAST)
    mask = (channel < channels)[:, None] & (slot < TAPS - 1)[None, :]
    token = length - (TAPS - 1) + slot
    raw += batch * stride
    past += batch * channels * (TAPS - 1)
    fresh = tl.load(
        raw + token[None, :] * channels + channel[:, None], mask=mask & (token >= 0)[None, :], other=0.0
    ).to(past.dtype.element_ty)
    old = tl.load(
        past + channel[:, None] * (TAPS - 1) + (TAPS - 1 + token)[None, :], mask=mask & (token < 0)[None, :], other=0.0
    )
    tl.debug_barrier()
    tl.store(
        past + channel[:, None] * (TAPS - 1) + slot[None, :], tl.where((token >= 0)[None, :], fresh, old), mask=mask
    )


# Warps by the wider of both widths. More are slower: the solve then waits for its barriers.
WARPS = {16: 1, 32: 1, 64: 2, 128: 4}
# Rows of a tile that holds several tokens: what the matrix units take.
JOINT_TOKENS = 16
# Squared relative residuals at which a step stops: the states are float32, so only the output's dtype matters.
HALF_STEP_TOLERANCE = 1e-7


@on_own_device
def gka_triton_step(
    inputs: TritonInputs,
    state: tuple[Tensor, Tensor],
    solver: GKASolver,
    scale: float,
    in_place: bool,
    every: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Outputs (B, T, H, Dv), both states after the last token and, with `every`, after each: (B, T, H, D, Dk)."""
    batch, length, heads, width = inputs.query.shape
    value_width = inputs.value.shape[-1]
    outputs = inputs.query.new_empty(batch, length, heads, value_width)
    after = state if in_place else (torch.empty_like(state[0]), torch.empty_like(state[1]))
    trail = [s.new_empty(batch, length, *s.shape[1:]) if every else s.new_empty(0) for s in state]
    none = inputs.query
    _launch(
        (inputs.query, inputs.key, inputs.value),
        (inputs.log_decay, inputs.key_log_decay, inputs.solution_mix, inputs.input_gate, None),
        inputs.numbers,
        None,
        (none,) * 9,
        (*state, *after, *trail),
        outputs,
        heads,
        solver,
        scale,
        0.0,
        {
            "MIXER": False,
            "DECAYS": decay_count(inputs),
            "EVERY": every,
            "TAPS": 1,
            "KEY_SILU": False,
            "VALUE_CONV": False,
        }
        | {"VALUE_SILU": False, "WIDTH": width, "VALUE_WIDTH": value_width},
    )
    return outputs, *after, *trail


@on_own_device
def gka_triton_mixer_step(inputs: MixerInputs, solver: GKASolver, options: MixerOptions) -> Tensor:
    """RMSNorm(GKA(conv(q), conv(k), conv(v))) * SiLU(gate) for a few tokens, (B, T, H, Dv), in two launches.

    Convolution contexts and states are replaced in place. Everything is rounded to the dtype of the projections where
    the layer's separate operators round it.
    """
    batch, length, query_heads, width = inputs.query.shape
    key_heads, (value_heads, value_width) = inputs.key.shape[2], inputs.value.shape[2:]
    heads = inputs.key_gram.shape[1]
    outputs = inputs.query.new_empty(batch, length, heads, value_width)
    none = inputs.query
    decays = 0 if inputs.decay_step is None else 1 if options.decay_gram else 3
    taps = inputs.query_taps.shape[1]
    surroundings = (
        inputs.query_past,
        inputs.key_past,
        inputs.value_past,
        inputs.query_taps,
        inputs.key_taps,
        inputs.value_taps,
        inputs.decay_rate,
        inputs.decay_bias,
        inputs.norm_weight,
    )
    states = (inputs.key_gram, inputs.value_key)
    _launch(
        (inputs.query, inputs.key, inputs.value),
        (inputs.decay_step, None, inputs.solution_mix, inputs.input_gate, inputs.output_gate),
        None,
        inputs.valid,
        tuple(none if t is None else t for t in surroundings),
        (*states, *states, none, none),
        outputs,
        heads,
        solver,
        options.scale,
        options.eps,
        {"MIXER": True, "DECAYS": decays, "EVERY": False, "TAPS": taps, "KEY_SILU": options.key_silu}
        | {"VALUE_CONV": inputs.value_taps is not None, "VALUE_SILU": options.value_silu}
        | {"WIDTH": width, "VALUE_WIDTH": value_width},
    )
    if taps > 1:
        channels = [query_heads * width, key_heads * width, value_heads * value_width]
        block = 256
        with_value = inputs.value_past is not None
        shift_kernel[(triton.cdiv(max(channels), block), batch, 3 if with_value else 2)](
            inputs.query,
            inputs.key,
            inputs.value,
            inputs.query_past,
            inputs.key_past,
            inputs.value_past if with_value else inputs.key_past,
            inputs.key if inputs.valid is None else inputs.valid,
            length,
            *channels,
            PADDED=inputs.valid is not None,
            TAPS=taps,
            PAST=triton.next_power_of_2(taps - 1),
            BLOCK=block,
            num_warps=4,
        )
    return outputs


def _launch(tokens, gates, numbers, valid, surroundings, states, outputs, heads, solver, scale, eps, options) -> None:
    query, key, value = tokens
    batch, length, query_heads, width = query.shape
    block, value_block = filled(width), filled(value.shape[-1])
    joint = length > 1 and query.dtype != torch.float32 and solver.method == "cg"
    tolerance = HALF_STEP_TOLERANCE if length == 1 else TOLERANCE["float16"]
    step_kernel[(batch * heads,)](
        query,
        key,
        value,
        *(query if t is None else t for t in gates),
        query if numbers is None else numbers,
        query if valid is None else valid,
        *surroundings,
        *states,
        outputs,
        length,
        heads,
        query_heads,
        key.shape[2],
        value.shape[2],
        solver.iterations,
        solver.ridge_ratio,
        solver.squared_tolerance(TOLERANCE["float32"] if query.dtype == torch.float32 else tolerance),
        scale,
        eps,
        METHOD=method(solver),
        GATED=gates[3] is not None,
        MIXED=gates[2] is not None,
        OUTPUT_GATED=gates[4] is not None,
        PACKED=numbers is not None,
        PADDED=valid is not None,
        TOKENS=1 if length == 1 else JOINT_TOKENS,
        JOINT=joint,
        EARLY=False,
        BLOCK=block,
        VALUE_BLOCK=value_block,
        **options,
        num_warps=WARPS[max(block, value_block)],
    )
