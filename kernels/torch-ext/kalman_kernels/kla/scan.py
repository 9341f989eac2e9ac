"""Kalman Linear Attention in chunks, in torch: the path for CPUs and the model for the kernels.

Time is cut into chunks that are walked side by side: first each chunk as a map of the belief before it (README.md,
eq. 5), then the few maps one after the other, then each chunk again from the belief that it really starts with. The
gradient runs the same way backwards (eqs. 6-9). Chunks are handled in blocks: what is kept for the backward pass are
the inputs and the belief before each block, never a belief per token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Inputs", "block_count", "kla_chunked_backward", "kla_chunked_forward"]

# Tokens of one chunk, and elements of (B, n, M, S) in one block of n chunks.
CHUNK = 32
BLOCK_ELEMENTS = {"cpu": 1 << 16}
OTHER_BLOCK_ELEMENTS = 1 << 21


class Inputs(NamedTuple):
    """Inputs in the compute dtype."""

    value: Tensor  # (B, T, M)
    value_precision: Tensor  # (B, T, M)
    key: Tensor  # (B, T, S)
    query: Tensor  # (B, T, S)
    decay: Tensor  # (M, S)
    process_noise: Tensor  # (M, S)
    reset: Tensor | None  # (B, T) bool
    valid: Tensor | None  # (B, T) bool


def _plan(value: Tensor, states: int) -> tuple[int, int]:
    """(C, chunks per block)."""
    batch, length, channels = value.shape
    chunk = min(CHUNK, length)
    elements = BLOCK_ELEMENTS.get(value.device.type, OTHER_BLOCK_ELEMENTS)
    return chunk, max(1, elements // (batch * channels * states))


def block_count(value: Tensor, states: int) -> int:
    """How many blocks values (B, T, M) with S states are handled in."""
    chunk, count = _plan(value, states)
    return -(-value.shape[1] // (chunk * count))


class _Block(NamedTuple):
    """One block of n chunks, time last but one: token c of every chunk is [:, :, c]."""

    value: Tensor  # (B, n, C, M)
    value_precision: Tensor
    key: Tensor  # (B, n, C, S)
    query: Tensor
    reset: Tensor | None  # (B, n, C)
    valid: Tensor | None


def _block(inputs: Inputs, start: int, stop: int, chunk: int) -> _Block:
    missing = -(stop - start) % chunk

    def cut(tensor: Tensor, fill: float) -> Tensor:
        piece = tensor[:, start:stop]
        if missing:
            piece = torch.cat([piece, piece.new_full((piece.shape[0], missing, *piece.shape[2:]), fill)], dim=1)
        return piece.unflatten(1, (-1, chunk))

    valid = inputs.valid
    if missing and valid is None:
        valid = torch.ones(inputs.value.shape[:2], dtype=torch.bool, device=inputs.value.device)
    return _Block(
        *(cut(t, 0.0) for t in inputs[:4]),
        reset=None if inputs.reset is None else cut(inputs.reset, False),
        valid=None if valid is None else cut(valid, False),
    )


class _Step(NamedTuple):
    """Token c of every chunk of a block, ready to broadcast to (B, n, M, S)."""

    value: Tensor  # (B, n, M, 1)
    observed: Tensor  # (B, n, M, 1) value precision
    key: Tensor  # (B, n, 1, S)
    query: Tensor
    reset: Tensor | None  # (B, n, 1, 1)
    valid: Tensor | None


def _step(block: _Block, c: int) -> _Step:
    def flag(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[:, :, c, None, None]

    return _Step(
        block.value[:, :, c, :, None],
        block.value_precision[:, :, c, :, None],
        block.key[:, :, c, None],
        block.query[:, :, c, None],
        flag(block.reset),
        flag(block.valid),
    )


def _advance(step: _Step, inputs: Inputs, precision: Tensor, information: Tensor) -> tuple[Tensor, ...]:
    """Belief before the token (after a reset), and after it; README eqs. 1-3."""
    if step.reset is not None:
        precision = torch.where(step.reset, 1, precision)
        information = torch.where(step.reset, 0, information)
    weighted = step.observed * step.key
    inverse = 1 / (inputs.decay * inputs.decay + inputs.process_noise * precision)
    after = precision * inverse + weighted * step.key, inputs.decay * inverse * information + weighted * step.value
    return precision, information, *after


def _keep(step: _Step, new: Tensor, old: Tensor) -> Tensor:
    return new if step.valid is None else torch.where(step.valid, new, old)


def _masked(step: _Step, *tensors: Tensor) -> tuple[Tensor, ...]:
    """0 at padding."""
    return tensors if step.valid is None else tuple(torch.where(step.valid, t, 0) for t in tensors)


def _starts(block: _Block, inputs: Inputs, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Beliefs before each chunk of a block, (B, n, M, S); README eq. 5.

    In the coordinates precision = N / D, information = E / D every token is linear, so a chunk is one 3 x 3 matrix
    [[a, b, 0], [c, d, 0], [e, f, g]] with a free scale, kept near one by powers of two.
    """
    count = block.value.shape[1]
    if count == 1:
        return state[0][:, None], state[1][:, None]
    one = torch.ones(*block.value.shape[:2], *inputs.decay.shape, dtype=inputs.decay.dtype, device=inputs.decay.device)
    zero = torch.zeros_like(one)
    matrix = (one, zero, zero, one, zero, zero, one)
    inverse = 1 / inputs.decay
    squared, noise = inverse * inverse, inputs.process_noise * inverse * inverse
    for c in range(block.value.shape[2]):
        step = _step(block, c)
        a, b, c_, d, e, f, g = before = matrix
        if step.reset is not None:
            # Precision 1, information 0, whatever was: N = D, E = 0.
            a, b, e, f, g = (
                torch.where(step.reset, new, old) for new, old in ((c_, a), (d, b), (0, e), (0, f), (0, g))
            )
        weighted = step.observed * step.key
        c_, d = c_ + noise * a, d + noise * b
        a, b = a * squared + weighted * step.key * c_, b * squared + weighted * step.key * d
        e, f, g = e * inverse + weighted * step.value * c_, f * inverse + weighted * step.value * d, g * inverse
        scale = torch.exp2(-torch.floor(torch.log2(a + d)))
        matrix = tuple(_keep(step, new * scale, old) for new, old in zip((a, b, c_, d, e, f, g), before, strict=True))
    precision, information = state
    starts = [], []
    a, b, c_, d, e, f, g = matrix
    for n in range(count):
        starts[0].append(precision)
        starts[1].append(information)
        if n + 1 == count:
            break
        scale = c_[:, n] * precision + d[:, n]
        following = (a[:, n] * precision + b[:, n]) / scale
        information = (e[:, n] * precision + f[:, n] + g[:, n] * information) / scale
        precision = following
    return torch.stack(starts[0], dim=1), torch.stack(starts[1], dim=1)


def kla_chunked_forward(
    inputs: Inputs, precision: Tensor, information: Tensor, prior: bool, keep: bool, spread: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Means, variances when `spread` (B, T, M), the final belief, and, when `keep`, the beliefs before each block."""
    length = inputs.value.shape[1]
    chunk, count = _plan(inputs.value, inputs.key.shape[-1])
    outputs, spreads, kept = [], [], ([], [])
    for start in range(0, length, chunk * count):
        stop = min(start + chunk * count, length)
        block = _block(inputs, start, stop, chunk)
        kept[0].append(precision)
        kept[1].append(information)
        belief = _starts(block, inputs, (precision, information))
        means, variances = [], []
        for c in range(chunk):
            step = _step(block, c)
            *_, after, after_information = _advance(step, inputs, *belief)
            variance = 1 / after
            mean = after_information * variance
            means.append((step.query * (inputs.decay * mean if prior else mean)).sum(-1))
            if spread:
                if prior:
                    variance = inputs.decay * inputs.decay * variance + inputs.process_noise
                variances.append((step.query * step.query * variance).sum(-1))
            belief = _keep(step, after, belief[0]), _keep(step, after_information, belief[1])
        precision, information = belief[0][:, -1], belief[1][:, -1]
        outputs.append(torch.stack(means, dim=2).flatten(1, 2)[:, : stop - start])
        if spread:
            spreads.append(torch.stack(variances, dim=2).flatten(1, 2)[:, : stop - start])
    mean = torch.cat(outputs, dim=1)
    variance = torch.cat(spreads, dim=1) if spread else mean.new_empty(0)
    if inputs.valid is not None:
        mean = torch.where(inputs.valid[..., None], mean, 0)
        variance = torch.where(inputs.valid[..., None], variance, 0) if spread else variance
    # An operator may not return its inputs.
    precision, information = precision.clone(), information.clone()
    if not keep:
        return mean, variance, precision, information, precision.new_empty(0), precision.new_empty(0)
    return mean, variance, precision, information, torch.stack(kept[0]), torch.stack(kept[1])


def kla_chunked_backward(
    inputs: Inputs,
    kept: tuple[Tensor, Tensor],
    d_mean: Tensor,
    d_variance: Tensor,
    d_precision: Tensor,
    d_information: Tensor,
    prior: bool,
) -> tuple[Tensor, ...]:
    """Gradients of (value, value_precision, key, query, decay, process_noise, precision, information); eqs. 6-9."""
    length = inputs.value.shape[1]
    chunk, count = _plan(inputs.value, inputs.key.shape[-1])
    adjoint = d_information, d_precision
    pieces: list[tuple[Tensor, ...]] = []
    d_decay = d_noise = torch.zeros_like(inputs.decay)
    starts = list(range(0, length, chunk * count))
    outer = inputs._replace(value=d_mean, value_precision=d_variance)
    for index in range(len(starts) - 1, -1, -1):
        start, stop = starts[index], min(starts[index] + chunk * count, length)
        block = _block(inputs, start, stop, chunk)
        cotangents = _block(outer, start, stop, chunk)
        gradients, parameters, adjoint = _block_backward(
            block, inputs, (kept[0][index], kept[1][index]), cotangents, adjoint, prior
        )
        d_decay, d_noise = d_decay + parameters[0], d_noise + parameters[1]
        pieces.append(tuple(g.flatten(1, 2)[:, : stop - start] for g in gradients))
    columns = [torch.cat(p[::-1], dim=1) for p in zip(*pieces, strict=True)]
    return *columns, d_decay, d_noise, adjoint[1], adjoint[0]


def _block_backward(
    block: _Block,
    inputs: Inputs,
    state: tuple[Tensor, Tensor],
    cotangents: _Block,
    adjoint: tuple[Tensor, Tensor],
    prior: bool,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    decay, noise = inputs.decay, inputs.process_noise
    belief = _starts(block, inputs, state)
    path = []
    chunk = block.value.shape[2]
    for c in range(chunk):
        step = _step(block, c)
        moves = _advance(step, inputs, *belief)
        path.append(moves)
        belief = _keep(step, moves[2], belief[0]), _keep(step, moves[3], belief[1])

    def direct(c: int) -> tuple[_Step, Tensor, Tensor, Tensor, Tensor]:
        """What token c's own outputs say about its mean and variance, and the steps that carry adjoints back."""
        step = _step(block, c)
        before, _, after, _ = path[c]
        by_mean = cotangents.value[:, :, c, :, None] * step.query
        by_variance = cotangents.value_precision[:, :, c, :, None] * step.query * step.query
        by_mean, by_variance = _masked(step, by_mean, by_variance)
        inverse = 1 / (decay * decay + noise * before)
        return step, by_mean, by_variance, inverse, 1 / after

    def arriving(c: int, mu: Tensor, nu: Tensor, with_direct: bool = True):
        step, by_mean, by_variance, inverse, variance = direct(c)
        if not with_direct:
            by_mean = by_variance = torch.zeros_like(by_mean)
        mean = path[c][3] * variance
        if prior:
            by_mean, by_variance = decay * by_mean, decay * decay * by_variance
        mu_here = mu + by_mean * variance
        nu_here = nu - (by_mean * mean + by_variance * variance) * variance
        gain = decay * inverse
        before_mu = gain * mu_here
        before_nu = gain * gain * nu_here - noise * gain * inverse * path[c][1] * mu_here
        if step.reset is not None:
            before_mu, before_nu = (torch.where(step.reset, 0, t) for t in (before_mu, before_nu))
        return step, mu_here, nu_here, _keep(step, before_mu, mu), _keep(step, before_nu, nu), inverse, variance

    # Adjoints that arrive at the end of each chunk: each chunk is affine in them.
    mu, nu = _ends(block, adjoint, arriving)
    d_value, d_observed, d_key, d_query = [], [], [], []
    d_decay = d_noise = torch.zeros_like(decay)
    for c in range(chunk - 1, -1, -1):
        before, before_information, _, after_information = path[c]
        step, mu_here, nu_here, mu, nu, inverse, variance = arriving(c, mu, nu)
        by_mean, by_variance = cotangents.value[:, :, c, :, None], cotangents.value_precision[:, :, c, :, None]
        mu_here, nu_here, by_mean, by_variance = _masked(step, mu_here, nu_here, by_mean, by_variance)
        mean = after_information * variance
        shown = (decay * mean, decay * decay * variance + noise) if prior else (mean, variance)
        d_query.append((by_mean * shown[0] + 2 * step.query * by_variance * shown[1]).sum(-2))
        if prior:
            weight = step.query * by_mean, step.query * step.query * by_variance
            d_decay = d_decay + (weight[0] * mean + 2 * decay * weight[1] * variance).sum((0, 1))
            d_noise = d_noise + weight[1].sum((0, 1))
        along = (mu_here * step.key).sum(-1)
        d_value.append(step.observed[..., 0] * along)
        d_observed.append((nu_here * step.key * step.key).sum(-1) + step.value[..., 0] * along)
        d_key.append((step.observed * (2 * step.key * nu_here + step.value * mu_here)).sum(-2))
        through, moved = nu_here * before, mu_here * before_information
        gain = decay * inverse
        d_decay = d_decay + (moved * (inverse - 2 * gain * gain) - 2 * decay * through * inverse * inverse).sum((0, 1))
        d_noise = d_noise - (before * inverse * inverse * (through + decay * moved)).sum((0, 1))
    gradients = tuple(torch.stack(t[::-1], dim=2) for t in (d_value, d_observed, d_key, d_query))
    return gradients, (d_decay, d_noise), (mu[:, 0], nu[:, 0])


def _ends(block: _Block, adjoint: tuple[Tensor, Tensor], arriving) -> tuple[Tensor, Tensor]:
    """(mu, nu) arriving at the end of each chunk, (B, n, M, S), from what arrives at the end of the block."""
    count, chunk = block.value.shape[1:3]
    mu, nu = (t[:, None].expand(-1, count, -1, -1) for t in adjoint)
    if count == 1:
        return mu, nu
    # A chunk's map is affine, mu' = P mu + u, nu' = Q nu + X mu + w: three walks give its columns.
    zero, one = torch.zeros_like(mu), torch.ones_like(mu)
    columns = []
    for start, with_direct in (((zero, zero), True), ((one, zero), False), ((zero, one), False)):
        walked = start
        for c in range(chunk - 1, -1, -1):
            walked = arriving(c, *walked, with_direct)[3:5]
        columns.append(walked)
    (u, w), (pull, cross), (_, push) = columns
    ends = [], []
    mu, nu = adjoint
    for n in range(count - 1, -1, -1):
        ends[0].append(mu)
        ends[1].append(nu)
        mu, nu = pull[:, n] * mu + u[:, n], push[:, n] * nu + cross[:, n] * mu + w[:, n]
    return torch.stack(ends[0][::-1], dim=1), torch.stack(ends[1][::-1], dim=1)
