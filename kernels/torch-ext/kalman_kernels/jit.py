"""What the Triton kernels of several operators share, on the host and on the device."""

# Triton turns annotations and defaults of jitted functions into objects of its own.
# pyright: reportArgumentType=false, reportOptionalMemberAccess=false, reportAttributeAccessIssue=false

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import INTERPRETED

__all__ = ["compute_capability", "long", "multiprocessors", "on_own_device"]

P = ParamSpec("P")
R = TypeVar("R")


def on_own_device(function: Callable[P, R]) -> Callable[P, R]:
    """Launch the kernels of a function on the device of its first tensor.

    Triton launches on the current device, which is another one where a model is spread over several: kernels would then
    read memory that nothing orders their reads with.
    """

    @functools.wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.cuda.device_of(_first_tensor([*args, *kwargs.values()])):
            return function(*args, **kwargs)

    return guarded


@functools.cache
def compute_capability(device: torch.device) -> int:
    """Ten times the compute capability of an NVIDIA device that is the current one, 0 of everything else."""
    if INTERPRETED:
        return 0
    target = triton.runtime.driver.active.get_current_target()
    return target.arch if target.backend == "cuda" else 0


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many a GPU has, 1 of everything else."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _first_tensor(values) -> Tensor | None:
    """Depth first, through tuples and lists."""
    for value in values:
        found = value if isinstance(value, Tensor) else _first_tensor(value) if isinstance(value, tuple) else None
        if found is not None:
            return found
    return None


@triton.jit
def long(number):
    """An integer as int64.

    Offsets outgrow int32, the interpreter's loop variables are Python numbers, an argument that is 1 is a constant.
    """
    return tl.full((), 0, tl.int64) + number
