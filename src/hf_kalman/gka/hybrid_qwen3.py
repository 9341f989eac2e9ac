"""`hybrid_qwen3` checkpoints of awslabs/hybrid-model-factory, loaded as they are.

A configuration that reads theirs, and the one renaming that separates their parameter names from ours.
"""

from huggingface_hub.dataclasses import strict
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from .configuration_gka import GKAConfig
from .modeling_gka import GKAForCausalLM, GKAModel

__all__ = [
    "KINDS",
    "MIXER_FIELDS",
    "SYMBOLS",
    "HybridQwen3Config",
    "HybridQwen3ForCausalLM",
    "HybridQwen3Model",
    "register_weight_names",
]

KINDS = {"*": "full_attention", "SWA": "sliding_attention", "GKA": "linear_attention"}
SYMBOLS = {kind: symbol for symbol, kind in KINDS.items()}
MIXER_FIELDS = {
    "use_alpha_connection": "use_solution_mix",
    "use_v_conv": "use_value_conv",
    "use_forgetting_gate": "use_decay",
    "use_forgetting_gate_kk": "decay_key_gram",
    "gla_rescale": "scale_output",
    "bp_lambda": "ridge_gradient",
    "use_gate": "use_output_gate",
    "use_beta_gate": "use_input_gate",
    "solver_type": "solver",
    "num_iter": "solver_iterations",
    "ridge_strength": "ridge_ratio",
    "conv_size": "linear_conv_kernel_dim",
    "num_q_heads": "linear_num_query_heads",
    "num_k_heads": "linear_num_key_heads",
    "num_v_heads": "linear_num_value_heads",
    "kv_proj_rank": "linear_kv_rank",
    "kv_learnable_residual": "linear_kv_residual",
}
# Fields of their mixer that repeat the decoder's or choose how a kernel runs; they change no result.
_REDUNDANT = ("hidden_size", "head_dim", "norm_eps", "chunk_size", "layer_idx", "mode")


@strict
class HybridQwen3Config(GKAConfig):
    """Reads `hybrid_override_pattern` and `gka_config`, and keeps both so that saving writes them back."""

    model_type = "hybrid_qwen3"

    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 22016
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 32
    head_dim: int | None = 128
    max_position_embeddings: int = 32768
    use_qk_norm: bool = True
    hybrid_override_pattern: str | None = None
    gka_config: dict | None = None

    def __post_init__(self, **kwargs):
        """Translate their fields to ours."""
        if self.hybrid_override_pattern is not None:
            self.layer_types = self.hybrid_override_pattern.split("-")
        symbols = list(self.layer_types or ["*"] * self.num_hidden_layers)
        self.layer_types = [self._kind(index, symbol) for index, symbol in enumerate(symbols)]
        self.attention_output_bias = self.attention_bias
        for name, value in (self.gka_config or {}).items():
            if name in _REDUNDANT:
                continue
            if name not in MIXER_FIELDS:
                raise ValueError(
                    f"`gka_config` must hold fields of the reference's GKA layer, got {name!r}; known are "
                    f"{sorted((*MIXER_FIELDS, *_REDUNDANT))}."
                )
            setattr(self, MIXER_FIELDS[name], value)
        super().__post_init__(**kwargs)

    @staticmethod
    def _kind(index: int, symbol: str) -> str:
        kind = KINDS.get(symbol, symbol if symbol in KINDS.values() else None)
        if kind is None:
            raise ValueError(
                f"`hybrid_override_pattern` names layer {index} {symbol!r}, which hf_kalman does not have; it loads "
                f"checkpoints made of {sorted(KINDS)}."
            )
        return kind


class HybridQwen3Model(GKAModel):
    """`GKAModel` under the reference's configuration."""

    config: HybridQwen3Config


class HybridQwen3ForCausalLM(GKAForCausalLM):
    """`GKAForCausalLM` under the reference's configuration and architecture name."""

    config: HybridQwen3Config


def register_weight_names() -> None:
    """`model.layers.N.gka.*` in their files is `model.layers.N.mixer.*` here, in both directions."""
    renamed: list = [WeightRenaming(r"\.gka\.", ".mixer.")]
    for name in ("A_log", "dt_bias"):
        renamed.append(WeightRenaming(rf"\.mixer\.{name}", f".mixer.decay_bias.{name}"))
    register_checkpoint_conversion_mapping("hybrid_qwen3", renamed, overwrite=True)
