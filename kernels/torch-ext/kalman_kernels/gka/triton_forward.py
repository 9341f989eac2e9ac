"""Gated KalmaNet forward in Triton: gates, states of chunks, solve and read-out (README.md, eqs. 1-10, 20, 21, 23)."""

# Triton turns annotations and defaults of jitted functions into objects of its own.
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false
# pyright: reportReturnType=false, reportAssignmentType=false

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..jit import long, on_own_device
from .reference import GKASolver
from .triton_common import (
    METHODS,
    Plan,
    carries,
    counted,
    dot,
    launch,
    launch_walk,
    load_operand,
    load_raw,
    load_rows,
    plan,
    power_of_two,
    products,
    scaled_rows,
    scaled_vector,
    solve,
    store_rows,
    unit_rows,
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
        decay = counted(tl.load(log_decay + read, mask=inside, other=0.0).to(tl.float32)) * 1.4426950408889634
        decay = tl.cumsum(decay, 0)
    tl.store(gates + planes + written, decay, mask=mask)
    if DECAYS > 1:
        decay = counted(tl.load(key_log_decay + read, mask=inside, other=0.0).to(tl.float32)) * 1.4426950408889634
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


@triton.jit(do_not_specialize=["length", "chunks", "span_chunks"])
def walk_kernel(
    key,
    value,
    gates,
    numbers,
    initial_gram,
    initial_value_key,
    bounds,
    factors,
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
    span_chunks,
    HAS_STATE: tl.constexpr,
    STORE: tl.constexpr,
    FINAL: tl.constexpr,
    PACKED: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program carries one state of one head through a span of chunks; README eqs. 8, 23.

    STORE: writes the state before every chunk and its unit; HAS_STATE: starts from `initial_*` (B H, spans, D, Dk) with
    largest elements `bounds` (2, B H, spans); FINAL: writes the state at the end. Without STORE also the span's decay
    into `factors` (2, B H, spans).
    """
    half = tl.num_programs(0) // 2
    program = tl.program_id(0)
    kind, span_line = program // half, long(program % half)
    spans = tl.cdiv(chunks, span_chunks)
    line, span = span_line // spans, (span_line % spans).to(tl.int32)
    batch, head = line // heads, line % heads
    first, last = span * span_chunks, tl.minimum((span + 1) * span_chunks, chunks)
    key += (batch * length * key_heads + head // (heads // key_heads)) * WIDTH
    gates += line * chunks * CHUNK
    numbers += batch * chunks * CHUNK
    bounds += program
    factors += program
    units += (kind * (half // spans) + line) * chunks
    if kind == 0:
        _walk(
            key,
            key,
            gates,
            gates + 2 * planes,
            numbers,
            initial_gram + span_line * WIDTH * WIDTH,
            bounds,
            factors,
            grams + line * chunks * WIDTH * WIDTH,
            units,
            final_gram + span_line * WIDTH * WIDTH,
            length,
            first,
            last,
            key_heads,
            key_heads,
            HAS_STATE,
            STORE,
            FINAL,
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
            initial_value_key + span_line * VALUE_WIDTH * WIDTH,
            bounds,
            factors,
            value_keys + line * chunks * VALUE_WIDTH * WIDTH,
            units,
            final_value_key + span_line * VALUE_WIDTH * WIDTH,
            length,
            first,
            last,
            value_heads,
            key_heads,
            HAS_STATE,
            STORE,
            FINAL,
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
    factors,
    states,
    units,
    final,
    length,
    first,
    last,
    left_heads,
    right_heads,
    HAS_STATE: tl.constexpr,
    STORE: tl.constexpr,
    FINAL: tl.constexpr,
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
    bound, kept = tl.full((), 0.0, tl.float32), 1.0
    if HAS_STATE:
        state = tl.load(initial + offset, mask=mask, other=0.0)
        bound = tl.load(bounds)
    for chunk in range(first, last):
        start = long(chunk) * CHUNK
        left_tile = load_raw(left + start * left_stride, left_stride, row, length - start, lines, LEFT_WIDTH)
        right_tile = load_raw(right + start * right_stride, right_stride, row, length - start, columns, WIDTH)
        factor = tl.load(gate + start + row)
        _, out, through = carries(cumulative, numbers, chunk, row, CHUNK, PACKED)
        if STORE:
            store_state(states, units, chunk, offset, mask, state, bound, LEFT_WIDTH * WIDTH)
        left_scaled, left_scale = scaled_rows(left_tile.to(tl.float32), OPERAND)
        right_scaled, right_scale = scaled_rows(right_tile.to(tl.float32), OPERAND)
        tile, added = products(
            left_scaled, left_scale, right_scaled, right_scale, out * factor * factor, OPERAND, PRECISION
        )
        state = state * through + tile * (added * (1.0 / 1024.0))
        bound = bound * through + added
        kept = kept * through
    if FINAL:
        tl.store(final + offset, state, mask=mask)
    if not STORE:
        tl.store(factors, kept)


@triton.jit
def store_state(states, units, chunk, offset, mask, state, bound, SIZE: tl.constexpr):
    """A state of no element above `bound` as an operand, and its unit; README eq. 23."""
    scale, inverse = power_of_two(bound)
    target = states + long(chunk) * SIZE + offset
    tl.store(target, (state * (inverse * 16384.0)).to(states.dtype.element_ty), mask=mask)
    tl.store(units + chunk, scale * (1.0 / 16384.0))


@triton.jit(do_not_specialize=["spans"])
def span_kernel(
    added,
    factors,
    initial,
    final,
    spans,
    HAS_STATE: tl.constexpr,
    REVERSE: tl.constexpr,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """What spans add, (B H, spans, SIZE), becomes the state before each (REVERSE: after it), in place."""
    tiles: tl.constexpr = (SIZE + TILE - 1) // TILE
    program = tl.program_id(0)
    tile, line = program % tiles, long(program // tiles)
    offset = tile * TILE + tl.arange(0, TILE)
    inside = offset < SIZE
    state = tl.zeros((TILE,), tl.float32)
    if HAS_STATE:
        state = tl.load(initial + line * SIZE + offset, mask=inside, other=0.0)
    place = line * spans + (spans - 1 if REVERSE else 0)
    summand = tl.load(added + place * SIZE + offset, mask=inside, other=0.0)
    factor = tl.load(factors + place)
    for step in range(0, spans):
        # The next span is under way.
        following = tl.where(step + 1 < spans, place - 1 if REVERSE else place + 1, place)
        next_summand = tl.load(added + following * SIZE + offset, mask=inside, other=0.0)
        next_factor = tl.load(factors + following)
        tl.store(added + place * SIZE + offset, state, mask=inside)
        state = state * factor + summand
        place, summand, factor = following, next_summand, next_factor
    tl.store(final + line * SIZE + offset, state, mask=inside)


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
    # The state is under way before the keys are waited for.
    gate, unit = tl.load(gates + 2 * planes + place), tl.load(units + program)
    key_tile = load_raw(key_base, key_heads * WIDTH, row, count, lines, WIDTH)
    gram = load_operand(grams + program * WIDTH * WIDTH, lines, lines, WIDTH, WIDTH)
    keys, key_scale = scaled_rows(key_tile.to(tl.float32), OPERAND)
    right_tile = load_rows(right + token * WIDTH, heads * WIDTH, row, count, lines, WIDTH)
    into, _, _ = carries(gates + row_gates, number, chunk, row, CHUNK, PACKED)
    into = into * unit
    weight = gate * gate * key_scale * key_scale
    decay = within(gates + row_gates, number, chunk, row, CHUNK, PACKED)
    if ADJOINT:
        norm = tl.load(norms + place)
        squared = tl.sum(right_tile * right_tile, 1)
        if RIDGE:
            key_state = dot(keys, gram, PRECISION) * (1.0 / 16384.0)
            store_rows(d_key + token * WIDTH, heads * WIDTH, row, count, lines, key_state, WIDTH)
    else:
        later = within(gates + row_gates, number, chunk, row, CHUNK, PACKED, True)
        norm = chunk_norm(keys, gram, into, decay, later, weight, PRECISION)
        tl.store(norms + place, norm)
    inverse = tl.where(norm > 0, 1.0 / norm, 0.0)
    if not ADJOINT:
        right_tile, size, squared = unit_rows(right_tile)
        tl.store(rows + place, size * inverse)
    x, residual = solve(
        right_tile,
        squared,
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
    query, solutions, rows, mix, offset, place, row, count, lines, heads, METHOD: tl.constexpr, WIDTH: tl.constexpr
):
    """q' of README eq. 6 for one chunk, in float32."""
    tile = load_rows(query + offset, heads * WIDTH, row, count, lines, WIDTH)
    if METHOD != 0:
        x = load_rows(solutions + offset, heads * WIDTH, row, count, lines, WIDTH)
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
    mixed = mixed_rows(query, solutions, rows, mix, token * WIDTH, place, row, count, lines, heads, METHOD, WIDTH)
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
def chunk_norm(keys, gram, into, decay, later, weight, PRECISION: tl.constexpr):
    """||H_t||_F for every token of a chunk; `into` holds the unit of `gram`, `weight` the squared gate; README eq. 10.

    ||H_t||^2 = e^{2 h_t} ||H_{t-1}||^2 + 2 e^{h_t} k_t^T H_{t-1} k_t + |k_t|^4, summed in closed form. `decay` (later,
    earlier token) comes transposed, too: `later` (earlier, later token).
    """
    wide = gram.to(tl.float32)
    size = tl.sum(wide * wide)
    row = tl.arange(0, keys.shape[0])
    pairs = dot(keys, tl.trans(keys), PRECISION)
    pairs = pairs * pairs * decay * weight[None, :]
    added = tl.sum(tl.where(row[:, None] == row[None, :], pairs, 2.0 * pairs), 1)
    added += 2.0 * into * tl.sum(keys.to(tl.float32) * dot(keys, gram, PRECISION), 1)
    squared = into * into * size + tl.sum(later * later * (weight * added)[:, None], 0)
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


# Programs that fill a device, and the fewest chunks of a span: spans are walked twice.
PROGRAMS, SPAN_CHUNKS = 256, 4
# Elements of a state in one program of `span_kernel`.
TILE = 1024


class Walked(NamedTuple):
    """Both states of every chunk as operands, their units, and both states at the end of the walk in float32."""

    grams: Tensor  # (B, H, chunks, Dk, Dk)
    value_keys: Tensor  # (B, H, chunks, Dv, Dk)
    units: Tensor  # (2, B, H, chunks)
    final_gram: Tensor
    final_value_key: Tensor


def walk(
    start: Callable[..., None],
    planes: Tensor,
    widths: tuple[int, int],
    config: Plan,
    initial: tuple[Tensor | None, Tensor | None],
    reverse: bool = False,
) -> Walked:
    """Run a walking kernel over all chunks, from `initial` states or from zero.

    `start` launches it: (programs, buffers in the order of its arguments, chunks of a span, flags). Few heads are
    walked in spans, once for what each span adds and once more from where each starts.
    """
    _, batch, heads, filled = planes.shape
    chunks, lines = filled // config.chunk, batch * heads
    width, value_width = widths
    shapes = ((width, width), (value_width, width))
    spans = max(1, min(PROGRAMS // (2 * lines), chunks // SPAN_CHUNKS))
    span_chunks = -(-chunks // spans)
    spans = -(-chunks // span_chunks)
    grams, value_keys = (
        torch.empty(batch, heads, chunks, *shape, dtype=config.storage, device=planes.device) for shape in shapes
    )
    units = planes.new_empty(2, batch, heads, chunks)
    ends = [planes.new_empty(batch, heads, *shape) for shape in shapes]
    starts: list[Tensor] | None = None
    if spans > 1:
        starts = [planes.new_empty(lines, spans, *shape) for shape in shapes]
        factors = planes.new_empty(2, lines, spans)
        buffers = (planes, planes, planes, factors, planes, planes, planes, *starts)
        start(2 * lines * spans, buffers, span_chunks, HAS_STATE=False, STORE=False, FINAL=True)
        for added, factor, given, end in zip(starts, factors, initial, ends, strict=True):
            size = end.shape[-2] * width
            tile = min(TILE, triton.next_power_of_2(size))
            span_kernel[(lines * -(-size // tile),)](
                added,
                factor,
                planes if given is None else given,
                end,
                spans,
                HAS_STATE=given is not None,
                REVERSE=reverse,
                SIZE=size,
                TILE=tile,
                num_warps=4,
            )
    elif any(given is not None for given in initial):
        starts = [torch.zeros_like(end) if given is None else given for given, end in zip(initial, ends, strict=True)]
    bounds = planes if starts is None else torch.stack([t.abs().amax((-1, -2)).flatten() for t in starts])
    sources = (planes, planes) if starts is None else starts
    buffers = (*sources, bounds, planes, grams, value_keys, units, *ends)
    start(2 * lines * spans, buffers, span_chunks, HAS_STATE=starts is not None, STORE=True, FINAL=spans == 1)
    return Walked(grams, value_keys, units, *ends)


def compute_states(
    inputs: TritonInputs, config: Plan, planes: Tensor, numbers: Tensor, initial: tuple[Tensor, Tensor] | None
) -> Walked:
    """Both states before every chunk and after the last token."""

    def start(programs: int, buffers: tuple[Tensor, ...], span_chunks: int, **flags: bool) -> None:
        walk_kernel[(programs,)](
            inputs.key,
            inputs.value,
            planes,
            numbers,
            *buffers,
            *sizes(inputs, config),
            span_chunks,
            **flags,
            **constants(inputs, config),
            **launch_walk(config, "walk", planes.device),
        )

    widths = (inputs.key.shape[-1], inputs.value.shape[-1])
    return walk(start, planes, widths, config, (None, None) if initial is None else initial)


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


@on_own_device
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
    states: Walked,
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
        solver.squared_tolerance(config.tolerance),
        METHOD=method(solver),
        ADJOINT=adjoint is not None,
        RIDGE=ridge_gradient,
        **options,
        **launch(config, "solve"),
    )
