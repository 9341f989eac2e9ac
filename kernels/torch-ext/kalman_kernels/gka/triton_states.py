"""What the kernels of a step share: states over the threads of a program, the solve for one query, turns."""

# Triton turns annotations and defaults of jitted functions into objects of its own.
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false
# pyright: reportReturnType=false, reportAssignmentType=false

from __future__ import annotations

import triton
import triton.language as tl

from ..jit import long
from .triton_common import log_kept, opened, sigmoid

# Where the blocks of columns stand among the axes of a state (rows, PIECE columns): with these, each compiler lays
# rows over the lanes of a warp, and a sum over columns hardly leaves a thread.
BLOCK_AXIS = tl.constexpr(1 if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7) else 0)


@triton.jit
def along(blocks):
    """What the columns of a state have, (blocks, PIECE), with an axis for its rows."""
    return tl.expand_dims(blocks, 1 - BLOCK_AXIS)


@triton.jit
def across(vector, PIECE: tl.constexpr):
    """A vector along the columns of a state, pieces of PIECE."""
    return along(tl.reshape(vector, (vector.shape[0] // PIECE, PIECE)))


@triton.jit
def wide(vector):
    """A vector over the rows of a state, with axes for its columns."""
    return tl.expand_dims(vector[:, None], BLOCK_AXIS)


@triton.jit
def columns_of(BLOCK: tl.constexpr, PIECE: tl.constexpr):
    """The columns of a state, (BLOCK / PIECE, PIECE)."""
    return tl.arange(0, BLOCK // PIECE)[:, None] * PIECE + tl.arange(0, PIECE)[None, :]


@triton.jit
def tile_at(rows, inside, columns, WIDTH: tl.constexpr):
    """Where the elements of a state (rows, WIDTH) stand, and which of them are there."""
    mask = wide(inside) & along(columns < WIDTH)
    return wide(rows) * WIDTH + along(columns), mask


@triton.jit
def load_state(pointer, rows, inside, columns, WIDTH: tl.constexpr):
    """A state, where its elements stand and which of them are there."""
    offset, mask = tile_at(rows, inside, columns, WIDTH)
    return tl.load(pointer + offset, mask=mask, other=0.0), offset, mask


@triton.jit
def summed_rows(state):
    """Sums over the columns of a state."""
    return tl.sum(tl.sum(state, BLOCK_AXIS), 1)


@triton.jit
def times(state, vector, PIECE: tl.constexpr):
    """state vector."""
    return summed_rows(state * across(vector, PIECE))


@triton.jit
def two_sums(a, b, c, d):
    """For reductions of two values at once: threads wait for each other half as often."""
    return a + c, b + d


@triton.jit
def solve_one(
    gram, query, rr, iterations, ridge, tolerance, METHOD: tl.constexpr, PIPELINED: tl.constexpr, PIECE: tl.constexpr
):
    """(gram + ridge ||gram||_F I)^-1 query in float32, gram symmetric; README eqs. 3-5.

    `rr` is query^T query. PIPELINED: conjugate gradients whose inner products do not wait for the product with gram
    (Ghysels & Vanroose 2014).
    """
    # Two sums: a chain of a quarter of the additions, one after the other, in a thread.
    norm = tl.sqrt(tl.sum(tl.sum(gram * gram, BLOCK_AXIS)))
    ridge = ridge * norm
    x = tl.zeros_like(query)
    step = 0
    if METHOD == 1:
        residual, direction = query, query
        # An empty state (norm 0) is solved by 0.
        enough = tl.where(norm > 0, tolerance * rr, rr)
        # Triton 3.6 to 3.8 compile the plain loop only if `busy` comes after what it carries, here and inside.
        busy = rr > enough
        if PIPELINED:
            image = times(gram, query, PIECE) + ridge * query
            direction, of_direction, of_that = x, x, x
            inverse, curvature = 0.0, 0.0
            while (step < iterations) & busy:
                product = gram * across(image, PIECE)
                rr, curved = tl.reduce((residual * residual, residual * image), 0, two_sums)
                of_image = summed_rows(product) + ridge * image
                ratio = rr * inverse
                curvature = curved - ratio * ratio * curvature
                inverse = 1.0 / rr
                further = (rr > enough) & (curvature > 0)
                length = tl.where(further, rr / curvature, 0.0)
                direction = residual + ratio * direction
                of_direction = image + ratio * of_direction
                of_that = of_image + ratio * of_that
                x += length * direction
                residual -= length * of_direction
                image -= length * of_that
                step += 1
                busy = further
        else:
            while (step < iterations) & busy:
                image = times(gram, direction, PIECE) + ridge * direction
                length = rr / tl.sum(direction * image, 0)
                x += length * direction
                residual -= length * image
                following = tl.sum(residual * residual, 0)
                direction = residual + (following / rr) * direction
                rr = following
                step += 1
                busy = rr > enough
    if METHOD == 2:
        span = tl.where(norm > 0, 2.0 / (2.0 * ridge + norm), 0.0)
        quarter = 0.0625 * span * span * norm * norm
        omega = 2.0
        change = span * query
        x += change
        while step < iterations:
            omega = 1.0 / (1.0 - quarter * omega)
            image = times(gram, x, PIECE) + ridge * x
            change = (omega - 1.0) * change + (omega * span) * (query - image)
            x += change
            step += 1
    return x


@triton.jit
def scalars(
    input_gate,
    log_decay,
    numbers,
    token,
    length,
    heads,
    GATED: tl.constexpr,
    DECAYED: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Gate, log decay and number of a token, or of several, as they are stored; neutral where there are none."""
    here = long(token) < length
    gate, log, number = 1.0, 0.0, 0
    if GATED:
        gate = tl.load(input_gate + token * heads, mask=here, other=0.0).to(tl.float32)
    if DECAYED:
        log = tl.load(log_decay + token * heads, mask=here, other=0.0).to(tl.float32)
    if PACKED:
        number = tl.load(numbers + token, mask=here, other=0)
    return gate, log, number


@triton.jit
def entering(
    k,
    gate,
    log,
    number,
    previous,
    input_gate,
    rate,
    bias,
    GATED: tl.constexpr,
    DECAYED: tl.constexpr,
    PACKED: tl.constexpr,
    MIXER: tl.constexpr,
):
    """A token's key behind its gate, and the share of a state that it keeps."""
    if GATED:
        k = k * opened(gate, input_gate, MIXER)
    keep = 1.0
    if DECAYED:
        keep = tl.exp(log_kept(log, rate, bias, MIXER))
    if PACKED:
        keep = tl.where(number == previous, keep, 0.0)
    return k, keep


@triton.jit
def share_of(mix_at, MIXED: tl.constexpr, MIXER: tl.constexpr):
    """How much of its solution a query has, all of it if not MIXED; MIXER: stored before its sigmoid."""
    mix = 1.0
    if MIXED:
        mix = tl.load(mix_at).to(tl.float32)
        if MIXER:
            mix = sigmoid(mix, mix_at)
    return mix


@triton.jit
def mixed_query(
    gram,
    query,
    rr,
    mix,
    iterations,
    ridge,
    tolerance,
    METHOD: tl.constexpr,
    PIPELINED: tl.constexpr,
    PIECE: tl.constexpr,
):
    """The query that reads: with a share `mix` of its solution. `rr` is query^T query."""
    x = solve_one(gram, query, rr, iterations, ridge, tolerance, METHOD, PIPELINED, PIECE)
    return query + mix * (x - query)


@triton.jit
def take_turns(program, processors, crowd, sleeps):
    """Of the first `crowd` programs, those side by side on a multiprocessor start one after the other.

    All would move their states at first, then all solve. Half a microsecond a sleep.
    """
    count = tl.where(program < crowd, sleeps * (program // processors), 0)
    for _ in range(0, count):
        tl.inline_asm_elementwise(
            "nanosleep.u32 500; mov.u32 $0, $1;", "=r,r", [sleeps], dtype=tl.int32, is_pure=False, pack=1
        )
