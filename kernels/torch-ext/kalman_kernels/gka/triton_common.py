"""What the Triton kernels of Gated KalmaNet share: scaled operands, tiles, decays, states, the solver.

Matrix operands are float16 (float32 inputs: float32 through three tf32 products). Float16 has eight times the precision
of bfloat16 and a narrow range, so every operand is brought to elements of at most 1 by an exact power of two, per row
or per tile, and the factors travel in float32. The solver works on H_t / ||H_t||_F, whose eigenvalues lie in [0, 1].
"""

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

from ..dispatch import INTERPRETED
from ..jit import compute_capability, long
from .limits import LEAST_LOG_DECAY
from .reference import CG_FLOOR

METHODS = {"none": 0, "cg": 1, "chebyshev": 2}
# Norm of a right side inside the solver.
START = tl.constexpr(32.0)
LEAST = tl.constexpr(LEAST_LOG_DECAY)
# What is smaller underflows gradually: inverses of scales stay finite when powers of two are multiplied onto them.
TINY = tl.constexpr(2.0**-100)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """Matrix product with float32 sums."""
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def power_of_two(size):
    """A power of two above a float32 and above TINY, and its inverse: multiplying by it is exact."""
    bits = (tl.maximum(size, TINY).to(tl.int32, bitcast=True) & 0x7F800000) + 0x00800000
    return bits.to(tl.float32, bitcast=True), (0x7F000000 - bits).to(tl.float32, bitcast=True)


@triton.jit
def scaled_rows(tile, OPERAND: tl.constexpr):
    """(rows, width) float32 as an operand and a factor per row."""
    scale, inverse = power_of_two(tl.max(tl.abs(tile), 1))
    return (tile * inverse[:, None]).to(OPERAND), scale


@triton.jit
def unit_rows(tile):
    """(rows of norm 1, their norms, 1.0) of a float32 tile; rows of zeros stay, their last is 0.0."""
    size = tl.sqrt(tl.sum(tile * tile, 1))
    return tile * tl.where(size > 0, 1.0 / size, 0.0)[:, None], size, tl.where(size > 0, 1.0, 0.0)


@triton.jit
def counted(log_decay):
    """A log decay from where it counts on; NaN stays."""
    return tl.where(log_decay < LEAST, LEAST, log_decay)


@triton.jit
def scaled_vector(vector):
    """A vector brought below 2^8, and its factor.

    Weights of products of rows: with elements below 1, 128 of them stay inside float16, and what is 2^22 times smaller
    than the largest still has full precision.
    """
    scale, inverse = power_of_two(tl.max(tl.abs(vector), 0))
    return vector * (inverse * 256.0), scale * (1.0 / 256.0)


@triton.jit
def silu(x):
    """x sigmoid(x)."""
    return x / (1.0 + tl.exp(-x))


@triton.jit
def rounded(x, pointer):
    """What a tensor of the pointer's dtype would have held."""
    return x.to(pointer.dtype.element_ty).to(tl.float32)


@triton.jit
def sigmoid(x, pointer):
    """1 / (1 + exp(-x)), as a tensor of the pointer's dtype would hold it."""
    return rounded(1.0 / (1.0 + tl.exp(-x)), pointer)


@triton.jit
def opened(gate, pointer, MIXER: tl.constexpr):
    """An input gate of the pointer's dtype; MIXER: before its sigmoid."""
    if MIXER:
        gate = rounded(sigmoid(gate, pointer) + 1e-6, pointer)
    return gate


@triton.jit
def decay_of(rate_at, bias_at, THERE: tl.constexpr):
    """A_log and dt_bias of a head; 0 if not THERE."""
    rate, bias = 0.0, 0.0
    if THERE:
        rate, bias = tl.load(rate_at).to(tl.float32), tl.load(bias_at).to(tl.float32)
    return rate, bias


@triton.jit
def log_kept(log, rate, bias, MIXER: tl.constexpr):
    """The logarithm of what a state keeps; MIXER: -exp(A_log) softplus(log + dt_bias)."""
    if MIXER:
        x = log + bias
        softplus = tl.where(x > 20.0, x, tl.log(1.0 + tl.exp(tl.minimum(x, 20.0))))
        log = -tl.exp(rate) * softplus
    return log


@triton.jit
def with_share(x, queries, mix_at, here, MIXER: tl.constexpr):
    """Rows that read: queries with a share of their solutions; MIXER: stored before its sigmoid."""
    mix = tl.load(mix_at, mask=here, other=0.0).to(tl.float32)
    if MIXER:
        mix = sigmoid(mix, mix_at)
    return queries + mix[:, None] * (x - queries)


@triton.jit
def token_vector(pointer, token, length, stride, lines, WIDTH: tl.constexpr):
    """One token's vector in float32, 0 from `length` on."""
    mask = lines < tl.where(long(token) < length, WIDTH, 0)
    return tl.load(pointer + token * stride + lines, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_rows(pointer, stride, rows, count, columns, WIDTH: tl.constexpr):
    """rows x columns of a row-major tensor in float32, 0 outside."""
    mask = (rows < count)[:, None] & (columns < WIDTH)[None, :]
    return tl.load(pointer + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_raw(pointer, stride, rows, count, columns, WIDTH: tl.constexpr):
    """`load_rows` in the dtype of the tensor."""
    mask = (rows < count)[:, None] & (columns < WIDTH)[None, :]
    return tl.load(pointer + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(pointer, stride, rows, count, columns, tile, WIDTH: tl.constexpr):
    """The inverse of `load_rows`, in the dtype of the tensor."""
    mask = (rows < count)[:, None] & (columns < WIDTH)[None, :]
    tl.store(pointer + rows[:, None] * stride + columns[None, :], tile.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def load_operand(pointer, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A stored (ROWS, COLUMNS) state as it is, 0 outside."""
    mask = (rows < ROWS)[:, None] & (columns < COLUMNS)[None, :]
    return tl.load(pointer + rows[:, None] * COLUMNS + columns[None, :], mask=mask, other=0.0)


@triton.jit
def carries(cumulative, numbers, chunk, rows, CHUNK: tl.constexpr, PACKED: tl.constexpr):
    """Decays of one chunk: into each token, from each token to the end, through; README eq. 7.

    `cumulative` and `numbers` point at the row's first entry. The cumulative decay is a base-2 logarithm and restarts
    with every chunk; entries beyond the end repeat the last one.
    """
    log = tl.load(cumulative + chunk * CHUNK + rows)
    last = tl.load(cumulative + chunk * CHUNK + CHUNK - 1)
    into, out, through = tl.exp2(log), tl.exp2(last - log), tl.exp2(last)
    if PACKED:
        number = tl.load(numbers + chunk * CHUNK + rows)
        final = tl.load(numbers + chunk * CHUNK + CHUNK - 1)
        before = tl.load(numbers + chunk * CHUNK - 1, mask=chunk > 0, other=0)
        into = tl.where(number == before, into, 0.0)
        out = tl.where(number == final, out, 0.0)
        through = tl.where(final == before, through, 0.0)
    return into, out, through


@triton.jit
def within(
    cumulative, numbers, chunk, rows, CHUNK: tl.constexpr, PACKED: tl.constexpr, TRANSPOSED: tl.constexpr = False
):
    """(CHUNK, CHUNK) decay from token j (second axis) to token i >= j (first axis) of one sequence; README eq. 7.

    TRANSPOSED swaps the axes.
    """
    log = tl.load(cumulative + chunk * CHUNK + rows)
    if TRANSPOSED:
        allowed = rows[:, None] <= rows[None, :]
        decay = tl.exp2(log[None, :] - log[:, None])
    else:
        allowed = rows[:, None] >= rows[None, :]
        decay = tl.exp2(log[:, None] - log[None, :])
    if PACKED:
        number = tl.load(numbers + chunk * CHUNK + rows)
        allowed = allowed & (number[:, None] == number[None, :])
    return tl.where(allowed, decay, 0.0)


@triton.jit
def between(cumulative, numbers, chunk, rows, CHUNK: tl.constexpr, PACKED: tl.constexpr):
    """(CHUNK, CHUNK) decay between two tokens of one sequence, whichever comes first: `within` and its transpose."""
    log = tl.load(cumulative + chunk * CHUNK + rows)
    difference = log[:, None] - log[None, :]
    decay = tl.exp2(tl.where(rows[:, None] >= rows[None, :], difference, -difference))
    if PACKED:
        number = tl.load(numbers + chunk * CHUNK + rows)
        decay = tl.where(number[:, None] == number[None, :], decay, 0.0)
    return decay


@triton.jit
def products(left, left_scale, right, right_scale, weight, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """sum_j weight_j left_j right_j^T as (tile, bound): the sum is tile * bound / 1024, no element exceeds bound.

    `left` and `right` (rows, width) are scaled rows; README eq. 23.
    """
    weight = weight * left_scale * right_scale
    bound = tl.maximum(tl.sum(tl.abs(weight), 0), TINY)
    weight = weight * (1024.0 / bound)
    left = (left.to(tl.float32) * weight[:, None]).to(OPERAND)
    return dot(tl.trans(left), right, PRECISION), bound


@triton.jit
def inverse_of(x):
    """1 / x for x > 0: two instructions where a division takes eight, and a relative error of about 2^-22."""
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def row_sums(tile):
    """Sums of rows, in an order that leaves a thread several short chains of additions instead of one long one."""
    tile = tl.reshape(tile, (tile.shape[0], tile.shape[1] // 8, 8))
    return tl.sum(tl.sum(tile, 1), 1)


@triton.jit
def solve(
    right,
    squared,
    keys,
    gram,
    into,
    weights,
    iterations,
    ridge,
    tolerance,
    METHOD: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(H_t / ||H_t||_F + ridge I)^-1 right_t for every token of a chunk, right of norm 1 or 0; README eqs. 5, 20, 21.

    H_t / ||H_t||_F = into_t gram + sum_j weights_tj keys_j keys_j^T; `squared` has the squared norms of `right`.
    Directions are rounded once and used rounded everywhere, so that their rounding changes the path and not the goal.
    Conjugate gradients freeze a row whose squared residual is below `tolerance` and end with the last row.
    """
    residual = right
    step = 0
    if METHOD == 1:
        # Registers and instructions are what this loop is short of: the solution is kept as it will be stored, and
        # right sides of norm START keep directions in the range of float16 down to the tolerance.
        residual = right * START
        x = tl.zeros_like(right).to(OPERAND)
        direction = tl.zeros_like(right).to(OPERAND)
        rr = squared * (START * START)
        ratio = tl.zeros_like(rr)
        enough = tolerance * START * START
        busy = 1
        while (step < iterations) & (busy > 0):
            # Rounds of two steps: fewer looks at whether all rows are done.
            for _ in range(0, tl.minimum(iterations - step, 2)):
                direction = residual.to(OPERAND) + direction * ratio.to(OPERAND)[:, None]
                inside = dot(direction, tl.trans(keys), PRECISION).to(OPERAND) * weights
                image = dot(direction, gram, PRECISION)
                image = image * into[:, None] + dot(inside, keys, PRECISION)
                image += ridge * direction.to(tl.float32)
                curvature = row_sums(direction.to(tl.float32) * image)
                # Rounded, too, before x and the residual take the same step.
                length = tl.where((rr > enough) & (curvature > 0), rr * inverse_of(curvature), 0.0).to(OPERAND)
                x += length[:, None] * direction
                residual -= length.to(tl.float32)[:, None] * image
                following = row_sums(residual * residual)
                ratio = tl.where(rr > 0, following * inverse_of(rr), 0.0)
                rr = following
            busy = tl.max((rr > enough).to(tl.int32), 0)
            step += 2
        x = x.to(tl.float32) * (1.0 / START)
        residual = residual * (1.0 / START)
    if METHOD == 2:
        x = tl.zeros_like(right)
        direction = tl.zeros_like(right).to(OPERAND)
        span = 2.0 / (1.0 + 2.0 * ridge)
        quarter = 0.0625 * span * span
        omega, kept, gained = 2.0, 0.0, span
        for _ in range(0, iterations):
            direction = (kept * direction.to(tl.float32) + gained * residual).to(OPERAND)
            inside = dot(direction, tl.trans(keys), PRECISION).to(OPERAND) * weights
            image = dot(direction, gram, PRECISION)
            image = image * into[:, None] + dot(inside, keys, PRECISION)
            wide = direction.to(tl.float32)
            x += wide
            residual -= image + ridge * wide
            omega = 1.0 / (1.0 - quarter * omega)
            kept, gained = omega - 1.0, omega * span
        x += (kept * direction.to(tl.float32) + gained * residual).to(OPERAND).to(tl.float32)
    return x, residual


class Plan(NamedTuple):
    """Sizes and launch options of one call; what the kernels take as constants."""

    chunk: int  # tokens of one solve
    block: int  # key width, filled up to a power of two
    value_block: int
    operand: tl.dtype
    precision: str
    tolerance: float  # squared relative residual at which conjugate gradients freeze a row

    @property
    def storage(self) -> torch.dtype:
        """The dtype of stored operands."""
        return torch.float32 if self.operand == tl.float32 else torch.float16


# Squared relative residuals. 1e-3 keeps float16 operands below the error of the published scheme in bfloat16.
TOLERANCE = {"float16": 1e-6, "float32": CG_FLOOR * torch.finfo(torch.float32).eps ** 2}


def filled(width: int) -> int:
    """The block that holds a width: a power of two that the matrix units take."""
    return max(16, triton.next_power_of_2(width))


def plan(query: Tensor, value_width: int) -> Plan:
    """The plan for a query (B, T, H, Dk) and values of width `value_width`."""
    block, value_block = filled(query.shape[-1]), filled(value_width)
    wide = query.dtype == torch.float32
    chunk = 16 if INTERPRETED else 32 if wide and max(block, value_block) > 64 else 64
    return Plan(
        chunk,
        block,
        value_block,
        tl.float32 if wide else tl.float16,
        "tf32x3" if wide else "ieee",
        TOLERANCE["float32" if wide else "float16"],
    )


# Launch options by kernel for widths above 64, "wide" for float32 operands; narrower ones run with 4 warps. Measured on
# Hopper and used everywhere. To re-tune: benchmarks/gka_gpu.py --tune chunks, then put what it prints here.
LAUNCH = {
    "walk": {"num_warps": 8},
    "adjoint_walk": {"num_warps": 8},
}
WIDE_LAUNCH = {"num_warps": 8}
# Of NVIDIA's devices those whose programs can have 160 KiB of shared memory; others have 99.
ROOMY = (80, 87, 90, 100, 101, 103, 110)


def launch(config: Plan, kernel: str) -> dict:
    """Launch options of a kernel."""
    options = {"num_warps": 4, "num_stages": 1}
    if max(config.block, config.value_block) <= 64:
        return options
    return options | (WIDE_LAUNCH if config.operand == tl.float32 else LAUNCH.get(kernel, {}))


def launch_walk(config: Plan, kernel: str, device: torch.device) -> dict:
    """Launch options of a kernel that walks over chunks: tiles of the next ones wait in shared memory.

    Float32 tiles are twice as large: one chunk less waits.
    """
    capability = compute_capability(device)
    stages = 3 if capability in ROOMY else 2 if capability else 1
    if config.operand == tl.float32:
        stages = max(1, stages - 1)
    return launch(config, kernel) | {"num_stages": stages}
