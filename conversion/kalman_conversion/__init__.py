"""Surgery on pretrained checkpoints: attention out, Kalman mixers in, healing."""

from .distil import Training, heal_distil, heal_finetune, soft_divergence
from .heal import check_pair, heal_layerwise, heal_rls, layer_errors
from .layer_selection import choose_layers, rank_layers
from .plan import FAMILIES, MIXERS, ConversionPlan, plan_conversion, resolve_layers
from .rls import RecursiveLeastSquares
from .stages import STAGES, read_stages, run_stages
from .swap import check_source, initialise_mixer, load_model, swap_attention, swap_checkpoint
from .text import read_documents, token_windows
from .verify import perplexity, verify

__all__ = [
    "FAMILIES",
    "MIXERS",
    "STAGES",
    "ConversionPlan",
    "RecursiveLeastSquares",
    "Training",
    "check_pair",
    "check_source",
    "choose_layers",
    "heal_distil",
    "heal_finetune",
    "heal_layerwise",
    "heal_rls",
    "initialise_mixer",
    "layer_errors",
    "load_model",
    "perplexity",
    "plan_conversion",
    "rank_layers",
    "read_documents",
    "read_stages",
    "resolve_layers",
    "run_stages",
    "soft_divergence",
    "swap_attention",
    "swap_checkpoint",
    "token_windows",
    "verify",
]
