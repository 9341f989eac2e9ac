"""What the Triton kernels of Gated KalmaNet take, known without Triton."""

from __future__ import annotations

import torch

from .reference import GKASolver

__all__ = ["LEAST_LOG_DECAY", "MAX_STEP", "MAX_WIDTH", "refusal"]

# Decays count from here on: e^-100 is nothing beside 1 in any dtype, and sums with it still have the digits of others.
LEAST_LOG_DECAY = -100.0

# Of keys and values.
MAX_WIDTH = 128
# Tokens that one launch of the step takes: beyond, the chunks serve.
MAX_STEP = 8


def refusal(dtype: torch.dtype, width: int, value_width: int, solver: GKASolver) -> str | None:
    """What about a call the kernels cannot take, for `dispatch.choose`; None when they can."""
    if dtype == torch.float64:
        return "float64"
    if solver.method == "exact":
        return "solver.method='exact'"
    if max(width, value_width) > MAX_WIDTH:
        return f"widths above {MAX_WIDTH} ({width} and {value_width})"
    return None
