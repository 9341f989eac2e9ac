"""The operators as layers that the `kernels` library can exchange: stateless, with nothing but a forward.

Models call their operators through layers of these names, so that a version of this package that comes from the Hub can
serve them in place of the installed one.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .gka.op import gated_kalmanet
from .gka.reference import GKASolver, GKAState
from .kla.op import kalman_linear_attention
from .kla.reference import KLAState
from .norm.op import gated_rms_norm
from .segments import Segments

__all__ = ["GatedKalmaNet", "GatedRMSNorm", "KalmanLinearAttention"]


class GatedKalmaNet(nn.Module):
    """`gated_kalmanet`."""

    has_backward = True
    can_torch_compile = True

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        log_decay: Tensor | None,
        solution_mix: Tensor | None,
        key_log_decay: Tensor | None,
        input_gate: Tensor | None,
        solver: GKASolver,
        initial_state: GKAState | None,
        segments: Segments | None,
        options: dict[str, Any],
    ) -> tuple[Tensor, GKAState]:
        """See `gated_kalmanet`; `options` are `scale` and `implementation`."""
        # Tuples of another copy of this package say the same.
        return gated_kalmanet(
            query,
            key,
            value,
            log_decay,
            solution_mix,
            key_log_decay=key_log_decay,
            input_gate=input_gate,
            solver=GKASolver(*solver),
            initial_state=initial_state,
            segments=None if segments is None else Segments(*segments),
            **options,
        )


class KalmanLinearAttention(nn.Module):
    """`kalman_linear_attention`."""

    has_backward = True
    can_torch_compile = True

    def forward(
        self,
        value: Tensor,
        value_precision: Tensor,
        key: Tensor,
        query: Tensor,
        decay: Tensor,
        process_noise: Tensor,
        initial_state: KLAState | None,
        segments: Segments | None,
        options: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None, KLAState]:
        """See `kalman_linear_attention`; `options` are its other arguments."""
        return kalman_linear_attention(
            value,
            value_precision,
            key,
            query,
            decay,
            process_noise,
            initial_state=initial_state,
            segments=None if segments is None else Segments(*segments),
            **options,
        )


class GatedRMSNorm(nn.Module):
    """`gated_rms_norm` of a module with `weight` and `eps`."""

    has_backward = True
    can_torch_compile = True

    def forward(self, hidden_states: Tensor, gate: Tensor | None, implementation: str = "auto") -> Tensor:
        """See `gated_rms_norm`; "reference" is "torch"."""
        implementation = "torch" if implementation == "reference" else implementation
        return gated_rms_norm(hidden_states, gate, self.weight, self.eps, implementation)  # pyright: ignore
