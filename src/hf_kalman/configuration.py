"""What the configurations of all families share: the decoder around the mixers."""

# The host types submodules as `Tensor | Module`, fills optional fields after construction and unpacks kwargs loosely.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportPrivateImportUsage=false, reportAssignmentType=false
# pyright: reportOptionalSubscript=false, reportOptionalMemberAccess=false, reportOptionalOperand=false

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters

__all__ = ["LAYER_TYPES", "DecoderConfig"]

LAYER_TYPES = ("linear_attention", "full_attention", "sliding_attention")


@strict
class DecoderConfig(PreTrainedConfig):
    r"""Configuration of a decoder of the Llama family: pre-norm, rotary embeddings, SwiGLU.

    With the switches of Llama, Mistral, Qwen2 and Qwen3. Which mixer a `linear_attention` layer is, the family says.

    Args:
        layer_types: one of `linear_attention`, `full_attention`, `sliding_attention` per layer.
        attention_bias: bias in the query, key and value projections.
        attention_output_bias: bias in the output projections.
        mlp_bias: bias in the MLP.
        use_qk_norm: RMSNorm per head on queries and keys of attention layers (Qwen3).
        sliding_window: width of `sliding_attention` layers.
    """

    keys_to_ignore_at_inference = ["past_key_values"]
    # Mixers compute on every rank what their sharded projections gather: their states are no multiple of anything.
    # A model drops the entries that it has no modules for.
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    } | {
        f"layers.*.mixer.{name}": style
        for style, names in {
            "colwise_gather_output": (
                "q_proj",
                "k_proj",
                "v_proj",
                "g_proj",
                "in_proj",
                "sensor_proj",
                "value_expand",
                "var_expand",
            ),
            "rowwise_split_input": ("o_proj", "local_proj"),
        }.items()
        for name in names
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 32000
    hidden_size: int = 2048
    intermediate_size: int = 8192
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 8192
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_parameters: RopeParameters | dict | None = None
    attention_bias: bool = False
    attention_output_bias: bool = False
    attention_dropout: float | int = 0.0
    mlp_bias: bool = False
    use_qk_norm: bool = False
    sliding_window: int | None = None
    layer_types: list[str] | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        """Fill in what follows from other fields."""
        self._fill_decoder()
        super().__post_init__(**kwargs)

    def _fill_decoder(self):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.layer_types is None:
            self.layer_types = ["linear_attention"] * self.num_hidden_layers

    def validate_architecture(self):
        """Cross-field rules; part of the `@strict` validation."""
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"`layer_types` must name each of the num_hidden_layers={self.num_hidden_layers} layers, got "
                f"{len(self.layer_types)} entries."
            )
        for index, kind in enumerate(self.layer_types):
            if kind not in LAYER_TYPES:
                raise ValueError(f"`layer_types[{index}]` must be one of {LAYER_TYPES}, got {kind!r}.")
        if "sliding_attention" in self.layer_types and self.sliding_window is None:
            raise ValueError("`sliding_window` must be set for the sliding_attention of `layer_types`, got None.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"`num_key_value_heads` must divide num_attention_heads={self.num_attention_heads}, got "
                f"{self.num_key_value_heads}."
            )
