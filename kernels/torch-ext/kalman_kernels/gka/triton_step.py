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

from ..jit import compute_capability, long, multiprocessors, on_own_device
from .gluon_few import gluon_few_kernel
from .mixer import MixerInputs, MixerOptions
from .reference import GKASolver
from .triton_common import (
    METHODS,
    ROOMY,
    TOLERANCE,
    counted,
    decay_of,
    filled,
    load_rows,
    log_kept,
    opened,
    power_of_two,
    rounded,
    scaled_rows,
    silu,
    solve,
    store_rows,
    token_vector,
    unit_rows,
    with_share,
)
from .triton_few import few_kernel
from .triton_forward import TritonInputs, chunk_norm, decay_count, method
from .triton_states import (
    across,
    along,
    columns_of,
    entering,
    load_state,
    mixed_query,
    scalars,
    share_of,
    summed_rows,
    take_turns,
    wide,
)
from .triton_token import token_kernel

__all__ = ["gka_triton_mixer_step", "gka_triton_step"]

# Rows of several tokens that are solved together: the least that matrix units take.
ROOM = tl.constexpr(16)


@triton.jit
def _unit(x):
    return x / (tl.sqrt(tl.sum(x * x, 0)) + 1e-6)


@triton.jit
def _finished(x, pointer, SILU: tl.constexpr, UNIT: tl.constexpr):
    """What becomes of a convolved vector: SiLU and unit norm where asked for, rounded like the separate operators."""
    x = rounded(x, pointer)
    if SILU:
        x = rounded(silu(x), pointer)
    if UNIT:
        x = _unit(x)
    return x


@triton.jit
def _window(raw, past, inside, lines, slot, TAPS: tl.constexpr):
    """What a single token sees, (BLOCK, SLOTS): TAPS - 1 of the past, then itself; pointers at a head's channels."""
    before = inside[:, None] & (slot < TAPS - 1)[None, :]
    window = tl.load(past + lines[:, None] * (TAPS - 1) + slot[None, :], mask=before, other=0.0).to(tl.float32)
    fresh = tl.load(raw + lines[:, None], mask=inside[:, None], other=0.0).to(tl.float32)
    return tl.where((slot == TAPS - 1)[None, :], fresh, window)


@triton.jit
def _weights(taps, inside, lines, slot, TAPS: tl.constexpr):
    """A head's taps, (BLOCK, SLOTS)."""
    there = inside[:, None] & (slot < TAPS)[None, :]
    return tl.load(taps + lines[:, None] * TAPS + slot[None, :], mask=there, other=0.0).to(tl.float32)


@triton.jit
def _move_on(past, window, inside, lines, slot, reach, TAPS: tl.constexpr):
    """The context after a token is what it saw, one place on; nothing with a `reach` of 0."""
    kept = inside[:, None] & ((slot > 0) & (slot < reach))[None, :]
    tl.store(past + lines[:, None] * (TAPS - 1) + slot[None, :] - 1, window.to(past.dtype.element_ty), mask=kept)


@triton.jit
def _prepare_several(
    raw,
    past,
    taps,
    ready,
    channels,
    lines,
    length,
    TOKENS: tl.constexpr,
    TAPS: tl.constexpr,
    CONV: tl.constexpr,
    SILU: tl.constexpr,
    UNIT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """All tokens of one row and head side by side: every load is on its way at once, norms stay inside warps."""
    token, inside = tl.arange(0, TOKENS), lines < WIDTH
    here = (token < length)[:, None] & inside[None, :]
    if CONV:
        x = tl.zeros([TOKENS, lines.shape[0]], tl.float32)
        # From the oldest tap on; what lies before the first token is the past.
        for tap in tl.static_range(TAPS):
            source = token - (TAPS - 1) + tap
            new, old = here & (source >= 0)[:, None], here & (source < 0)[:, None]
            fresh = tl.load(raw + source[:, None] * channels + lines[None, :], mask=new, other=0.0)
            held = tl.load(past + lines[None, :] * (TAPS - 1) + source[:, None] + (TAPS - 1), mask=old, other=0.0)
            weight = tl.load(taps + lines * TAPS + tap, mask=inside, other=0.0).to(tl.float32)
            x += (fresh.to(tl.float32) + held.to(tl.float32)) * weight[None, :]
    else:
        x = tl.load(raw + token[:, None] * channels + lines[None, :], mask=here, other=0.0).to(tl.float32)
    x = _finished(x, raw, SILU, False)
    if UNIT:
        x = x / (tl.sqrt(tl.sum(x * x, 1)) + 1e-6)[:, None]
    tl.store(ready + token[:, None] * channels + lines[None, :], x.to(ready.dtype.element_ty), mask=here)
    if CONV:
        # The context after them is what the last one saw, one place on.
        after = ()
        for slot in tl.static_range(TAPS - 1):
            source = length - (TAPS - 1) + slot
            new, old = lines < tl.where(source >= 0, WIDTH, 0), lines < tl.where(source < 0, WIDTH, 0)
            fresh = tl.load(raw + source * channels + lines, mask=new, other=0.0)
            held = tl.load(past + lines * (TAPS - 1) + source + (TAPS - 1), mask=old, other=0.0)
            after = after + (tl.where(source >= 0, fresh, held),)
        tl.debug_barrier()
        for slot in tl.static_range(TAPS - 1):
            tl.store(past + lines * (TAPS - 1) + slot, after[slot], mask=inside)


@triton.jit
def _written(
    tokens,
    token,
    GATED: tl.constexpr,
    DECAYED: tl.constexpr,
    PACKED: tl.constexpr,
    OPENED: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """What the value state needs of a token: value, `_scalars` and, if OPENED, the output gate."""
    value, input_gate, log_decay, numbers, output_gate, length, heads, value_heads, lines = tokens
    v = token_vector(value, token, length, value_heads * WIDTH, lines, WIDTH)
    gate, log, number = scalars(input_gate, log_decay, numbers, token, length, heads, GATED, DECAYED, PACKED)
    opening = 0.0
    if OPENED:
        opening = token_vector(output_gate, token, length, heads * WIDTH, lines, WIDTH)
    return v, gate, log, number, opening


@triton.jit
def _solve_together(
    operand,
    unit,
    query,
    key,
    query_stride,
    key_stride,
    log_decay,
    rate,
    bias,
    solution_mix,
    input_gate,
    numbers,
    mixed,
    length,
    heads,
    iterations,
    ridge,
    tolerance,
    METHOD: tl.constexpr,
    MIXER: tl.constexpr,
    DECAYED: tl.constexpr,
    GATED: tl.constexpr,
    MIXED: tl.constexpr,
    PACKED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The queries that read, of all tokens: a chunk of ROOM tokens after H_0 = unit * operand, as prompts are solved.

    Pointers are at the first token of a row and head.
    """
    token, lines = tl.arange(0, ROOM), tl.arange(0, BLOCK)
    here = token < length
    keys = load_rows(key, key_stride, token, length, lines, WIDTH)
    queries = load_rows(query, query_stride, token, length, lines, WIDTH)
    gate, log, number = scalars(input_gate, log_decay, numbers, token, length, heads, GATED, DECAYED, PACKED)
    if GATED:
        keys = keys * opened(gate, input_gate, MIXER)[:, None]
    kept = tl.zeros([ROOM], tl.float32)
    if DECAYED:
        kept = tl.where(here, counted(log_kept(log, rate, bias, MIXER)), 0.0)
    log = tl.cumsum(kept, 0)
    into = tl.exp(log)
    earlier, following = token[:, None] >= token[None, :], token[:, None] <= token[None, :]
    if PACKED:
        into = tl.where(number == 0, into, 0.0)
        same = number[:, None] == number[None, :]
        earlier, following = earlier & same, following & same
    decay = tl.where(earlier, tl.exp(log[:, None] - log[None, :]), 0.0)
    later = tl.where(following, tl.exp(log[None, :] - log[:, None]), 0.0)
    keys, key_scale = scaled_rows(keys, tl.float16)
    weight = key_scale * key_scale
    into = into * unit
    norm = chunk_norm(keys, operand, into, decay, later, weight, "ieee")
    inverse = tl.where(norm > 0, 1.0 / norm, 0.0)
    right, size, squared = unit_rows(queries)
    x, _ = solve(
        right,
        squared,
        keys,
        operand,
        into * inverse,
        (decay * weight[None, :] * inverse[:, None]).to(tl.float16),
        iterations,
        ridge,
        tolerance,
        METHOD,
        tl.float16,
        "ieee",
    )
    x = x * (size * inverse)[:, None]
    if MIXED:
        x = with_share(x, queries, solution_mix + token * heads, here, MIXER)
    store_rows(mixed, heads * WIDTH, token, length, lines, x, WIDTH)


@triton.jit(
    do_not_specialize=["length", "iterations", "ridge", "tolerance", "scale", "eps", "processors", "crowd", "sleeps"]
)
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
    decay_rate,
    decay_bias,
    norm_weight,
    gram_in,
    value_key_in,
    gram_out,
    value_key_out,
    grams,
    value_keys,
    mixed,
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
    processors,
    crowd,
    sleeps,
    METHOD: tl.constexpr,
    PART: tl.constexpr,
    PIPELINED: tl.constexpr,
    EAGER: tl.constexpr,
    PIECE: tl.constexpr,
    EARLY: tl.constexpr,
    PAIRED: tl.constexpr,
    TURNS: tl.constexpr,
    MIXER: tl.constexpr,
    DECAYS: tl.constexpr,
    GATED: tl.constexpr,
    MIXED: tl.constexpr,
    OUTPUT_GATED: tl.constexpr,
    PACKED: tl.constexpr,
    EVERY: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
):
    """Two to eight tokens of one head. MIXER: gates and decays as projections give them, then the layer's gated norm.

    DECAYS: 0 none, 1 one for both states, 2 two, 3 for the value state alone. EVERY also stores all states. PART: 0 all
    of it, token after token; 1 the solves alone, one program for each token (second axis); 2 all but the solves, done
    before, one program for each state (second axis: value state and outputs, Gram state); 3 all of it, tokens solved
    together. EARLY: the kernel before may still run until tokens are read. EAGER: both states are loaded at once.
    PIECE: columns of a state side by side, over neighbouring threads. PAIRED: parts 1 and 2 run at the same time, 2
    waits for the solves. TURNS: `take_turns`.
    """
    TOGETHER: tl.constexpr = PART == 3
    program = tl.program_id(0)
    if TURNS:
        take_turns(program, processors, crowd, sleeps)
    line, batch, head = long(program), long(program // heads), program % heads
    rows, value_rows = tl.arange(0, BLOCK), tl.arange(0, VALUE_BLOCK)
    columns = columns_of(BLOCK, PIECE)
    last = length - 1
    updates, value_updates = last + 1, last + 1
    inside, value_inside = rows < WIDTH, value_rows < VALUE_WIDTH
    if PART == 1:
        last = tl.program_id(1)
        updates = last + 1
    if PART == 2:
        # Nothing of the other state.
        of_value = tl.program_id(1) == 0
        updates, value_updates = tl.where(of_value, 0, updates), tl.where(of_value, value_updates, 0)
        inside = rows < tl.where(of_value, 0, WIDTH)
        value_inside = value_rows < tl.where(of_value, VALUE_WIDTH, 0)
    query_head = head // (heads // query_heads)
    key_head, value_head = head // (heads // key_heads), head // (heads // value_heads)
    gram_at, value_at = gram_in + line * WIDTH * WIDTH, value_key_in + line * VALUE_WIDTH * WIDTH
    if TOGETHER:
        # Rows and columns alone: nothing is summed over either before the products of matrices.
        offset = rows[:, None] * WIDTH + rows[None, :]
        mask = inside[:, None] & inside[None, :]
        gram = tl.load(gram_at + offset, mask=mask, other=0.0)
    else:
        gram, offset, mask = load_state(gram_at, rows, inside, columns, WIDTH)
    if EAGER & (PART != 1):
        state, value_offset, value_mask = load_state(value_at, value_rows, value_inside, columns, WIDTH)
    if PART == 3:
        unit, inverse = power_of_two(tl.max(tl.abs(gram)))
        operand = (gram * (inverse * 16384.0)).to(tl.float16)
        unit = unit * (1.0 / 16384.0)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    if PAIRED & (PART == 1):
        tl.extra.cuda.gdc_launch_dependents()
    previous = 0
    first = batch * length
    place = first * heads + head
    # From here on pointers are at the first token of the row and head.
    key += (first * key_heads + key_head) * WIDTH
    query += (first * query_heads + query_head) * WIDTH
    value += (first * value_heads + value_head) * VALUE_WIDTH
    input_gate += place
    log_decay += place
    key_log_decay += place
    solution_mix += place
    output_gate += place * VALUE_WIDTH
    rate, bias = decay_of(decay_rate + head, decay_bias + head, MIXER & (DECAYS > 0))
    numbers += first
    of_gram = key_log_decay if DECAYS == 2 else log_decay
    DECAYED: tl.constexpr = (DECAYS == 1) | (DECAYS == 2)
    k = token_vector(key, 0, length, key_heads * WIDTH, rows, WIDTH)
    gate, log, number = scalars(input_gate, of_gram, numbers, 0, length, heads, GATED, DECAYED, PACKED)
    q = tl.zeros([BLOCK], tl.float32)
    OPENED: tl.constexpr = MIXER & OUTPUT_GATED
    tokens = value, input_gate, log_decay, numbers, output_gate, length, heads, value_heads, value_rows
    for token in range(0, updates):
        # The next token is under way.
        next_k = token_vector(key, token + 1, length, key_heads * WIDTH, rows, WIDTH)
        next_gate, next_log, next_number = scalars(
            input_gate, of_gram, numbers, token + 1, length, heads, GATED, DECAYED, PACKED
        )
        if PART < 2:
            q = token_vector(query, token, length, query_heads * WIDTH, rows, WIDTH)
        k, keep = entering(k, gate, log, number, previous, input_gate, rate, bias, GATED, DECAYED, PACKED, MIXER)
        if PACKED:
            previous = number
        gram = gram * keep + k[:, None] * k[None, :] if TOGETHER else gram * keep + wide(k) * across(k, PIECE)
        if EVERY:
            tl.store(grams + (place + token * heads) * WIDTH * WIDTH + offset, gram, mask=mask)
        if (PART != 1) & (token == last):
            if PAIRED & (PART == 2):
                # For the solves: they read what is replaced here.
                tl.extra.cuda.gdc_wait()
            # Under way while the solve runs.
            tl.store(gram_out + line * WIDTH * WIDTH + offset, gram, mask=mask)
        if (PART == 0) & (METHOD != 0):
            mix = share_of(solution_mix + token * heads, MIXED, MIXER)
            q = mixed_query(gram, q, tl.sum(q * q, 0), mix, iterations, ridge, tolerance, METHOD, PIPELINED, PIECE)
        if PART == 0:
            # What reads waits for the value state.
            tl.store(mixed + (place + token * heads) * WIDTH + rows, q, mask=inside)
        k, gate, log, number = next_k, next_gate, next_log, next_number
    if PART == 1:
        mix = share_of(solution_mix + last * heads, MIXED, MIXER)
        q = mixed_query(gram, q, tl.sum(q * q, 0), mix, iterations, ridge, tolerance, METHOD, PIPELINED, PIECE)
        tl.store(mixed + (place + last * heads) * WIDTH + rows, q, mask=inside)
    if PART == 3:
        _solve_together(
            operand,
            unit,
            query,
            key,
            query_heads * WIDTH,
            key_heads * WIDTH,
            of_gram,
            rate,
            bias,
            solution_mix,
            input_gate,
            numbers,
            mixed + place * WIDTH,
            length,
            heads,
            iterations,
            ridge,
            tolerance,
            METHOD,
            MIXER,
            DECAYED,
            GATED,
            MIXED,
            PACKED,
            WIDTH,
            BLOCK,
        )
    if PART != 1:
        if not EAGER:
            state, value_offset, value_mask = load_state(value_at, value_rows, value_inside, columns, WIDTH)
        previous = 0
        reads = mixed + place * WIDTH
        if MIXER:
            weight = tl.load(norm_weight + value_rows, mask=value_inside, other=0.0).to(tl.float32)
        writing = token_vector(key, 0, length, key_heads * WIDTH, columns, WIDTH)
        v, value_gate, value_log, value_number, opening = _written(
            tokens, 0, GATED, DECAYS > 0, PACKED, OPENED, VALUE_WIDTH
        )
        if PAIRED:
            tl.extra.cuda.gdc_wait()
        tl.debug_barrier()
        reading = token_vector(reads, 0, length, heads * WIDTH, columns, WIDTH)
        for token in range(0, value_updates):
            next_reading = token_vector(reads, token + 1, length, heads * WIDTH, columns, WIDTH)
            next_writing = token_vector(key, token + 1, length, key_heads * WIDTH, columns, WIDTH)
            next_v, next_gate, next_log, next_number, next_opening = _written(
                tokens, token + 1, GATED, DECAYS > 0, PACKED, OPENED, VALUE_WIDTH
            )
            if GATED:
                factor = opened(value_gate, input_gate, MIXER)
                v, writing = v * factor, writing * factor
            keep = 1.0
            if DECAYS > 0:
                keep = tl.exp(log_kept(value_log, rate, bias, MIXER))
            if PACKED:
                keep = tl.where(value_number == previous, keep, 0.0)
                previous = value_number
            target = (place + token * heads) * VALUE_WIDTH + value_rows
            state = state * keep + wide(v) * along(writing)
            if EVERY:
                tl.store(
                    value_keys + (place + token * heads) * VALUE_WIDTH * WIDTH + value_offset, state, mask=value_mask
                )
            y = summed_rows(state * along(reading)) * scale
            if MIXER:
                y = rounded(y, outputs)
                y = y / tl.sqrt(tl.sum(y * y, 0) / VALUE_WIDTH + eps) * weight
                if OUTPUT_GATED:
                    y = y * silu(opening)
            tl.store(outputs + target, y.to(outputs.dtype.element_ty), mask=value_inside)
            reading, writing, v, opening = next_reading, next_writing, next_v, next_opening
            value_gate, value_log, value_number = next_gate, next_log, next_number
        tl.store(value_key_out + line * VALUE_WIDTH * WIDTH + value_offset, state, mask=value_mask)


@triton.jit(do_not_specialize=["rows", "share", "length"])
def prepare_kernel(
    query,
    key,
    value,
    query_past,
    key_past,
    value_past,
    query_taps,
    key_taps,
    value_taps,
    valid,
    query_ready,
    key_ready,
    value_ready,
    rows,
    share,
    length,
    query_heads,
    key_heads,
    value_heads,
    PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
    TAPS: tl.constexpr,
    SLOTS: tl.constexpr,
    KEY_SILU: tl.constexpr,
    VALUE_CONV: tl.constexpr,
    VALUE_SILU: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Convolution, SiLU and unit norm of the queries, keys or values of one head; convolution contexts in place.

    One program does `share` rows. EARLY: as in `step_kernel`, and the next may start once this one need not wait any
    more. TOKENS: 1, or a power of two that holds all of several. PADDED: a single token.
    """
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    first, head = tl.program_id(0) * share, tl.program_id(1)
    last = tl.minimum(first + share, rows)
    if head < query_heads:
        _prepare(
            query,
            query_past,
            query_taps,
            query_ready,
            valid,
            first,
            last,
            head,
            query_heads,
            length,
            PADDED,
            TOKENS,
            TAPS,
            SLOTS,
            True,
            KEY_SILU,
            True,
            WIDTH,
            BLOCK,
        )
    elif head < query_heads + key_heads:
        head -= query_heads
        _prepare(
            key,
            key_past,
            key_taps,
            key_ready,
            valid,
            first,
            last,
            head,
            key_heads,
            length,
            PADDED,
            TOKENS,
            TAPS,
            SLOTS,
            True,
            KEY_SILU,
            True,
            WIDTH,
            BLOCK,
        )
    else:
        head -= query_heads + key_heads
        _prepare(
            value,
            value_past,
            value_taps,
            value_ready,
            valid,
            first,
            last,
            head,
            value_heads,
            length,
            PADDED,
            TOKENS,
            TAPS,
            SLOTS,
            VALUE_CONV,
            VALUE_SILU,
            False,
            VALUE_WIDTH,
            VALUE_BLOCK,
        )


@triton.jit
def _prepare(
    raw,
    past,
    taps,
    ready,
    valid,
    first,
    last,
    head,
    heads,
    length,
    PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
    TAPS: tl.constexpr,
    SLOTS: tl.constexpr,
    CONV: tl.constexpr,
    SILU: tl.constexpr,
    UNIT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    channels = heads * WIDTH
    lines, slot = tl.arange(0, BLOCK), tl.arange(0, SLOTS)
    inside = lines < WIDTH
    # From here on pointers are at the first channel of the head.
    raw += long(first) * length * channels + head * WIDTH
    ready += long(first) * length * channels + head * WIDTH
    past += (long(first) * channels + head * WIDTH) * (TAPS - 1)
    taps += head * WIDTH * TAPS
    if CONV and TOKENS == 1:
        weights = _weights(taps, inside, lines, slot, TAPS)
    for row in range(first, last):
        if TOKENS > 1:
            _prepare_several(raw, past, taps, ready, channels, lines, length, TOKENS, TAPS, CONV, SILU, UNIT, WIDTH)
        else:
            if CONV:
                # Taps and what a token sees in one tile: that, one place on, is the context after it.
                window = _window(raw, past, inside, lines, slot, TAPS)
                x = tl.sum(window * weights, 1)
            else:
                x = tl.load(raw + lines, mask=inside, other=0.0).to(tl.float32)
            x = _finished(x, raw, SILU, UNIT)
            tl.store(ready + lines, x.to(ready.dtype.element_ty), mask=inside)
            if CONV:
                reach = TAPS
                if PADDED:
                    # A token that is padding does not move the window: as if there were none.
                    reach = tl.where(tl.load(valid + row) != 0, TAPS, 0)
                tl.debug_barrier()
                _move_on(past, window, inside, lines, slot, reach, TAPS)
        raw += length * channels
        ready += length * channels
        past += channels * (TAPS - 1)


# Warps by the wider of both widths. More are slower: the solve then waits for its barriers.
WARPS = {16: 1, 32: 1, 64: 2, 128: 4}
# Up to how many heads of all rows several tokens are solved side by side, in a launch of their own.
SPREAD_PROGRAMS = 64
# Up to how many heads of all rows several tokens of width 64 have twice the warps: one after the other with room for
# both states, side by side with half the latency.
EAGER_PROGRAMS = 132
# From how many heads of all rows on a single token has the value state on its way during the solve, and states are read
# and written in whole lines of memory, by the wider of both widths: without and with the convolution.
AHEAD_PROGRAMS = ({128: 512}, {64: 1024, 128: 1})
# Registers of a thread for a single token by the wider of both widths: with these, a multiprocessor holds six programs.
TOKEN_REGISTERS = {64: 168}
# The least ridge for which the residual of pipelined conjugate gradients in float32, a recursion, is the true one.
PIPELINED_RIDGE = 0.01
# Warps and registers of a thread for a few tokens of states as wide as high, by their width: with these, a
# multiprocessor holds three programs of width 128 and seven of width 64.
SQUARE_LAUNCH = {64: (2, 144), 128: (4, 168)}
# How many programs prepare tokens; each does as many rows as that takes.
PREPARE_PROGRAMS = 4096
PREPARE_WARPS = 4
# From how many tokens on, to four, they are taken side by side, by the wider of both widths; from two on where
# `gluon_few_kernel` takes them.
FEW_FROM = {64: 4, 128: 3}
# From how many heads of all rows for each multiprocessor on several tokens start while they are still prepared, by the
# wider of both widths.
EARLY_FROM = {64: 4, 128: 3}
# How many programs a multiprocessor holds at the same time, by the wider of both widths, and by how many sleeps each
# starts later than the one before it.
STEP_TURNS = {64: (6, 2), 128: (2, 10)}
CHUNK_TURNS = (2, 24)
# From how many tokens of all heads on four tokens and more are taken as a chunk.
TOGETHER_TOKENS = 512
# The convolution of a step of the operator alone.
BARE = {
    "CONVOLVES": False,
    "TAPS": 1,
    "KEY_SILU": False,
    "VALUE_CONV": False,
    "VALUE_SILU": False,
}


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
        (none,) * 6,
        (none,) * 3,
        (*state, *after, *trail),
        outputs,
        heads,
        solver,
        scale,
        0.0,
        {"MIXER": False, "DECAYS": decay_count(inputs), "EVERY": every, "EARLY": False},
        BARE,
    )
    return outputs, *after, *trail


@on_own_device
def gka_triton_mixer_step(inputs: MixerInputs, solver: GKASolver, options: MixerOptions) -> Tensor:
    """RMSNorm(GKA(conv(q), conv(k), conv(v))) * SiLU(gate) for a few tokens, (B, T, H, Dv), in one to three launches.

    Convolution contexts and states are replaced in place. Everything is rounded to the dtype of the projections where
    the layer's separate operators round it.
    """
    batch, length, query_heads, width = inputs.query.shape
    key_heads, (value_heads, value_width) = inputs.key.shape[2], inputs.value.shape[2:]
    heads = inputs.key_gram.shape[1]
    outputs = inputs.query.new_empty(batch, length, heads, value_width)
    none = inputs.query

    def present(*tensors: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(none if t is None else t for t in tensors)

    taps, early = inputs.query_taps.shape[1], _may_overlap(none)
    convolution = {
        "TAPS": taps,
        "KEY_SILU": options.key_silu,
        "VALUE_CONV": inputs.value_taps is not None,
        "VALUE_SILU": options.value_silu,
    }
    raw = (inputs.query, inputs.key, inputs.value)
    pasts = present(inputs.query_past, inputs.key_past, inputs.value_past)
    weights = present(inputs.query_taps, inputs.key_taps, inputs.value_taps)
    convolved = (query_heads, key_heads, *((value_heads,) if convolution["VALUE_CONV"] else ()))
    alone = convolves(length, heads, convolved)
    ready = raw
    if not alone:
        with_value = convolution["VALUE_CONV"] or options.value_silu
        ready = (*(torch.empty_like(t) for t in raw[:2]), torch.empty_like(raw[2]) if with_value else raw[2])
        every_head = query_heads + key_heads + (value_heads if with_value else 0)
        share = triton.cdiv(batch * every_head, PREPARE_PROGRAMS)
        prepare_kernel[(triton.cdiv(batch, share), every_head)](
            *raw,
            *pasts,
            *weights,
            *present(inputs.valid),
            *ready,
            batch,
            share,
            length,
            query_heads,
            key_heads,
            value_heads,
            PADDED=inputs.valid is not None,
            # From two to four tokens one build serves all.
            TOKENS=1 if length == 1 else max(4, triton.next_power_of_2(length)),
            SLOTS=triton.next_power_of_2(taps),
            WIDTH=width,
            VALUE_WIDTH=value_width,
            BLOCK=filled(width),
            VALUE_BLOCK=filled(value_width),
            num_warps=PREPARE_WARPS,
            **convolution,
            **_overlap(early),
        )
    _launch(
        ready,
        (inputs.decay_step, None, inputs.solution_mix, inputs.input_gate, inputs.output_gate),
        None,
        inputs.valid,
        (*pasts, *weights),
        (*present(inputs.decay_rate, inputs.decay_bias), inputs.norm_weight),
        (inputs.key_gram, inputs.value_key, inputs.key_gram, inputs.value_key, none, none),
        outputs,
        heads,
        solver,
        options.scale,
        options.eps,
        {
            "MIXER": True,
            "DECAYS": 0 if inputs.decay_step is None else 1 if options.decay_gram else 3,
            "EVERY": False,
            "EARLY": early,
        },
        {"CONVOLVES": True, **convolution} if alone else BARE,
    )
    return outputs


def _may_overlap(tensor: Tensor) -> bool:
    """Whether a kernel may start while the one before it ends: the step then loads its state meanwhile."""
    return compute_capability(tensor.device) >= 90


def starts_early(length: int, programs: int, widest: int, processors: int) -> bool:
    """Whether a step may start while `prepare_kernel` ends.

    Several tokens not where their programs would all find room at once: they would gather on the multiprocessors that
    are free first, and others would stay idle.
    """
    return length == 1 or programs <= SPREAD_PROGRAMS or programs >= EARLY_FROM.get(widest, 0) * processors


def _overlap(early: bool) -> dict[str, bool]:
    """EARLY and, with it, the launch option that lets a kernel start before the one before it ends."""
    return {"EARLY": early, "launch_pdl": True} if early else {"EARLY": early}


def way(length: int, programs: int, widest: int, dtype: torch.dtype, solver: GKASolver, square: bool) -> str:
    """How the tokens of `programs` heads are taken; `widest`: the wider of both widths.

    "each": one after the other; "spread": each solved by a program of its own; "few": up to four side by side, by
    `gluon_few_kernel` if `square`, else by `few_kernel`; "chunk": up to eight like a chunk of a prompt.
    """
    if length == 1:
        return "each"
    if programs <= SPREAD_PROGRAMS:
        return "spread"
    if dtype == torch.float32:
        return "each"
    if (2 if square else FEW_FROM.get(widest, 5)) <= length <= 4 and method(solver) == METHODS["cg"]:
        return "few"
    return "chunk" if length > 3 and length * programs >= TOGETHER_TOKENS else "each"


def has_square(width: int, value_width: int, capability: int, every: bool) -> bool:
    """Whether `gluon_few_kernel` takes what `few_kernel` would: on devices with room for several programs' states.

    Not where every state is stored: that is mostly writing, which `few_kernel` does in whole lines of memory.
    """
    return capability in ROOMY and width == value_width and width in SQUARE_LAUNCH and not every


def square_layout(programs: int, width: int) -> dict[str, int]:
    """`gluon_few_kernel`'s WARPS and its launch options for a few tokens of `programs` heads."""
    warps, registers = SQUARE_LAUNCH[width]
    if width == 64 and programs <= EAGER_PROGRAMS:
        warps, registers = 2 * warps, 128
    return {"WARPS": warps, "num_warps": warps, "maxnreg": registers}


def turns(way: str, programs: int, widest: int, processors: int) -> tuple[int, int]:
    """`take_turns`'s crowd and sleeps; none where no program has to wait for another to end."""
    side_by_side, sleeps = CHUNK_TURNS if way == "chunk" else STEP_TURNS.get(widest, (1, 0))
    crowd = side_by_side * processors
    return (crowd, sleeps) if sleeps and programs > crowd else (0, 0)


def convolves(length: int, heads: int, convolved: tuple[int, ...]) -> bool:
    """`token_kernel`'s CONVOLVES: a context that several heads read has to be replaced by a launch of its own."""
    return length == 1 and all(count == heads for count in convolved)


def layout(programs: int, widest: int) -> tuple[bool, int]:
    """`step_kernel`'s EAGER, which comes with twice the warps, and PIECE for several tokens of `programs` heads."""
    return widest == 64 and programs <= EAGER_PROGRAMS, 16


def token_layout(programs: int, widest: int, convolving: bool, capability: int) -> dict[str, int]:
    """`token_kernel`'s STAGES and PIECE and its launch options for one token of `programs` heads."""
    # Shared memory for the states of as many programs as registers have room for.
    ahead = capability in ROOMY and programs >= AHEAD_PROGRAMS[convolving].get(widest, programs + 1)
    options = {"num_warps": WARPS[widest], "STAGES": 2 if ahead else 1, "PIECE": min(widest, 32 if ahead else 16)}
    if capability and widest in TOKEN_REGISTERS:
        options["maxnreg"] = TOKEN_REGISTERS[widest]
    return options


def _launch(
    tokens,
    gates,
    numbers,
    valid,
    contexts,
    parameters,
    states,
    outputs,
    heads,
    solver,
    scale,
    eps,
    options,
    convolution,
) -> None:
    query, key, value = tokens
    batch, length, query_heads, width = query.shape
    block, value_block = filled(width), filled(value.shape[-1])
    programs, widest = batch * heads, max(block, value_block)
    solves = method(solver) != METHODS["none"]
    processors, capability = multiprocessors(query.device), compute_capability(query.device)
    square = has_square(width, value.shape[-1], capability, options["EVERY"])
    chosen = way(length, programs, widest, query.dtype, solver, square) if solves else "each"
    precise = query.dtype == torch.float32
    # What every kernel takes; `solves_one` and `pace` are for all but a few tokens side by side.
    inputs = (query, key, value, *(query if t is None else t for t in gates), query if numbers is None else numbers)
    sizes = (heads, query_heads, key.shape[2], value.shape[2])
    tolerance = solver.squared_tolerance(TOLERANCE["float32" if precise else "float16"])
    settings = (solver.iterations, solver.ridge_ratio, tolerance, scale, eps)
    pace = (processors, *turns(chosen, programs, widest, processors))
    constants = {
        "GATED": gates[3] is not None,
        "MIXED": gates[2] is not None,
        "OUTPUT_GATED": gates[4] is not None,
        "PACKED": numbers is not None,
        "WIDTH": width,
        "VALUE_WIDTH": value.shape[-1],
        **options,
        **_overlap(options["EARLY"] and starts_early(length, programs, widest, processors)),
    }
    solves_one = {
        "METHOD": method(solver),
        "PIPELINED": not precise and solver.ridge_ratio >= PIPELINED_RIDGE,
        "TURNS": capability >= 70,
    }
    if length == 1:
        token_kernel[(programs,)](
            *inputs,
            query if valid is None else valid,
            *contexts,
            *parameters,
            *states,
            outputs,
            *sizes,
            *settings,
            *pace,
            PADDED=valid is not None,
            BLOCK=widest,
            **token_layout(programs, widest, convolution["CONVOLVES"], capability),
            **constants,
            **solves_one,
            **convolution,
        )
        return
    blocks = {"BLOCK": block, "VALUE_BLOCK": value_block}
    if chosen == "few":
        rest = (outputs, length, *sizes, *settings)
        if square:
            # No other value width, and no state but the last.
            del constants["VALUE_WIDTH"], constants["EVERY"]
            gluon_few_kernel[(programs,)](
                *inputs, *parameters, *states[:4], *rest, **square_layout(programs, width), **constants
            )
        else:
            few_kernel[(programs,)](
                *inputs, *parameters, *states, *rest, **constants, **blocks, num_warps=WARPS[widest]
            )
        return
    eager, piece = layout(programs, widest)
    # What reads of every token.
    mixed = torch.empty(batch, length, heads, width, dtype=torch.float32, device=query.device)

    def start(*grid: int, **changes: int) -> None:
        flags = {"PAIRED": False, "EAGER": eager, "PIECE": min(block, piece), **constants, **solves_one, **blocks}
        flags |= changes
        step_kernel[grid](
            *inputs,
            *parameters,
            *states,
            mixed,
            outputs,
            length,
            *sizes,
            *settings,
            *pace,
            **flags,
            num_warps=WARPS[widest] * (2 if flags["EAGER"] else 1),
        )

    if chosen == "spread":
        # Part 2 runs beside part 1 and has its states loaded when that has solved.
        beside = {"PAIRED": True, "EAGER": True, "launch_pdl": True} if _may_overlap(query) else {}
        start(programs, length, PART=1, EVERY=False, TURNS=False, PAIRED=bool(beside))
        start(programs, 2, PART=2, EARLY=False, TURNS=False, **beside)
    else:
        start(programs, PART=3 if chosen == "chunk" else 0)
