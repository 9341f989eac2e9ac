"""What a conversion will do, decided and checked before anything expensive happens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from transformers import PreTrainedConfig

from hf_kalman import GKAConfig, KLAConfig
from hf_kalman.configuration import LAYER_TYPES, DecoderConfig

from .recipe import load_recipe

__all__ = [
    "CONVERSION_MIXER",
    "FAMILIES",
    "MIXERS",
    "REFUSED",
    "ConversionPlan",
    "mixer_options",
    "plan_conversion",
    "resolve_layers",
]

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "olmo2", "phi3", "gemma3_text")
# Model types that users ask for and that are not converted, and why.
REFUSED = {
    "qwen3_moe": "its experts, their router and its balancing loss have no counterpart in the converted model",
    "mixtral": "its experts, their router and its balancing loss have no counterpart in the converted model",
    "gemma3": "it holds a vision tower; convert the text model inside it (model type gemma3_text)",
    "gemma2": "it caps attention scores, which no fast attention of the host computes",
    "olmo3": "it is not tested",
    "phi": "it has LayerNorm and runs attention and MLP side by side",
    "gpt2": "it has learned positions and LayerNorm",
    "hybrid_qwen3": "it has mixers already; import it with `import-awslabs`",
}
MIXERS = ("gka", "kla")
_CONFIGS = {"gka": GKAConfig, "kla": KLAConfig}
# Mixer fields of a conversion where the caller says nothing. GKA: the variants that healed best, one at a time, in
# benchmarks/results/healing.json. The published layers differ in all of them. `mixer_options` adds widths for KLA.
CONVERSION_MIXER = {
    "gka": {
        "use_local_values": True,
        "key_activation": "identity",
        "value_activation": "identity",
        "solver": "cg",
        "solver_iterations": 20,
    },
    "kla": {"value_rank": "conv", "skip": "channel"},
}
_CARRIED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "tie_word_embeddings",
    "rope_parameters",
    "attention_dropout",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)


class ConversionPlan(NamedTuple):
    """A checked conversion: the configuration of the result and the indices of the swapped layers."""

    config: GKAConfig | KLAConfig
    layers: tuple[int, ...]
    source_type: str


def resolve_layers(layers: str | Path | Sequence[int], source: Sequence[str]) -> tuple[int, ...]:
    """Indices of the layers to swap.

    Args:
        layers: "all", "half" (every second layer, the first one kept), "none", indices (a list or "2,4,7"), or the path
            of a recipe, whose layers are taken.
        source: the kind of every layer of the source model.

    Raises:
        ValueError: unknown word, an index out of range or twice, or a layer that is not softmax attention.
    """
    count = len(source)
    chosen = []
    for index in _indices(layers, count):
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < count:
            raise ValueError(
                f"swap_attention: `layers` must hold indices from 0 to {count - 1} of the {count}-layer model, got "
                f"{index!r}."
            )
        if index in chosen:
            raise ValueError(f"swap_attention: `layers` must name each layer once, got {index} twice.")
        if source[index] not in ("full_attention", "sliding_attention"):
            raise ValueError(
                f"swap_attention: `layers` must name attention layers, got {index}, which is {source[index]}."
            )
        chosen.append(index)
    return tuple(sorted(chosen))


def _indices(layers: str | Path | Sequence[int], count: int) -> Sequence[int]:
    """The words, recipes and lists that `resolve_layers` knows, as indices that are not checked yet."""
    if isinstance(layers, Path) or (isinstance(layers, str) and layers.endswith((".yaml", ".yml"))):
        layers = load_recipe(layers).get("swap", {}).get("layers", "half")
    if not isinstance(layers, (str, Path)):
        return layers
    words = {"all": range(count), "half": range(1, count, 2), "none": ()}
    if layers in words:
        return words[str(layers)]
    try:
        return [int(part) for part in str(layers).split(",")]
    except ValueError:
        raise ValueError(
            "swap_attention: `layers` must be 'all', 'half', 'none' or indices like '2,4,7' (`choose_layers` finds "
            f"some), got {layers!r}."
        ) from None


def mixer_options(
    source: PreTrainedConfig, initialisation: str, fields: dict[str, Any], mixer: str = "gka"
) -> dict[str, Any]:
    """Fields of the mixers: those given, over `CONVERSION_MIXER` and what the sizes of the source suggest.

    The "reference" initialisation belongs to the published layer, and a model that has mixers already keeps their
    fields: both add nothing to what is given but, for KLA, the width of the attention that is replaced.
    """
    if mixer not in _CONFIGS or source.model_type == _CONFIGS[mixer].model_type:
        return fields
    sizes = {}
    if mixer == "kla":
        head_dim = getattr(source, "head_dim", None) or source.hidden_size // source.num_attention_heads
        sizes = {"linear_inner_size": source.num_attention_heads * head_dim}
    if initialisation == "reference":
        return {**sizes, **fields}
    if mixer == "kla":
        sizes["variance_rank"] = -(-source.hidden_size // 8)
    return {**sizes, **CONVERSION_MIXER[mixer], **fields}


def plan_conversion(
    source: PreTrainedConfig,
    mixer: Literal["gka", "kla"] = "gka",
    layers: str | Path | Sequence[int] = "half",
    **mixer_fields,
) -> ConversionPlan:
    """Check a conversion of a model with configuration `source` and describe its result.

    Args:
        source: configuration of a model of one of `FAMILIES`, or of an already converted one.
        mixer: what replaces softmax attention.
        layers: see `resolve_layers`.
        mixer_fields: fields of `GKAConfig` or `KLAConfig` that describe the mixer.

    Raises:
        ValueError: an unknown mixer, model type, layer or field, or sizes that do not fit.
    """
    if mixer not in MIXERS:
        raise ValueError(f"swap_attention: `mixer` must be one of {MIXERS}, got {mixer!r}.")
    target = _CONFIGS[mixer]
    if source.model_type not in (*FAMILIES, target.model_type):
        reason = REFUSED.get(source.model_type)
        raise ValueError(
            f"swap_attention: `model` must be of type {', '.join((*FAMILIES, target.model_type))}, got "
            f"{source.model_type!r}" + (f": {reason}." if reason else ".")
        )
    for name in mixer_fields:
        if name in DecoderConfig.__dataclass_fields__ or name not in target.__dataclass_fields__:
            raise ValueError(
                f"swap_attention: mixer options must be fields of {target.__name__} that describe the mixer, got "
                f"{name!r}."
            )
    if source.model_type == target.model_type:
        base = {k: v for k, v in source.to_dict().items() if k in target.__dataclass_fields__ and k != "dtype"}
        kinds = list(source.layer_types)
    else:
        base, kinds = _decoder_fields(source)
        if mixer == "kla":
            base["linear_bias"] = base["attention_bias"] or base["attention_output_bias"]
    swapped = resolve_layers(layers, kinds)
    for index in swapped:
        kinds[index] = "linear_attention"
    base["layer_types"] = kinds
    rope = base["rope_parameters"]
    if rope and set(rope) <= set(LAYER_TYPES):
        base["rope_parameters"] = {k: v for k, v in rope.items() if k in kinds and k != "linear_attention"} or None
    for name in ("architectures", "transformers_version", "model_type"):
        base.pop(name, None)
    return ConversionPlan(target(**{**base, **mixer_fields}), swapped, source.model_type)


def _decoder_fields(source: PreTrainedConfig) -> tuple[dict, list[str]]:
    """Fields of `DecoderConfig` that describe the decoder of a supported source model, and its layer kinds."""
    family = source.model_type
    fields = {name: getattr(source, name) for name in _CARRIED if hasattr(source, name)}
    heads = source.num_attention_heads
    fields["head_dim"] = getattr(source, "head_dim", None) or source.hidden_size // heads
    fields["attention_bias"] = family == "qwen2" or bool(getattr(source, "attention_bias", False))
    fields["attention_output_bias"] = family != "qwen2" and fields["attention_bias"]
    fields["mlp_bias"] = bool(getattr(source, "mlp_bias", False))
    fields["use_qk_norm"] = family in ("qwen3", "olmo2", "gemma3_text")
    window = getattr(source, "sliding_window", None)
    kinds = getattr(source, "layer_types", None)
    if kinds is None:
        kinds = ["full_attention" if window is None else "sliding_attention"] * source.num_hidden_layers
    fields["sliding_window"] = window if "sliding_attention" in kinds else None
    if family == "smollm3":
        fields["rope_layers"] = [bool(rotates) for rotates in source.no_rope_layers]
    elif family == "granite":
        for name in ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"):
            fields[name] = getattr(source, name)
    elif family == "olmo2":
        fields |= {"norm_style": "olmo2", "norm_placement": "post", "qk_norm_full": True, "rope_in_float32": True}
    elif family == "phi3":
        fields["fused_projections"] = True
        _refuse(source, "resid_pdrop", 0.0)
        _refuse(source, "embd_pdrop", 0.0)
    elif family == "gemma3_text":
        _refuse(source, "attn_logit_softcapping", None)
        _refuse(source, "use_bidirectional_attention", False)
        fields |= {"norm_style": "gemma3", "norm_placement": "both", "scale_embeddings": True}
        fields["hidden_act"] = source.hidden_activation
        fields["attention_multiplier"] = source.query_pre_attn_scalar**-0.5
        fields["final_logit_softcapping"] = source.final_logit_softcapping
    return fields, list(kinds)


def _refuse(source: PreTrainedConfig, name: str, wanted: Any) -> None:
    """What a family may have and the decoder has not."""
    found = getattr(source, name, wanted)
    if found != wanted:
        raise ValueError(
            f"swap_attention: a `model` of type {source.model_type!r} can be converted with {name}={wanted!r} only, "
            f"got {found!r}."
        )
