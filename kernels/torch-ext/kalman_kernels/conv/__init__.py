"""Short causal depthwise convolution with state."""

from .op import IMPLEMENTATIONS, causal_conv
from .reference import causal_conv_reference

__all__ = ["IMPLEMENTATIONS", "causal_conv", "causal_conv_reference"]
