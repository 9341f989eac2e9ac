"""One generation step of a whole Gated KalmaNet layer between its projections, fused."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..dispatch import HAS_TRITON
from ..in_place import in_place_op
from .limits import MAX_STEP, refusal
from .reference import GKASolver

__all__ = ["MixerInputs", "MixerOptions", "gka_mixer_step", "serves_mixer_step"]

# Tensors that a step replaces.
REPLACED = ("query_past", "key_past", "value_past", "key_gram", "value_key")


class MixerInputs(NamedTuple):
    """Raw projections of a few tokens and the parameters of everything between them and the output projection."""

    query: Tensor  # (B, T, Hq, Dk)
    key: Tensor  # (B, T, G, Dk)
    value: Tensor  # (B, T, Gv, Dv)
    decay_step: Tensor | None  # (B, T, H), before dt_bias and softplus
    solution_mix: Tensor | None  # (B, T, H), before the sigmoid
    input_gate: Tensor | None  # (B, T, H), before the sigmoid
    output_gate: Tensor | None  # (B, T, H, Dv), before SiLU
    query_past: Tensor  # (B, Hq Dk, K - 1), replaced
    key_past: Tensor  # (B, G Dk, K - 1), replaced
    value_past: Tensor | None  # (B, Gv Dv, K - 1), replaced
    query_taps: Tensor  # (Hq Dk, K)
    key_taps: Tensor  # (G Dk, K)
    value_taps: Tensor | None  # (Gv Dv, K), None for values without a convolution
    decay_rate: Tensor | None  # (H,), A_log
    decay_bias: Tensor | None  # (H,), dt_bias
    norm_weight: Tensor  # (Dv,)
    key_gram: Tensor  # (B, H, Dk, Dk) float32, replaced
    value_key: Tensor  # (B, H, Dv, Dk) float32, replaced
    valid: Tensor | None  # (B, 1) int8, 0 where a single token is padding: it changes nothing, its output is 0


class MixerOptions(NamedTuple):
    """What the layer's configuration says about a step."""

    key_silu: bool
    value_silu: bool
    decay_gram: bool
    scale: float
    eps: float


def serves_mixer_step(
    tensor: Tensor, width: int, value_width: int, length: int, solver: GKASolver, implementation: str
) -> bool:
    """Whether `gka_mixer_step` takes projections like `tensor`: (B, length, ...) of a GPU, gradients switched off."""
    wanted = HAS_TRITON and (implementation == "triton" or (implementation == "auto" and tensor.device.type == "cuda"))
    fits = length <= MAX_STEP and refusal(tensor.dtype, width, value_width, solver) is None
    return wanted and fits and not torch.is_grad_enabled()


def gka_mixer_step(inputs: MixerInputs, solver: GKASolver, options: MixerOptions) -> Tensor:
    """RMSNorm(GKA(conv(q), conv(k), conv(v))) * SiLU(gate) for at most 8 tokens, (B, T, H, Dv), in 1 to 3 launches.

    The whole of `GKAMixer` between its projections, with what the separate operators round rounded alike. Convolution
    contexts and states are replaced in place; no gradient.

    Raises:
        ValueError: a tensor that is replaced is not contiguous.
    """
    strided = {n: t for n, t in zip(inputs._fields, inputs, strict=True) if t is not None and not t.is_contiguous()}
    for name in REPLACED:
        if name in strided:
            raise ValueError(
                f"gka_mixer_step: `{name}` must be contiguous to be replaced, got strides {strided[name].stride()}."
            )
    if strided:
        inputs = inputs._replace(**{name: tensor.contiguous() for name, tensor in strided.items()})
    return _mixer_step(*inputs, *solver, *options)


@in_place_op("gka_mixer_step", REPLACED)
def _mixer_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay_step: Tensor | None,
    solution_mix: Tensor | None,
    input_gate: Tensor | None,
    output_gate: Tensor | None,
    query_past: Tensor,
    key_past: Tensor,
    value_past: Tensor | None,
    query_taps: Tensor,
    key_taps: Tensor,
    value_taps: Tensor | None,
    decay_rate: Tensor | None,
    decay_bias: Tensor | None,
    norm_weight: Tensor,
    key_gram: Tensor,
    value_key: Tensor,
    valid: Tensor | None,
    method: str,
    iterations: int,
    ridge_ratio: float,
    ridge_gradient: bool,
    tolerance: float,
    key_silu: bool,
    value_silu: bool,
    decay_gram: bool,
    scale: float,
    eps: float,
) -> Tensor:
    from .triton_step import gka_triton_mixer_step

    inputs = MixerInputs(
        query,
        key,
        value,
        decay_step,
        solution_mix,
        input_gate,
        output_gate,
        query_past,
        key_past,
        value_past,
        query_taps,
        key_taps,
        value_taps,
        decay_rate,
        decay_bias,
        norm_weight,
        key_gram,
        value_key,
        valid,
    )
    solver = GKASolver(method, iterations, ridge_ratio, ridge_gradient, tolerance)  # pyright: ignore[reportArgumentType]
    return gka_triton_mixer_step(inputs, solver, MixerOptions(key_silu, value_silu, decay_gram, scale, eps))


@_mixer_step.register_fake
def _mixer_step_fake(query, key, value, *rest):
    return query.new_empty(*query.shape[:2], rest[13].shape[1], value.shape[-1])
