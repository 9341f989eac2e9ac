"""Kalman Linear Attention backward in Triton: the exact adjoint (README.md, eqs. 6-9), no atomics.

Slabs of time are handled from the end, so that what they need is bounded. In each, beliefs before every fourth token
are computed again from the kept ones, and those between stay in registers; spans run side by side as in the forward
pass, once for the affine map of what arrives from the future, once for the gradients. Sums over channels (keys and
queries) go through partial sums that are added in a fixed order.
"""

# Triton turns annotations and defaults of jitted functions into objects of its own.
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false
# pyright: reportReturnType=false, reportAssignmentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..jit import long, on_own_device
from .triton_forward import (
    CHECKPOINT,
    KEPT,
    TritonInputs,
    advance,
    beliefs,
    load_channels,
    load_mark,
    load_states,
    reciprocal,
    span_tokens,
    tile_of,
    tile_size,
)

__all__ = ["kla_triton_backward"]

# Bytes that a slab of time may need beside its partial sums, and for them; the fewest tokens of a slab.
BELIEF_BYTES, PARTIAL_BYTES, SLAB = 2**28, 2**27, 1024
# Programs that fill a device, and filters of each.
PROGRAMS, TILE = 1024, 128


@triton.jit(do_not_specialize=["length", "begin", "end", "span", "batches"])
def adjoint_kernel(
    value,
    observed,
    key,
    query,
    decay,
    noise,
    marks,
    kept_precision,
    kept_information,
    d_mean,
    d_variance,
    arriving,
    leaving,
    d_value,
    d_observed,
    d_key,
    d_query,
    d_decay,
    d_noise,
    length,
    begin,
    end,
    span,
    batches,
    channels,
    states,
    MAPS: tl.constexpr,
    MARKED: tl.constexpr,
    PRIOR: tl.constexpr,
    SPREAD: tl.constexpr,
    STEPS: tl.constexpr,
    BS: tl.constexpr,
    BM: tl.constexpr,
):
    """Back through one span of the slab [begin, end), for BM channels.

    MAPS: writes the map of (mu, nu) through the span into `leaving` (4, spans - 1, B, M, S): both from zero, what of mu
    stays in mu, and what of it goes into nu; the first span is not among the programs. Otherwise starts from `arriving`
    (2, spans, B, M, S), writes gradients, and, from the first span, what leaves into `leaving` (2, B, M, S). Partial
    sums: d_key and d_query (B, channel blocks, end - begin, S), d_decay and d_noise (spans, B, M, S).
    """
    number, row, state, channel, inside, flat = tile_of(batches, channels, states, BS, BM)
    blocks = tl.cdiv(channels, BM)
    size = long(channels * states)
    plane = tl.num_programs(0) // blocks * size
    line = (long(number) * batches + row) * size + flat
    if MAPS:
        number += 1
    a = tl.load(decay + flat, mask=inside, other=1.0)
    p = tl.load(noise + flat, mask=inside, other=1.0)
    squared = a * a
    mu = tl.zeros((BS, BM), tl.float32)
    nu, by_decay, by_noise, cross = mu, mu, mu, mu
    stays = mu + 1.0
    if not MAPS:
        mu = tl.load(arriving + line, mask=inside, other=0.0)
        nu = tl.load(arriving + plane + line, mask=inside, other=0.0)
    first = begin + number * span
    last = tl.minimum(first + span, end)
    chunks = tl.cdiv(last - first, STEPS)
    for step in range(0, chunks):
        at = first + (chunks - 1 - step) * STEPS
        kept = (long((at - begin) // STEPS) * batches + row) * size + flat
        lam = tl.load(kept_precision + kept, mask=inside, other=1.0)
        eta = tl.load(kept_information + kept, mask=inside, other=0.0)
        path = ((lam, eta),)
        v = load_channels(value, row, at, channel, length, channels, last)
        weight = load_channels(observed, row, at, channel, length, channels, last)
        k = load_states(key, row, at, state, length, states, last)
        for count in tl.static_range(STEPS):
            token = at + count
            if count < STEPS - 1:
                next_v = load_channels(value, row, token + 1, channel, length, channels, last)
                next_weight = load_channels(observed, row, token + 1, channel, length, channels, last)
                next_k = load_states(key, row, token + 1, state, length, states, last)
            old_lam, old_eta = lam, eta
            mark = load_mark(marks, row, token, length) if MARKED else 0
            lam, eta = advance(lam, eta, k, weight, v, a, squared, p, mark, MARKED)
            if MARKED:
                lam, eta = tl.where(mark < 2, lam, old_lam), tl.where(mark < 2, eta, old_eta)
            path = path + ((lam, eta),)
            if count < STEPS - 1:
                v, weight, k = next_v, next_weight, next_k
        q = load_states(query, row, at + STEPS - 1, state, length, states, last)
        dy = load_channels(d_mean, row, at + STEPS - 1, channel, length, channels, last)
        if SPREAD:
            ds = load_channels(d_variance, row, at + STEPS - 1, channel, length, channels, last)
        for back in tl.static_range(STEPS):
            token = at + STEPS - 1 - back
            if back < STEPS - 1:
                # The token before is under way while this one is worked on.
                next_q = load_states(query, row, token - 1, state, length, states, last)
                next_dy = load_channels(d_mean, row, token - 1, channel, length, channels, last)
                if SPREAD:
                    next_ds = load_channels(d_variance, row, token - 1, channel, length, channels, last)
                next_v = load_channels(value, row, token - 1, channel, length, channels, last)
                next_weight = load_channels(observed, row, token - 1, channel, length, channels, last)
                next_k = load_states(key, row, token - 1, state, length, states, last)
            lam, eta = path[STEPS - back][0], path[STEPS - back][1]
            old_lam, old_eta = path[STEPS - 1 - back][0], path[STEPS - 1 - back][1]
            valid = token < last
            if MARKED:
                mark = load_mark(marks, row, token, length)
                resets = (mark & 1) > 0
                old_lam = tl.where(resets, 1.0, old_lam)
                old_eta = tl.where(resets, 0.0, old_eta)
                valid = valid & (mark < 2)
                dy = tl.where(valid, dy, 0.0)
                if SPREAD:
                    ds = tl.where(valid, ds, 0.0)
            variance = reciprocal(lam)
            mean = eta * variance
            by_mean = q[:, None] * dy[None, :]
            shown = mean
            if PRIOR:
                if not MAPS:
                    by_decay += by_mean * mean
                shown = a * mean
                by_mean = a * by_mean
            inverse = reciprocal(squared + p * old_lam)
            gain = a * inverse
            mu_here = mu + by_mean * variance
            nu_here = nu - by_mean * mean * variance
            if SPREAD:
                by_variance = (q * q)[:, None] * ds[None, :]
                spread = variance
                if PRIOR:
                    if not MAPS:
                        by_decay += 2.0 * a * by_variance * variance
                        by_noise += by_variance
                    spread = squared * variance + p
                    by_variance = squared * by_variance
                nu_here -= by_variance * variance * variance
            through = p * gain * inverse * old_eta
            before_mu = gain * mu_here
            before_nu = gain * gain * nu_here - through * mu_here
            if MAPS:
                before_stays = gain * stays
                before_cross = gain * gain * cross - through * stays
                if MARKED:
                    before_stays = tl.where(resets, 0.0, before_stays)
                    before_cross = tl.where(resets, 0.0, before_cross)
                stays, cross = tl.where(valid, before_stays, stays), tl.where(valid, before_cross, cross)
            else:
                mu_here, nu_here = tl.where(valid, mu_here, 0.0), tl.where(valid, nu_here, 0.0)
                along = tl.sum(mu_here * k[:, None], 0)
                dv = weight * along
                dw = tl.sum(nu_here * (k * k)[:, None], 0) + v * along
                dk = tl.sum(weight[None, :] * (2.0 * k[:, None] * nu_here + v[None, :] * mu_here), 1)
                shown = dy[None, :] * shown
                if SPREAD:
                    shown += 2.0 * q[:, None] * ds[None, :] * spread
                dq = tl.sum(shown, 1)
                forward, moved = nu_here * old_lam, mu_here * old_eta
                by_decay += moved * (inverse - 2.0 * gain * gain) - 2.0 * a * forward * inverse * inverse
                by_noise -= old_lam * inverse * inverse * (forward + a * moved)
                place = (long(row) * length + token) * channels + channel
                there = channel < tl.where(token < last, channels, 0)
                tl.store(d_value + place, dv.to(d_value.dtype.element_ty), mask=there)
                tl.store(d_observed + place, dw.to(d_observed.dtype.element_ty), mask=there)
                partial = (
                    long(row * blocks + tl.program_id(0) % blocks) * (end - begin) + token - begin
                ) * states + state
                there = state < tl.where(token < last, states, 0)
                tl.store(d_key + partial, dk, mask=there)
                tl.store(d_query + partial, dq, mask=there)
            if MARKED:
                before_mu = tl.where(resets, 0.0, before_mu)
                before_nu = tl.where(resets, 0.0, before_nu)
            mu, nu = tl.where(valid, before_mu, mu), tl.where(valid, before_nu, nu)
            if back < STEPS - 1:
                v, weight, k, q, dy = next_v, next_weight, next_k, next_q, next_dy
                if SPREAD:
                    ds = next_ds
    if MAPS:
        tl.store(leaving + line, mu, mask=inside)
        tl.store(leaving + plane + line, nu, mask=inside)
        tl.store(leaving + 2 * plane + line, stays, mask=inside)
        tl.store(leaving + 3 * plane + line, cross, mask=inside)
    else:
        tl.store(d_decay + line, by_decay, mask=inside)
        tl.store(d_noise + line, by_noise, mask=inside)
        if number == 0:
            tl.store(leaving + line, mu, mask=inside)
            tl.store(leaving + size * batches + line, nu, mask=inside)


@triton.jit(do_not_specialize=["spans", "size"])
def arriving_kernel(maps, arriving, spans, size, BLOCK: tl.constexpr):
    """(mu, nu) at the end of every span, (2, spans, B, M, S), from the maps of all spans and the last entry."""
    place = long(tl.program_id(0)) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    arriving_plane = long(size) * spans
    plane = arriving_plane - size
    place += plane
    mu = tl.load(arriving + place, mask=inside, other=0.0)
    nu = tl.load(arriving + arriving_plane + place, mask=inside, other=0.0)
    for _ in range(1, spans):
        place -= size
        stays = tl.load(maps + 2 * plane + place, mask=inside, other=0.0)
        cross = tl.load(maps + 3 * plane + place, mask=inside, other=0.0)
        nu = tl.load(maps + plane + place, mask=inside, other=0.0) + stays * stays * nu + cross * mu
        mu = tl.load(maps + place, mask=inside, other=0.0) + stays * mu
        tl.store(arriving + place, mu, mask=inside)
        tl.store(arriving + arriving_plane + place, nu, mask=inside)


@on_own_device
def kla_triton_backward(
    inputs: TritonInputs,
    kept: tuple[Tensor, Tensor],
    d_mean: Tensor,
    d_variance: Tensor | None,
    d_precision: Tensor,
    d_information: Tensor,
    prior: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (value, value_precision, key, query, decay, process_noise, precision, information)."""
    batch, length, channels = inputs.value.shape
    states = inputs.key.shape[-1]
    rows, width = tile_size(states, channels, TILE)
    blocks = -(-channels // width)
    programs = batch * blocks
    shape = (batch, channels, states)
    size = batch * channels * states
    new = {"dtype": torch.float32, "device": inputs.value.device}
    slab = max(SLAB, min(PARTIAL_BYTES // (8 * programs * states), BELIEF_BYTES * CHECKPOINT // (8 * size)))
    slab = min(triton.cdiv(length, KEPT), slab // KEPT) * KEPT
    marks = inputs.value if inputs.marks is None else inputs.marks
    options = {
        "MARKED": inputs.marks is not None,
        "PRIOR": prior,
        "SPREAD": d_variance is not None,
        "STEPS": CHECKPOINT,
        "BS": rows,
        "BM": width,
        "num_warps": 1,
    }
    carried = torch.stack([d_information, d_precision])
    d_value, d_observed = torch.empty_like(inputs.value), torch.empty_like(inputs.value_precision)
    d_key, d_query = torch.empty_like(inputs.key), torch.empty_like(inputs.query)
    partial = torch.empty(2, batch * blocks * min(slab, length) * states, **new)
    d_decay, d_noise = torch.zeros(2, channels, states, **new)
    for begin in range((length - 1) // slab * slab, -1, -slab):
        end = min(begin + slab, length)
        span = span_tokens(end - begin, programs, PROGRAMS)
        spans = -(-(end - begin) // span)
        arriving = carried[:, None]
        sizes = (length, begin, end, span, batch, channels, states)
        near = beliefs(inputs, kept, begin, end, prior)
        known = (*inputs[:6], marks, *near, d_mean, d_mean if d_variance is None else d_variance)
        if spans > 1:
            maps = torch.empty(4, spans - 1, *shape, **new)
            adjoint_kernel[(programs * (spans - 1),)](*known, maps, maps, *[maps] * 6, *sizes, MAPS=True, **options)
            arriving = torch.empty(2, spans, *shape, **new)
            arriving[:, -1] = carried
            arriving_kernel[(-(-size // 256),)](maps, arriving, spans, size, BLOCK=256, num_warps=2)
            del maps
        by_key, by_query = partial[:, : batch * blocks * (end - begin) * states].unflatten(
            1, (batch, blocks, end - begin, states)
        )
        by_decay, by_noise = torch.empty(2, spans * batch, channels, states, **new)
        leaving = torch.empty(2, *shape, **new)
        adjoint_kernel[(programs * spans,)](
            *known,
            arriving,
            leaving,
            d_value,
            d_observed,
            by_key,
            by_query,
            by_decay,
            by_noise,
            *sizes,
            MAPS=False,
            **options,
        )
        carried = leaving
        d_key[:, begin:end] = by_key.sum(1)
        d_query[:, begin:end] = by_query.sum(1)
        d_decay, d_noise = d_decay + by_decay.sum(0), d_noise + by_noise.sum(0)
        del near, known
    return d_value, d_observed, d_key, d_query, d_decay, d_noise, carried[1].clone(), carried[0].clone()
