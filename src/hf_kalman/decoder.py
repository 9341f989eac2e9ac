"""The decoder that both families share: softmax attention, decoder layer, and the walk through the layers.

It is the superset of the Llama-like decoders of the host library, built from the host's own parts (norm, rotary
embedding, MLP, attention interface), with the parameter names of the source models, so that weights carry over and a
layer that is not swapped computes bit for bit what it computed before.
"""

# The host types submodules as `Tensor | Module`, fills optional fields after construction and unpacks kwargs loosely.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportPrivateImportUsage=false, reportAssignmentType=false
# pyright: reportOptionalSubscript=false, reportOptionalMemberAccess=false, reportOptionalOperand=false

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import (
    create_causal_mask,
    create_recurrent_attention_mask,
    create_sliding_window_causal_mask,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from kalman_kernels import Segments

from .cache import KalmanCacheLayer, swap_cache_layers
from .configuration import LAYER_TYPES
from .layers import ShortConvolution
from .packing import build_segments

__all__ = [
    "DecoderAttention",
    "DecoderGenerationMixin",
    "DecoderLayer",
    "DecoderPreTrainedModel",
    "ScaledEmbedding",
    "build_decoder",
    "build_rotary",
    "run_decoder",
]

_MASKS = {
    "full_attention": create_causal_mask,
    "sliding_attention": create_sliding_window_causal_mask,
    "linear_attention": create_recurrent_attention_mask,
}


def _norm(config, width: int) -> nn.Module:
    """The host's RMSNorm that the configuration asks for."""
    if config.norm_style == "olmo2":
        from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm as Norm
    elif config.norm_style == "gemma3":
        from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm as Norm
    else:
        Norm = LlamaRMSNorm  # noqa: N806
    return Norm(width, eps=config.rms_norm_eps)


class ScaledEmbedding(nn.Embedding):
    """Token embeddings times sqrt(width), the factor rounded to their dtype as Gemma rounds it."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("embed_scale", torch.tensor(self.embedding_dim**0.5), persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, T) to (B, T, width)."""
        return super().forward(input_ids) * self.embed_scale.to(self.weight.dtype)


class RotaryByKind(nn.Module):
    """One rotary embedding for each kind of attention layer; its output is a dict of theirs."""

    def __init__(self, config) -> None:
        super().__init__()
        for kind, parameters in config.rope_parameters.items():
            if parameters is not None:
                own = copy.copy(config)
                own.rope_parameters = parameters
                self.add_module(kind, _rotary(own))

    def forward(self, hidden_states: Tensor, position_ids: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """{kind: (cos, sin)}."""
        return {kind: module(hidden_states, position_ids) for kind, module in self.named_children()}


def _rotary(config) -> nn.Module:
    if config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
        from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

        return Phi3RotaryEmbedding(config)
    return LlamaRotaryEmbedding(config)


def build_rotary(config) -> nn.Module | None:
    """Rotary embedding of a decoder; a model without softmax attention has no use for positions."""
    if set(config.layer_types) == {"linear_attention"}:
        return None
    by_kind = set(config.rope_parameters) <= set(LAYER_TYPES)
    return RotaryByKind(config) if by_kind else _rotary(config)


def _rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary embedding of the first `cos.shape[-1]` channels, in the dtype of cos, back in that of the inputs."""
    width = cos.shape[-1]
    if width == query.shape[-1]:
        rotated = apply_rotary_pos_emb(query, key, cos, sin)
        return rotated[0].to(query.dtype), rotated[1].to(key.dtype)
    rotated = _rotate(query[..., :width], key[..., :width], cos, sin)
    return torch.cat([rotated[0], query[..., width:]], dim=-1), torch.cat([rotated[1], key[..., width:]], dim=-1)


class DecoderAttention(nn.Module):
    """Softmax attention with rotary embedding, with the switches of `DecoderConfig`."""

    def __init__(self, config, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.layer_type = config.layer_types[layer_idx]
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5 if config.attention_multiplier is None else config.attention_multiplier
        self.rotates = config.rope_layers is None or bool(config.rope_layers[layer_idx])
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        width, bias = config.hidden_size, config.attention_bias
        heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        widths = self.widths = [count * self.head_dim for count in heads]
        if config.fused_projections:
            self.qkv_proj = nn.Linear(width, sum(widths), bias=False)
        else:
            self.q_proj = nn.Linear(width, widths[0], bias=bias)
            self.k_proj = nn.Linear(width, widths[1], bias=bias)
            self.v_proj = nn.Linear(width, widths[2], bias=bias)
        self.o_proj = nn.Linear(widths[0], width, bias=config.attention_output_bias)
        if config.use_qk_norm:
            normed = widths[:2] if config.qk_norm_full else [self.head_dim] * 2
            self.q_norm, self.k_norm = _norm(config, normed[0]), _norm(config, normed[1])
        self.sliding_window = config.sliding_window if self.layer_type == "sliding_attention" else None

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, T, hidden) to the same, and the attention weights where the attention interface returns them."""
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        if self.config.fused_projections:
            query, key, value = self.qkv_proj(hidden_states).split(self.widths, dim=-1)
        else:
            query, key, value = (p(hidden_states) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.config.use_qk_norm and self.config.qk_norm_full:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = query.view(heads), key.view(heads), value.view(heads).transpose(1, 2)
        if self.config.use_qk_norm and not self.config.qk_norm_full:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = query.transpose(1, 2), key.transpose(1, 2)
        if self.rotates:
            query, key = _rotate(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights


# The norms before and after the mixer, before and after the MLP, under the names of the models that place them there.
_NORMS = {
    "pre": ("input_layernorm", None, "post_attention_layernorm", None),
    "post": (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    "both": ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
}


class DecoderLayer(GradientCheckpointingLayer):
    """x += mix(norm(x)); x += mlp(norm(x)), where mix is softmax attention or the family's mixer.

    The norms stand where `norm_placement` says, under the names of the models that place them there.
    """

    mixer_class: type[nn.Module]

    def __init__(self, config, layer_idx: int) -> None:
        super().__init__()
        self.layer_type = config.layer_types[layer_idx]
        if self.layer_type == "linear_attention":
            self.mixer = self.mixer_class(config, layer_idx)
        else:
            self.self_attn = DecoderAttention(config, layer_idx)
        self.mlp = _mlp(config)
        self.norms = _NORMS[config.norm_placement]
        for name in self.norms:
            if name is not None:
                self.add_module(name, _norm(config, config.hidden_size))
        self.residual_multiplier = config.residual_multiplier

    def _normed(self, place: int, hidden_states: Tensor) -> Tensor:
        name = self.norms[place]
        return hidden_states if name is None else getattr(self, name)(hidden_states)

    def _add(self, residual: Tensor, hidden_states: Tensor) -> Tensor:
        return residual + (hidden_states if self.residual_multiplier == 1 else hidden_states * self.residual_multiplier)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask=None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs,
    ) -> Tensor:
        """(B, T, hidden) to the same. `attention_mask` is a mask for attention layers, `Segments` for mixers."""
        options = kwargs.pop("mixer_options", None) or {}
        residual = hidden_states
        hidden_states = self._normed(0, hidden_states)
        if self.layer_type == "linear_attention":
            hidden_states = self.mix(hidden_states, attention_mask, past_key_values, **options)
        else:
            hidden_states, _ = self.self_attn(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
                use_cache=use_cache,
                **kwargs,
            )
        hidden_states = self._add(residual, self._normed(1, hidden_states))
        if options.get("collect") is not None:
            options["collect"].before_mlp = hidden_states
        return self.feed_forward(hidden_states)

    def mix(self, hidden_states: Tensor, segments: Segments | None, past_key_values: Cache | None, **options) -> Tensor:
        """The family's mixer; `options` are the `mixer_options` of the call."""
        return self.mixer(hidden_states, segments=segments, past_key_values=past_key_values, **options)

    def feed_forward(self, hidden_states: Tensor) -> Tensor:
        """The second half of the layer: x + mlp(norm(x))."""
        return self._add(hidden_states, self._normed(3, self.mlp(self._normed(2, hidden_states))))


def _mlp(config) -> nn.Module:
    if not config.fused_projections:
        return LlamaMLP(config)
    from transformers.models.phi3.modeling_phi3 import Phi3MLP

    return Phi3MLP(config)


class DecoderPreTrainedModel(PreTrainedModel):
    """The host's feature flags and what there is to initialise outside the mixers."""

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values", "mixer_options"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoModel") -> None:
        """As the host's for a copy that came with a checkpoint; not for the package: every save would copy its code."""
        if not cls.__module__.startswith("hf_kalman."):
            super().register_for_auto_class(auto_class)

    def post_init(self) -> None:
        """As the host's; plans and precision lists keep the entries that this configuration has modules for."""
        super().post_init()
        names = [name for name, _ in self.named_modules()] + [*self.state_dict()]
        last = {name.rpartition(".")[2] for name in names}
        self._keep_in_fp32_modules_strict &= last

        def present(entry: str) -> bool:
            pattern = re.compile(re.escape(entry).replace(r"\*", r"\d+"))
            return any(pattern.fullmatch(name) for name in names)

        self._tp_plan = {entry: style for entry, style in self._tp_plan.items() if present(entry)}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ShortConvolution):
            bound = module.kernel_size[0] ** -0.5
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, ScaledEmbedding):
            init.constant_(module.embed_scale, module.embedding_dim**0.5)
        elif type(module).__name__ == "Gemma3RMSNorm":
            init.zeros_(module.weight)

    def head(self, hidden_states: Tensor) -> Tensor:
        """Logits of final hidden states (..., hidden)."""
        logits, cap = self.lm_head(hidden_states), self.config.final_logit_softcapping
        if self.config.logits_scaling != 1:
            logits = logits / self.config.logits_scaling
        return logits if cap is None else torch.tanh(logits / cap) * cap


class DecoderGenerationMixin(GenerationMixin):
    """`generate` with the recurrent layers' own entries in the host's caches."""

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        result = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get("past_key_values")
        if isinstance(cache, Cache):
            swap_cache_layers(cache, self.config)
        return result


def build_decoder(model: nn.Module, config, layer_class: type[DecoderLayer]) -> None:
    """Give `model` the modules of a decoder, under the host's names."""
    model.padding_idx = config.pad_token_id
    model.vocab_size = config.vocab_size
    embedding = ScaledEmbedding if config.scale_embeddings else nn.Embedding
    model.embed_tokens = embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
    model.layers = nn.ModuleList([layer_class(config, index) for index in range(config.num_hidden_layers)])
    model.norm = _norm(config, config.hidden_size)
    model.rotary_emb = build_rotary(config)
    model.gradient_checkpointing = False


def _masks(config, inputs_embeds: Tensor, attention_mask, past_key_values: Cache | None, position_ids) -> dict:
    """One mask per kind of layer; a dict that `generate` has already prepared passes through."""
    if isinstance(attention_mask, dict):
        return dict(attention_mask)
    arguments = {
        "config": config,
        "inputs_embeds": inputs_embeds,
        "attention_mask": attention_mask,
        "past_key_values": past_key_values,
        "position_ids": position_ids,
    }
    masks = {kind: _MASKS[kind](**arguments) for kind in sorted(set(config.layer_types))}
    if "linear_attention" in masks and masks["linear_attention"] is None and _is_padding(attention_mask, inputs_embeds):
        masks["linear_attention"] = attention_mask[:, -1:]
    return masks


def _is_padding(attention_mask, inputs_embeds: Tensor) -> bool:
    """Whether a step of one token has padding in some row: the host takes such tokens for real ones."""
    if inputs_embeds.shape[1] != 1 or not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
        return False
    if torch.compiler.is_compiling() or (attention_mask.is_cuda and torch.cuda.is_current_stream_capturing()):
        return False
    return not bool(attention_mask[:, -1].all())


def _check_inputs(
    inputs_embeds: Tensor, attention_mask, position_ids: Tensor | None, past_key_values: Cache | None, kwargs: dict
) -> None:
    """What would otherwise fail deep inside or, worse, not at all."""
    batch, tokens = inputs_embeds.shape[:2]
    for layer in past_key_values.layers if past_key_values is not None else ():
        rows = layer.rows if isinstance(layer, KalmanCacheLayer) else None
        if rows not in (None, batch):
            raise ValueError(
                f"`past_key_values` holds {rows} sequences, but the input has {batch}; use a new cache, or its "
                "batch_select_indices and batch_repeat_interleave."
            )
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        wanted = (tokens, tokens + past) if isinstance(past, int) else (attention_mask.shape[1],)
        if attention_mask.shape[0] != batch or attention_mask.shape[1] not in wanted:
            raise ValueError(
                f"`attention_mask` must have shape ({batch}, {wanted[-1]}): one column for each token of the past and "
                f"of the input, got {tuple(attention_mask.shape)}."
            )
    for name, given in (("position_ids", position_ids), ("seq_idx", kwargs.get("seq_idx"))):
        if given is not None and tuple(given.shape) not in ((batch, tokens), (1, tokens)):
            raise ValueError(f"`{name}` must have shape ({batch}, {tokens}), got {tuple(given.shape)}.")
    if kwargs.get("cu_seq_lens_q") is not None and batch != 1:
        raise ValueError(f"`cu_seq_lens_q` is of sequences packed into one row, but the input has {batch} rows.")


def _rotations(model, hidden_states: Tensor, position_ids: Tensor) -> dict:
    """{kind of layer: (cosines, sines)}, empty where nothing rotates."""
    if model.rotary_emb is None:
        return {}
    like = hidden_states.new_empty(0, dtype=torch.float32) if model.config.rope_in_float32 else hidden_states
    found = model.rotary_emb(like, position_ids)
    return found if isinstance(found, dict) else dict.fromkeys(model.config.layer_types, found)


def run_decoder(
    model,
    input_ids: Tensor | None,
    attention_mask,
    position_ids: Tensor | None,
    past_key_values: Cache | None,
    inputs_embeds: Tensor | None,
    use_cache: bool | None,
    **kwargs,
) -> BaseModelOutputWithPast:
    """The walk through embedding, layers and final norm, common to every family."""
    config = model.config
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("Exactly one of `input_ids` and `inputs_embeds` must be given.")
    if inputs_embeds is None:
        inputs_embeds = model.embed_tokens(input_ids)
    if use_cache and past_key_values is None:
        past_key_values = DynamicCache(config=config)
    if past_key_values is not None:
        swap_cache_layers(past_key_values, config)
    _check_inputs(inputs_embeds, attention_mask, position_ids, past_key_values, kwargs)
    past = past_key_values.get_seq_length() if past_key_values is not None else 0
    given_positions = position_ids
    if position_ids is None:
        position_ids = (past + torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device))[None]

    masks = _masks(config, inputs_embeds, attention_mask, past_key_values, position_ids)
    if "linear_attention" in config.layer_types:
        masks["linear_attention"] = build_segments(
            masks.get("linear_attention"),
            given_positions,
            kwargs.get("cu_seq_lens_q"),
            kwargs.get("seq_idx"),
            inputs_embeds.shape[1],
            fresh=past_key_values is None or (isinstance(past, int) and past == 0),
        )
    hidden_states = inputs_embeds
    if config.embedding_multiplier != 1:
        hidden_states = hidden_states * config.embedding_multiplier
    rotations = _rotations(model, hidden_states, position_ids)
    for layer in model.layers[: config.num_hidden_layers]:
        hidden_states = layer(
            hidden_states,
            attention_mask=masks[layer.layer_type],
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            position_embeddings=rotations.get(layer.layer_type),
            **kwargs,
        )
    hidden_states = model.norm(hidden_states)
    return BaseModelOutputWithPast(
        last_hidden_state=hidden_states, past_key_values=past_key_values if use_cache else None
    )
