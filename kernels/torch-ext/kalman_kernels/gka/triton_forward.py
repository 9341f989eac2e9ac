"""Gated KalmaNet forward in Triton: gates, states of chunks, solve and read-out (README.md, eqs. 1-10, 20, 21, 23)."""

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

from .reference import GKASolver
from .triton_common import (
    METHODS,
    Plan,
    carries,
    dot,
    launch,
    load_operand,
    load_raw,
    load_rows,
    long,
    plan,
    power_of_two,
    products,
    scaled_rows,
    scaled_vector,
    solve,
    store_operand,
    store_rows,
    within,
)

__all__ = ["TritonInputs", "gates", "gka_triton_forward"]


@triton.jit(do_not_specialize=["length", "chunks"])
def gates_kernel(
    key_log_decay,
    log_decay,
    input_gate,
    solution_mix,
    gates,
    length,
    chunks,
    heads,
    planes,
    DECAYS: tl.constexpr,
    GATED: tl.constexpr,
    MIXED: tl.constexpr,
    CHUNK: tl.constexpr,
    HEADS: tl.constexpr,
):
    """(B, T, H) gates as four planes (B, H, chunks * CHUNK): base-2 decays summed within each chunk, gate, mixture.

    DECAYS: 0 no decay, 1 one decay for both states, 2 two.
    """
    program = long(tl.program_id(0))
    batch, chunk = program // chunks, program % chunks
    row, head = tl.arange(0, CHUNK), tl.arange(0, HEADS)
    rows = chunk * CHUNK + row
    read = (batch * length + rows)[:, None] * heads + head[None, :]
    inside = (rows < length)[:, None] & (head < heads)[None, :]
    written = (batch * heads + head)[None, :] * (chunks * CHUNK) + rows[:, None]
    mask = (head < heads)[None, :]
    decay = tl.zeros((CHUNK, HEADS), tl.float32)
    if DECAYS > 0:
        decay = tl.load(log_decay + read, mask=inside, other=0.0).to(tl.float32) * 1.4426950408889634
        decay = tl.cumsum(decay, 0)
    tl.store(gates + planes + written, decay, mask=mask)
    if DECAYS > 1:
        decay = tl.load(key_log_decay + read, mask=inside, other=0.0).to(tl.float32) * 1.4426950408889634
        decay = tl.cumsum(decay, 0)
    tl.store(gates + written, decay, mask=mask)
    gate = tl.where(inside, 1.0, 0.0)
    if GATED:
        gate = tl.load(input_gate + read, mask=inside, other=0.0).to(tl.float32)
    tl.store(gates + 2 * planes + written, gate, mask=mask)
    mix = tl.where(inside, 1.0, 0.0)
    if MIXED:
        mix = tl.load(solution_mix + read, mask=inside, other=0.0).to(tl.float32)
    tl.store(gates + 3 * planes + written, mix, mask=mask)


@triton.jit(do_not_specialize=["length", "chunks"])
def increments_kernel(
    key,
    value,
    gates,
    numbers,
    grams,
    value_keys,
    units,
    length,
    chunks,
    heads,
    key_heads,
    value_heads,
    planes,
    PACKED: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What one chunk adds to both states, (B H, chunks, D, Dk) in the units written beside; README eq. 8, 23."""
    program = long(tl.program_id(0))
    line, chunk = program // chunks, (program % chunks).to(tl.int32)
    batch, head = line // heads, line % heads
    row, lines, value_lines = tl.arange(0, CHUNK), tl.arange(0, BLOCK), tl.arange(0, VALUE_BLOCK)
    first = long(chunk) * CHUNK
    count = length - chunk * CHUNK
    row_gates = line * chunks * CHUNK
    number = numbers + batch * chunks * CHUNK
    token = batch * length + first
    gate = tl.load(gates + 2 * planes + row_gates + first + row)
    key_base = key + (token * key_heads + head // (heads // key_heads)) * WIDTH
    keys, key_scale = scaled_rows(load_rows(key_base, key_heads * WIDTH, row, count, lines, WIDTH), OPERAND)
    _, out, _ = carries(gates + row_gates, number, chunk, row, CHUNK, PACKED)
    tile, bound = products(keys, key_scale, keys, key_scale, out * gate * gate, OPERAND, PRECISION)
    store_operand(grams + program * WIDTH * WIDTH, lines, lines, tile, WIDTH, WIDTH)
    tl.store(units + program, bound)
    value_base = value + (token * value_heads + head // (heads // value_heads)) * VALUE_WIDTH
    values, value_scale = scaled_rows(
        load_rows(value_base, value_heads * VALUE_WIDTH, row, count, value_lines, VALUE_WIDTH), OPERAND
    )
    _, out, _ = carries(gates + planes + row_gates, number, chunk, row, CHUNK, PACKED)
    tile, bound = products(values, value_scale, keys, key_scale, out * gate * gate, OPERAND, PRECISION)
    store_operand(value_keys + program * VALUE_WIDTH * WIDTH, value_lines, lines, tile, VALUE_WIDTH, WIDTH)
    tl.store(units + tl.num_programs(0) + program, bound)


@triton.jit(do_not_specialize=["length", "chunks"])
def walk_kernel(
    key,
    value,
    gates,
    numbers,
    initial_gram,
    initial_value_key,
    gram_bounds,
    value_bounds,
    grams,
    value_keys,
    units,
    final_gram,
    final_value_key,
    length,
    chunks,
    heads,
    key_heads,
    value_heads,
    planes,
    HAS_STATE: tl.constexpr,
    PACKED: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`increments_kernel` and `scan_kernel` in one: a program carries one state of one head through time.

    It moves a third of their bytes, and has no more programs than there are states: the choice for many heads.
    """
    program = long(tl.program_id(0))
    lines = tl.num_programs(0) // 2
    line = program % lines
    batch, head = line // heads, line % heads
    key += (batch * length * key_heads + head // (heads // key_heads)) * WIDTH
    gates += line * chunks * CHUNK
    numbers += batch * chunks * CHUNK
    if program < lines:
        _walk(
            key,
            key,
            gates,
            gates + 2 * planes,
            numbers,
            initial_gram + line * WIDTH * WIDTH,
            gram_bounds + line,
            grams + line * chunks * WIDTH * WIDTH,
            units + line * chunks,
            final_gram + line * WIDTH * WIDTH,
            length,
            chunks,
            key_heads,
            key_heads,
            HAS_STATE,
            PACKED,
            WIDTH,
            WIDTH,
            CHUNK,
            BLOCK,
            BLOCK,
            OPERAND,
            PRECISION,
        )
    else:
        _walk(
            value + (batch * length * value_heads + head // (heads // value_heads)) * VALUE_WIDTH,
            key,
            gates + planes,
            gates + 2 * planes,
            numbers,
            initial_value_key + line * VALUE_WIDTH * WIDTH,
            value_bounds + line,
            value_keys + line * chunks * VALUE_WIDTH * WIDTH,
            units + (lines + line) * chunks,
            final_value_key + line * VALUE_WIDTH * WIDTH,
            length,
            chunks,
            value_heads,
            key_heads,
            HAS_STATE,
            PACKED,
            VALUE_WIDTH,
            WIDTH,
            CHUNK,
            VALUE_BLOCK,
            BLOCK,
            OPERAND,
            PRECISION,
        )


@triton.jit
def _walk(
    left,
    right,
    cumulative,
    gate,
    numbers,
    initial,
    bounds,
    states,
    units,
    final,
    length,
    chunks,
    left_heads,
    right_heads,
    HAS_STATE: tl.constexpr,
    PACKED: tl.constexpr,
    LEFT_WIDTH: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    LEFT_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row, lines, columns = tl.arange(0, CHUNK), tl.arange(0, LEFT_BLOCK), tl.arange(0, BLOCK)
    mask = (lines < LEFT_WIDTH)[:, None] & (columns < WIDTH)[None, :]
    offset = lines[:, None] * WIDTH + columns[None, :]
    left_stride, right_stride = left_heads * LEFT_WIDTH, right_heads * WIDTH
    state = tl.zeros((LEFT_BLOCK, BLOCK), tl.float32)
    bound = 0.0
    if HAS_STATE:
        state = tl.load(initial + offset, mask=mask, other=0.0)
        bound = tl.load(bounds)
    left_tile = load_raw(left, left_stride, row, length, lines, LEFT_WIDTH)
    right_tile = load_raw(right, right_stride, row, length, columns, WIDTH)
    for chunk in range(0, chunks):
        first = long(chunk) * CHUNK
        # The next chunk is under way while this one is worked on.
        following, count = first + CHUNK, length - (chunk + 1) * CHUNK
        next_left = load_raw(left + following * left_stride, left_stride, row, count, lines, LEFT_WIDTH)
        next_right = load_raw(right + following * right_stride, right_stride, row, count, columns, WIDTH)
        factor = tl.load(gate + first + row)
        _, out, through = carries(cumulative, numbers, chunk, row, CHUNK, PACKED)
        scale, inverse = power_of_two(bound)
        target = states + long(chunk) * (LEFT_WIDTH * WIDTH) + offset
        tl.store(target, (state * (inverse * 16384.0)).to(states.dtype.element_ty), mask=mask)
        tl.store(units + chunk, scale * (1.0 / 16384.0))
        left_scaled, left_scale = scaled_rows(left_tile.to(tl.float32), OPERAND)
        right_scaled, right_scale = scaled_rows(right_tile.to(tl.float32), OPERAND)
        tile, added = products(
            left_scaled, left_scale, right_scaled, right_scale, out * factor * factor, OPERAND, PRECISION
        )
        state = state * through + tile * (added * (1.0 / 1024.0))
        bound = bound * through + added
        left_tile, right_tile = next_left, next_right
    tl.store(final + offset, state, mask=mask)


@triton.jit(do_not_specialize=["chunks"])
def scan_kernel(
    states,
    units,
    state_units,
    gates,
    numbers,
    initial,
    bounds,
    final,
    chunks,
    heads,
    PACKED: tl.constexpr,
    HAS_STATE: tl.constexpr,
    REVERSE: tl.constexpr,
    FINAL: tl.constexpr,
    SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Increments of chunks become the state before each chunk (REVERSE: after it), in place; README eqs. 8, 13.

    One program carries TILE elements of one head through time.
    """
    tiles: tl.constexpr = (SIZE + TILE - 1) // TILE
    program = tl.program_id(0)
    tile, line = program % tiles, long(program // tiles)
    offset = tile * TILE + tl.arange(0, TILE)
    inside = offset < SIZE
    number = numbers + (line // heads) * chunks * CHUNK
    cumulative = gates + line * chunks * CHUNK
    states += line * chunks * SIZE
    state = tl.zeros((TILE,), tl.float32)
    bound = 0.0
    if HAS_STATE:
        state = tl.load(initial + line * SIZE + offset, mask=inside, other=0.0)
        bound = tl.load(bounds + line)
    for block in range(0, tl.cdiv(chunks, 4)):
        # The increments of four chunks are under way together: the walk would else wait for each of them.
        start = long(block) * 4
        added_0 = _increment(states, offset, start, chunks, REVERSE, SIZE)
        added_1 = _increment(states, offset, start + 1, chunks, REVERSE, SIZE)
        added_2 = _increment(states, offset, start + 2, chunks, REVERSE, SIZE)
        added_3 = _increment(states, offset, start + 3, chunks, REVERSE, SIZE)
        for step in tl.static_range(4):
            added = added_0 if step == 0 else added_1 if step == 1 else added_2 if step == 2 else added_3
            chunk = chunks - 1 - start - step if REVERSE else start + step
            present = (chunk >= 0) & (chunk < chunks)
            unit = tl.load(units + line * chunks + chunk, mask=present, other=0.0)
            through = tl.exp2(tl.load(cumulative + chunk * CHUNK + CHUNK - 1, mask=present, other=0.0))
            if PACKED:
                last = tl.load(number + chunk * CHUNK + CHUNK - 1, mask=present, other=0)
                before = tl.load(number + chunk * CHUNK - 1, mask=present & (chunk > 0), other=0)
                through = tl.where((last == before) | (chunk < 0) | (chunk >= chunks), through, 0.0)
            scale, inverse = power_of_two(bound)
            tl.store(
                states + chunk * SIZE + offset,
                (state * (inverse * 16384.0)).to(states.dtype.element_ty),
                mask=offset < tl.where(present, SIZE, 0),
            )
            if present & (tile == 0):
                tl.store(state_units + line * chunks + chunk, scale * (1.0 / 16384.0))
            state = state * through + added * (unit * (1.0 / 16384.0))
            bound = bound * through + unit
    if FINAL:
        tl.store(final + line * SIZE + offset, state, mask=inside)


@triton.jit
def _increment(states, offset, step, chunks, REVERSE: tl.constexpr, SIZE: tl.constexpr):
    """The increment of the chunk visited at `step`."""
    chunk = chunks - 1 - step if REVERSE else step
    limit = tl.where((chunk >= 0) & (chunk < chunks), SIZE, 0)
    return tl.load(states + chunk * SIZE + offset, mask=offset < limit, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["length", "chunks", "iterations", "ridge", "tolerance"])
def solve_kernel(
    right,
    key,
    gates,
    numbers,
    grams,
    units,
    norms,
    solutions,
    others,
    rows,
    d_key,
    length,
    chunks,
    heads,
    key_heads,
    planes,
    iterations,
    ridge,
    tolerance,
    METHOD: tl.constexpr,
    ADJOINT: tl.constexpr,
    RIDGE: tl.constexpr,
    PACKED: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Solve for one chunk of one head: (H_t / ||H_t||_F + ridge I)^-1 of the rows of `right`, scaled to norm 1.

    Forward: computes ||H_t||_F (`norms`), writes the solutions and their factors |q_t| / ||H_t||_F (`rows`, plane 0).
    ADJOINT: reads the norms and rows of norm 1 or 0; writes, in plane 1, the inner products of `others` with what the
    iteration left of the right side, and, with RIDGE, K H_0 into `d_key`. README eqs. 5, 9, 10, 17.
    """
    program = long(tl.program_id(0))
    line, chunk = program // chunks, (program % chunks).to(tl.int32)
    batch, head = line // heads, line % heads
    row, lines = tl.arange(0, CHUNK), tl.arange(0, BLOCK)
    first = long(chunk) * CHUNK
    count = length - chunk * CHUNK
    row_gates = line * chunks * CHUNK
    number = numbers + batch * chunks * CHUNK
    place = row_gates + first + row
    token = (batch * length + first) * heads + head
    key_base = key + ((batch * length + first) * key_heads + head // (heads // key_heads)) * WIDTH
    gate = tl.load(gates + 2 * planes + place)
    keys, key_scale = scaled_rows(load_rows(key_base, key_heads * WIDTH, row, count, lines, WIDTH), OPERAND)
    into, _, _ = carries(gates + row_gates, number, chunk, row, CHUNK, PACKED)
    into = into * tl.load(units + program)
    weight = gate * gate * key_scale * key_scale
    right_tile = load_rows(right + token * WIDTH, heads * WIDTH, row, count, lines, WIDTH)
    gram = load_operand(grams + program * WIDTH * WIDTH, lines, lines, WIDTH, WIDTH)
    decay = within(gates + row_gates, number, chunk, row, CHUNK, PACKED)
    if ADJOINT:
        norm = tl.load(norms + place)
        if RIDGE:
            key_state = dot(keys, gram, PRECISION) * (1.0 / 16384.0)
            store_rows(d_key + token * WIDTH, heads * WIDTH, row, count, lines, key_state, WIDTH)
    else:
        norm = chunk_norm(keys, gram, into, decay, weight, PRECISION)
        tl.store(norms + place, norm)
    inverse = tl.where(norm > 0, 1.0 / norm, 0.0)
    if not ADJOINT:
        size = tl.sqrt(tl.sum(right_tile * right_tile, 1))
        tl.store(rows + place, size * inverse)
        right_tile = right_tile * tl.where(size > 0, 1.0 / size, 0.0)[:, None]
    x, residual = solve(
        right_tile,
        keys,
        gram,
        into * inverse,
        (decay * weight[None, :] * inverse[:, None]).to(OPERAND),
        iterations,
        ridge,
        tolerance,
        METHOD,
        OPERAND,
        PRECISION,
    )
    store_rows(solutions + token * WIDTH, heads * WIDTH, row, count, lines, x, WIDTH)
    if ADJOINT:
        if METHOD == 1:
            other = load_rows(others + token * WIDTH, heads * WIDTH, row, count, lines, WIDTH)
            tl.store(rows + planes + place, tl.sum(other * residual, 1))
        else:
            tl.store(rows + planes + place, tl.zeros_like(norm))


@triton.jit
def mixed_rows(
    query, solutions, rows, mix, token, place, row, count, lines, heads, METHOD: tl.constexpr, WIDTH: tl.constexpr
):
    """q' of README eq. 6 for one chunk, in float32."""
    tile = load_rows(query + token * WIDTH, heads * WIDTH, row, count, lines, WIDTH)
    if METHOD != 0:
        x = load_rows(solutions + token * WIDTH, heads * WIDTH, row, count, lines, WIDTH)
        tile += mix[:, None] * (x * tl.load(rows + place)[:, None] - tile)
    return tile


@triton.jit(do_not_specialize=["length", "chunks", "scale"])
def read_kernel(
    query,
    key,
    value,
    gates,
    numbers,
    value_keys,
    units,
    solutions,
    rows,
    outputs,
    length,
    chunks,
    heads,
    key_heads,
    value_heads,
    planes,
    scale,
    METHOD: tl.constexpr,
    PACKED: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Read-out of one chunk of one head: y_t = scale U_t (q_t + mix_t (x_t - q_t)); README eq. 6."""
    program = long(tl.program_id(0))
    line, chunk = program // chunks, (program % chunks).to(tl.int32)
    batch, head = line // heads, line % heads
    row, lines, value_lines = tl.arange(0, CHUNK), tl.arange(0, BLOCK), tl.arange(0, VALUE_BLOCK)
    first = long(chunk) * CHUNK
    count = length - chunk * CHUNK
    row_gates = line * chunks * CHUNK
    place = row_gates + first + row
    number = numbers + batch * chunks * CHUNK
    key_base = key + ((batch * length + first) * key_heads + head // (heads // key_heads)) * WIDTH
    value_base = value + ((batch * length + first) * value_heads + head // (heads // value_heads)) * VALUE_WIDTH
    token = (batch * length + first) * heads + head
    gate = tl.load(gates + 2 * planes + place)
    mix = tl.load(gates + 3 * planes + place)
    mixed = mixed_rows(query, solutions, rows, mix, token, place, row, count, lines, heads, METHOD, WIDTH)
    probe, probe_scale = scaled_rows(mixed, OPERAND)
    into, _, _ = carries(gates + planes + row_gates, number, chunk, row, CHUNK, PACKED)
    into = into * tl.load(units + tl.num_programs(0) + program)
    state = load_operand(value_keys + program * VALUE_WIDTH * WIDTH, value_lines, lines, VALUE_WIDTH, WIDTH)
    result = dot(probe, tl.trans(state), PRECISION) * into[:, None]
    keys, key_scale = scaled_rows(load_rows(key_base, key_heads * WIDTH, row, count, lines, WIDTH), OPERAND)
    values, value_scale = scaled_rows(
        load_rows(value_base, value_heads * VALUE_WIDTH, row, count, value_lines, VALUE_WIDTH), OPERAND
    )
    weight, weight_scale = scaled_vector(gate * gate * key_scale * value_scale)
    weights = within(gates + planes + row_gates, number, chunk, row, CHUNK, PACKED) * weight[None, :]
    inside = (dot(probe, tl.trans(keys), PRECISION) * weights).to(OPERAND)
    result += dot(inside, values, PRECISION) * weight_scale
    result = result * (probe_scale * scale)[:, None]
    store_rows(outputs + token * VALUE_WIDTH, heads * VALUE_WIDTH, row, count, value_lines, result, VALUE_WIDTH)


@triton.jit
def chunk_norm(keys, gram, into, decay, weight, PRECISION: tl.constexpr):
    """||H_t||_F for every token of a chunk; `into` holds the unit of `gram`, `weight` the squared gate; README eq. 10.

    ||H_t||^2 = e^{2 h_t} ||H_{t-1}||^2 + 2 e^{h_t} k_t^T H_{t-1} k_t + |k_t|^4, summed in closed form.
    """
    wide, wide_keys = gram.to(tl.float32), keys.to(tl.float32)
    size = tl.sum(tl.sum(wide * wide, 1), 0)
    key_key = dot(keys, tl.trans(keys), PRECISION)
    own = tl.sum(wide_keys * wide_keys, 1)
    past = into * tl.sum(wide_keys * dot(keys, gram, PRECISION), 1)
    past += tl.sum(decay * weight[None, :] * key_key * key_key, 1)
    added = weight * (2.0 * past - weight * own * own)
    squared = into * into * size + tl.sum(decay * decay * added[None, :], 1)
    return tl.sqrt(tl.maximum(squared, 0.0))


class TritonInputs(NamedTuple):
    """Contiguous inputs in their own dtypes, padding already neutral; an absent gate is None."""

    query: Tensor  # (B, T, H, Dk)
    key: Tensor  # (B, T, G, Dk)
    value: Tensor  # (B, T, Gv, Dv)
    log_decay: Tensor | None  # (B, T, H), of both states when it is alone
    key_log_decay: Tensor | None  # (B, T, H), never alone
    solution_mix: Tensor | None  # (B, T, H)
    input_gate: Tensor | None  # (B, T, H)
    numbers: Tensor | None  # (B, T) int32, as in `Segments.numbers`


def decay_count(inputs: TritonInputs) -> int:
    """Different decays of a call: 0, 1 for both states, or 2."""
    return (inputs.log_decay is not None) + (inputs.key_log_decay is not None)


class Sizes(NamedTuple):
    """What every kernel is told about the problem, in the order of its arguments."""

    length: int
    chunks: int
    heads: int
    key_heads: int
    value_heads: int
    planes: int


def sizes(inputs: TritonInputs, config: Plan) -> Sizes:
    """Counts of one call."""
    batch, length, heads, _ = inputs.query.shape
    chunks = -(-length // config.chunk)
    planes = batch * heads * chunks * config.chunk
    return Sizes(length, chunks, heads, inputs.key.shape[2], inputs.value.shape[2], planes)


def gates(inputs: TritonInputs, config: Plan) -> tuple[Tensor, Tensor]:
    """Planes (4, B, H, chunks * chunk) of `gates_kernel`, and the segment numbers filled up to whole chunks."""
    batch, length, heads, _ = inputs.query.shape
    count = sizes(inputs, config)
    filled = count.chunks * config.chunk
    planes = torch.empty(4, batch, heads, filled, dtype=torch.float32, device=inputs.query.device)
    sources = (inputs.key_log_decay, inputs.log_decay, inputs.input_gate, inputs.solution_mix)
    gates_kernel[(batch * count.chunks,)](
        *(planes if t is None else t for t in sources),
        planes,
        length,
        count.chunks,
        heads,
        count.planes,
        DECAYS=decay_count(inputs),
        GATED=inputs.input_gate is not None,
        MIXED=inputs.solution_mix is not None,
        CHUNK=config.chunk,
        HEADS=triton.next_power_of_2(heads),
        num_warps=4,
    )
    if inputs.numbers is None:
        return planes, planes
    numbers = inputs.numbers
    if filled > length:
        numbers = torch.cat([numbers, numbers[:, -1:].expand(batch, filled - length)], dim=1)
    return planes, numbers


# Elements of a state in one program of the scan.
TILE = 1024
# States from which on one program carries a whole state through time.
WALKS = 256


def scan(
    states: Tensor,
    units: Tensor,
    state_units: Tensor,
    planes: Tensor,
    numbers: Tensor,
    initial: Tensor | None,
    final: Tensor | None,
    config: Plan,
    packed: bool,
    reverse: bool = False,
) -> None:
    """Turn increments (B, H, chunks, D, Dk) in `units` into states in place; writes `state_units` and `final`."""
    batch, heads, chunks, rows, columns = states.shape
    size = rows * columns
    tile = min(TILE, triton.next_power_of_2(size))
    tiles = -(-size // tile)
    scan_kernel[(tiles * batch * heads,)](
        states,
        units,
        state_units,
        planes,
        numbers,
        states if initial is None else initial,
        units if initial is None else initial.abs().amax((-1, -2)),
        units if final is None else final,
        chunks,
        heads,
        PACKED=packed,
        HAS_STATE=initial is not None,
        REVERSE=reverse,
        FINAL=final is not None,
        SIZE=size,
        CHUNK=config.chunk,
        TILE=tile,
        num_warps=4,
    )


class States(NamedTuple):
    """Both states before every chunk as operands, their units, and both states after the last token."""

    grams: Tensor  # (B, H, chunks, Dk, Dk)
    value_keys: Tensor  # (B, H, chunks, Dv, Dk)
    units: Tensor  # (2, B, H, chunks)
    final_gram: Tensor
    final_value_key: Tensor


def compute_states(
    inputs: TritonInputs, config: Plan, planes: Tensor, numbers: Tensor, initial: tuple[Tensor, Tensor] | None
) -> States:
    """All states of a call."""
    batch, _, heads, width = inputs.query.shape
    value_width = inputs.value.shape[-1]
    count = sizes(inputs, config)
    grams, value_keys = (
        torch.empty(batch, heads, count.chunks, d, width, dtype=config.storage, device=planes.device)
        for d in (width, value_width)
    )
    units = planes.new_empty(2, batch, heads, count.chunks)
    packed = inputs.numbers is not None
    final_gram, final_value_key = (planes.new_empty(batch, heads, d, width) for d in (width, value_width))
    gram, value_key = initial if initial is not None else (None, None)
    if 2 * batch * heads >= WALKS:
        walk_kernel[(2 * batch * heads,)](
            inputs.key,
            inputs.value,
            planes,
            numbers,
            planes if gram is None else gram,
            planes if value_key is None else value_key,
            planes if gram is None else gram.abs().amax((-1, -2)),
            planes if value_key is None else value_key.abs().amax((-1, -2)),
            grams,
            value_keys,
            units,
            final_gram,
            final_value_key,
            *count,
            HAS_STATE=initial is not None,
            **constants(inputs, config),
            **launch(config, "walk"),
        )
        return States(grams, value_keys, units, final_gram, final_value_key)
    added = torch.empty_like(units)
    increments_kernel[(batch * heads * count.chunks,)](
        inputs.key,
        inputs.value,
        planes,
        numbers,
        grams,
        value_keys,
        added,
        *count,
        **constants(inputs, config),
        **launch(config, "increments"),
    )
    scan(grams, added[0], units[0], planes[0], numbers, gram, final_gram, config, packed)
    scan(value_keys, added[1], units[1], planes[1], numbers, value_key, final_value_key, config, packed)
    return States(grams, value_keys, units, final_gram, final_value_key)


def constants(inputs: TritonInputs, config: Plan) -> dict:
    """What the chunk-parallel kernels are compiled for."""
    return {
        "PACKED": inputs.numbers is not None,
        "WIDTH": inputs.query.shape[-1],
        "VALUE_WIDTH": inputs.value.shape[-1],
        "CHUNK": config.chunk,
        "BLOCK": config.block,
        "VALUE_BLOCK": config.value_block,
        "OPERAND": config.operand,
        "PRECISION": config.precision,
    }


def method(solver: GKASolver) -> int:
    """The kernels' number for a solver."""
    return METHODS["none" if solver.iterations == 0 else solver.method]


def gka_triton_forward(
    inputs: TritonInputs, initial: tuple[Tensor, Tensor] | None, solver: GKASolver, scale: float, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Outputs (B, T, H, Dv) in the dtype of the query, both final states in float32, and what the backward pass keeps.

    Kept are the solutions of norm-1 queries in H_t / ||H_t||_F (B, T, H, Dk), their factors |q_t| / ||H_t||_F and the
    norms ||H_t||_F (B, H, chunks * chunk); empty when not `keep`.
    """
    batch, length, heads, width = inputs.query.shape
    value_width = inputs.value.shape[-1]
    config = plan(inputs.query, value_width)
    planes, numbers = gates(inputs, config)
    states = compute_states(inputs, config, planes, numbers, initial)
    count = sizes(inputs, config)
    outputs = inputs.query.new_empty(batch, length, heads, value_width)
    solutions, norms, rows = (planes.new_empty(0) for _ in range(3))
    if method(solver) != 0:
        solutions = inputs.query.new_empty(batch, length, heads, width, dtype=config.storage)
        norms, rows = torch.empty_like(planes[0]), torch.empty_like(planes[0])
        launch_solve(inputs, config, planes, numbers, states, inputs.query, solver, norms, solutions, rows)
    read_kernel[(batch * heads * count.chunks,)](
        inputs.query,
        inputs.key,
        inputs.value,
        planes,
        numbers,
        states.value_keys,
        states.units,
        solutions,
        rows,
        outputs,
        *count,
        scale,
        METHOD=method(solver),
        **constants(inputs, config),
        **launch(config, "read"),
    )
    if not keep:
        solutions, norms, rows = (planes.new_empty(0) for _ in range(3))
    return outputs, states.final_gram, states.final_value_key, solutions, rows, norms


def launch_solve(
    inputs: TritonInputs,
    config: Plan,
    planes: Tensor,
    numbers: Tensor,
    states: States,
    right: Tensor,
    solver: GKASolver,
    norms: Tensor,
    solutions: Tensor,
    rows: Tensor,
    adjoint: tuple[Tensor, Tensor, bool] | None = None,
) -> None:
    """Run `solve_kernel`; `adjoint` is (solutions of the forward pass, d_key, whether the ridge has a gradient)."""
    batch, _, heads, _ = inputs.query.shape
    count = sizes(inputs, config)
    options = constants(inputs, config)
    del options["VALUE_WIDTH"], options["VALUE_BLOCK"]
    others, d_key, ridge_gradient = adjoint if adjoint is not None else (solutions, solutions, False)
    solve_kernel[(batch * heads * count.chunks,)](
        right,
        inputs.key,
        planes,
        numbers,
        states.grams,
        states.units,
        norms,
        solutions,
        others,
        rows,
        d_key,
        count.length,
        count.chunks,
        count.heads,
        count.key_heads,
        count.planes,
        solver.iterations,
        solver.ridge_ratio,
        config.tolerance,
        METHOD=method(solver),
        ADJOINT=adjoint is not None,
        RIDGE=ridge_gradient,
        **options,
        **launch(config, "solve"),
    )
