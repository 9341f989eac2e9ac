"""From the host's masks and packing arguments to `Segments`."""

from __future__ import annotations

import torch
from torch import Tensor

from kalman_kernels import Segments

__all__ = ["build_segments"]


def build_segments(
    mask: Tensor | None,
    position_ids: Tensor | None,
    cu_seq_lens_q: Tensor | None,
    seq_idx: Tensor | None,
    length: int,
    fresh: bool,
) -> Segments | None:
    """What the recurrent layers need to know about padding and packing, or None for plain rows.

    Args:
        mask: (B, T) padding mask of the current tokens, nonzero where there is a token, or None.
        position_ids: (B, T) positions; where they do not go up by one a packed sequence starts. Looked at only when
            nothing else says so and the call has neither padding nor a past, as the host's attention layers do.
        cu_seq_lens_q: cumulative lengths of the sequences packed into one row.
        seq_idx: (B, T) ids of packed sequences.
        length: T.
        fresh: whether there is no cached past.

    Raises:
        ValueError: a packing argument does not fit.
    """
    packed = None
    if cu_seq_lens_q is not None:
        packed = Segments.from_cu_seqlens(cu_seq_lens_q, length)
    elif seq_idx is not None:
        packed = Segments.from_segment_ids(seq_idx)
    elif position_ids is not None and position_ids.ndim == 2 and mask is None and fresh and length > 1:
        packed = Segments.from_position_ids(position_ids)
        if packed.reset is not None and not torch.compiler.is_compiling() and not bool(packed.reset.any()):
            packed = None
    if mask is None:
        return packed
    return Segments(None if packed is None else packed.reset, mask.bool())
