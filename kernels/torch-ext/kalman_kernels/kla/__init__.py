"""Kalman Linear Attention (arXiv 2602.10743): a scalar Kalman filter per channel and state, with its uncertainty."""

from .op import IMPLEMENTATIONS, kalman_linear_attention, kalman_linear_attention_step
from .reference import KLAState, kalman_linear_attention_reference

__all__ = [
    "IMPLEMENTATIONS",
    "KLAState",
    "kalman_linear_attention",
    "kalman_linear_attention_reference",
    "kalman_linear_attention_step",
]
