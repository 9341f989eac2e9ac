"""What the configurations of all families share: the decoder around the mixers."""

# The host types submodules as `Tensor | Module`, fills optional fields after construction and unpacks kwargs loosely.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportPrivateImportUsage=false, reportAssignmentType=false
# pyright: reportOptionalSubscript=false, reportOptionalMemberAccess=false, reportOptionalOperand=false

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters

__all__ = ["ARCHITECTURE_VERSION", "LAYER_TYPES", "DecoderConfig"]

# Of what a configuration can say. A new field that changes what is computed raises it: older packages then refuse the
# checkpoints that they would compute wrongly.
ARCHITECTURE_VERSION = 1
LAYER_TYPES = ("linear_attention", "full_attention", "sliding_attention")
# What the host itself writes beside the fields.
_HOST_EXTRAS = {
    "_commit_hash",
    "attn_implementation",
    "auto_map",
    "model_type",
    "name_or_path",
    "torch_dtype",
    "transformers_version",
}


@strict
class DecoderConfig(PreTrainedConfig):
    r"""Configuration of a decoder of the Llama family: RMSNorm, rotary embeddings, gated MLP.

    With the switches of Llama, Mistral, Qwen2, Qwen3, SmolLM3, Granite, OLMo-2, Phi-3 and Gemma-3; the defaults are
    Llama's. Which mixer a `linear_attention` layer is, the family says.

    Args:
        layer_types: one of `linear_attention`, `full_attention`, `sliding_attention` per layer.
        attention_bias: bias in the query, key and value projections.
        attention_output_bias: bias in the output projections.
        mlp_bias: bias in the MLP.
        use_qk_norm: RMSNorm per head on queries and keys of attention layers (Qwen3, Gemma-3).
        qk_norm_full: that norm over all heads at once (OLMo-2).
        sliding_window: width of `sliding_attention` layers.
        rope_parameters: as everywhere in the host; or one such dict per kind of attention layer (Gemma-3).
        rope_layers: whether each layer rotates its queries and keys; all do when None (SmolLM3).
        rope_in_float32: rotates in float32 whatever the dtype (OLMo-2).
        norm_style: whose RMSNorm: "llama", "olmo2" (weight before narrowing), "gemma3" (1 + weight).
        norm_placement: before attention and MLP ("pre"), after them ("post", OLMo-2), or both (Gemma-3).
        fused_projections: one projection for queries, keys and values of attention layers, one for gate and up of
            MLPs (Phi-3).
        embedding_multiplier: factor on the input of the first layer (Granite).
        scale_embeddings: token embeddings times sqrt(hidden_size), in their dtype (Gemma).
        attention_multiplier: factor on attention scores, head_dim ** -0.5 when None (Granite, Gemma).
        residual_multiplier: factor on what attention, mixers and MLPs add (Granite).
        logits_scaling: divides the logits (Granite).
        final_logit_softcapping: c in c tanh(logits / c); none when None (Gemma).
        architecture_version: of the package that wrote the configuration; a larger one than this package's is refused.
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
    qk_norm_full: bool = False
    rope_layers: list[bool] | list[int] | None = None
    rope_in_float32: bool = False
    norm_style: Literal["llama", "olmo2", "gemma3"] = "llama"
    norm_placement: Literal["pre", "post", "both"] = "pre"
    fused_projections: bool = False
    embedding_multiplier: float | int = 1.0
    scale_embeddings: bool = False
    attention_multiplier: float | int | None = None
    residual_multiplier: float | int = 1.0
    logits_scaling: float | int = 1.0
    final_logit_softcapping: float | int | None = None
    layer_types: list[str] | None = None
    architecture_version: int = ARCHITECTURE_VERSION
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        """Fill in what follows from other fields."""
        self._check_version(kwargs)
        self._fill_decoder()
        super().__post_init__(**kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoConfig"):
        """As the host's for a copy that came with a checkpoint; not for the package: every save would copy its code."""
        if not cls.__module__.startswith("hf_kalman."):
            super().register_for_auto_class(auto_class)

    def _check_version(self, unknown):
        if self.architecture_version > ARCHITECTURE_VERSION:
            unknown = sorted(set(unknown) - _HOST_EXTRAS)
            fields = f"; unknown fields: {unknown}" if unknown else ""
            raise ValueError(
                f"`architecture_version` {self.architecture_version} is newer than {ARCHITECTURE_VERSION}, the newest "
                f"that this hf-kalman knows{fields}. Upgrade it (pip install --upgrade hf-kalman), or uninstall it and "
                "load the checkpoint's own code with trust_remote_code=True."
            )

    def _fill_decoder(self):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.layer_types is None:
            self.layer_types = ["linear_attention"] * self.num_hidden_layers
        if self._rotates_by_kind():
            # Hosts before 5.23 look every kind up.
            self.rope_parameters = {**dict.fromkeys(self.layer_types), **self.rope_parameters}
        self._fill_tp_plan()

    def _fill_tp_plan(self):
        """Where columns of a projection cannot be told apart by heads, every rank computes the whole of them."""
        whole = []
        if self.fused_projections:
            whole = ["self_attn.qkv_proj", "mlp.gate_up_proj"]
        elif self.use_qk_norm and self.qk_norm_full:
            whole = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
        if not whole:
            return
        plan = {**self.base_model_tp_plan, **{f"layers.*.{name}": "colwise_gather_output" for name in whole}}
        plan["layers.*.self_attn.o_proj"] = "rowwise_split_input"
        if self.fused_projections:
            plan["layers.*.mlp.down_proj"] = "rowwise_split_input"
        for name in ("q_norm", "k_norm"):
            plan.pop(f"layers.*.self_attn.{name}", None)
        self.base_model_tp_plan = plan

    def _rotates_by_kind(self) -> bool:
        return bool(self.rope_parameters) and set(self.rope_parameters) <= set(LAYER_TYPES)

    def convert_rope_params_to_dict(self, **kwargs):
        """As the host's, which before 5.23 would add the defaults of one rotary embedding to a dict of several."""
        return kwargs if self._rotates_by_kind() else super().convert_rope_params_to_dict(**kwargs)

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
        if self.rope_layers is not None and len(self.rope_layers) != self.num_hidden_layers:
            raise ValueError(
                f"`rope_layers` must name each of the num_hidden_layers={self.num_hidden_layers} layers, got "
                f"{len(self.rope_layers)} entries."
            )
        if self.fused_projections and (self.attention_bias or self.attention_output_bias or self.mlp_bias):
            raise ValueError("`fused_projections` have no biases, got an `attention_bias` or `mlp_bias`.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"`num_key_value_heads` must divide num_attention_heads={self.num_attention_heads}, got "
                f"{self.num_key_value_heads}."
            )
