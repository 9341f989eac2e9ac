"""Surgery on pretrained checkpoints: attention out, Kalman mixers in, healing."""

from .heal import check_pair, heal_layerwise, heal_rls, layer_errors
from .plan import FAMILIES, MIXERS, ConversionPlan, plan_conversion, resolve_layers
from .rls import RecursiveLeastSquares
from .swap import check_checkpoint, initialise_mixer, load_model, swap_attention
from .text import read_documents, token_windows
from .verify import perplexity, verify

__all__ = [
    "FAMILIES",
    "MIXERS",
    "ConversionPlan",
    "RecursiveLeastSquares",
    "check_checkpoint",
    "check_pair",
    "heal_layerwise",
    "heal_rls",
    "initialise_mixer",
    "layer_errors",
    "load_model",
    "perplexity",
    "plan_conversion",
    "read_documents",
    "resolve_layers",
    "swap_attention",
    "token_windows",
    "verify",
]
