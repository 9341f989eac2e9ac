"""Surgery on pretrained checkpoints: attention out, Kalman mixers in, healing."""

from .plan import FAMILIES, MIXERS, ConversionPlan, plan_conversion
from .swap import check_checkpoint, initialise_mixer, load_model, swap_attention

__all__ = [
    "FAMILIES",
    "MIXERS",
    "ConversionPlan",
    "check_checkpoint",
    "initialise_mixer",
    "load_model",
    "plan_conversion",
    "swap_attention",
]
