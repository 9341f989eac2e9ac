"""Small models of every family and shape that the package supports."""

import torch

from hf_kalman import GKAConfig, GKAForCausalLM, KLAConfig, KLAForCausalLM


class Kinds(list):
    """Kinds of layers, and the family that says what a `linear_attention` layer is."""

    def __init__(self, layers, family="gka"):
        super().__init__(layers)
        self.family = family


PURE = Kinds(["linear_attention"] * 2)
HYBRID = Kinds(["full_attention", "linear_attention", "sliding_attention", "linear_attention"])
OPENING = Kinds(["linear_attention", "full_attention"])
KLA_PURE, KLA_HYBRID, KLA_OPENING = (Kinds(kinds, "kla") for kinds in (PURE, HYBRID, OPENING))
SHAPES = {
    "gka pure": PURE,
    "gka hybrid": HYBRID,
    "gka opening": OPENING,
    "kla pure": KLA_PURE,
    "kla hybrid": KLA_HYBRID,
    "kla opening": KLA_OPENING,
}
# The kinds that a test of both families takes.
PURES, HYBRIDS = {"gka": PURE, "kla": KLA_PURE}, {"gka": HYBRID, "kla": KLA_HYBRID}


def tiny_config(layer_types=HYBRID, **fields):
    family = getattr(layer_types, "family", "gka")
    own = {
        "gka": {"solver": "cg", "solver_iterations": 12, "output_initializer_factor": 1},
        "kla": {"linear_state_size": 5, "dt_min": 0.05, "dt_max": 0.5},
    }
    return {"gka": GKAConfig, "kla": KLAConfig}[family](
        **{
            "vocab_size": 61,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": len(layer_types),
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "layer_types": list(layer_types),
            "sliding_window": 8,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "initializer_range": 0.1,
            **own[family],
            **fields,
        }
    )


def tiny_model(layer_types=HYBRID, seed=0, **fields):
    torch.manual_seed(seed)
    config = tiny_config(layer_types, **fields)
    return {GKAConfig: GKAForCausalLM, KLAConfig: KLAForCausalLM}[type(config)](config).eval()


def tokens(batch, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 61, (batch, length), generator=generator)
