"""Packed sequences and padding: one representation for every operator.

A row of a batch may hold several independent sequences one after the other (packing) and positions that hold no
token at all (padding, on the left, on the right or in between). `Segments` says both:

    reset[b, t] = True   the state is emptied before token t: it starts a new sequence
    valid[b, t] = False  position t is padding: the state passes through unchanged, the output there is zero

Operators treat a padded position as the identity transition: no decay, no process noise, no update. Padding
therefore changes nothing, wherever it stands and whatever initial state the row continues from.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Segments"]


class Segments(NamedTuple):
    """Where sequences start and which positions are padding.

    Args:
        reset: (B, T) bool, or None when each row is one sequence. True empties the state before that token. Token 0
            of a row continues the row's initial state unless `reset[:, 0]` is True.
        valid: (B, T) bool, or None when no position is padding.
    """

    reset: Tensor | None = None
    valid: Tensor | None = None

    @classmethod
    def from_mask(cls, attention_mask: Tensor) -> Segments:
        """Padding from a (B, T) mask, nonzero where there is a token.

        Raises:
            ValueError: `attention_mask` is not two-dimensional.
        """
        _check_rows("from_mask", "attention_mask", attention_mask)
        return cls(valid=attention_mask.bool())

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor, length: int) -> Segments:
        """Packing of one row from cumulative lengths `[0, n_1, n_1 + n_2, ..., length]`.

        Raises:
            ValueError: `cu_seqlens` is not a one-dimensional list of offsets from 0 to `length` (checked when it lies
                on the CPU; on an accelerator only its shape is checked, because reading it would stall the device).
        """
        if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2:
            raise ValueError(
                "Segments.from_cu_seqlens: `cu_seqlens` must be one-dimensional with at least two offsets, got shape "
                f"{tuple(cu_seqlens.shape)}."
            )
        if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
            offsets = cu_seqlens.tolist()
            if offsets[0] != 0 or offsets[-1] != length or offsets != sorted(offsets):
                raise ValueError(
                    f"Segments.from_cu_seqlens: `cu_seqlens` must rise from 0 to the length {length}, got {offsets}."
                )
        # One slot more than the row: an offset equal to `length` (the closing one) lands there and is dropped.
        reset = torch.zeros(length + 1, dtype=torch.bool, device=cu_seqlens.device)
        reset = reset.index_fill(0, cu_seqlens.long(), True)[:length]
        return cls(reset=reset.index_fill(0, torch.zeros(1, dtype=torch.long, device=reset.device), False)[None])

    @classmethod
    def from_segment_ids(cls, segment_ids: Tensor) -> Segments:
        """Packing from (B, T) ids: a token whose id differs from that of the token before starts a sequence.

        Raises:
            ValueError: `segment_ids` is not two-dimensional.
        """
        _check_rows("from_segment_ids", "segment_ids", segment_ids)
        return cls(reset=_later(segment_ids[:, 1:] != segment_ids[:, :-1]))

    @classmethod
    def from_position_ids(cls, position_ids: Tensor) -> Segments:
        """Packing from (B, T) positions: a position that does not follow the one before starts a sequence.

        Raises:
            ValueError: `position_ids` is not two-dimensional.
        """
        _check_rows("from_position_ids", "position_ids", position_ids)
        return cls(reset=_later(position_ids[:, 1:] != position_ids[:, :-1] + 1))

    def check(self, name: str, batch: int, length: int) -> None:
        """Raise `ValueError` unless both fields fit a (batch, length) input of the operator `name`."""
        for field, tensor in (("reset", self.reset), ("valid", self.valid)):
            if tensor is None:
                continue
            if tensor.dtype != torch.bool:
                raise ValueError(f"{name}: `segments.{field}` must be a bool tensor, got {tensor.dtype}.")
            if tensor.ndim != 2 or tensor.shape[0] not in (1, batch) or tensor.shape[1] != length:
                raise ValueError(
                    f"{name}: `segments.{field}` must have shape ({batch}, {length}) or (1, {length}) to match the "
                    f"input (B, T), got {tuple(tensor.shape)}."
                )

    def numbers(self) -> Tensor | None:
        """(B, T) int64: how many resets each token has seen in its row; 0 still belongs to the initial state."""
        return None if self.reset is None else self.reset.long().cumsum(1)


def _check_rows(function: str, name: str, tensor: Tensor) -> None:
    if tensor.ndim != 2:
        raise ValueError(f"Segments.{function}: `{name}` must have shape (B, T), got {tuple(tensor.shape)}.")


def _later(changed: Tensor) -> Tensor:
    """(B, T - 1) for tokens 1 to T - 1 as (B, T): token 0 continues the row's initial state."""
    return torch.nn.functional.pad(changed, (1, 0), value=False)
