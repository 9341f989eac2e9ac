"""Which implementation serves a call. `auto` looks at the device and at nothing else."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

__all__ = ["Choice", "Implementation", "choose"]

Implementation = Literal["auto", "reference", "torch", "triton"]


class Choice(NamedTuple):
    """The implementation that serves a call and the reason for it."""

    implementation: str
    reason: str


def choose(name: str, implementation: str, available: tuple[str, ...], device: torch.device) -> Choice:
    """Resolve `implementation` for an operator on `device`.

    Args:
        name: the operator, for messages.
        implementation: "auto" or the name of one implementation.
        available: the implementations that this operator has, best first for an accelerator.
        device: where the inputs lie.

    Raises:
        ValueError: `implementation` is unknown, or this operator does not have it.
        NotImplementedError: the implementation exists and cannot run on `device`.
    """
    known = ("auto", "reference", "torch", "triton")
    if implementation not in known:
        raise ValueError(f"{name}: `implementation` must be one of {known}, got {implementation!r}.")
    if implementation == "auto":
        if "triton" in available and device.type == "cuda":
            return Choice("triton", "the inputs lie on a CUDA device")
        why = "no Triton kernel exists for this operator" if device.type == "cuda" else f"the device is {device.type!r}"
        return Choice("torch", why)
    if implementation not in available:
        raise NotImplementedError(
            f"{name}: implementation={implementation!r} does not exist for this operator; use one of {available}."
        )
    if implementation == "triton" and device.type != "cuda":
        raise NotImplementedError(
            f"{name}: implementation='triton' needs a CUDA tensor, got device {str(device)!r}; use "
            "implementation='torch'."
        )
    return Choice(implementation, "asked for")
