"""Which implementation serves a call. `auto` looks at the device, and at what the kernels can take at all."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from typing import Literal, NamedTuple

import torch

__all__ = ["HAS_TRITON", "INTERPRETED", "NAMESPACE", "Choice", "Implementation", "choose"]

# Of the registered operators. A copy of this package under another name, as the Hub loads it, has one of its own.
_PACKAGE = __name__.rpartition(".")[0]
NAMESPACE = _PACKAGE
if _PACKAGE != "kalman_kernels":
    NAMESPACE = "kalman_kernels_" + hashlib.sha256(_PACKAGE.encode()).hexdigest()[:16]

HAS_TRITON = importlib.util.find_spec("triton") is not None
# TRITON_INTERPRET=1 runs the kernels on the CPU, for tests. Triton reads it where a kernel is defined.
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0") == "1"

Implementation = Literal["auto", "reference", "torch", "triton"]


class Choice(NamedTuple):
    """The implementation that serves a call and the reason for it."""

    implementation: str
    reason: str


def choose(
    name: str,
    implementation: str,
    available: tuple[str, ...],
    device: torch.device,
    refusal: str | None = None,
) -> Choice:
    """Resolve `implementation` for an operator on `device`.

    Args:
        name: the operator, for messages.
        implementation: "auto" or the name of one implementation.
        available: the implementations that this operator has, best first for an accelerator.
        device: where the inputs lie.
        refusal: why the Triton kernels cannot serve this call whatever the device, None when they can. "auto" then
            takes the torch path and says so in the reason; "triton" raises.

    Raises:
        ValueError: `implementation` is unknown, or this operator does not have it.
        NotImplementedError: the implementation exists and cannot run on `device`.
    """
    known = ("auto", "reference", "torch", "triton")
    if implementation not in known:
        raise ValueError(f"{name}: `implementation` must be one of {known}, got {implementation!r}.")
    if implementation == "auto":
        if device.type != "cuda":
            return Choice("torch", f"the device is {device.type!r}")
        if "triton" not in available:
            return Choice("torch", "no Triton kernel exists for this operator, or Triton is not installed")
        if refusal is not None:
            return Choice("torch", f"the Triton kernels do not take {refusal}")
        return Choice("triton", "the inputs lie on a CUDA device")
    if implementation not in available:
        raise NotImplementedError(
            f"{name}: implementation={implementation!r} does not exist for this operator; use one of {available}."
        )
    if implementation == "triton" and refusal is not None:
        raise NotImplementedError(
            f"{name}: implementation='triton' does not take {refusal}; use implementation='torch'."
        )
    if implementation == "triton" and device.type != "cuda" and not INTERPRETED:
        raise NotImplementedError(
            f"{name}: implementation='triton' needs a CUDA tensor, got device {str(device)!r}; use "
            "implementation='torch'."
        )
    return Choice(implementation, "asked for")
