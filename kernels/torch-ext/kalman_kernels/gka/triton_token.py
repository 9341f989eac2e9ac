"""Gated KalmaNet for a single token in Triton: one launch for all of a mixer (README.md, eqs. 1-6)."""

# Triton turns annotations and defaults of jitted functions into objects of its own.
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false
# pyright: reportReturnType=false, reportAssignmentType=false

from __future__ import annotations

import triton
import triton.language as tl

from ..jit import long
from .triton_common import decay_of, log_kept, opened, rounded, silu
from .triton_states import (
    across,
    columns_of,
    entering,
    mixed_query,
    scalars,
    share_of,
    take_turns,
    tile_at,
    times,
    two_sums,
    wide,
)

__all__ = ["token_kernel"]


@triton.jit
def _vector(pointer, lines, inside):
    return tl.load(pointer + lines, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _seen(raw, past, lines, inside, TAPS: tl.constexpr):
    """What a token sees of each channel, as it is stored: itself, then the past, latest first."""
    seen = (tl.load(raw + lines, mask=inside, other=0.0),)
    for back in tl.static_range(TAPS - 1):
        seen = seen + (tl.load(past + lines * (TAPS - 1) + (TAPS - 2 - back), mask=inside, other=0.0),)
    return seen


@triton.jit
def _taps(taps, lines, inside, TAPS: tl.constexpr):
    """The taps for what `_seen` returns."""
    weights = (tl.load(taps + lines * TAPS + (TAPS - 1), mask=inside, other=0.0),)
    for back in tl.static_range(TAPS - 1):
        weights = weights + (tl.load(taps + lines * TAPS + (TAPS - 2 - back), mask=inside, other=0.0),)
    return weights


@triton.jit
def _convolved(seen, weights, pointer, CONV: tl.constexpr, SILU: tl.constexpr, TAPS: tl.constexpr):
    """Rounded like the separate operators, from the oldest on."""
    x = seen[TAPS - 1].to(tl.float32)
    if CONV:
        x = x * weights[TAPS - 1].to(tl.float32)
    for back in tl.static_range(TAPS - 1):
        x += seen[TAPS - 2 - back].to(tl.float32) * weights[TAPS - 2 - back].to(tl.float32)
    x = rounded(x, pointer)
    if SILU:
        x = rounded(silu(x), pointer)
    return x


@triton.jit
def _move_on(past, seen, lines, moves, TAPS: tl.constexpr):
    """The context after a token is what it saw, one place on."""
    for back in tl.static_range(TAPS - 1):
        tl.store(past + lines * (TAPS - 1) + (TAPS - 2 - back), seen[back], mask=moves)


@triton.jit
def _raw(vector, past, taps, lines, inside, CONV: tl.constexpr, TAPS: tl.constexpr):
    """A token's vector as it is stored; if CONV, all that the convolution sees, and its taps."""
    if CONV:
        seen, weights = _seen(vector, past, lines, inside, TAPS), _taps(taps, lines, inside, TAPS)
    else:
        seen, weights = (tl.load(vector + lines, mask=inside, other=0.0),), (1.0,)
    return seen, weights


@triton.jit
def _given(
    vectors,
    numbers,
    lines,
    inside,
    value_inside,
    CONVOLVES: tl.constexpr,
    VALUE_CONV: tl.constexpr,
    TAPS: tl.constexpr,
    MIXER: tl.constexpr,
    DECAYS: tl.constexpr,
    GATED: tl.constexpr,
    SHARED: tl.constexpr,
    OPENED: tl.constexpr,
    PACKED: tl.constexpr,
    PADDED: tl.constexpr,
):
    """All that is read of a token, neutral where there is nothing; pointers are at what belongs to it."""
    query, query_past, query_taps, key, key_past, key_taps, value, value_past, value_taps, output_gate = vectors
    input_gate, of_gram, log_decay, solution_mix, number, valid, rate, bias = numbers
    seen_query, of_query = _raw(query, query_past, query_taps, lines, inside, CONVOLVES, TAPS)
    seen_key, of_key = _raw(key, key_past, key_taps, lines, inside, CONVOLVES, TAPS)
    seen_value, of_value = _raw(value, value_past, value_taps, lines, value_inside, VALUE_CONV, TAPS)
    gate, log, number = scalars(input_gate, of_gram, number, 0, 1, 0, GATED, (DECAYS == 1) | (DECAYS == 2), PACKED)
    value_log, opening, there = 0.0, 0.0, 1
    if DECAYS > 0:
        value_log = tl.load(log_decay).to(tl.float32)
    if OPENED:
        opening = _vector(output_gate, lines, value_inside)
    if PADDED:
        there = tl.load(valid).to(tl.int32)
    mix = share_of(solution_mix, SHARED, MIXER)
    rate, bias = decay_of(rate, bias, MIXER & (DECAYS > 0))
    gates = gate, log, value_log, number, mix, rate, bias, there
    return seen_query, of_query, seen_key, of_key, seen_value, of_value, opening, gates


@triton.jit(
    do_not_specialize=["heads", "query_heads", "key_heads", "value_heads"]
    + ["iterations", "ridge", "tolerance", "scale", "eps", "processors", "crowd", "sleeps"]
)
def token_kernel(
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
    heads,
    query_heads,
    key_heads,
    value_heads,
    iterations,
    ridge,
    tolerance,
    scale,
    eps,
    processors,
    crowd,
    sleeps,
    METHOD: tl.constexpr,
    PIPELINED: tl.constexpr,
    PIECE: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
    TURNS: tl.constexpr,
    MIXER: tl.constexpr,
    CONVOLVES: tl.constexpr,
    KEY_SILU: tl.constexpr,
    VALUE_CONV: tl.constexpr,
    VALUE_SILU: tl.constexpr,
    TAPS: tl.constexpr,
    DECAYS: tl.constexpr,
    GATED: tl.constexpr,
    MIXED: tl.constexpr,
    OUTPUT_GATED: tl.constexpr,
    PACKED: tl.constexpr,
    PADDED: tl.constexpr,
    EVERY: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A single token of one head: first the Gram state and its solve, then the value state and the output.

    Both are tiles of BLOCK rows and columns, taken by two turns of one loop. With STAGES 2 the compiler has the value
    state on its way to shared memory while the solve runs. PIECE: columns of a state side by side, over neighbouring
    threads. CONVOLVES: queries, keys and values are raw and what is convolved has a head of its own; what
    `prepare_kernel` does is done here. PADDED: a row's token may be padding. Other constants: `step_kernel`.
    """
    program = tl.program_id(0)
    if TURNS:
        take_turns(program, processors, crowd, sleeps)
    if EARLY & CONVOLVES:
        # For whatever was before: it may have written all that is read here.
        tl.extra.cuda.gdc_wait()
    line, batch, head = long(program), long(program // heads), program % heads
    query_head, key_head, value_head = head, head, head
    if not CONVOLVES:
        query_head, key_head = head // (heads // query_heads), head // (heads // key_heads)
    if not (CONVOLVES & VALUE_CONV):
        value_head = head // (heads // value_heads)
    query_line, key_line = batch * query_heads + query_head, batch * key_heads + key_head
    value_line = batch * value_heads + value_head
    lines, columns = tl.arange(0, BLOCK), columns_of(BLOCK, PIECE)
    inside, value_inside = lines < WIDTH, lines < VALUE_WIDTH
    DECAYED: tl.constexpr = (DECAYS == 1) | (DECAYS == 2)
    nothing = tl.zeros([BLOCK], tl.float32)
    # The query, then what reads; the key; the value; what opens the output.
    q, k, v, opening = nothing, nothing, nothing, nothing
    keep, value_keep, mix, rr = 1.0, 1.0, 1.0, 0.0
    query_past += query_line * WIDTH * (TAPS - 1)
    key_past += key_line * WIDTH * (TAPS - 1)
    value_past += value_line * VALUE_WIDTH * (TAPS - 1)
    vectors = (
        query + query_line * WIDTH,
        query_past,
        query_taps + query_head * WIDTH * TAPS,
        key + key_line * WIDTH,
        key_past,
        key_taps + key_head * WIDTH * TAPS,
        value + value_line * VALUE_WIDTH,
        value_past,
        value_taps + value_head * VALUE_WIDTH * TAPS,
        output_gate + line * VALUE_WIDTH,
    )
    of_gram = key_log_decay if DECAYS == 2 else log_decay
    numbers = (
        input_gate + line,
        of_gram + line,
        log_decay + line,
        solution_mix + line,
        numbers + batch,
        valid + batch,
        decay_rate + head,
        decay_bias + head,
    )
    SHARED: tl.constexpr = MIXED & (METHOD != 0)
    OPENED: tl.constexpr = MIXER & OUTPUT_GATED
    if CONVOLVES:
        given = _given(
            vectors,
            numbers,
            lines,
            inside,
            value_inside,
            CONVOLVES,
            VALUE_CONV,
            TAPS,
            MIXER,
            DECAYS,
            GATED,
            SHARED,
            OPENED,
            PACKED,
            PADDED,
        )
    if MIXER:
        weight = _vector(norm_weight, lines, value_inside)
    for turn in tl.range(0, 2, num_stages=STAGES):
        of_keys = turn == 0
        height = WIDTH
        if VALUE_WIDTH != WIDTH:
            height = WIDTH if of_keys else VALUE_WIDTH
        offset, mask = tile_at(lines, lines < height, columns, WIDTH)
        place = line * height * WIDTH
        state = tl.load((gram_in if of_keys else value_key_in) + place + offset, mask=mask, other=0.0)
        if of_keys:
            if not CONVOLVES:
                if EARLY:
                    tl.extra.cuda.gdc_wait()
                given = _given(
                    vectors,
                    numbers,
                    lines,
                    inside,
                    value_inside,
                    CONVOLVES,
                    VALUE_CONV,
                    TAPS,
                    MIXER,
                    DECAYS,
                    GATED,
                    SHARED,
                    OPENED,
                    PACKED,
                    PADDED,
                )
            seen_query, of_query, seen_key, of_key, seen_value, of_value, open_by, gates = given
            gate, log, value_log, number, mix, rate, bias, there = gates
            if OPENED:
                opening = open_by
            if CONVOLVES:
                q = _convolved(seen_query, of_query, query, True, KEY_SILU, TAPS)
                k = _convolved(seen_key, of_key, key, True, KEY_SILU, TAPS)
                v = _convolved(seen_value, of_value, value, VALUE_CONV, VALUE_SILU, TAPS if VALUE_CONV else 1)
                of_q, of_k = tl.reduce((q * q, k * k), 0, two_sums)
                q = rounded(q / (tl.sqrt(of_q) + 1e-6), query)
                k = rounded(k / (tl.sqrt(of_k) + 1e-6), key)
                # The sums have let all threads read before any of them writes. Padding does not move a context.
                moves, value_moves = inside, value_inside
                if PADDED:
                    moves = lines < tl.where(there != 0, WIDTH, 0)
                    value_moves = lines < tl.where(there != 0, VALUE_WIDTH, 0)
                _move_on(query_past, seen_query, lines, moves, TAPS)
                _move_on(key_past, seen_key, lines, moves, TAPS)
                if VALUE_CONV:
                    _move_on(value_past, seen_value, lines, value_moves, TAPS)
            else:
                q, k, v = seen_query[0].to(tl.float32), seen_key[0].to(tl.float32), seen_value[0].to(tl.float32)
            if GATED:
                v = v * opened(gate, input_gate, MIXER)
            k, keep = entering(k, gate, log, number, 0, input_gate, rate, bias, GATED, DECAYED, PACKED, MIXER)
            if DECAYS > 0:
                value_keep = tl.exp(log_kept(value_log, rate, bias, MIXER))
            if PACKED:
                value_keep = tl.where(number == 0, value_keep, 0.0)
            if PADDED:
                q, k, v = tl.where(there != 0, q, 0.0), tl.where(there != 0, k, 0.0), tl.where(there != 0, v, 0.0)
                keep, value_keep = tl.where(there != 0, keep, 1.0), tl.where(there != 0, value_keep, 1.0)
            # Ahead of the state, which is under way.
            rr = tl.sum(q * q, 0)
        state = state * (keep if of_keys else value_keep) + wide(tl.where(of_keys, k, v)) * across(k, PIECE)
        # Under way while the solve runs.
        tl.store((gram_out if of_keys else value_key_out) + place + offset, state, mask=mask)
        if EVERY:
            tl.store((grams if of_keys else value_keys) + place + offset, state, mask=mask)
        if of_keys:
            if METHOD != 0:
                q = mixed_query(state, q, rr, mix, iterations, ridge, tolerance, METHOD, PIPELINED, PIECE)
        else:
            y = times(state, q, PIECE) * scale
            if MIXER:
                y = rounded(y, outputs)
                y = y / tl.sqrt(tl.sum(y * y, 0) / VALUE_WIDTH + eps) * weight
                if OUTPUT_GATED:
                    y = y * silu(opening)
            target = outputs + line * VALUE_WIDTH + lines
            tl.store(target, y.to(outputs.dtype.element_ty), mask=value_inside)
