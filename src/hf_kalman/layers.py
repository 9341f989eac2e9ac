"""Modules that mixers of several families are made of."""

# The host types submodules as `Tensor | Module`, fills optional fields after construction and unpacks kwargs loosely.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportPrivateImportUsage=false, reportAssignmentType=false
# pyright: reportOptionalSubscript=false, reportOptionalMemberAccess=false, reportOptionalOperand=false

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kalman_kernels import Segments, causal_conv

__all__ = ["ShortConvolution", "check_count", "exchangeable", "inverse_softplus"]

M = TypeVar("M", bound=nn.Module)


def exchangeable(name: str) -> Callable[[type[M]], type[M]]:
    """Let the `kernels` library exchange a layer's forward, under a name of its mappings.

    As `kernels.use_kernel_forward_from_hub` does, without needing that library.
    """

    def named(layer: type[M]) -> type[M]:
        layer.kernel_layer_name = name  # pyright: ignore[reportAttributeAccessIssue]
        layer.kernel_condition = staticmethod(lambda module: True)  # pyright: ignore[reportAttributeAccessIssue]
        return layer

    return named


def check_count(name: str, value: int) -> None:
    """Raise `ValueError` where the argument `name` is no integer >= 0."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"`{name}` must be an integer >= 0, got {value!r}.")


def inverse_softplus(value: Tensor) -> Tensor:
    """The inverse of softplus: log(exp(value) - 1), for value > 0 of any shape."""
    return value + torch.log(-torch.expm1(-value))


class ShortConvolution(nn.Conv1d):
    """Causal depthwise convolution as a module, so that device hooks see its weight."""

    def __init__(self, channels: int, taps: int, bias: bool = False) -> None:
        super().__init__(channels, channels, taps, groups=channels, bias=bias)

    def forward(
        self,
        inputs: Tensor,
        state: Tensor | None,
        segments: Segments | None,
        implementation: str,
        activation: str | None = None,
        unit_width: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(B, T, C) and the context (B, C, K-1) to the same; `unit_width` does not go with a bias."""
        # Padding is the torch path's; "auto" says so.
        implementation = "auto" if implementation == "triton" else implementation
        weight = self.weight[:, 0]
        if self.bias is None:
            return causal_conv(inputs, weight, state, segments, implementation, activation, unit_width)
        outputs, state = causal_conv(inputs, weight, state, segments, implementation)
        outputs = outputs + self.bias
        return outputs if activation is None else F.silu(outputs), state
