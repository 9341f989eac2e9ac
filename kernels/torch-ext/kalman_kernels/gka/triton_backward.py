"""Gated KalmaNet backward in Triton: the implicit gradient (README.md, eqs. 11-19, 22), chunk-parallel, no atomics."""

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

from ..jit import long, on_own_device
from .reference import GKASolver
from .triton_common import (
    between,
    carries,
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
    store_rows,
    within,
)
from .triton_forward import (
    TritonInputs,
    Walked,
    compute_states,
    constants,
    gates,
    launch_solve,
    method,
    mixed_rows,
    sizes,
    store_state,
    walk,
)

__all__ = ["gka_triton_backward"]


@triton.jit(do_not_specialize=["length", "chunks", "scale"])
def adjoint_read_kernel(
    query,
    key,
    value,
    gates,
    numbers,
    value_keys,
    units,
    solutions,
    d_outputs,
    d_mixed,
    d_query,
    rows,
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
    """Gradient through the read-out, dq' = scale U^T dy, for one chunk of one head; README eqs. 11, 18.

    Writes dq' in rows of norm 1 and its norms (plane 2), q . dq' (plane 5), x . dq' (plane 6) and q' . dq' (plane 4).
    Without a solver dq' is d_query.
    """
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
    gate, mix = tl.load(gates + 2 * planes + place), tl.load(gates + 3 * planes + place)
    unit = tl.load(units + tl.num_programs(0) + program)
    dy = load_raw(d_outputs + token * VALUE_WIDTH, heads * VALUE_WIDTH, row, count, value_lines, VALUE_WIDTH)
    state = load_operand(value_keys + program * VALUE_WIDTH * WIDTH, value_lines, lines, VALUE_WIDTH, WIDTH)
    keys = load_raw(key_base, key_heads * WIDTH, row, count, lines, WIDTH)
    values = load_raw(value_base, value_heads * VALUE_WIDTH, row, count, value_lines, VALUE_WIDTH)
    dy, dy_scale = scaled_rows(dy.to(tl.float32), OPERAND)
    into, _, _ = carries(gates + planes + row_gates, number, chunk, row, CHUNK, PACKED)
    into = into * unit
    result = dot(dy, state, PRECISION) * into[:, None]
    keys, key_scale = scaled_rows(keys.to(tl.float32), OPERAND)
    values, value_scale = scaled_rows(values.to(tl.float32), OPERAND)
    query_tile = load_raw(query + token * WIDTH, heads * WIDTH, row, count, lines, WIDTH)
    if METHOD != 0:
        x = load_raw(solutions + token * WIDTH, heads * WIDTH, row, count, lines, WIDTH)
    weight, weight_scale = scaled_vector(gate * gate * key_scale * value_scale)
    weights = within(gates + planes + row_gates, number, chunk, row, CHUNK, PACKED) * weight[None, :]
    inside = (dot(dy, tl.trans(values), PRECISION) * weights).to(OPERAND)
    query_tile = query_tile.to(tl.float32)
    if METHOD != 0:
        x = x.to(tl.float32)
    result += dot(inside, keys, PRECISION) * weight_scale
    result = result * (dy_scale * scale)[:, None]
    query_dot = tl.sum(query_tile * result, 1)
    if METHOD == 0:
        store_rows(d_query + token * WIDTH, heads * WIDTH, row, count, lines, result, WIDTH)
        tl.store(rows + 3 * planes + place, tl.zeros_like(mix))
        tl.store(rows + 4 * planes + place, query_dot)
    else:
        x_dot = tl.sum(x * result, 1) * tl.load(rows + place)
        tl.store(rows + 4 * planes + place, query_dot + mix * (x_dot - query_dot))
        tl.store(rows + 5 * planes + place, query_dot)
        tl.store(rows + 6 * planes + place, x_dot)
        size = tl.sqrt(tl.sum(result * result, 1))
        tl.store(rows + 2 * planes + place, size)
        result = result * tl.where(size > 0, 1.0 / size, 0.0)[:, None]
        store_rows(d_mixed + token * WIDTH, heads * WIDTH, row, count, lines, result, WIDTH)


@triton.jit(do_not_specialize=["length", "chunks", "ridge"])
def adjoint_query_kernel(
    query,
    gates,
    numbers,
    norms,
    solutions,
    adjoints,
    d_mixed,
    d_query,
    d_mix,
    rows,
    length,
    chunks,
    heads,
    planes,
    ridge,
    METHOD: tl.constexpr,
    RIDGE: tl.constexpr,
    PACKED: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """d_query and d_mix for one chunk of one head; README eqs. 11, 14, 17.

    Leaves in `rows`: the factor of z (plane 1), the ridge's W inside the chunk (plane 2) and -z . H x - w ||H||^2
    (plane 3).
    """
    program = long(tl.program_id(0))
    line, chunk = program // chunks, (program % chunks).to(tl.int32)
    batch, head = line // heads, line % heads
    row, lines = tl.arange(0, CHUNK), tl.arange(0, BLOCK)
    first = long(chunk) * CHUNK
    count = length - chunk * CHUNK
    row_gates = line * chunks * CHUNK
    place = row_gates + first + row
    number = numbers + batch * chunks * CHUNK
    token = (batch * length + first) * heads + head
    mix = tl.load(gates + 3 * planes + place)
    size = tl.load(rows + 2 * planes + place)
    norm = tl.load(norms + place)
    inverse = tl.where(norm > 0, 1.0 / norm, 0.0)
    z = load_rows(adjoints + token * WIDTH, heads * WIDTH, row, count, lines, WIDTH)
    right = load_rows(d_mixed + token * WIDTH, heads * WIDTH, row, count, lines, WIDTH)
    z_size = size * inverse
    result = right * (size * (1.0 - mix))[:, None] + z * (mix * z_size)[:, None]
    store_rows(d_query + token * WIDTH, heads * WIDTH, row, count, lines, result, WIDTH)
    query_tile = load_rows(query + token * WIDTH, heads * WIDTH, row, count, lines, WIDTH)
    z_query = tl.sum(z * query_tile, 1) * z_size
    tl.store(d_mix + token + row * heads, z_query - tl.load(rows + 5 * planes + place), mask=row < count)
    x = load_rows(solutions + token * WIDTH, heads * WIDTH, row, count, lines, WIDTH)
    solution_size = tl.load(rows + place)
    # z . H x = x . (dq' - residual) - lambda z . x: of exactly the x and z that the other sums are made of.
    through_gram = mix * (size * solution_size * tl.load(rows + planes + place) - tl.load(rows + 6 * planes + place))
    ridge_part = ridge * tl.sum(z * x, 1) * (mix * z_size * solution_size)
    if RIDGE:
        # With the ridge's gradient its w ||H||^2 cancels lambda z . x.
        decay = within(gates + row_gates, number, chunk, row, CHUNK, PACKED)
        tl.store(rows + 2 * planes + place, tl.sum(decay * decay * (ridge_part * inverse)[:, None], 0))
    else:
        through_gram += ridge_part * norm
    tl.store(rows + 3 * planes + place, through_gram)
    # Every thread has read what stood in plane 1.
    tl.debug_barrier()
    tl.store(rows + planes + place, mix * z_size)


@triton.jit
def _compose(later_factor, later_sum, factor, summand):
    return later_factor * factor, summand + factor * later_sum


@triton.jit(do_not_specialize=["chunks"])
def ridge_scan_kernel(
    rows,
    gates,
    numbers,
    arriving,
    chunks,
    heads,
    planes,
    PACKED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """W_t of README eq. 14 between chunks: `arriving` (B H, chunks + 1), entry c at the start of chunk c."""
    line = long(tl.program_id(0))
    rows += 2 * planes + line * chunks * CHUNK
    gates += line * chunks * CHUNK
    numbers += (line // heads) * chunks * CHUNK
    arriving += line * (chunks + 1)
    carried = 0.0
    tl.store(arriving + chunks, carried)
    blocks = tl.cdiv(chunks, BLOCK)
    for step in range(0, blocks):
        chunk = (blocks - 1 - step) * BLOCK + tl.arange(0, BLOCK)
        inside = chunk < chunks
        start = chunk.to(tl.int64) * CHUNK
        into = tl.exp2(tl.load(gates + start, mask=inside, other=0.0))
        through = tl.exp2(tl.load(gates + start + CHUNK - 1, mask=inside, other=0.0))
        if PACKED:
            before = tl.load(numbers + start - 1, mask=inside & (chunk > 0), other=0)
            into = tl.where(tl.load(numbers + start, mask=inside, other=0) == before, into, 0.0)
            through = tl.where(tl.load(numbers + start + CHUNK - 1, mask=inside, other=0) == before, through, 0.0)
        factor = tl.where(inside, through * through, 1.0)
        summand = tl.load(rows + start, mask=inside, other=0.0) * into * into
        factor, summand = tl.associative_scan((factor, summand), 0, _compose, reverse=True)
        total = summand + factor * carried
        tl.store(arriving + chunk, total, mask=inside)
        carried = tl.sum(tl.where(tl.arange(0, BLOCK) == 0, total, 0.0), 0)


@triton.jit(do_not_specialize=["length", "chunks", "span_chunks", "scale"])
def adjoint_walk_kernel(
    query,
    key,
    gates,
    numbers,
    solutions,
    adjoints,
    rows,
    arriving,
    d_outputs,
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
    planes,
    span_chunks,
    scale,
    METHOD: tl.constexpr,
    RIDGE: tl.constexpr,
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
    """Both adjoint states, back through time: `walk_kernel` in reverse; README eqs. 13-15.

    Writes the adjoint that arrives at the end of every chunk; of the Gram matrix's a matrix S with the adjoint
    (S + S^T) / 2.
    """
    half = tl.num_programs(0) // 2
    program = tl.program_id(0)
    kind, span_line = program // half, long(program % half)
    spans = tl.cdiv(chunks, span_chunks)
    line, span = span_line // spans, (span_line % spans).to(tl.int32)
    batch, head = line // heads, line % heads
    first, last = span * span_chunks, tl.minimum((span + 1) * span_chunks, chunks)
    token = batch * length * heads + head
    solutions += token * WIDTH
    gates += line * chunks * CHUNK
    numbers += batch * chunks * CHUNK
    rows += line * chunks * CHUNK
    bounds += program
    factors += program
    units += (kind * (half // spans) + line) * chunks
    if kind == 0:
        _adjoint_gram_walk(
            key + (batch * length * key_heads + head // (heads // key_heads)) * WIDTH,
            gates,
            numbers,
            solutions,
            adjoints + token * WIDTH,
            rows,
            arriving + line * (chunks + 1),
            initial_gram + span_line * WIDTH * WIDTH,
            bounds,
            factors,
            grams + line * chunks * WIDTH * WIDTH,
            units,
            final_gram + span_line * WIDTH * WIDTH,
            length,
            first,
            last,
            heads,
            key_heads,
            planes,
            METHOD,
            RIDGE,
            HAS_STATE,
            STORE,
            FINAL,
            PACKED,
            WIDTH,
            CHUNK,
            BLOCK,
            OPERAND,
            PRECISION,
        )
    else:
        _adjoint_value_walk(
            query + token * WIDTH,
            gates,
            numbers,
            solutions,
            rows,
            d_outputs + token * VALUE_WIDTH,
            initial_value_key + span_line * VALUE_WIDTH * WIDTH,
            bounds,
            factors,
            value_keys + line * chunks * VALUE_WIDTH * WIDTH,
            units,
            final_value_key + span_line * VALUE_WIDTH * WIDTH,
            length,
            first,
            last,
            heads,
            planes,
            scale,
            METHOD,
            HAS_STATE,
            STORE,
            FINAL,
            PACKED,
            WIDTH,
            VALUE_WIDTH,
            CHUNK,
            BLOCK,
            VALUE_BLOCK,
            OPERAND,
            PRECISION,
        )


@triton.jit
def _adjoint_gram_walk(
    key,
    gates,
    numbers,
    solutions,
    adjoints,
    rows,
    arriving,
    initial,
    bounds,
    factors,
    states,
    units,
    final,
    length,
    first,
    last,
    heads,
    key_heads,
    planes,
    METHOD: tl.constexpr,
    RIDGE: tl.constexpr,
    HAS_STATE: tl.constexpr,
    STORE: tl.constexpr,
    FINAL: tl.constexpr,
    PACKED: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row, lines = tl.arange(0, CHUNK), tl.arange(0, BLOCK)
    mask = (lines < WIDTH)[:, None] & (lines < WIDTH)[None, :]
    offset = lines[:, None] * WIDTH + lines[None, :]
    stride, key_stride = heads * WIDTH, key_heads * WIDTH
    state = tl.zeros((BLOCK, BLOCK), tl.float32)
    bound, kept = tl.full((), 0.0, tl.float32), 1.0
    if HAS_STATE:
        state = tl.load(initial + offset, mask=mask, other=0.0)
        bound = tl.load(bounds)
    for step in range(0, last - first):
        chunk = last - 1 - step
        start = long(chunk) * CHUNK
        if METHOD != 0:
            x_tile = load_raw(solutions + start * stride, stride, row, length - start, lines, WIDTH)
            z_tile = load_raw(adjoints + start * stride, stride, row, length - start, lines, WIDTH)
            x_size, z_size = tl.load(rows + start + row), tl.load(rows + planes + start + row)
            if RIDGE:
                key_tile = load_raw(key + start * key_stride, key_stride, row, length - start, lines, WIDTH)
                gate = tl.load(gates + 2 * planes + start + row)
                here, after = tl.load(rows + 2 * planes + start + row), tl.load(arriving + chunk + 1)
        into, out, through = carries(gates, numbers, chunk, row, CHUNK, PACKED)
        if STORE:
            store_state(states, units, chunk, offset, mask, state, bound, WIDTH * WIDTH)
        state = state * through
        bound = bound * through
        kept = kept * through
        if METHOD != 0:
            x, x_scale = scaled_rows(x_tile.to(tl.float32), OPERAND)
            z, z_scale = scaled_rows(z_tile.to(tl.float32), OPERAND)
            tile, added = products(z, z_scale, x, x_scale, into * x_size * z_size, OPERAND, PRECISION)
            state -= tile * (added * (2.0 / 1024.0))
            bound += 2 * added
            if RIDGE:
                weight = 2 * (here + out * out * after) * into * gate * gate
                keys, key_scale = scaled_rows(key_tile.to(tl.float32), OPERAND)
                tile, added = products(keys, key_scale, keys, key_scale, weight, OPERAND, PRECISION)
                state -= tile * (added * (1.0 / 1024.0))
                bound += added
    if FINAL:
        tl.store(final + offset, state, mask=mask)
    if not STORE:
        tl.store(factors, kept)


@triton.jit
def _adjoint_value_walk(
    query,
    gates,
    numbers,
    solutions,
    rows,
    d_outputs,
    initial,
    bounds,
    factors,
    states,
    units,
    final,
    length,
    first,
    last,
    heads,
    planes,
    scale,
    METHOD: tl.constexpr,
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
    row, lines, value_lines = tl.arange(0, CHUNK), tl.arange(0, BLOCK), tl.arange(0, VALUE_BLOCK)
    mask = (value_lines < VALUE_WIDTH)[:, None] & (lines < WIDTH)[None, :]
    offset = value_lines[:, None] * WIDTH + lines[None, :]
    stride, query_stride = heads * VALUE_WIDTH, heads * WIDTH
    state = tl.zeros((VALUE_BLOCK, BLOCK), tl.float32)
    bound, kept = tl.full((), 0.0, tl.float32), 1.0
    if HAS_STATE:
        state = tl.load(initial + offset, mask=mask, other=0.0)
        bound = tl.load(bounds)
    for step in range(0, last - first):
        chunk = last - 1 - step
        start = long(chunk) * CHUNK
        query_tile = load_raw(query + start * query_stride, query_stride, row, length - start, lines, WIDTH)
        dy_tile = load_raw(d_outputs + start * stride, stride, row, length - start, value_lines, VALUE_WIDTH)
        if METHOD != 0:
            x_tile = load_raw(solutions + start * query_stride, query_stride, row, length - start, lines, WIDTH)
            mix, x_size = tl.load(gates + 3 * planes + start + row), tl.load(rows + start + row)
        into, _, through = carries(gates + planes, numbers, chunk, row, CHUNK, PACKED)
        if STORE:
            store_state(states, units, chunk, offset, mask, state, bound, VALUE_WIDTH * WIDTH)
        mixed = query_tile.to(tl.float32)
        if METHOD != 0:
            mixed += mix[:, None] * (x_tile.to(tl.float32) * x_size[:, None] - mixed)
        mixed, mixed_scale = scaled_rows(mixed, OPERAND)
        dy, dy_scale = scaled_rows(dy_tile.to(tl.float32), OPERAND)
        tile, added = products(dy, dy_scale, mixed, mixed_scale, into * scale, OPERAND, PRECISION)
        state = state * through + tile * (added * (1.0 / 1024.0))
        bound = bound * through + added
        kept = kept * through
    if FINAL:
        tl.store(final + offset, state, mask=mask)
    if not STORE:
        tl.store(factors, kept)


@triton.jit(do_not_specialize=["length", "chunks"])
def adjoint_gram_kernel(
    key,
    gates,
    numbers,
    solutions,
    adjoints,
    rows,
    arriving,
    gram_units,
    grams,
    units,
    d_key,
    length,
    chunks,
    heads,
    key_heads,
    planes,
    METHOD: tl.constexpr,
    RIDGE: tl.constexpr,
    PACKED: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of the gated keys through H for one chunk of one head; README eqs. 12, 14, 17.

    Reads K H_0 from `d_key`. Replaces z in `adjoints` by the gradient, in rows below 1 with factors (plane 1), and
    completes the sums for the Gram matrix's decay (plane 3).
    """
    program = long(tl.program_id(0))
    line, chunk = program // chunks, (program % chunks).to(tl.int32)
    batch, head = line // heads, line % heads
    row, lines = tl.arange(0, CHUNK), tl.arange(0, BLOCK)
    first = long(chunk) * CHUNK
    count = length - chunk * CHUNK
    row_gates = line * chunks * CHUNK
    place = row_gates + first + row
    number = numbers + batch * chunks * CHUNK
    token = (batch * length + first) * heads + head
    gate = tl.load(gates + 2 * planes + place)
    key_base = key + ((batch * length + first) * key_heads + head // (heads // key_heads)) * WIDTH
    # All of it under way before any of it is waited for.
    keys = load_raw(key_base, key_heads * WIDTH, row, count, lines, WIDTH)
    if METHOD != 0:
        x = load_raw(solutions + token * WIDTH, heads * WIDTH, row, count, lines, WIDTH)
        z = load_raw(adjoints + token * WIDTH, heads * WIDTH, row, count, lines, WIDTH)
    if RIDGE:
        key_state = load_raw(d_key + token * WIDTH, heads * WIDTH, row, count, lines, WIDTH)
    keys, key_scale = scaled_rows(keys.to(tl.float32), OPERAND)
    if METHOD != 0:
        x, x_scale = scaled_rows(x.to(tl.float32), OPERAND)
        z, z_scale = scaled_rows(z.to(tl.float32), OPERAND)
    into, out, _ = carries(gates + row_gates, number, chunk, row, CHUNK, PACKED)
    decays = between(gates + row_gates, number, chunk, row, CHUNK, PACKED)
    total = tl.zeros([CHUNK, BLOCK], tl.float32)
    if RIDGE:
        weight = tl.load(rows + 2 * planes + place)
        weight += out * out * tl.load(arriving + line * (chunks + 1) + chunk + 1)
        total -= key_state.to(tl.float32) * (into * weight * (2 * 16384.0 * tl.load(gram_units + program)))[:, None]
        # With the weight of the later one.
        decay = decays * tl.where(row[:, None] >= row[None, :], weight[:, None], weight[None, :])
        sizes, sizes_scale = scaled_vector(2 * gate * gate * key_scale * key_scale)
        weight_scale, weight_inverse = power_of_two(tl.max(tl.abs(weight), 0))
        pairs = (dot(keys, tl.trans(keys), PRECISION) * (decay * weight_inverse) * sizes[None, :]).to(OPERAND)
        total -= dot(pairs, keys, PRECISION) * (sizes_scale * weight_scale)
    if METHOD != 0:
        sizes = x_scale * z_scale * tl.load(rows + place) * tl.load(rows + planes + place)
        sizes, sizes_scale = scaled_vector(sizes)
        weights = tl.where(row[:, None] <= row[None, :], decays, 0.0) * sizes[None, :]
        pairs = (dot(keys, tl.trans(x), PRECISION) * weights).to(OPERAND)
        others = (dot(keys, tl.trans(z), PRECISION) * weights).to(OPERAND)
        total -= (dot(pairs, z, PRECISION) + dot(others, x, PRECISION)) * sizes_scale
    # Last: until here its tile would only take registers.
    gram = load_operand(grams + program * WIDTH * WIDTH, lines, lines, WIDTH, WIDTH)
    out_unit = (out * 0.5 * tl.load(units + program))[:, None]
    total += (dot(keys, gram, PRECISION) + dot(keys, tl.trans(gram), PRECISION)) * out_unit
    total = total * (gate * key_scale)[:, None]
    through_gram = tl.sum(total * keys.to(tl.float32), 1) * gate * key_scale
    tl.store(rows + 3 * planes + place, tl.load(rows + 3 * planes + place) - 0.5 * through_gram)
    total, scale = scaled_rows(total, tl.float32)
    # Every thread has read its z.
    tl.debug_barrier()
    store_rows(adjoints + token * WIDTH, heads * WIDTH, row, count, lines, total, WIDTH)
    tl.store(rows + planes + place, scale)


@triton.jit(do_not_specialize=["length", "chunks", "scale"])
def adjoint_value_kernel(
    query,
    key,
    value,
    gates,
    numbers,
    solutions,
    adjoints,
    rows,
    d_outputs,
    value_keys,
    units,
    d_key,
    d_value,
    d_gate,
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
    """Gradients of keys, values and input gate for one chunk of one head; README eqs. 15, 16, 18.

    Adds the part of `adjoint_gram_kernel` and completes the sums for the value state's decay (plane 4).
    """
    program = long(tl.program_id(0))
    line, chunk = program // chunks, (program % chunks).to(tl.int32)
    batch, head = line // heads, line % heads
    row, lines, value_lines = tl.arange(0, CHUNK), tl.arange(0, BLOCK), tl.arange(0, VALUE_BLOCK)
    first = long(chunk) * CHUNK
    count = length - chunk * CHUNK
    row_gates = line * chunks * CHUNK
    place = row_gates + first + row
    number = numbers + batch * chunks * CHUNK
    token = (batch * length + first) * heads + head
    gate = tl.load(gates + 2 * planes + place)
    key_base = key + ((batch * length + first) * key_heads + head // (heads // key_heads)) * WIDTH
    value_base = value + ((batch * length + first) * value_heads + head // (heads // value_heads)) * VALUE_WIDTH
    _, out, _ = carries(gates + planes + row_gates, number, chunk, row, CHUNK, PACKED)
    out = out * tl.load(units + tl.num_programs(0) + program)
    state = load_operand(value_keys + program * VALUE_WIDTH * WIDTH, value_lines, lines, VALUE_WIDTH, WIDTH)
    mix = tl.load(gates + 3 * planes + place)
    mixed = mixed_rows(query, solutions, rows, mix, token * WIDTH, place, row, count, lines, heads, METHOD, WIDTH)
    mixed, mixed_scale = scaled_rows(mixed, OPERAND)
    dy, dy_scale = scaled_rows(
        load_rows(d_outputs + token * VALUE_WIDTH, heads * VALUE_WIDTH, row, count, value_lines, VALUE_WIDTH), OPERAND
    )
    keys, key_scale = scaled_rows(load_rows(key_base, key_heads * WIDTH, row, count, lines, WIDTH), OPERAND)
    values, value_scale = scaled_rows(
        load_rows(value_base, value_heads * VALUE_WIDTH, row, count, value_lines, VALUE_WIDTH), OPERAND
    )
    sizes, sizes_scale = scaled_vector(mixed_scale * dy_scale * scale)
    weights = within(gates + planes + row_gates, number, chunk, row, CHUNK, PACKED, True) * sizes[None, :]
    pairs = (dot(keys, tl.trans(mixed), PRECISION) * weights).to(OPERAND)
    d_tile = dot(keys, tl.trans(state), PRECISION) * out[:, None]
    d_tile += dot(pairs, dy, PRECISION) * sizes_scale
    d_tile = d_tile * (gate * key_scale)[:, None]
    value_dot = tl.sum(d_tile * values.to(tl.float32), 1) * value_scale
    d_value += token * VALUE_WIDTH
    store_rows(d_value, heads * VALUE_WIDTH, row, count, value_lines, d_tile * gate[:, None], VALUE_WIDTH)
    tl.store(rows + 4 * planes + place, tl.load(rows + 4 * planes + place) - value_dot * gate)
    pairs = (dot(values, tl.trans(dy), PRECISION) * weights).to(OPERAND)
    through_gram = load_rows(adjoints + token * WIDTH, heads * WIDTH, row, count, lines, WIDTH)
    total = dot(values, state, PRECISION) * out[:, None]
    total += dot(pairs, mixed, PRECISION) * sizes_scale
    total = total * (gate * value_scale)[:, None]
    total += through_gram * tl.load(rows + planes + place)[:, None]
    gate_gradient = tl.sum(total * keys.to(tl.float32), 1) * key_scale + value_dot
    tl.store(d_gate + token + row * heads, gate_gradient, mask=row < count)
    d_key += token * WIDTH
    store_rows(d_key, heads * WIDTH, row, count, lines, total * gate[:, None], WIDTH)


@triton.jit(do_not_specialize=["length", "chunks", "spans"])
def decay_kernel(
    rows,
    ends,
    norms,
    arriving,
    numbers,
    d_key_log_decay,
    d_log_decay,
    length,
    chunks,
    spans,
    heads,
    planes,
    SHARED: tl.constexpr,
    RIDGE: tl.constexpr,
    PACKED: tl.constexpr,
    CHUNK: tl.constexpr,
    SPAN: tl.constexpr,
):
    """README eq. 19: sums over the rest of a span in the same sequence, plus what arrives at its end."""
    program = long(tl.program_id(0))
    line, span = program // spans, program % spans
    batch, head = line // heads, line % heads
    offset = tl.arange(0, SPAN)
    inside = span * SPAN + offset < chunks * CHUNK
    last = tl.minimum((span + 1) * SPAN, chunks * CHUNK) - 1
    row = line * chunks * CHUNK + span * SPAN + offset
    through_gram = tl.load(rows + 3 * planes + row, mask=inside, other=0.0)
    through_value = tl.load(rows + 4 * planes + row, mask=inside, other=0.0)
    gram_end = 0.5 * tl.load(ends + program)
    if RIDGE:
        norm = tl.load(norms + line * chunks * CHUNK + last)
        gram_end -= tl.load(arriving + line * (chunks + 1) + (last + 1) // CHUNK) * norm * norm
    value_end = tl.load(ends + tl.num_programs(0) + program)
    if PACKED:
        number = tl.load(numbers + batch * chunks * CHUNK + span * SPAN + offset, mask=inside, other=-1)
        final = tl.load(numbers + batch * chunks * CHUNK + last)
        rest = (offset[:, None] <= offset[None, :]) & (number[:, None] == number[None, :])
        d_gram = tl.sum(tl.where(rest, through_gram[None, :], 0.0), 1) + tl.where(number == final, gram_end, 0.0)
        d_value = tl.sum(tl.where(rest, through_value[None, :], 0.0), 1) + tl.where(number == final, value_end, 0.0)
    else:
        d_gram = tl.cumsum(through_gram, 0, reverse=True) + gram_end
        d_value = tl.cumsum(through_value, 0, reverse=True) + value_end
    target = (batch * length + span * SPAN + offset) * heads + head
    written = span * SPAN + offset < length
    if SHARED:
        tl.store(d_log_decay + target, d_gram + d_value, mask=written)
    else:
        tl.store(d_key_log_decay + target, d_gram, mask=written)
        tl.store(d_log_decay + target, d_value, mask=written)


@triton.jit(do_not_specialize=["chunks", "anchors"])
def inner_kernel(
    states,
    units,
    anchor_states,
    anchor_units,
    final,
    inner,
    chunks,
    anchors,
    ANCHOR: tl.constexpr,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """<adjoint that arrives at a chunk's end, state there> at the end of every ANCHOR-th chunk: (B H, anchors).

    `anchor_states` (B H, anchors - 1, SIZE) are in units; the state at the last end is `final`.
    """
    program = long(tl.program_id(0))
    line, anchor = program // anchors, program % anchors
    place = line * chunks + tl.minimum((anchor + 1) * ANCHOR, chunks) - 1
    other = line * (anchors - 1) + anchor
    total = 0.0
    for start in range(0, SIZE, TILE):
        offset = start + tl.arange(0, TILE)
        inside = offset < SIZE
        left = tl.load(states + place * SIZE + offset, mask=inside, other=0.0).to(tl.float32)
        if anchor == anchors - 1:
            right = tl.load(final + line * SIZE + offset, mask=inside, other=0.0)
        else:
            right = tl.load(anchor_states + other * SIZE + offset, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(left * right, 0)
    total = total * tl.load(units + place)
    if anchor < anchors - 1:
        total = total * tl.load(anchor_units + other)
    tl.store(inner + program, total)


# Chunks between two places where the decays' gradients are anchored to an inner product of states.
ANCHOR = 4


@on_own_device
def gka_triton_backward(
    inputs: TritonInputs,
    initial: tuple[Tensor, Tensor] | None,
    solutions: Tensor,
    solution_sizes: Tensor,
    norms: Tensor,
    d_outputs: Tensor,
    d_gram: Tensor | None,
    d_value_key: Tensor | None,
    solver: GKASolver,
    scale: float,
) -> tuple[Tensor | None, ...]:
    """Gradients in the order of `TritonInputs` without `numbers`, then of both initial states; None for absent inputs.

    The states of the chunks are computed again: they would be the largest part of what a forward pass keeps.
    """
    query, key, value = inputs.query, inputs.key, inputs.value
    batch, length, heads, width = query.shape
    value_width = value.shape[-1]
    config = plan(query, value_width)
    planes, numbers = gates(inputs, config)
    states = compute_states(inputs, config, planes, numbers, initial)
    count = sizes(inputs, config)
    kind, ridge_gradient = method(solver), solver.ridge_gradient and method(solver) != 0
    options = {"METHOD": kind, **constants(inputs, config)}
    narrow = {k: v for k, v in options.items() if k not in ("VALUE_WIDTH", "VALUE_BLOCK")}
    elementwise = {k: v for k, v in narrow.items() if k not in ("OPERAND", "PRECISION")}
    grid = (batch * heads * count.chunks,)

    rows = planes.new_empty(7, batch, heads, count.chunks * config.chunk)
    if kind != 0:
        rows[0] = solution_sizes
    d_query = torch.empty_like(query)
    d_mix = planes.new_zeros(batch, length, heads) if kind == 0 else planes.new_empty(batch, length, heads)
    d_mixed = torch.empty_like(solutions)
    adjoint_read_kernel[grid](
        query,
        key,
        value,
        planes,
        numbers,
        states.value_keys,
        states.units,
        solutions,
        d_outputs,
        d_mixed,
        d_query,
        rows,
        *count,
        scale,
        **options,
        **launch(config, "adjoint_read"),
    )
    anchors = _anchors(states)
    # Only the Gram states are needed from here on: this frees the others.
    states = states._replace(value_keys=planes)
    d_key = torch.empty(batch, length, heads, width, dtype=key.dtype, device=key.device)
    if kind != 0:
        adjoints = torch.empty_like(solutions)
        adjoint = (solutions, d_key, ridge_gradient)
        launch_solve(inputs, config, planes, numbers, states, d_mixed, solver, norms, adjoints, rows, adjoint)
        adjoint_query_kernel[grid](
            query,
            planes,
            numbers,
            norms,
            solutions,
            adjoints,
            d_mixed,
            d_query,
            d_mix,
            rows,
            count.length,
            count.chunks,
            count.heads,
            count.planes,
            solver.ridge_ratio,
            RIDGE=ridge_gradient,
            **elementwise,
            **launch(config, "adjoint_query"),
        )
    else:
        adjoints = torch.empty(batch, length, heads, width, dtype=config.storage, device=query.device)
    gram_units = states.units[0]
    del d_mixed, states
    arriving = planes.new_empty(batch, heads, count.chunks + 1)
    if ridge_gradient:
        ridge_scan_kernel[(batch * heads,)](
            rows,
            planes,
            numbers,
            arriving,
            count.chunks,
            heads,
            count.planes,
            PACKED=inputs.numbers is not None,
            CHUNK=config.chunk,
            BLOCK=1024,
            num_warps=4,
        )

    def start(programs: int, buffers: tuple[Tensor, ...], span_chunks: int, **flags: bool) -> None:
        adjoint_walk_kernel[(programs,)](
            query,
            key,
            planes,
            numbers,
            solutions,
            adjoints,
            rows,
            arriving,
            d_outputs,
            *buffers,
            count.length,
            count.chunks,
            heads,
            count.key_heads,
            count.planes,
            span_chunks,
            scale,
            RIDGE=ridge_gradient,
            **flags,
            **options,
            **launch_walk(config, "adjoint_walk", planes.device),
        )

    doubled = None if d_gram is None else 2 * d_gram
    arrived = walk(start, planes, (width, value_width), config, (doubled, d_value_key), reverse=True)
    grams, value_keys, units, d_initial_gram, d_initial_value_key = arrived
    if initial is None:
        d_initial_gram = d_initial_value_key = None
    del arrived
    if d_initial_gram is not None and initial is not None:
        d_initial_gram = 0.25 * (d_initial_gram + d_initial_gram.mT)
        if ridge_gradient:
            d_initial_gram -= arriving[..., :1, None] * initial[0]
    ends = planes.new_empty(2, batch, heads, -(-count.chunks // ANCHOR))
    _inner(grams, units[0], *anchors[0], ends[0])
    _inner(value_keys, units[1], *anchors[1], ends[1])
    del anchors, doubled
    adjoint_gram_kernel[grid](
        key,
        planes,
        numbers,
        solutions,
        adjoints,
        rows,
        arriving,
        gram_units,
        grams,
        units,
        d_key,
        count.length,
        count.chunks,
        heads,
        count.key_heads,
        count.planes,
        RIDGE=ridge_gradient,
        **narrow,
        **launch(config, "adjoint_gram"),
    )
    del grams
    d_gate = planes.new_empty(batch, length, heads)
    d_value = torch.empty(batch, length, heads, value_width, dtype=value.dtype, device=value.device)
    adjoint_value_kernel[grid](
        query,
        key,
        value,
        planes,
        numbers,
        solutions,
        adjoints,
        rows,
        d_outputs,
        value_keys,
        units,
        d_key,
        d_value,
        d_gate,
        *count,
        scale,
        **options,
        **launch(config, "adjoint_value"),
    )
    del value_keys

    decays = [inputs.log_decay, inputs.key_log_decay]
    d_log_decay, d_key_log_decay = (None if t is None else planes.new_empty(batch, length, heads) for t in decays)
    if d_log_decay is not None:
        span = ANCHOR * config.chunk
        spans = -(-count.chunks // ANCHOR)
        decay_kernel[(batch * heads * spans,)](
            rows,
            ends,
            norms,
            arriving,
            numbers,
            d_log_decay if d_key_log_decay is None else d_key_log_decay,
            d_log_decay,
            length,
            count.chunks,
            spans,
            heads,
            count.planes,
            SHARED=d_key_log_decay is None,
            RIDGE=ridge_gradient,
            PACKED=inputs.numbers is not None,
            CHUNK=config.chunk,
            SPAN=span,
            num_warps=8,
        )

    def given(tensor: Tensor | None, gradient: Tensor | None) -> Tensor | None:
        return None if tensor is None or gradient is None else gradient.to(tensor.dtype)

    return (
        d_query,
        _fold(d_key, count.key_heads),
        _fold(d_value, count.value_heads),
        given(inputs.log_decay, d_log_decay),
        given(inputs.key_log_decay, d_key_log_decay),
        given(inputs.solution_mix, d_mix),
        given(inputs.input_gate, d_gate),
        d_initial_gram,
        d_initial_value_key,
    )


def _fold(gradient: Tensor, groups: int) -> Tensor:
    """Sum over the query heads that share a key or value head."""
    return gradient if gradient.shape[2] == groups else gradient.unflatten(2, (groups, -1)).sum(3)


class Anchors(NamedTuple):
    """One kind of state after every ANCHOR-th chunk but the last, in units, and after the last token."""

    states: Tensor  # (B, H, anchors - 1, D, Dk)
    units: Tensor  # (B, H, anchors - 1)
    final: Tensor  # (B, H, D, Dk) float32


def _anchors(states: Walked) -> tuple[Anchors, Anchors]:
    """Copies that outlive the states of all chunks."""

    def pick(tiles: Tensor, units: Tensor, final: Tensor) -> Anchors:
        return Anchors(tiles[:, :, ANCHOR::ANCHOR].clone(), units[:, :, ANCHOR::ANCHOR].clone(), final)

    return (
        pick(states.grams, states.units[0], states.final_gram),
        pick(states.value_keys, states.units[1], states.final_value_key),
    )


def _inner(
    states: Tensor, units: Tensor, anchor_states: Tensor, anchor_units: Tensor, final: Tensor, inner: Tensor
) -> None:
    """Inner products of (B, H, chunks, D, Dk) in units with the states where they arrive, into (B, H, anchors)."""
    size = states.shape[3] * states.shape[4]
    inner_kernel[(inner.numel(),)](
        states,
        units,
        anchor_states,
        anchor_units,
        final,
        inner,
        states.shape[2],
        inner.shape[2],
        ANCHOR=ANCHOR,
        SIZE=size,
        TILE=min(4096, triton.next_power_of_2(size)),
        num_warps=8,
    )
