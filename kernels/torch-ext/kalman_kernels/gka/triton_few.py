"""Gated KalmaNet for two to four half-precision tokens side by side, in Triton (README.md, eq. 24)."""

# Triton turns annotations and defaults of jitted functions into objects of its own.
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false
# pyright: reportReturnType=false, reportAssignmentType=false

from __future__ import annotations

import triton
import triton.language as tl

from ..jit import long
from .triton_common import (
    START,
    decay_of,
    inverse_of,
    load_rows,
    log_kept,
    opened,
    power_of_two,
    rounded,
    silu,
    store_rows,
    token_vector,
    with_share,
)
from .triton_states import two_sums

__all__ = ["few_kernel"]

# So many tokens; right sides, which are the columns that matrix units take at least; pairs of a token and a key.
FEW = tl.constexpr(4)
SIDES = tl.constexpr(8)
ROOM = tl.constexpr(16)
# Rows of a state over which warps lie, and columns that a thread has side by side: sums over every such row and over
# such columns stay inside a thread.
APART = tl.constexpr(4)
NEAR = tl.constexpr(4)


@triton.jit
def _three(a, b, c, d, e, f):
    return a + d, b + e, c + f


@triton.jit
def _four(a, b, c, d, e, f, g, h):
    return a + e, b + f, c + g, d + h


@triton.jit
def _sum_and_largest(a, b, c, d):
    return a + c, tl.maximum(b, d)


@triton.jit
def pick(index, of_four):
    """What each index says: one of four."""
    a, b, c, d = of_four
    return tl.where(index == 0, a, tl.where(index == 1, b, tl.where(index == 2, c, d)))


@triton.jit
def _gate(input_gate, token, length, heads, MIXER: tl.constexpr, GATED: tl.constexpr):
    gate = 1.0
    if GATED:
        gate = tl.load(input_gate + token * heads, mask=token < length, other=0.0).to(tl.float32)
        gate = opened(gate, input_gate, MIXER)
    return gate


@triton.jit
def gates_of(input_gate, length, heads, MIXER: tl.constexpr, GATED: tl.constexpr):
    """The input gates of all tokens; 0 from `length` on."""
    return (
        _gate(input_gate, 0, length, heads, MIXER, GATED),
        _gate(input_gate, 1, length, heads, MIXER, GATED),
        _gate(input_gate, 2, length, heads, MIXER, GATED),
        _gate(input_gate, 3, length, heads, MIXER, GATED),
    )


@triton.jit
def _log(log_decay, rate, bias, token, length, heads, MIXER: tl.constexpr, DECAYED: tl.constexpr):
    """The logarithm of what a state keeps at a token; 0 from `length` on."""
    log = 0.0
    if DECAYED:
        log = tl.load(log_decay + token * heads, mask=token < length, other=0.0).to(tl.float32)
        log = tl.where(token < length, log_kept(log, rate, bias, MIXER), 0.0)
    return log


@triton.jit
def logs_of(log_decay, rate, bias, length, heads, MIXER: tl.constexpr, DECAYED: tl.constexpr):
    return (
        _log(log_decay, rate, bias, 0, length, heads, MIXER, DECAYED),
        _log(log_decay, rate, bias, 1, length, heads, MIXER, DECAYED),
        _log(log_decay, rate, bias, 2, length, heads, MIXER, DECAYED),
        _log(log_decay, rate, bias, 3, length, heads, MIXER, DECAYED),
    )


@triton.jit
def _number(numbers, token, length, before, PACKED: tl.constexpr):
    """The number of a token's sequence; from `length` on the one before it."""
    number = before
    if PACKED:
        number = tl.where(token < length, tl.load(numbers + token, mask=token < length, other=0), before)
    return number


@triton.jit
def numbers_of(numbers, length, PACKED: tl.constexpr):
    """The numbers of all tokens' sequences."""
    n0 = _number(numbers, 0, length, 0, PACKED)
    n1 = _number(numbers, 1, length, n0, PACKED)
    n2 = _number(numbers, 2, length, n1, PACKED)
    return n0, n1, n2, _number(numbers, 3, length, n2, PACKED)


@triton.jit
def _kept(log, number, earlier, PACKED: tl.constexpr):
    """What is kept over a sum of logarithms, nothing from one sequence to another."""
    kept = tl.exp(log)
    if PACKED:
        kept = tl.where(number == earlier, kept, 0.0)
    return kept


@triton.jit
def decays(logs, number, PACKED: tl.constexpr):
    """What is kept from before the first token to each, and of the first, second and third token by those after it.

    Every sum of logarithms is summed for itself: small ones after a token that keeps next to nothing are not lost.
    """
    log0, log1, log2, log3 = logs
    n0, n1, n2, n3 = number
    entered = (
        _kept(log0, n0, 0, PACKED),
        _kept(log0 + log1, n1, 0, PACKED),
        _kept(log0 + (log1 + log2), n2, 0, PACKED),
        _kept((log0 + log1) + (log2 + log3), n3, 0, PACKED),
    )
    of_first = (
        _kept(log1, n1, n0, PACKED),
        _kept(log1 + log2, n2, n0, PACKED),
        _kept(log1 + (log2 + log3), n3, n0, PACKED),
    )
    of_second = _kept(log2, n2, n1, PACKED), _kept(log2 + log3, n3, n1, PACKED)
    return entered, of_first, of_second, _kept(log3, n3, n2, PACKED)


@triton.jit
def _joined(state, keep, left, right, states, token, length, stride, offset, mask, EVERY: tl.constexpr):
    """keep state + left right^T, stored if EVERY."""
    state = state * keep + left[:, None] * right[None, :]
    if EVERY and token < length:
        tl.store(states + long(token) * stride + offset, state, mask=mask)
    return state


@triton.jit
def _squares(state):
    """||state||_F^2 as far as each thread sums it."""
    squares = tl.reshape(state * state, (state.shape[0] // APART, APART, state.shape[1] // NEAR, NEAR))
    return tl.sum(tl.sum(squares, 0), 2)


@triton.jit
def _all_four(a, b, c, d):
    """What four `_squares` are summed to: threads wait for each other once."""
    a, b, c, d = tl.reduce((a, b, c, d), 1, _four)
    return tl.reduce((a, b, c, d), 0, _four)


@triton.jit
def _largest(state):
    """The largest magnitude, found so that a thread has several short chains of comparisons."""
    return tl.max(tl.max(tl.abs(tl.reshape(state, (state.shape[0] // APART, APART, state.shape[1]))), 0))


@triton.jit
def _operand(state, largest):
    """A state in float16 and the factor that it lacks."""
    unit, inverse = power_of_two(largest)
    return (state * (inverse * 16384.0)).to(tl.float16), unit * (1.0 / 16384.0)


@triton.jit
def _columns(pointer, stride, tokens, count, lines, WIDTH: tl.constexpr):
    """`load_rows`, transposed, in the dtype of the tensor."""
    mask = (lines < WIDTH)[:, None] & (tokens < count)[None, :]
    return tl.load(pointer + tokens[None, :] * stride + lines[:, None], mask=mask, other=0.0)


@triton.jit
def moved(x, residual, direction, of_direction, wide, image, key, weight, sums, inverse, curvature, wanted):
    """A step of conjugate gradients (Chronopoulos & Gear 1989), each column for itself, where it is `wanted`.

    `wide` is the residual, rounded, `image` what the operand and the ridge make of it; `sums` are ||r||^2, r^T image
    and key^T wide. `inverse` and `curvature` are 1 / ||r||^2 and p^T A p of the step before, 0 at first.
    """
    rr, curved, along = sums
    share = weight * along
    image += share[None, :] * key[:, None]
    ratio = rr * inverse
    curvature = curved + share * along - ratio * ratio * curvature
    further = wanted & (curvature > 0)
    span = tl.where(further, rr * inverse_of(curvature), 0.0)
    inverse = tl.where(further, inverse_of(rr), 0.0)
    direction = wide + ratio[None, :] * direction
    of_direction = image + ratio[None, :] * of_direction
    x += span[None, :] * direction
    residual -= span[None, :] * of_direction
    return x, residual, direction, of_direction, inverse, curvature


@triton.jit
def joined(by_second, by_third, c32, side):
    """What keys 2 and 3 take away when they join: shares of the columns, and the weight of column 5 for token 3.

    With the keys K behind the second, their weights C, X = A^-1 K and x = A^-1 q (Woodbury):
    (A + K C K^T)^-1 q = x - X y ,   (I + C K^T X) y = C K^T x ,   by elimination, whose pivots are at least 1.
    `by_second` are the products of key 2 with columns 2, 3, 5, 6 and 7, `by_third` those of key 3 with 3, 5 and 7.
    """
    second2, second3, second5, second6, second7 = by_second
    third3, third5, third7 = by_third
    of_third_token = second2 / (1.0 + second6)
    pivot = 1.0 / (1.0 + c32 * second7)
    beside, known = c32 * second5, c32 * second3
    factor = third7 * pivot
    newest = (third3 - factor * known) / (1.0 + third5 - factor * beside)
    of_last_token = (known - beside * newest) * pivot
    shares = tl.where(side == 6, -of_third_token, tl.where(side == 7, -of_last_token, tl.where(side < FEW, 1.0, 0.0)))
    return shares, newest


@triton.jit
def _solutions(right, there, operand, into, key, weight, iterations, ridge, tolerance):
    """(into operand + weight key key^T + ridge I)^-1 START right by conjugate gradients, each column for itself.

    `operand` is symmetric. Inner products of a step are those of the residual and its image alone (`moved`), so that
    threads wait for each other once. Residuals are rounded once and used rounded everywhere, so that their rounding
    changes the path and not the goal.
    """
    residual = right * START
    enough = tolerance * START * START
    x = tl.zeros_like(residual)
    direction, of_direction = x, x
    inverse, curvature = tl.zeros_like(there), tl.zeros_like(there)
    step = 0
    busy = 1
    while (step < iterations) & (busy > 0):
        # Two steps: fewer looks at whether all are done.
        for further_step in tl.static_range(2):
            half = residual.to(tl.float16)
            wide = half.to(tl.float32)
            image = tl.dot(operand, half) * into[None, :] + ridge * wide
            # All at once: threads wait for each other once.
            sums = tl.reduce((residual * residual, residual * image, key[:, None] * wide), 0, _three)
            rr = sums[0]
            wanted = (rr > enough) & (step + further_step < iterations)
            x, residual, direction, of_direction, inverse, curvature = moved(
                x, residual, direction, of_direction, wide, image, key, weight, sums, inverse, curvature, wanted
            )
        busy = tl.max((rr > enough).to(tl.int32), 0)
        step += 2
    return x


@triton.jit
def _at(vector, index: tl.constexpr):
    """One number of (SIDES,)."""
    return tl.sum(tl.where(tl.arange(0, SIDES) == index, vector, 0.0), 0)


@triton.jit(do_not_specialize=["length", "iterations", "ridge", "tolerance", "scale", "eps"])
def few_kernel(
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
    EARLY: tl.constexpr,
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
    """At most FEW tokens of one head, with one product of matrices in an iteration for all of them.

    H_t = a_t H_0 + sum_{1 <= j <= t} c_tj k_j k_j^T ,   A_t = a_t H_0 + c_t1 k_1 k_1^T + ridge ||H_t||_F I

    with H_0 the state after the first token. A_t^-1 (q_t, k_2 .. k_t) are found by conjugate gradients, all tokens side
    by side; then the keys join them. Solutions stay in float32, since what a new key of a young state takes away is
    nearly all there is. The value state as it was is read by a product of matrices, too:

    y_t = a'_t S r_t + sum_{j <= t} c'_tj (k_j^T r_t) v_j   for what reads, r_t.

    EARLY: the kernel before may still run until tokens are read. Inputs and other constants are those of `step_kernel`.
    """
    program = tl.program_id(0)
    line, batch, head = long(program), long(program // heads), program % heads
    rows, value_rows = tl.arange(0, BLOCK), tl.arange(0, VALUE_BLOCK)
    token, side, pair = tl.arange(0, FEW), tl.arange(0, SIDES), tl.arange(0, ROOM)
    # Token `of` and key `by` of a pair.
    of, by = pair % FEW, pair // FEW
    start = batch * length
    place = start * heads + head
    # From here on pointers are at the first token of the row and head.
    query += (start * query_heads + head // (heads // query_heads)) * WIDTH
    key += (start * key_heads + head // (heads // key_heads)) * WIDTH
    value += (start * value_heads + head // (heads // value_heads)) * VALUE_WIDTH
    query_stride, key_stride, value_stride = query_heads * WIDTH, key_heads * WIDTH, value_heads * VALUE_WIDTH
    input_gate += place
    log_decay += place
    rate, bias = decay_of(decay_rate + head, decay_bias + head, MIXER & (DECAYS > 0))
    numbers += start
    offset = rows[:, None] * WIDTH + rows[None, :]
    mask = (rows < WIDTH)[:, None] & (rows < WIDTH)[None, :]
    gram = tl.load(gram_in + line * WIDTH * WIDTH + offset, mask=mask, other=0.0)
    # No element of a Gram matrix is larger than the largest of its diagonal.
    diagonal = tl.load(gram_in + line * WIDTH * WIDTH + rows * (WIDTH + 1), mask=rows < WIDTH, other=0.0)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    number = numbers_of(numbers, length, PACKED)
    gate0, gate1, gate2, gate3 = gates_of(input_gate, length, heads, MIXER, GATED)
    gates = pick(by, (gate0, gate1, gate2, gate3))
    k0 = token_vector(key, 0, length, key_stride, rows, WIDTH) * gate0
    k1 = token_vector(key, 1, length, key_stride, rows, WIDTH) * gate1
    k2 = token_vector(key, 2, length, key_stride, rows, WIDTH) * gate2
    k3 = token_vector(key, 3, length, key_stride, rows, WIDTH) * gate3
    # The right sides of all tokens: four queries, none, key 3 of token 3, key 2 of token 2, key 2 of token 3.
    whose, joins = tl.where(side == 5, 3, side % FEW), tl.where(side == 5, 3, 2)
    # Loaded ahead of what is stored.
    asked = _columns(query, query_stride, tl.where(side < FEW, side, length), length, rows, WIDTH)
    joins = tl.where((side > FEW) & (whose < length), joins, length)
    joining = _columns(key, key_stride, joins, length, rows, WIDTH)
    DECAYED: tl.constexpr = (DECAYS == 1) | (DECAYS == 2)
    of_gram = key_log_decay + place if DECAYS == 2 else log_decay
    logs = logs_of(of_gram, rate, bias, length, heads, MIXER, DECAYED)
    entered, of_first, of_second, c32 = decays(logs, number, PACKED)
    a1, a2, a3 = of_first
    c21, c31 = of_second
    grams += place * WIDTH * WIDTH
    stride = heads * WIDTH * WIDTH
    gram = _joined(gram, entered[0], k0, k0, grams, 0, length, stride, offset, mask, EVERY)
    s0 = _squares(gram)
    operand, unit = _operand(gram, tl.max(tl.abs(diagonal * entered[0] + k0 * k0), 0))
    gram = _joined(gram, a1, k1, k1, grams, 1, length, stride, offset, mask, EVERY)
    s1 = _squares(gram)
    gram = _joined(gram, c21, k2, k2, grams, 2, length, stride, offset, mask, EVERY)
    s2 = _squares(gram)
    gram = _joined(gram, c32, k3, k3, grams, 3, length, stride, offset, mask, EVERY)
    s3 = _squares(gram)
    s0, s1, s2, s3 = _all_four(s0, s1, s2, s3)
    # Under way while the solve runs.
    tl.store(gram_out + line * WIDTH * WIDTH + offset, gram, mask=mask)
    norm = tl.sqrt(pick(whose, (s0, s1, s2, s3)))
    of_norm = tl.where(norm > 0, 1.0 / norm, 0.0)
    into = pick(whose, (1.0, a1, a2, a3)) * unit * of_norm
    weight = pick(whose, (0.0, 1.0, c21, c31)) * of_norm
    right = asked.to(tl.float32) + joining.to(tl.float32) * tl.where(side == 5, gate3, gate2)[None, :]
    size = tl.sqrt(tl.sum(right * right, 0))
    there = tl.where(size > 0, 1.0, 0.0)
    right = right * tl.where(size > 0, 1.0 / size, 0.0)[None, :]
    k1 = token_vector(key, 1, length, key_stride, rows, WIDTH) * gate1
    x = _solutions(right, there, operand, into, k1, weight, iterations, ridge, tolerance)
    value_offset = value_rows[:, None] * WIDTH + rows[None, :]
    value_mask = (value_rows < VALUE_WIDTH)[:, None] & (rows < WIDTH)[None, :]
    state = tl.load(value_key_in + line * VALUE_WIDTH * WIDTH + value_offset, mask=value_mask, other=0.0)
    x = x * (size * of_norm * (1.0 / START))[None, :]
    # Loaded once more: registers are what the solve is short of.
    k1 = token_vector(key, 1, length, key_stride, rows, WIDTH) * gate1
    k2 = token_vector(key, 2, length, key_stride, rows, WIDTH) * gate2
    k3 = token_vector(key, 3, length, key_stride, rows, WIDTH) * gate3
    by_second, by_third = tl.reduce((x * k2[:, None], x * k3[:, None]), 0, two_sums)
    shares, newest = joined(
        (_at(by_second, 2), _at(by_second, 3), _at(by_second, 5), _at(by_second, 6), _at(by_second, 7)),
        (_at(by_third, 3), _at(by_third, 5), _at(by_third, 7)),
        c32,
        side,
    )
    of_newest = tl.sum(tl.where(side == 5, x, 0.0), 1)
    x = tl.sum(tl.reshape(x * shares[None, :], (BLOCK, SIDES // FEW, FEW)), 1)
    x = tl.trans(x - tl.where(token == 3, newest, 0.0)[None, :] * of_newest[:, None])
    if MIXED:
        queries = load_rows(query, query_stride, token, length, rows, WIDTH)
        x = with_share(x, queries, solution_mix + place + token * heads, token < length, MIXER)
    # What reads FEW times: for each key that may have been written.
    x = tl.reshape(tl.broadcast_to(x[None, :, :], (FEW, FEW, BLOCK)), (ROOM, BLOCK))
    keys = load_rows(key, key_stride, by, length, rows, WIDTH)
    score, largest = tl.reduce((x * keys, tl.abs(x)), 1, _sum_and_largest)
    reading_unit, of_unit = power_of_two(largest)
    reading = (x * of_unit[:, None]).to(tl.float16)
    if DECAYS > 1:
        # Those of the value state differ.
        logs = logs_of(log_decay, rate, bias, length, heads, MIXER, True)
        entered, of_first, of_second, c32 = decays(logs, number, PACKED)
        a1, a2, a3 = of_first
        c21, c31 = of_second
    # What token `of` keeps of token `by`, of itself and of earlier ones.
    within = pick(
        by,
        (
            pick(of, (1.0, a1, a2, a3)),
            pick(of, (0.0, 1.0, c21, c31)),
            pick(of, (0.0, 0.0, 1.0, c32)),
            pick(of, (0.0, 0.0, 0.0, 1.0)),
        ),
    )
    # Keys and values are behind the input gate.
    score = score * (gates * gates * within)
    readable, unit = _operand(state, _largest(state))
    before = tl.where(by == 0, pick(of, entered) * unit * reading_unit, 0.0)
    values = load_rows(value, value_stride, by, length, value_rows, VALUE_WIDTH)
    y = tl.dot(reading, tl.trans(readable)) * before[:, None] + values * score[:, None]
    y = tl.sum(tl.reshape(y, (FEW, FEW, VALUE_BLOCK)), 0) * scale
    if MIXER:
        y = rounded(y, outputs)
        weight = tl.load(norm_weight + value_rows, mask=value_rows < VALUE_WIDTH, other=0.0).to(tl.float32)
        y = y / tl.sqrt(tl.sum(y * y, 1) / VALUE_WIDTH + eps)[:, None] * weight[None, :]
        if OUTPUT_GATED:
            opening = output_gate + place * VALUE_WIDTH
            y = y * silu(load_rows(opening, heads * VALUE_WIDTH, token, length, value_rows, VALUE_WIDTH))
    store_rows(outputs + place * VALUE_WIDTH, heads * VALUE_WIDTH, token, length, value_rows, y, VALUE_WIDTH)
    k0 = token_vector(key, 0, length, key_stride, rows, WIDTH) * gate0
    # The gates of the values on the keys, of which a thread has fewer elements.
    k0, k1, k2, k3 = k0 * gate0, k1 * gate1, k2 * gate2, k3 * gate3
    v0 = token_vector(value, 0, length, value_stride, value_rows, VALUE_WIDTH)
    v1 = token_vector(value, 1, length, value_stride, value_rows, VALUE_WIDTH)
    v2 = token_vector(value, 2, length, value_stride, value_rows, VALUE_WIDTH)
    v3 = token_vector(value, 3, length, value_stride, value_rows, VALUE_WIDTH)
    value_keys += place * VALUE_WIDTH * WIDTH
    stride = heads * VALUE_WIDTH * WIDTH
    if EVERY:
        state = _joined(state, entered[0], v0, k0, value_keys, 0, length, stride, value_offset, value_mask, EVERY)
        state = _joined(state, a1, v1, k1, value_keys, 1, length, stride, value_offset, value_mask, EVERY)
        state = _joined(state, c21, v2, k2, value_keys, 2, length, stride, value_offset, value_mask, EVERY)
        state = _joined(state, c32, v3, k3, value_keys, 3, length, stride, value_offset, value_mask, EVERY)
    else:
        state = state * entered[3] + v0[:, None] * (k0 * a3)[None, :]
        state += v1[:, None] * (k1 * c31)[None, :]
        state += v2[:, None] * (k2 * c32)[None, :]
        state += v3[:, None] * k3[None, :]
    tl.store(value_key_out + line * VALUE_WIDTH * WIDTH + value_offset, state, mask=value_mask)
