"""The mathematics of Kalman sequence layers, on torch and triton alone."""

from . import layers
from .conv import causal_conv
from .gka import GKASolver, GKAState, gated_kalmanet, gated_kalmanet_step
from .kla import KLAState, kalman_linear_attention, kalman_linear_attention_step
from .norm import gated_rms_norm
from .segments import Segments

__all__ = [
    "GKASolver",
    "GKAState",
    "KLAState",
    "Segments",
    "causal_conv",
    "gated_kalmanet",
    "gated_kalmanet_step",
    "gated_rms_norm",
    "kalman_linear_attention",
    "kalman_linear_attention_step",
    "layers",
]
