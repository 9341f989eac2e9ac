"""What jitted functions of several operators share."""

# Triton turns annotations and defaults of jitted functions into objects of its own.
# pyright: reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["long"]


@triton.jit
def long(number):
    """An integer as int64.

    Offsets outgrow int32, the interpreter's loop variables are Python numbers, an argument that is 1 is a constant.
    """
    return tl.full((), 0, tl.int64) + number
