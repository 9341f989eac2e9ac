"""Reading long contexts in pieces: chunks encoded on their own, their caches made into one.

What is exact, and for whom. A Gated KalmaNet layer is linear in what it writes: with A_c the product of the decays of
chunk c and S_c (Gram matrix and value state) its state from an empty start,

    S = sum_c (prod_{c' > c} A_c') S_c

is the state after all chunks in a row: `decayed` is exact for a layer whose inputs do not depend on earlier chunks (the
first layer, but for the first tokens of a chunk, whose convolution would have seen the one before). Without decay it is
`sum`. The read-out U (H + lambda I)^-1 q has lambda ~ ||H||_F and does not change when H and U are scaled together:
`mean` reads exactly what `sum` reads, and gives every token that follows n times the weight.

A Kalman Linear Attention layer keeps a belief in information form. What independent observations say of a state that
stays where it is adds up, the prior counts once: precision = prior + sum_c (precision_c - prior), information =
sum_c information_c: `sum` is exact without decay and process noise. With them nothing but the map of each chunk would
be; here each chunk's part first goes through what the later chunks forget, `decayed`.

Attention layers keep their keys and values in a row, at their true positions.
"""

# The host types submodules as `Tensor | Module`, fills optional fields after construction and unpacks kwargs loosely.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportPrivateImportUsage=false, reportAssignmentType=false
# pyright: reportOptionalSubscript=false, reportOptionalMemberAccess=false, reportOptionalOperand=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from kalman_kernels.numerics import widen

from .cache import KalmanCacheLayer, swap_cache_layers
from .kla.configuration_kla import KLAConfig
from .kla.modeling_kla import DynamicsBias

__all__ = ["encode_chunks"]

METHODS = ("decayed", "sum", "mean")


@torch.no_grad()
def encode_chunks(
    model: PreTrainedModel, chunks: Sequence[Tensor], method: Literal["decayed", "sum", "mean"] = "decayed"
) -> DynamicCache:
    """Encode chunks independently of one another and make one cache of theirs.

    Generate from it with all chunks and a prompt as `input_ids`:

        cache = encode_chunks(model, chunks)
        model.generate(torch.cat([*chunks, prompt], dim=1), past_key_values=cache)

    Args:
        model: a causal language model or base model of this package.
        chunks: token ids (B, T_c) each, without padding, in their order.
        method: how recurrent states become one; see the module.

    Returns:
        A cache that holds all tokens of all chunks.

    Raises:
        ValueError: there is no chunk, one of them does not fit, or the method is unknown.
    """
    _check(chunks, method)
    decoder, caches, lengths = model.base_model, [], []
    for chunk in chunks:
        caches.append(_encode(decoder, chunk, sum(lengths)))
        lengths.append(chunk.shape[1])
    merged = DynamicCache(config=decoder.config)
    swap_cache_layers(merged, decoder.config)
    for index, (layer, block) in enumerate(zip(merged.layers, decoder.layers, strict=True)):
        parts = [cache.layers[index] for cache in caches]
        if not isinstance(layer, KalmanCacheLayer):
            for part in parts:
                layer.update(part.keys, part.values)
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length = sum(lengths)
            continue
        if isinstance(decoder.config, KLAConfig):
            states = _merge_beliefs(parts, lengths, block.mixer.dynamics_bias, method)
        else:
            states = _merge_linear(parts, method)
        for slot, context in parts[-1].conv_states.items():
            layer.write(slot, context, states.get(slot))
        layer.advance(sum(lengths))
    return merged


def _check(chunks: Sequence[Tensor], method: str) -> None:
    if method not in METHODS:
        raise ValueError(f"encode_chunks: `method` must be one of {METHODS}, got {method!r}.")
    if not chunks:
        raise ValueError("encode_chunks: `chunks` must hold at least one chunk, got none.")
    for index, chunk in enumerate(chunks):
        if chunk.ndim != 2 or chunk.shape[0] != chunks[0].shape[0] or chunk.shape[1] == 0:
            raise ValueError(
                f"encode_chunks: `chunks[{index}]` must have shape ({chunks[0].shape[0]}, tokens >= 1), got "
                f"{tuple(chunk.shape)}."
            )


def _encode(decoder: PreTrainedModel, chunk: Tensor, start: int) -> Cache:
    cache = DynamicCache(config=decoder.config)
    swap_cache_layers(cache, decoder.config)
    for layer in cache.layers:
        if isinstance(layer, KalmanCacheLayer):
            layer.log_decays = []
    positions = torch.arange(start, start + chunk.shape[1], device=chunk.device)[None].expand(len(chunk), -1)
    decoder(chunk, position_ids=positions, past_key_values=cache, use_cache=True)
    return cache


def _merge_linear(parts: list[KalmanCacheLayer], method: str) -> dict[int, Tensor]:
    """Gated KalmaNet: Gram matrices (slot 0) and value states (slot 1), with the log decays (B, H) of each chunk."""
    merged = {}
    for slot in range(2):
        total = torch.zeros_like(parts[0].recurrent_states[slot])
        for part in parts:
            if method == "decayed" and part.log_decays:
                total = total * part.log_decays[slot].exp()[..., None, None]
            total = total + part.recurrent_states[slot]
        merged[slot] = total / len(parts) if method == "mean" else total
    return merged


def _merge_beliefs(
    parts: list[KalmanCacheLayer], lengths: list[int], dynamics: DynamicsBias, method: str
) -> dict[int, Tensor]:
    """Kalman Linear Attention: precisions (slot 0, prior 1) and information (slot 1)."""
    if method == "mean":
        return {slot: torch.stack([part.recurrent_states[slot] for part in parts]).mean(0) for slot in range(2)}
    _, decay, noise = dynamics(dynamics.delta.new_zeros(()))

    def forget(precision: Tensor, information: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        # `tokens` predictions in closed form: the variance goes to noise / (1 - decay^2), or grows by noise.
        if method == "sum" or tokens == 0:
            return precision, information
        factor = decay.log() * tokens
        room = -torch.expm1(2 * decay.log())
        grown = torch.where(room > 0, noise * -torch.expm1(2 * factor) / room.clamp_min(1e-30), noise * tokens)
        after = 1 / ((2 * factor).exp() / precision + grown)
        return after, after * factor.exp() * information / precision

    ones = torch.ones_like(widen(parts[0].recurrent_states[0]))
    zeros, later = torch.zeros_like(ones), sum(lengths)
    precision, information = forget(ones, zeros, later)
    for part, length in zip(parts, lengths, strict=True):
        later -= length
        known = forget(part.recurrent_states[0], part.recurrent_states[1], later)
        prior, _ = forget(*forget(ones, zeros, length), later)
        precision, information = precision + known[0] - prior, information + known[1]
    return {0: precision, 1: information}
