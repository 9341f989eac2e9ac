"""Gated KalmaNet for two to four half-precision tokens side by side, in Gluon (README.md, eq. 24).

The mathematics of `few_kernel`. What Triton gives no say in is written out here: tiles lie over threads as matrix units
take them, so that no product, sum or update has to move one; sums over rows cost one exchange through shared memory;
states are copied there while something else is computed, and a thread has so few registers that a multiprocessor holds
half as many programs again.
"""

# Triton turns annotations and defaults of jitted functions into objects of its own.
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false
# pyright: reportReturnType=false, reportAssignmentType=false

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from .triton_common import START, decay_of, power_of_two, rounded, sigmoid, silu
from .triton_few import FEW, SIDES, decays, gates_of, joined, logs_of, moved, numbers_of, pick

__all__ = ["gluon_few_kernel"]

# Triton 3.8 has renamed it.
async_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
# Columns of a piece of a state: a line of memory.
PIECE = gl.constexpr(32)
# Numbers that wait in shared memory while the solve runs, a power of two of them.
WAITING = gl.constexpr(16)


@gluon.jit
def _copy(staged, pointer, PIECES: gl.constexpr, WIDTH: gl.constexpr, WARPS: gl.constexpr):
    """A state on its way to shared memory, in pieces that arrive one after the other."""
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [WARPS, 1], [1, 0])
    rows = gl.arange(0, WIDTH, layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, PIECE, layout=gl.SliceLayout(0, layout))
    at = pointer + rows[:, None] * WIDTH + columns[None, :]
    for j in gl.static_range(PIECES):
        async_load(staged[j], at + j * PIECE)
        async_copy.commit_group()


@gluon.jit
def _part(tile, row: gl.constexpr, start: gl.constexpr, count: gl.constexpr, WIDTH: gl.constexpr):
    """Part of a row of (rows, WIDTH) in shared memory."""
    return tile.slice(row * WIDTH + start, count, 0)


@gluon.jit
def _below(a, b):
    """The rows of two tiles in one."""
    return gl.reshape(gl.permute(gl.join(a, b), [2, 0, 1]), [2 * a.shape[0], a.shape[1]])


@gluon.jit
def _operand(tile, LEFT: gl.constexpr):
    """A piece of a state as a product takes it: no thread's elements leave it, columns change their order."""
    tile = gl.permute(gl.reshape(tile, [tile.shape[0], tile.shape[1] // 16, 4, 2, 2]), [0, 1, 3, 2, 4])
    return gl.convert_layout(gl.reshape(tile, [tile.shape[0], PIECE]), LEFT, assert_trivial=True)


@gluon.jit
def _ordered(x):
    """Rows in the order of the columns of `_operand`."""
    x = gl.permute(gl.reshape(x, [x.shape[0] // 16, 4, 2, 2, x.shape[1]]), [0, 2, 1, 3, 4])
    return gl.reshape(x, [x.shape[0] * 16, x.shape[4]])


@gluon.jit
def _after(x, half, nothing):
    """x, computed after its half; `nothing` is 0, which no compiler knows.

    Otherwise halves of all pieces would be made at the end, and all pieces kept until then.
    """
    return gl.inline_asm_elementwise(
        "lop3.b32 $0, $2, $4, $5, 0x78; mov.b32 $1, $3;",
        "=r,=r,r,r,r,r,r",
        [x, half, nothing],
        dtype=gl.float32,
        is_pure=True,
        pack=2,
    )


@gluon.jit
def _squares(state, WARPS: gl.constexpr):
    """||state||_F^2 of a tile as far as each thread sums it, (WARPS, 8, 4)."""
    squares = gl.reshape(state * state, [state.shape[0] // (16 * WARPS), WARPS, 2, 8, state.shape[1] // 16, 4, 4])
    return gl.sum(gl.sum(gl.sum(gl.sum(squares, 6), 4), 2), 0)


@gluon.jit
def _by_warp(x, WARPS: gl.constexpr):
    """(rows, SIDES) as (repetitions, WARPS, 2, 8, SIDES)."""
    return gl.reshape(x, [x.shape[0] // (16 * WARPS), WARPS, 2, 8, SIDES])


@gluon.jit
def _put_sums(room, values, COUNT: gl.constexpr, WARPS: gl.constexpr):
    """Sums of several (rows, SIDES) over the rows of each warp."""
    for i in gl.static_range(COUNT):
        room[i].store(gl.sum(gl.sum(gl.sum(_by_warp(values[i], WARPS), 0), 1), 1))


@gluon.jit
def _get_sums(room, COUNT: gl.constexpr, SEEN: gl.constexpr, MMA: gl.constexpr):
    """What the warps have put, summed."""
    sums = ()
    for i in gl.static_range(COUNT):
        total = gl.sum(room[i].load(SEEN), 0)
        sums = sums + (gl.convert_layout(total, gl.SliceLayout(0, MMA), assert_trivial=True),)
    return sums


@gluon.jit
def _sums(room, values, COUNT: gl.constexpr, WARPS: gl.constexpr, SEEN: gl.constexpr, MMA: gl.constexpr):
    """Sums of the columns of several (rows, SIDES): threads wait for each other once."""
    _put_sums(room, values, COUNT, WARPS)
    return _get_sums(room, COUNT, SEEN, MMA)


@gluon.jit
def _product(operand, vector, vectors, PIECES: gl.constexpr, MMA: gl.constexpr):
    """operand vector as two sums of half as many products: shorter chains."""
    vectors.store(_ordered(vector))
    right: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    zero = gl.zeros([operand[0].shape[0], SIDES], gl.float32, MMA)
    one, two = zero, zero
    half: gl.constexpr = PIECES // 2
    for j in gl.static_range(half):
        one = mma_v2(operand[j], vectors.slice(j * PIECE, PIECE, 0).load(right), one)
        two = mma_v2(operand[half + j], vectors.slice((half + j) * PIECE, PIECE, 0).load(right), two)
    return one, two


@gluon.jit
def _solutions(
    right,
    size,
    operand,
    into,
    key,
    weight,
    vectors,
    room,
    iterations,
    ridge,
    tolerance,
    PIECES: gl.constexpr,
    WARPS: gl.constexpr,
    SEEN: gl.constexpr,
    MMA: gl.constexpr,
):
    """`triton_few._solutions` of right sides of norm `size`, scaled to norm START before and back after."""
    residual = right * (gl.where(size > 0, 1.0 / size, 0.0) * START)[None, :]
    enough = tolerance * START * START
    x = gl.zeros_like(residual)
    direction, of_direction = x, x
    inverse, curvature = gl.zeros_like(size), gl.zeros_like(size)
    step = 0
    busy = 1
    while (step < iterations) & (busy > 0):
        half = residual.to(gl.float16)
        wide = half.to(gl.float32)
        one, two = _product(operand, half, vectors, PIECES, MMA)
        image = one * into[None, :] + (two * into[None, :] + ridge * wide)
        products = residual * residual, residual * image, key[:, None] * wide
        sums = _sums(room, products, 3, WARPS, SEEN, MMA)
        wanted = sums[0] > enough
        x, residual, direction, of_direction, inverse, curvature = moved(
            x, residual, direction, of_direction, wide, image, key, weight, sums, inverse, curvature, wanted
        )
        busy = gl.max(wanted.to(gl.int32), 0)
        step += 1
    return x * (size * (1.0 / START))[None, :]


@gluon.jit
def _put(room, values, COUNT: gl.constexpr, WARPS: gl.constexpr):
    """Up to WAITING numbers into shared memory."""
    index = gl.arange(0, WAITING, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))
    every = gl.zeros_like(index).to(gl.float32)
    for i in gl.static_range(COUNT):
        every = gl.where(index == i, values[i], every)
    room.store(every)


@gluon.jit
def _get(room, COUNT: gl.constexpr, WARPS: gl.constexpr):
    """What `_put` has put."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    values = ()
    for i in gl.static_range(COUNT):
        values = values + (gl.sum(room.slice(i, 1, 0).load(layout), 0),)
    return values


@gluon.jit
def _at(vector, side, index: gl.constexpr):
    """One number of (SIDES,)."""
    return gl.sum(gl.where(side == index, vector, 0.0), 0)


@gluon.jit
def _twice(x, MMA: gl.constexpr):
    """The first FEW columns of the sum of both halves of (rows, SIDES), beside themselves."""
    x = gl.sum(gl.reshape(x, [x.shape[0], SIDES // FEW, FEW]), 1)
    x = gl.permute(gl.join(x, x), [0, 2, 1])
    return gl.convert_layout(gl.reshape(x, [x.shape[0], SIDES]), MMA)


@gluon.jit(do_not_specialize=["length", "iterations", "ridge", "tolerance", "scale", "eps"])
def gluon_few_kernel(
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
    EARLY: gl.constexpr,
    MIXER: gl.constexpr,
    DECAYS: gl.constexpr,
    GATED: gl.constexpr,
    MIXED: gl.constexpr,
    OUTPUT_GATED: gl.constexpr,
    PACKED: gl.constexpr,
    WIDTH: gl.constexpr,
    WARPS: gl.constexpr,
):
    """`few_kernel` for states of WIDTH x WIDTH, by WIDTH / 32 or WIDTH / 16 warps, two or four; inputs are its."""
    # Both states and what is solved lie over threads as the products of matrices give them and take them.
    MMA: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, 8])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    # As LEFT, but for the order of 16 columns: a thread has four side by side, which are one access to memory.
    PARTS: gl.constexpr = WIDTH // (16 * WARPS)
    PART: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [8, 0], [0, 16]],
        [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0]][: WARPS // 2],
        [],
        [16 * WARPS, PIECE],
    )
    STATE: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [8, 0], [0, 16], [16 * WARPS, 0]][: 3 + PARTS],
        [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0]][: WARPS // 2],
        [],
        [WIDTH, PIECE],
    )
    ROWS: gl.constexpr = gl.SliceLayout(1, STATE)
    PART_ROWS: gl.constexpr = gl.SliceLayout(1, PART)
    COLUMNS: gl.constexpr = gl.SliceLayout(0, PART)
    ACROSS: gl.constexpr = gl.SliceLayout(1, MMA)
    # Tokens as they are loaded: of four and of eight tokens, a vector.
    FOUR: gl.constexpr = gl.BlockedLayout([1, 4], [128 // WIDTH, WIDTH // 4], [WARPS, 1], [1, 0])
    EIGHT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [WARPS, 1], [1, 0])
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    # What every thread reads of all warps: one number of each, or those of its columns.
    ALL: gl.constexpr = gl.DistributedLinearLayout(
        [[1], [2]][: WARPS // 2], [[0]] * 5, [[0], [0]][: WARPS // 2], [], [WARPS]
    )
    SEEN: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [1, 0], [2, 0]][: 1 + WARPS // 2],
        [[0, 2], [0, 4], [0, 0], [0, 0], [0, 0]],
        [[0, 0], [0, 0]][: WARPS // 2],
        [],
        [WARPS, 8],
    )
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    # Those of a warp that read at the same time find what they read in different banks.
    OF_STATES: gl.constexpr = gl.SwizzledSharedLayout(16, 1, 2, [1, 0])
    OF_TOKENS: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    PIECES: gl.constexpr = WIDTH // PIECE
    TALL: gl.constexpr = 16 * WARPS
    keys = gl.allocate_shared_memory(gl.float32, [FEW * WIDTH], FLAT)
    values = gl.allocate_shared_memory(value.dtype.element_ty, [FEW * WIDTH], FLAT)
    asked = gl.allocate_shared_memory(query.dtype.element_ty, [SIDES, WIDTH], OF_TOKENS)
    parked = gl.allocate_shared_memory(gl.float32, [WAITING], FLAT)
    vectors = gl.allocate_shared_memory(gl.float16, [WIDTH, SIDES], PLAIN)
    # Allocations of their own: what is stored to one is not ordered with what is stored to another.
    staged, room, small_room = (), (), ()
    for _ in gl.static_range(PIECES):
        staged = staged + (gl.allocate_shared_memory(gl.float32, [WIDTH, PIECE], OF_STATES),)
    for _ in gl.static_range(5):
        room = room + (gl.allocate_shared_memory(gl.float32, [WARPS, SIDES], PLAIN),)
    for _ in gl.static_range(4):
        small_room = small_room + (gl.allocate_shared_memory(gl.float32, [WARPS], FLAT),)
    program = gl.program_id(0)
    line, batch, head = program.to(gl.int64), (program // heads).to(gl.int64), program % heads
    start = batch * length
    place = start * heads + head
    gram_in += line * WIDTH * WIDTH
    _copy(staged, gram_in, PIECES, WIDTH, WARPS)
    lines = gl.arange(0, WIDTH, layout=LINE)
    diagonal = gl.load(gram_in + lines * (WIDTH + 1))
    # From here on pointers are at the first token of the row and head.
    query += (start * query_heads + head // (heads // query_heads)) * WIDTH
    key += (start * key_heads + head // (heads // key_heads)) * WIDTH
    value += (start * value_heads + head // (heads // value_heads)) * WIDTH
    query_stride, key_stride, value_stride = query_heads * WIDTH, key_heads * WIDTH, value_heads * WIDTH
    input_gate += place
    log_decay += place
    rate, bias = decay_of(decay_rate + head, decay_bias + head, MIXER & (DECAYS > 0))
    numbers += start
    if EARLY:
        tl.extra.cuda.gdc_wait()
    four = gl.arange(0, FEW, layout=gl.SliceLayout(1, FOUR))
    channels, there = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, FOUR))[None, :], (four < length)[:, None]
    key_tile = gl.load(key + (four * key_stride)[:, None] + channels, mask=there, other=0.0)
    value_tile = gl.load(value + (four * value_stride)[:, None] + channels, mask=there, other=0.0)
    first_key = gl.load(key + lines).to(gl.float32)
    # The right sides of all tokens: four queries, none, key 3 of token 3, key 2 of token 2, key 2 of token 3.
    eight = gl.arange(0, SIDES, layout=gl.SliceLayout(1, EIGHT))
    channels, joins = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, EIGHT))[None, :], gl.where(eight == 5, 3, 2)
    asks = (eight < FEW) & (eight < length)
    joining = (eight > FEW) & (gl.where(eight == 5, 3, eight - FEW) < length)
    asked_tile = gl.load(query + (eight * query_stride)[:, None] + channels, mask=asks[:, None], other=0.0)
    asked_tile += gl.load(key + (joins * key_stride)[:, None] + channels, mask=joining[:, None], other=0.0)
    number = numbers_of(numbers, length, PACKED)
    gates = gates_of(input_gate, length, heads, MIXER, GATED)
    gate0, gate1, gate2, gate3 = gates
    DECAYED: gl.constexpr = (DECAYS == 1) | (DECAYS == 2)
    of_gram = key_log_decay + place if DECAYS == 2 else log_decay
    logs = logs_of(of_gram, rate, bias, length, heads, MIXER, DECAYED)
    entered, of_first, of_second, c32 = decays(logs, number, PACKED)
    a1, a2, a3 = of_first
    c21, c31 = of_second
    # Registers are what the solve is short of.
    _put(parked, entered + of_first + of_second + (c32,) + gates, 14, WARPS)
    keys.store(gl.reshape(key_tile.to(gl.float32) * pick(four, gates)[:, None], [FEW * WIDTH]))
    values.store(gl.reshape(value_tile, [FEW * WIDTH]))
    asked.store(asked_tile)
    # No element of a Gram matrix is larger than the largest of its diagonal.
    first_key = first_key * gate0
    largest = gl.abs(diagonal * entered[0] + first_key * first_key)
    small_room[0].store(gl.max(gl.reshape(largest, [WARPS, WIDTH // WARPS]), 1))
    unit, inverse = power_of_two(gl.max(small_room[0].load(ALL), 0))
    shrink, unit = inverse * 16384.0, unit * (1.0 / 16384.0)
    lefts = ()
    for t in gl.static_range(PARTS * FEW):
        lefts = lefts + (_part(keys, t % FEW, t // FEW * TALL, TALL, WIDTH).load(PART_ROWS),)
    offset = gl.arange(0, TALL, layout=PART_ROWS)[:, None] * WIDTH + gl.arange(0, PIECE, layout=COLUMNS)[None, :]
    nothing = gl.full([TALL, PIECE], length // 256, gl.int32, PART)
    gram_out += line * WIDTH * WIDTH
    steps = entered[0], a1, c21, c32
    operand, squares = (), ()
    for j in gl.static_range(PIECES):
        async_copy.wait_group(PIECES - 1 - j)
        halves = ()
        for i in gl.static_range(PARTS):
            gram = staged[j].slice(i * TALL, TALL, 0).load(PART)
            at = offset + (i * TALL * WIDTH + j * PIECE)
            for t in gl.static_range(FEW):
                across = _part(keys, t, j * PIECE, PIECE, WIDTH).load(COLUMNS)
                gram = gram * steps[t] + lefts[FEW * i + t][:, None] * across[None, :]
                if t == 0:
                    first_half = (gram * shrink).to(gl.float16)
                if (i == 0) & (j == 0):
                    squares = squares + (_squares(gram, WARPS),)
                else:
                    squares = squares[1:] + (squares[0] + _squares(gram, WARPS),)
            halves = halves + (first_half,)
            gl.store(gram_out + at, _after(gram, first_half, nothing))
        tile = halves[0]
        if PARTS == 2:
            tile = _below(halves[0], halves[1])
        operand = operand + (_operand(tile, LEFT),)
    for t in gl.static_range(FEW):
        small_room[t].store(gl.sum(gl.sum(squares[t], 2), 1))
    _, _, _, _, a1, a2, a3, c21, c31, _, _, _, gate2, gate3 = _get(parked, 14, WARPS)
    side, rows = gl.arange(0, SIDES, layout=gl.SliceLayout(0, MMA)), gl.arange(0, WIDTH, layout=ACROSS)
    right = asked.permute([1, 0]).load(MMA).to(gl.float32)
    right = right * gl.where(side < FEW, 1.0, gl.where(side == 5, gate3, gate2))[None, :]
    _put_sums(room, (right * right,), 1, WARPS)
    norms = ()
    for t in gl.static_range(FEW):
        norms = norms + (gl.sum(small_room[t].load(ALL), 0),)
    (sizes,) = _get_sums(room, 1, SEEN, MMA)
    # Under way while the solve runs, like the Gram state on its way back.
    _copy(staged, value_key_in + line * WIDTH * WIDTH, PIECES, WIDTH, WARPS)
    whose = gl.where(side == 5, 3, side % FEW)
    norm = gl.sqrt(pick(whose, norms))
    of_norm = gl.where(norm > 0, 1.0 / norm, 0.0)
    into = pick(whose, (1.0, a1, a2, a3)) * unit * of_norm
    weight = pick(whose, (0.0, 1.0, c21, c31)) * of_norm
    x = _solutions(
        right,
        gl.sqrt(sizes),
        operand,
        into,
        _part(keys, 1, 0, WIDTH, WIDTH).load(ACROSS),
        weight,
        vectors,
        room,
        iterations,
        ridge,
        tolerance,
        PIECES,
        WARPS,
        SEEN,
        MMA,
    )
    x = x * of_norm[None, :]
    e0, e1, e2, e3, a1, a2, a3, c21, c31, c32, gate0, gate1, gate2, gate3 = _get(parked, 14, WARPS)
    entered = e0, e1, e2, e3
    k0 = _part(keys, 0, 0, WIDTH, WIDTH).load(ACROSS)
    k1 = _part(keys, 1, 0, WIDTH, WIDTH).load(ACROSS)
    k2 = _part(keys, 2, 0, WIDTH, WIDTH).load(ACROSS)
    k3 = _part(keys, 3, 0, WIDTH, WIDTH).load(ACROSS)
    by_second, by_third = _sums(room, (x * k2[:, None], x * k3[:, None]), 2, WARPS, SEEN, MMA)
    shares, newest = joined(
        (
            _at(by_second, side, 2),
            _at(by_second, side, 3),
            _at(by_second, side, 5),
            _at(by_second, side, 6),
            _at(by_second, side, 7),
        ),
        (_at(by_third, side, 3), _at(by_third, side, 5), _at(by_third, side, 7)),
        c32,
        side,
    )
    of_newest = gl.sum(gl.where((side == 5)[None, :], x, 0.0), 1)
    x = _twice(x * shares[None, :], MMA)
    # From here on columns are tokens, each twice.
    token = side % FEW
    here = token < length
    x -= gl.where(token == 3, newest, 0.0)[None, :] * of_newest[:, None]
    if MIXED:
        mix_at = solution_mix + place + token * heads
        mix = gl.load(mix_at, mask=here, other=0.0).to(gl.float32)
        if MIXER:
            mix = sigmoid(mix, mix_at)
        queries = asked.permute([1, 0]).load(MMA).to(gl.float32)
        queries = _twice(gl.where((side < FEW)[None, :], queries, 0.0), MMA)
        x = queries + mix[None, :] * (x - queries)
    room[4].store(gl.max(gl.max(gl.max(_by_warp(gl.abs(x), WARPS), 0), 1), 1))
    products = x * k0[:, None], x * k1[:, None], x * k2[:, None], x * k3[:, None]
    score0, score1, score2, score3 = _sums(room, products, 4, WARPS, SEEN, MMA)
    largest = gl.convert_layout(gl.max(room[4].load(SEEN), 0), gl.SliceLayout(0, MMA), assert_trivial=True)
    reading_unit, of_unit = power_of_two(largest)
    vectors.store(_ordered((x * of_unit[None, :]).to(gl.float16)))
    if DECAYS > 1:
        # Those of the value state differ.
        logs = logs_of(log_decay, rate, bias, length, heads, MIXER, True)
        entered, of_first, of_second, c32 = decays(logs, number, PACKED)
        a1, a2, a3 = of_first
        c21, c31 = of_second
    # What each token keeps of itself and of earlier ones; keys are behind the input gate already, values are not.
    score0 = score0 * (gate0 * pick(token, (1.0, a1, a2, a3)))
    score1 = score1 * (gate1 * pick(token, (0.0, 1.0, c21, c31)))
    score2 = score2 * (gate2 * pick(token, (0.0, 0.0, 1.0, c32)))
    score3 = score3 * (gate3 * pick(token, (0.0, 0.0, 0.0, 1.0)))
    # The gates of the values on the keys.
    at_end = gate0 * a3, gate1 * c31, gate2 * c32, gate3
    news, lefts = (), ()
    for t in gl.static_range(FEW):
        news = news + (_part(values, t, 0, WIDTH, WIDTH).load(ACROSS).to(gl.float32),)
        lefts = lefts + (gl.convert_layout(news[t], ROWS, assert_trivial=True),)
    offset = gl.arange(0, WIDTH, layout=ROWS)[:, None] * WIDTH
    offset += gl.arange(0, PIECE, layout=gl.SliceLayout(0, STATE))[None, :]
    value_key_out += line * WIDTH * WIDTH
    async_copy.wait_group(0)
    zero = gl.zeros([WIDTH, SIDES], gl.float32, MMA)
    y = zero
    for j in gl.static_range(PIECES):
        state = staged[j].load(STATE)
        row_unit, inverse = power_of_two(gl.max(gl.abs(state), 1))
        readable = _operand((state * (inverse * 16384.0)[:, None]).to(gl.float16), LEFT)
        read = mma_v2(readable, vectors.slice(j * PIECE, PIECE, 0).load(RIGHT), zero)
        y += read * gl.convert_layout(row_unit * (1.0 / 16384.0), ACROSS, assert_trivial=True)[:, None]
        state = state * entered[3]
        for t in gl.static_range(FEW):
            across = _part(keys, t, j * PIECE, PIECE, WIDTH).load(COLUMNS)
            state += (
                lefts[t][:, None]
                * gl.convert_layout(across * at_end[t], gl.SliceLayout(0, STATE), assert_trivial=True)[None, :]
            )
        gl.store(value_key_out + offset + j * PIECE, state)
    y = y * (pick(token, entered) * reading_unit)[None, :]
    y += news[0][:, None] * score0[None, :] + news[1][:, None] * score1[None, :]
    y += news[2][:, None] * score2[None, :] + news[3][:, None] * score3[None, :]
    y = y * scale
    at = (place * WIDTH + token * (heads * WIDTH))[None, :] + rows[:, None]
    if MIXER:
        y = rounded(y, outputs)
        (sizes,) = _sums(room, (y * y,), 1, WARPS, SEEN, MMA)
        y = y / gl.sqrt(sizes / WIDTH + eps)[None, :] * gl.load(norm_weight + rows).to(gl.float32)[:, None]
        if OUTPUT_GATED:
            y = y * silu(gl.load(output_gate + at, mask=here[None, :], other=0.0).to(gl.float32))
    gl.store(outputs + at, y.to(outputs.dtype.element_ty), mask=(here & (side < FEW))[None, :])
