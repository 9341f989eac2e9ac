"""RMSNorm with an output gate."""

from .op import IMPLEMENTATIONS, gated_rms_norm

__all__ = ["IMPLEMENTATIONS", "gated_rms_norm"]
