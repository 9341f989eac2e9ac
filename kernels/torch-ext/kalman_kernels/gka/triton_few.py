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
    scaled_rows,
    silu,
    store_rows,
    token_vector,
    unit_rows,
    with_share,
)

__all__ = ["few_kernel"]

# So many tokens, with as many right sides each, fill the rows that matrix units take at least.
FEW = tl.constexpr(4)
ROOM = tl.constexpr(16)
# Rows of a state over which warps lie: sums over every such row stay inside a thread.
APART = tl.constexpr(4)
# The least weight of the state before the tokens: what is divided by it, and squared then, stays finite.
LEAST_WEIGHT = tl.constexpr(2.0**-50)


@triton.jit
def _three(a, b, c, d, e, f):
    return a + d, b + e, c + f


@triton.jit
def _four(a, b, c, d, e, f, g, h):
    return a + e, b + f, c + g, d + h


@triton.jit
def _pick(index, of_four):
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
def _log(log_decay, rate, bias, token, length, heads, MIXER: tl.constexpr, DECAYED: tl.constexpr):
    """The logarithm of what a state keeps at a token; 0 from `length` on."""
    log = 0.0
    if DECAYED:
        log = tl.load(log_decay + token * heads, mask=token < length, other=0.0).to(tl.float32)
        log = tl.where(token < length, log_kept(log, rate, bias, MIXER), 0.0)
    return log


@triton.jit
def _logs(log_decay, rate, bias, length, heads, MIXER: tl.constexpr, DECAYED: tl.constexpr):
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
def _kept(log, number, earlier, PACKED: tl.constexpr):
    """What is kept over a sum of logarithms, nothing from one sequence to another."""
    kept = tl.exp(log)
    if PACKED:
        kept = tl.where(number == earlier, kept, 0.0)
    return kept


@triton.jit
def _decays(logs, number, PACKED: tl.constexpr):
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
    """||state||_F^2, summed so that a thread has several short chains of additions."""
    return tl.sum(tl.sum(tl.reshape(state * state, (state.shape[0] // APART, APART, state.shape[1])), 0))


@triton.jit
def _largest(state):
    """The largest magnitude, found like `_squares`."""
    return tl.max(tl.max(tl.abs(tl.reshape(state, (state.shape[0] // APART, APART, state.shape[1]))), 0))


@triton.jit
def _operand(state, largest):
    """A state in float16 and the factor that it lacks."""
    unit, inverse = power_of_two(largest)
    return (state * (inverse * 16384.0)).to(tl.float16), unit * (1.0 / 16384.0)


@triton.jit
def _solutions(right, there, operand, iterations, ridge, tolerance):
    """(operand + ridge I)^-1 START right by conjugate gradients, each row for itself; `operand` is symmetric.

    Directions are rounded once and used rounded everywhere, as in `triton_common.solve`.
    """
    residual = right * START
    enough = tolerance * START * START
    x = tl.zeros_like(residual)
    direction = residual.to(tl.float16)
    rr = there * (START * START)
    step = 0
    busy = 1
    while (step < iterations) & (busy > 0):
        # Two steps: fewer looks at whether all are done.
        for further_step in tl.static_range(2):
            wide = direction.to(tl.float32)
            image = tl.dot(direction, operand) + ridge[:, None] * wide
            # All at once: threads wait for each other once.
            rr, curvature, along, far = tl.reduce(
                (residual * residual, wide * image, residual * image, image * image), 1, _four
            )
            further = (rr > enough) & (curvature > 0) & (step + further_step < iterations)
            span = tl.where(further, rr * inverse_of(curvature), 0.0)
            x += span[:, None] * wide
            residual -= span[:, None] * image
            # ||residual||^2 after the step over the one before.
            ratio = tl.where(further, 1.0 + span * (span * far - 2.0 * along) * inverse_of(rr), 0.0)
            direction = (residual + tl.maximum(ratio, 0.0)[:, None] * wide).to(tl.float16)
        busy = tl.max((rr > enough).to(tl.int32), 0)
        step += 2
    return x


@triton.jit
def _part(sides, index, which):
    """(FEW,) of what the right sides of all tokens have, (FEW, FEW): the side `which`."""
    return tl.sum(tl.where(index == which, sides, 0.0), 0)


@triton.jit
def _shares(by_first, by_second, by_third, first, second, third):
    """How much of each right side's solution is in a token's, (FEW, FEW).

    With the keys K that a token has behind the first, their weights C, X = A^-1 K and x = A^-1 q (Woodbury):
    (A + K C K^T)^-1 q = x - X y ,   (I + C K^T X) y = C K^T x ,   by elimination, whose pivots are at least 1.

    by_first .. by_third: k_1^T .. k_3^T times the solutions of all right sides; first .. third: the weights of k_1 ..
    k_3 in every token.
    """
    index = tl.arange(0, FEW)[:, None]
    r1, r2, r3 = _part(by_first, index, 0), _part(by_second, index, 0), _part(by_third, index, 0)
    m11, m12, m13 = _part(by_first, index, 1), _part(by_first, index, 2), _part(by_first, index, 3)
    m21, m22, m23 = _part(by_second, index, 1), _part(by_second, index, 2), _part(by_second, index, 3)
    m31, m32, m33 = _part(by_third, index, 1), _part(by_third, index, 2), _part(by_third, index, 3)
    r1, r2, r3 = first * r1, second * r2, third * r3
    m11, m12, m13 = 1.0 + first * m11, first * m12, first * m13
    p1 = 1.0 / m11
    f = second * m21 * p1
    m22, m23, r2 = 1.0 + second * m22 - f * m12, second * m23 - f * m13, r2 - f * r1
    f = third * m31 * p1
    m32, m33, r3 = third * m32 - f * m12, 1.0 + third * m33 - f * m13, r3 - f * r1
    p2 = 1.0 / m22
    f = m32 * p2
    y3 = (r3 - f * r2) / (m33 - f * m23)
    y2 = (r2 - m23 * y3) * p2
    y1 = (r1 - m12 * y2 - m13 * y3) * p1
    return _pick(index, (1.0, -y1[None, :], -y2[None, :], -y3[None, :]))


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

    H_t = a_t H_0 + sum_{1 <= j <= t} c_tj k_j k_j^T ,   A_t = a_t H_0 + ridge ||H_t||_F I

    with H_0 the state after the first token. A_t^-1 (q_t, k_1 .. k_t) are found by conjugate gradients, all tokens side
    by side; then the keys join them (`_shares`). Solutions stay in float32, since what a new key of a young state takes
    away is nearly all there is. The value state as it was is read by a product of matrices, too:

    y_t = a'_t S r_t + sum_{j <= t} c'_tj (k_j^T r_t) v_j   for what reads, r_t.

    EARLY: the kernel before may still run until tokens are read. Inputs and other constants are those of `step_kernel`.
    """
    program = tl.program_id(0)
    line, batch, head = long(program), long(program // heads), program % heads
    rows, value_rows = tl.arange(0, BLOCK), tl.arange(0, VALUE_BLOCK)
    token, side = tl.arange(0, FEW), tl.arange(0, ROOM)
    # Right side `by` of token `of`: its query, or key `by`.
    of, by = side % FEW, side // FEW
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
    if EARLY:
        tl.extra.cuda.gdc_wait()
    n0 = _number(numbers, 0, length, 0, PACKED)
    n1 = _number(numbers, 1, length, n0, PACKED)
    n2 = _number(numbers, 2, length, n1, PACKED)
    n3 = _number(numbers, 3, length, n2, PACKED)
    number = n0, n1, n2, n3
    gate0 = _gate(input_gate, 0, length, heads, MIXER, GATED)
    gate1 = _gate(input_gate, 1, length, heads, MIXER, GATED)
    gate2 = _gate(input_gate, 2, length, heads, MIXER, GATED)
    gate3 = _gate(input_gate, 3, length, heads, MIXER, GATED)
    gates = _pick(by, (gate0, gate1, gate2, gate3))
    k0 = token_vector(key, 0, length, key_stride, rows, WIDTH) * gate0
    k1 = token_vector(key, 1, length, key_stride, rows, WIDTH) * gate1
    k2 = token_vector(key, 2, length, key_stride, rows, WIDTH) * gate2
    k3 = token_vector(key, 3, length, key_stride, rows, WIDTH) * gate3
    DECAYED: tl.constexpr = (DECAYS == 1) | (DECAYS == 2)
    of_gram = key_log_decay + place if DECAYS == 2 else log_decay
    logs = _logs(of_gram, rate, bias, length, heads, MIXER, DECAYED)
    entered, of_first, of_second, c32 = _decays(logs, number, PACKED)
    a1, a2, a3 = of_first
    c21, c31 = of_second
    grams += place * WIDTH * WIDTH
    stride = heads * WIDTH * WIDTH
    gram = _joined(gram, entered[0], k0, k0, grams, 0, length, stride, offset, mask, EVERY)
    s0 = _squares(gram)
    operand, unit = _operand(gram, tl.sqrt(s0))
    gram = _joined(gram, a1, k1, k1, grams, 1, length, stride, offset, mask, EVERY)
    s1 = _squares(gram)
    gram = _joined(gram, c21, k2, k2, grams, 2, length, stride, offset, mask, EVERY)
    s2 = _squares(gram)
    gram = _joined(gram, c32, k3, k3, grams, 3, length, stride, offset, mask, EVERY)
    s3 = _squares(gram)
    # Under way while the solve runs.
    tl.store(gram_out + line * WIDTH * WIDTH + offset, gram, mask=mask)
    norm = tl.sqrt(_pick(of, (s0, s1, s2, s3)))
    inverse = tl.where(norm > 0, 1.0 / norm, 0.0)
    into = tl.maximum(_pick(of, (1.0, a1, a2, a3)) * unit * inverse, LEAST_WEIGHT)
    right = load_rows(query, query_stride, tl.where(by == 0, of, length), length, rows, WIDTH)
    joining = tl.where((by > 0) & (by <= of), by, length)
    right += load_rows(key, key_stride, joining, length, rows, WIDTH) * gates[:, None]
    right, size, there = unit_rows(right)
    x = _solutions(right, there, operand, iterations, ridge / into, tolerance)
    value_offset = value_rows[:, None] * WIDTH + rows[None, :]
    value_mask = (value_rows < VALUE_WIDTH)[:, None] & (rows < WIDTH)[None, :]
    state = tl.load(value_key_in + line * VALUE_WIDTH * WIDTH + value_offset, mask=value_mask, other=0.0)
    x = x * (size * inverse / into * (1.0 / START))[:, None]
    # Loaded once more: registers are what the solve is short of.
    k1 = token_vector(key, 1, length, key_stride, rows, WIDTH) * gate1
    k2 = token_vector(key, 2, length, key_stride, rows, WIDTH) * gate2
    k3 = token_vector(key, 3, length, key_stride, rows, WIDTH) * gate3
    by_first, by_second, by_third = tl.reduce((x * k1[None, :], x * k2[None, :], x * k3[None, :]), 1, _three)
    shares = _shares(
        tl.reshape(by_first, (FEW, FEW)),
        tl.reshape(by_second, (FEW, FEW)),
        tl.reshape(by_third, (FEW, FEW)),
        _pick(token, (0.0, 1.0, c21, c31)),
        _pick(token, (0.0, 0.0, 1.0, c32)),
        _pick(token, (0.0, 0.0, 0.0, 1.0)),
    )
    x = tl.sum(tl.reshape(x, (FEW, FEW, BLOCK)) * shares[:, :, None], 0)
    if MIXED:
        queries = load_rows(query, query_stride, token, length, rows, WIDTH)
        x = with_share(x, queries, solution_mix + place + token * heads, token < length, MIXER)
    # What reads FEW times: for each key that may have been written.
    x = tl.reshape(tl.broadcast_to(x[None, :, :], (FEW, FEW, BLOCK)), (ROOM, BLOCK))
    score = tl.sum(x * load_rows(key, key_stride, by, length, rows, WIDTH), 1) * gates
    reading, reading_unit = scaled_rows(x, tl.float16)
    logs = _logs(log_decay, rate, bias, length, heads, MIXER, DECAYS > 0)
    entered, of_first, of_second, c32 = _decays(logs, number, PACKED)
    a1, a2, a3 = of_first
    c21, c31 = of_second
    # What token `of` keeps of token `by`, of itself and of earlier ones.
    within = _pick(
        by,
        (
            _pick(of, (1.0, a1, a2, a3)),
            _pick(of, (0.0, 1.0, c21, c31)),
            _pick(of, (0.0, 0.0, 1.0, c32)),
            _pick(of, (0.0, 0.0, 0.0, 1.0)),
        ),
    )
    score = score * gates * within
    readable, unit = _operand(state, _largest(state))
    before = tl.where(by == 0, _pick(of, entered) * unit * reading_unit, 0.0)
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
    v0 = token_vector(value, 0, length, value_stride, value_rows, VALUE_WIDTH) * gate0
    v1 = token_vector(value, 1, length, value_stride, value_rows, VALUE_WIDTH) * gate1
    v2 = token_vector(value, 2, length, value_stride, value_rows, VALUE_WIDTH) * gate2
    v3 = token_vector(value, 3, length, value_stride, value_rows, VALUE_WIDTH) * gate3
    value_keys += place * VALUE_WIDTH * WIDTH
    stride = heads * VALUE_WIDTH * WIDTH
    if EVERY:
        state = _joined(state, entered[0], v0, k0, value_keys, 0, length, stride, value_offset, value_mask, EVERY)
        state = _joined(state, a1, v1, k1, value_keys, 1, length, stride, value_offset, value_mask, EVERY)
        state = _joined(state, c21, v2, k2, value_keys, 2, length, stride, value_offset, value_mask, EVERY)
        state = _joined(state, c32, v3, k3, value_keys, 3, length, stride, value_offset, value_mask, EVERY)
    else:
        state = state * entered[3] + (v0 * a3)[:, None] * k0[None, :]
        state += (v1 * c31)[:, None] * k1[None, :]
        state += (v2 * c32)[:, None] * k2[None, :]
        state += v3[:, None] * k3[None, :]
    tl.store(value_key_out + line * VALUE_WIDTH * WIDTH + value_offset, state, mask=value_mask)
