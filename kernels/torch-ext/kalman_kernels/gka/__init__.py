"""Gated KalmaNet (arXiv 2511.21016): online ridge regression over the whole past in constant memory."""

from .mixer import MixerInputs, MixerOptions, gka_mixer_step, serves_mixer_step
from .op import IMPLEMENTATIONS, gated_kalmanet, gated_kalmanet_step
from .reference import GKASolver, GKAState, gated_kalmanet_reference

__all__ = [
    "IMPLEMENTATIONS",
    "GKASolver",
    "GKAState",
    "MixerInputs",
    "MixerOptions",
    "gated_kalmanet",
    "gated_kalmanet_reference",
    "gated_kalmanet_step",
    "gka_mixer_step",
    "serves_mixer_step",
]
