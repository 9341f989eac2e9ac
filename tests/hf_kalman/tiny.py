"""Small models of every shape that the package supports."""

import torch

from hf_kalman import GKAConfig, GKAForCausalLM

PURE = ["linear_attention"] * 2
HYBRID = ["full_attention", "linear_attention", "sliding_attention", "linear_attention"]
OPENING = ["linear_attention", "full_attention"]
SHAPES = {"pure": PURE, "hybrid": HYBRID, "opening": OPENING}


def tiny_config(layer_types=HYBRID, **fields):
    return GKAConfig(
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
            "solver": "cg",
            "solver_iterations": 12,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "initializer_range": 0.1,
            **fields,
        }
    )


def tiny_model(layer_types=HYBRID, seed=0, **fields):
    torch.manual_seed(seed)
    return GKAForCausalLM(tiny_config(layer_types, **fields)).eval()


def tokens(batch, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 61, (batch, length), generator=generator)
