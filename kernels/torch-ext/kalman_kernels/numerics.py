"""What several operators compute in the same way."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["EPSILON", "unit_norm", "widen"]

# Added to norms: keeps a zero vector at zero instead of at NaN (the published checkpoints' value).
EPSILON = 1e-6


def widen(tensor: Tensor) -> Tensor:
    """At least float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def unit_norm(vector: Tensor) -> Tensor:
    """X / (||x|| + 1e-6) over the last axis, computed in at least float32."""
    wide = widen(vector)
    return (wide / (torch.linalg.vector_norm(wide, dim=-1, keepdim=True) + EPSILON)).to(vector.dtype)
