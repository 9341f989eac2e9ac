"""Gated KalmaNet in chunks, in torch: the path for CPUs and the model for the kernels.

Time is cut into chunks of C tokens. A chunk needs the two states before it and the products of its own keys, never a
state per token (README.md, eqs. 7-10). Chunks are handled in blocks, so that temporaries do not grow with T; kept for
the backward pass are the inputs, the solutions x and the states before each block. The gradient is the implicit one
(README.md, eqs. 11-19): it differentiates the solved equation, not the iterations, and holds to the accuracy of the
solve.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .limits import LEAST_LOG_DECAY
from .reference import CG_FLOOR, GKASolver, solve_ridge

__all__ = ["Inputs", "block_count", "gka_chunked_backward", "gka_chunked_forward", "gka_step"]

# Tokens of one chunk. Small enough that the products of a chunk's keys among themselves stay cheap beside those with
# the state; an accelerator prefers fewer, larger products. benchmarks/gka_cpu.py compares.
CHUNK = {"cpu": 32}
OTHER_CHUNK = 64
# Elements of (B, H, n, C, D) in one block of n chunks: bounds the temporaries; on a CPU it keeps them in the cache.
BLOCK_ELEMENTS = {"cpu": 1 << 18}
OTHER_BLOCK_ELEMENTS = 1 << 24
# Elements of (B, H, n, C, D, D) in one block of the direct solve.
EXACT_BLOCK_ELEMENTS = 1 << 23


class Inputs(NamedTuple):
    """(B, T, ...) inputs in the compute dtype, padding already neutral; `numbers` as in `Segments.numbers`."""

    query: Tensor  # (B, T, H, Dk)
    key: Tensor  # (B, T, G, Dk)
    value: Tensor  # (B, T, Gv, Dv)
    log_decay: Tensor  # (B, T, H)
    key_log_decay: Tensor  # (B, T, H)
    solution_mix: Tensor  # (B, T, H)
    input_gate: Tensor  # (B, T, H)
    numbers: Tensor | None  # (B, T)


class _Decay(NamedTuple):
    """Products of decays inside each chunk; zero across the start of a sequence. README eq. 7."""

    within: Tensor  # (B, H, n, C, C)  e^{b_i - b_j} for j <= i
    carry_in: Tensor  # (B, H, n, C)   e^{b_i}: the state before the chunk, seen at i
    carry_out: Tensor  # (B, H, n, C)  e^{b_C - b_j}: token j, seen after the chunk
    through: Tensor  # (B, H, n)       e^{b_C}: the state before the chunk, seen after it
    reaches: Tensor  # (C, C) or (B, 1, n, C, C) bool: j <= i of the same sequence, however small the decay between


def _decay(log_decay: Tensor, numbers: Tensor | None, before: Tensor | None) -> _Decay:
    """`log_decay` (B, H, n, C); `numbers` (B, 1, n, C) and `before` (B, 1, n): the segment before each chunk."""
    b = log_decay.clamp_min(LEAST_LOG_DECAY).cumsum(-1)
    difference = b[..., :, None] - b[..., None, :]
    allowed = torch.ones(b.shape[-1], b.shape[-1], dtype=torch.bool, device=b.device).tril()
    carry_in, carry_out, through = b.exp(), (b[..., -1:] - b).exp(), b[..., -1].exp()
    if numbers is not None and before is not None:
        allowed = allowed & (numbers[..., :, None] == numbers[..., None, :])
        carry_in = torch.where(numbers == before[..., None], carry_in, 0)
        carry_out = torch.where(numbers == numbers[..., -1:], carry_out, 0)
        through = torch.where(numbers[..., -1] == before, through, 0)
    # Only differences <= 0 are exponentiated: a strong decay underflows to 0 and nothing overflows.
    return _Decay(torch.where(allowed, difference, -math.inf).exp(), carry_in, carry_out, through, allowed)


class _Block(NamedTuple):
    """One block of n chunks, heads expanded, (B, H, n, C, ...)."""

    query: Tensor
    key: Tensor  # times the input gate
    value: Tensor  # times the input gate
    mix: Tensor  # (B, H, n, C, 1)
    gram_decay: _Decay
    value_decay: _Decay


def _plan(query: Tensor, value_width: int, method: str) -> tuple[int, int]:
    """(C, chunks per block) for a query of shape (B, T, H, D)."""
    batch, length, heads, width = query.shape
    chunk = min(CHUNK.get(query.device.type, OTHER_CHUNK), length)
    per_chunk = batch * heads * chunk * max(width, value_width)
    count = max(1, BLOCK_ELEMENTS.get(query.device.type, OTHER_BLOCK_ELEMENTS) // per_chunk)
    if method == "exact":
        count = max(1, min(count, EXACT_BLOCK_ELEMENTS // (per_chunk * width)))
    return chunk, count


def block_count(query: Tensor, value_width: int, method: str) -> int:
    """How many blocks a query of shape (B, T, H, D) is handled in."""
    chunk, count = _plan(query, value_width, method)
    return -(-query.shape[1] // (chunk * count))


def _chunks(tensor: Tensor, start: int, stop: int, chunk: int, fill: float = 0.0) -> Tensor:
    """(B, T, N, ...) from `start` to `stop` as (B, N, n, C, ...), the last chunk filled up with neutral tokens."""
    piece = tensor[:, start:stop]
    missing = -piece.shape[1] % chunk
    if missing:
        piece = torch.cat([piece, piece.new_full((piece.shape[0], missing, *piece.shape[2:]), fill)], dim=1)
    return piece.unflatten(1, (-1, chunk)).movedim(3, 1)


def _expand(tensor: Tensor, heads: int) -> Tensor:
    """(B, G, ...) to (B, H, ...): query head h reads key/value head h // (H / G)."""
    groups = tensor.shape[1]
    if groups == heads:
        return tensor
    return tensor[:, :, None].expand(-1, -1, heads // groups, *tensor.shape[2:]).flatten(1, 2)


def _block(inputs: Inputs, start: int, stop: int, chunk: int) -> _Block:
    heads = inputs.query.shape[2]
    gate = _chunks(inputs.input_gate, start, stop, chunk)[..., None]
    numbers = before = None
    if inputs.numbers is not None:
        numbers = inputs.numbers[:, start:stop]
        missing = -numbers.shape[1] % chunk
        numbers = torch.cat([numbers, numbers[:, -1:].expand(-1, missing)], dim=1)
        last = inputs.numbers[:, start - 1 : start] if start else torch.zeros_like(numbers[:, :1])
        numbers = numbers.unflatten(1, (-1, chunk))[:, None]  # (B, 1, n, C)
        before = torch.cat([last[:, None], numbers[..., :-1, -1]], dim=-1)  # (B, 1, n)
    return _Block(
        query=_chunks(inputs.query, start, stop, chunk),
        key=_expand(_chunks(inputs.key, start, stop, chunk), heads) * gate,
        value=_expand(_chunks(inputs.value, start, stop, chunk), heads) * gate,
        mix=_chunks(inputs.solution_mix, start, stop, chunk)[..., None],
        gram_decay=_decay(_chunks(inputs.key_log_decay, start, stop, chunk), numbers, before),
        value_decay=_decay(_chunks(inputs.log_decay, start, stop, chunk), numbers, before),
    )


def _states(decay: _Decay, left: Tensor, right: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """States before each chunk (B, H, n, D1, D2), and after the last, of S <- decay S + left_j right_j^T. eq. 8."""
    added = (left * decay.carry_out[..., None]).transpose(-1, -2) @ right
    before = torch.empty_like(added)
    for c in range(added.shape[2]):
        before[:, :, c] = state
        state = torch.addcmul(added[:, :, c], decay.through[:, :, c, None, None], state)
    return before, state


class _Ridge:
    """The n shifted Gram matrices of every token of a block, as one operator on (B, H, n, C, D). README eqs. 9, 10."""

    def __init__(self, key: Tensor, decay: _Decay, gram: Tensor, solver: GKASolver) -> None:
        self.key, self.key_t, self.gram = key.flatten(0, 2), key.flatten(0, 2).transpose(-1, -2), gram.flatten(0, 2)
        self.within, self.carry_in = decay.within.flatten(0, 2), decay.carry_in.flatten(0, 2)[..., None]
        self.solver = solver
        key_key = torch.bmm(self.key, self.key_t)
        quadratic = (self.key * torch.bmm(self.key, self.gram)).sum(-1, keepdim=True)
        initial = (self.gram * self.gram).sum((-1, -2))[:, None, None]
        squared = self.carry_in**2 * initial + 2 * self.carry_in * torch.bmm(self.within, quadratic)
        squared = squared + (torch.bmm(self.within, key_key.square()) * self.within).sum(-1, keepdim=True)
        self.key_key = key_key
        self.norm = squared.clamp_min_(0).sqrt()  # (N, C, 1), ||H_t||_F
        self.ridge = solver.ridge_ratio * self.norm
        # 0 where the state is empty: x stays 0 there.
        full = 2 * self.ridge + self.norm
        self.inverse_span = torch.where(full > 0, 1 / torch.where(full > 0, full, 1), 0)

    def gram_product(self, x: Tensor) -> Tensor:
        """H_t x_t for every token, x (N, C, D)."""
        inside = torch.bmm(x, self.key_t).mul_(self.within)
        return torch.bmm(x, self.gram).mul_(self.carry_in).baddbmm_(inside, self.key)

    def product(self, x: Tensor) -> Tensor:
        """(H_t + lambda_t I) x_t for every token, x (N, C, D)."""
        return self.gram_product(x).addcmul_(x, self.ridge)

    def solve(self, right: Tensor) -> Tensor:
        """(H_t + lambda_t I)^-1 right_t for every token, right and result (B, H, n, C, D)."""
        solver = self.solver
        if solver.iterations == 0 and solver.method != "exact":
            return right
        flat = right.flatten(0, 2)
        solution = {"chebyshev": self._chebyshev, "cg": self._cg, "exact": self._exact}[solver.method](flat)
        return solution.view_as(right)

    def _chebyshev(self, right: Tensor) -> Tensor:
        step = 2 * self.inverse_span
        quarter_rho_sq = (step * self.norm / 4) ** 2
        omega = torch.full_like(step, 2.0)
        x, change = step * right, step * right
        for _ in range(self.solver.iterations):
            omega = 1 / (1 - quarter_rho_sq * omega)
            # The change of x is what the recurrence carries: x_i - x_{i-1}.
            change.mul_(omega - 1).addcmul_(right - self.product(x), omega * step)
            x = x + change
        return x

    def _cg(self, right: Tensor) -> Tensor:
        x, residual, direction = torch.zeros_like(right), right.clone(), right.clone()
        rr = residual.square().sum(-1, keepdim=True)
        # A row stops where its residual is rounding noise: what follows would only stir that noise. An empty state
        # (curvature 0) never starts.
        done = self.solver.squared_tolerance(CG_FLOOR * torch.finfo(rr.dtype).eps ** 2) * rr
        for _ in range(self.solver.iterations):
            if self.solver.tolerance and not bool((rr > done).any()):
                break
            image = self.product(direction)
            curvature = (direction * image).sum(-1, keepdim=True)
            active = (rr > done) & (curvature > 0)
            step = torch.where(active, rr / curvature, 0)
            x.addcmul_(direction, step)
            residual.addcmul_(image, step, value=-1)
            following = residual.square().sum(-1, keepdim=True)
            direction = torch.addcmul(residual, direction, torch.where(active, following / rr, 0))
            rr = following
        return x

    def _exact(self, right: Tensor) -> Tensor:
        outer = self.key[:, :, :, None] * self.key[:, :, None, :]
        gram = torch.bmm(self.within, outer.flatten(2)).view_as(outer)
        gram = gram + self.carry_in[..., None] * self.gram[:, None]
        return solve_ridge(gram, right, self.norm[..., 0], self.ridge[..., 0], self.solver)


def gka_chunked_forward(
    inputs: Inputs, gram: Tensor, value_key: Tensor, solver: GKASolver, scale: float, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Outputs (B, T, H, Dv), both final states, and, when `keep`, what the backward pass needs.

    The kept tensors are the solutions (B, T, H, Dk) and both states before each block (blocks, B, H, D, Dk); they are
    empty when not `keep`.
    """
    length = inputs.query.shape[1]
    chunk, count = _plan(inputs.query, inputs.value.shape[-1], solver.method)
    outputs, solutions, grams, value_keys = [], [], [], []
    for start in range(0, length, chunk * count):
        stop = min(start + chunk * count, length)
        block = _block(inputs, start, stop, chunk)
        if keep:
            grams.append(gram)
            value_keys.append(value_key)
        before, gram = _states(block.gram_decay, block.key, block.key, gram)
        solution = _Ridge(block.key, block.gram_decay, before, solver).solve(block.query)
        mixed = torch.lerp(block.query, solution, block.mix)
        before, value_key = _states(block.value_decay, block.value, block.key, value_key)
        inside = (mixed @ block.key.transpose(-1, -2)).mul_(block.value_decay.within)
        read = (mixed @ before.transpose(-1, -2)).mul_(block.value_decay.carry_in[..., None])
        outputs.append(_unchunk(scale * (read + inside @ block.value), stop - start))
        if keep:
            solutions.append(_unchunk(solution, stop - start))
    # An operator may not return its inputs.
    gram, value_key, output = gram.clone(), value_key.clone(), torch.cat(outputs, dim=1)
    if not keep:
        return output, gram, value_key, gram.new_empty(0), gram.new_empty(0), gram.new_empty(0)
    return output, gram, value_key, torch.cat(solutions, dim=1), torch.stack(grams), torch.stack(value_keys)


def _unchunk(tensor: Tensor, length: int) -> Tensor:
    """(B, H, n, C, ...) to (B, length, H, ...)."""
    return tensor.movedim(1, 3).flatten(1, 2)[:, :length]


class _Adjoint(NamedTuple):
    """What arrives from the future at the end of a chunk. README eqs. 12-14."""

    gram: Tensor  # (B, H, Dk, Dk)    symmetric, P + P^T without the ridge's part
    ridge: Tensor  # (B, H)           the scalar W of the ridge's part
    value_key: Tensor  # (B, H, Dv, Dk)


def gka_chunked_backward(
    inputs: Inputs,
    saved: tuple[Tensor, Tensor, Tensor],
    d_outputs: Tensor,
    d_gram: Tensor,
    d_value_key: Tensor,
    initial_gram: Tensor,
    solver: GKASolver,
    scale: float,
) -> tuple[Tensor, ...]:
    """Gradients of (query, key, value, log_decay, key_log_decay, solution_mix, input_gate, gram, value_key)."""
    length = inputs.query.shape[1]
    chunk, count = _plan(inputs.query, inputs.value.shape[-1], solver.method)
    solutions, grams, value_keys = saved
    adjoint = _Adjoint(d_gram + d_gram.transpose(-1, -2), torch.zeros_like(d_gram[..., 0, 0]), d_value_key)
    pieces: list[tuple[Tensor, ...]] = []
    starts = list(range(0, length, chunk * count))
    for index in range(len(starts) - 1, -1, -1):
        start = starts[index]
        stop = min(start + chunk * count, length)
        gradients, adjoint = _block_backward(
            _block(inputs, start, stop, chunk),
            _chunks(solutions, start, stop, chunk),
            _chunks(d_outputs, start, stop, chunk),
            (grams[index], value_keys[index]),
            adjoint,
            solver,
            scale,
        )
        d_query, d_key, d_value, *d_gates = (_unchunk(g, stop - start) for g in gradients)
        pieces.append((d_query, *_fold_gate(inputs, slice(start, stop), d_key, d_value), *d_gates))
    d_query, d_key, d_value, d_input_gate, *d_gates = (torch.cat(p[::-1], dim=1) for p in zip(*pieces, strict=True))
    d_initial_gram = 0.5 * adjoint.gram - adjoint.ridge[..., None, None] * initial_gram
    return d_query, d_key, d_value, *d_gates, d_input_gate, d_initial_gram, adjoint.value_key


def _fold_gate(inputs: Inputs, span: slice, d_key: Tensor, d_value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From gradients of the gated, expanded key and value to those of key, value and gate."""
    gate = inputs.input_gate[:, span]

    def fold(tensor: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        grouped = gradient.unflatten(2, (tensor.shape[2], -1))  # (B, T, G, H/G, D)
        d_gate = (grouped * tensor[:, span, :, None]).sum(-1).flatten(2)
        return (grouped * gate.unflatten(2, (tensor.shape[2], -1))[..., None]).sum(3), d_gate

    d_key, from_key = fold(inputs.key, d_key)
    d_value, from_value = fold(inputs.value, d_value)
    return d_key, d_value, from_key + from_value


def _block_backward(
    block: _Block,
    solution: Tensor,
    d_outputs: Tensor,
    states: tuple[Tensor, Tensor],
    adjoint: _Adjoint,
    solver: GKASolver,
    scale: float,
) -> tuple[tuple[Tensor, ...], _Adjoint]:
    query, key, value, mix = block.query, block.key, block.value, block.mix
    mixed = torch.lerp(query, solution, mix)
    before_u, after_u = _states(block.value_decay, value, key, states[1])
    before_h, after_h = _states(block.gram_decay, key, key, states[0])
    ridge = _Ridge(key, block.gram_decay, before_h, solver)

    # Through the read-out and the solve: README eq. 11.
    value_dy = (value @ d_outputs.transpose(-1, -2)) * block.value_decay.within.transpose(-1, -2)  # (.., j, i >= j)
    d_mixed = (d_outputs @ before_u).mul_(block.value_decay.carry_in[..., None]) + value_dy.transpose(-1, -2) @ key
    d_mixed = scale * d_mixed
    z_hat = ridge.solve(d_mixed)
    d_mix = ((z_hat - d_mixed) * query).sum(-1)
    z = mix * z_hat
    d_query = (1 - mix) * d_mixed + z
    if solver.iterations == 0 and solver.method != "exact":
        z = torch.zeros_like(z)  # nothing was solved, nothing reaches the Gram matrix

    after = _after(before_u, after_u)
    d_key, d_value, d_log_decay, value_state = _value_adjoint(
        block, mixed, d_outputs, value_dy, d_mixed, after, adjoint, scale
    )
    after = _after(before_h, after_h)
    d_key_gram, d_key_log_decay, gram_state, ridge_state = _gram_adjoint(block, solution, z, ridge, after, adjoint)
    gradients = (d_query, d_key + d_key_gram, d_value, d_log_decay, d_key_log_decay, d_mix)
    return gradients, _Adjoint(gram_state, ridge_state, value_state)


def _after(before: Tensor, last: Tensor) -> Tensor:
    """States after each chunk, from those before each chunk and the one after the last."""
    return torch.cat([before[:, :, 1:], last[:, :, None]], dim=2)


def _arriving(added: Tensor, decay: _Decay, state: Tensor) -> tuple[Tensor, Tensor]:
    """Adjoints that arrive at the end of each chunk, and at the start of the block, from what each chunk adds."""
    arriving = torch.empty_like(added)
    for c in range(added.shape[2] - 1, -1, -1):
        arriving[:, :, c] = state
        state = torch.addcmul(added[:, :, c], decay.through[:, :, c, None, None], state)
    return arriving, state


def _decay_gradient(decay: _Decay, row: Tensor, end: Tensor) -> Tensor:
    """Eq. 19: sums of `row` (B, H, n, C) over the rest of the chunk, plus what arrives at its end, `end` (B, H, n)."""
    rest = decay.reaches.transpose(-1, -2).to(row.dtype)
    return (rest @ row[..., None])[..., 0] + decay.reaches[..., -1, :] * end[..., None]


def _value_adjoint(
    block: _Block,
    mixed: Tensor,
    d_outputs: Tensor,
    value_dy: Tensor,
    d_mixed: Tensor,
    after: Tensor,
    adjoint: _Adjoint,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """README eqs. 15, 16: through U_t. (d_key, d_value, d_log_decay, adjoint arriving at the block's start)."""
    key, value, decay = block.key, block.value, block.value_decay
    added = scale * ((d_outputs * decay.carry_in[..., None]).transpose(-1, -2) @ mixed)
    arriving, state = _arriving(added, decay, adjoint.value_key)
    carry_out = decay.carry_out[..., None]
    d_key = carry_out * (value @ arriving) + scale * (value_dy @ mixed)
    key_mixed = (key @ mixed.transpose(-1, -2)).mul_(decay.within.transpose(-1, -2))
    d_value = carry_out * (key @ arriving.transpose(-1, -2)) + scale * (key_mixed @ d_outputs)
    row = (mixed * d_mixed).sum(-1) - (value * d_value).sum(-1)
    return d_key, d_value, _decay_gradient(decay, row, (arriving * after).sum((-1, -2))), state


def _gram_adjoint(
    block: _Block, x: Tensor, z: Tensor, ridge: _Ridge, after: Tensor, adjoint: _Adjoint
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """README eqs. 12-14, 17, 18: through H_t. (d_key, d_key_log_decay, both adjoints arriving at the block's start)."""
    key, decay, solver = block.key, block.gram_decay, ridge.solver
    shape = x.shape[:-1]
    norm, before = ridge.norm.view(shape), ridge.gram.view(*shape[:-1], *ridge.gram.shape[1:])
    weight = torch.zeros_like(norm)
    if solver.ridge_gradient:
        weight = solver.ridge_ratio * (z * x).sum(-1) / torch.where(norm > 0, norm, 1)
    within_t = decay.within.transpose(-1, -2)
    carry_in, carry_out = decay.carry_in, decay.carry_out

    # The ridge's part is a scalar recurrence: it never touches a D x D matrix (eq. 14).
    inside = (within_t.square() @ weight[..., None])[..., 0]
    total, arriving_w, scalar = torch.empty_like(weight), torch.empty_like(weight[..., 0]), adjoint.ridge
    for c in range(weight.shape[2] - 1, -1, -1):
        arriving_w[:, :, c] = scalar
        total[:, :, c] = inside[:, :, c] + carry_out[:, :, c].square() * scalar[..., None]
        scalar = total[:, :, c, 0] * carry_in[:, :, c, 0].square()

    z_in, w_in = z * carry_in[..., None], (carry_in * total)[..., None]
    added = z_in.transpose(-1, -2) @ x
    added = -(added + added.transpose(-1, -2)) - 2 * ((key * w_in).transpose(-1, -2) @ key)
    arriving, state = _arriving(added, decay, adjoint.gram)

    lower = torch.ones(shape[-1], shape[-1], dtype=torch.bool, device=x.device).tril()
    pairs = torch.where(lower, decay.within * total[..., :, None], within_t * total[..., None, :])
    key_x, key_z = (key @ x.transpose(-1, -2)).mul_(within_t), (key @ z.transpose(-1, -2)).mul_(within_t)
    key_key = ridge.key_key.view(*shape, shape[-1])
    d_key = carry_out[..., None] * (key @ arriving) - key_x @ z - key_z @ x
    d_key = d_key - 2 * (w_in * (key @ before) + (key_key * pairs) @ key)

    image = ridge.gram_product(x.flatten(0, 2)).view_as(x)  # H_t x_t
    row = -(z * image).sum(-1) - weight * norm.square() - 0.5 * (key * d_key).sum(-1)
    end = 0.5 * (arriving * after).sum((-1, -2)) - arriving_w * norm[..., -1].square()
    return d_key, _decay_gradient(decay, row, end), state, scalar


def gka_step(
    inputs: Inputs, gram: Tensor, value_key: Tensor, solver: GKASolver, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One token: outputs (B, 1, H, Dv) and both states after it. Nothing is kept for a backward pass."""
    heads = inputs.query.shape[2]
    gate = inputs.input_gate[:, 0, :, None]
    query, mix = inputs.query[:, 0], inputs.solution_mix[:, 0, :, None]  # (B, H, D)
    key, value = _expand(inputs.key[:, 0], heads) * gate, _expand(inputs.value[:, 0], heads) * gate
    carry = inputs.key_log_decay[:, 0].exp(), inputs.log_decay[:, 0].exp()
    if inputs.numbers is not None:
        carry = tuple(torch.where(inputs.numbers == 0, c, 0) for c in carry)
    gram = torch.addcmul(carry[0][..., None, None] * gram, key[..., :, None], key[..., None, :])
    value_key = torch.addcmul(carry[1][..., None, None] * value_key, value[..., :, None], key[..., None, :])
    norm = torch.linalg.vector_norm(gram, dim=(-2, -1))
    solution = solve_ridge(gram, query, norm, solver.ridge_ratio * norm, solver)
    mixed = torch.lerp(query, solution, mix)
    return scale * (value_key @ mixed[..., None])[..., 0][:, None], gram, value_key
