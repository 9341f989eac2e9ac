"""Kalman Linear Attention, one token at a time: the specification (README.md, eqs. 1-4). Any float dtype, no speed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..segments import Segments

__all__ = ["KLAState", "kalman_linear_attention_reference"]


class KLAState(NamedTuple):
    """The belief of every filter after the last token, in information form.

    Args:
        precision: (B, M, S), lambda_t of the paper, > 0: the inverse of the posterior variance.
        information: (B, M, S), eta_t of the paper: precision times posterior mean.
    """

    precision: Tensor
    information: Tensor


def kalman_linear_attention_reference(
    value: Tensor,
    value_precision: Tensor,
    key: Tensor,
    query: Tensor,
    decay: Tensor,
    process_noise: Tensor,
    *,
    initial_state: KLAState | None = None,
    segments: Segments | None = None,
    decode_from_prior: bool = False,
) -> tuple[Tensor, Tensor, KLAState]:
    """Arguments, shapes and result as in `kalman_linear_attention`; computed in the dtype of `value`."""
    batch, length, channels = value.shape
    fresh = value.new_ones(batch, channels, key.shape[-1])
    precision, information = initial_state if initial_state is not None else (fresh, torch.zeros_like(fresh))
    segments = segments or Segments()
    means, variances = [], []
    for t in range(length):
        before = precision, information
        if segments.reset is not None:
            reset = segments.reset[:, t, None, None]
            before = torch.where(reset, 1, precision), torch.where(reset, 0, information)
        k, q = key[:, t, None], query[:, t, None]  # (B, 1, S)
        v, observed = value[:, t, :, None], value_precision[:, t, :, None]  # (B, M, 1)
        spread = decay * decay + process_noise * before[0]
        following = before[0] / spread + observed * k * k, decay / spread * before[1] + observed * v * k
        mean, variance = following[1] / following[0], 1 / following[0]
        if decode_from_prior:
            mean, variance = decay * mean, decay * decay * variance + process_noise
        outputs = (q * mean).sum(-1), (q * q * variance).sum(-1)
        if segments.valid is not None:
            valid = segments.valid[:, t, None]
            following = tuple(
                torch.where(valid[..., None], new, old)
                for new, old in zip(following, (precision, information), strict=True)
            )
            outputs = tuple(torch.where(valid, out, 0) for out in outputs)
        precision, information = following
        means.append(outputs[0])
        variances.append(outputs[1])
    return torch.stack(means, dim=1), torch.stack(variances, dim=1), KLAState(precision, information)
