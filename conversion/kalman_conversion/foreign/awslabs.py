"""Checkpoints of awslabs/hybrid-model-factory (Gated KalmaNet hybrids of arXiv 2511.21016), in and out.

`hybrid_qwen3` folders load as they are (`hf_kalman.gka.hybrid_qwen3`). Import makes a `kalman_gka` folder of them and
of the other families with a dense decoder, export goes back. Tensors are copied as bytes, file by file, whatever their
number and size. Stage-1 checkpoints hold the teacher's attention beside the mixer in layers named `GKA*`: it is left
out, as the package's own conversion to a standard checkpoint does.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

from hf_kalman import GKAConfig, GKAForCausalLM
from hf_kalman.gka.hybrid_qwen3 import MIXER_FIELDS, SYMBOLS, HybridQwen3Config

from ..files import check_output, new_folder
from ..streaming import StoredTensor, all_tensors, copy_rest, read_shards, write_checkpoint
from ..swap import check_source

__all__ = ["export_awslabs", "import_awslabs"]

# Their model types with a dense decoder: what sets it apart from Qwen3's.
_FAMILIES = {
    "hybrid_qwen3": {"use_qk_norm": True},
    "hybrid_llama": {"use_qk_norm": False},
    "hybrid_qwen2": {"use_qk_norm": False, "attention_bias": True, "attention_output_bias": False},
}
_REFUSED = {
    "hybrid_qwen3_moe": "it has experts, which the decoder of this package has not",
    "hybrid_ministral3": "its scaling of attention by position is not described in public",
    "hybrid_qwen2_5_vl": "it holds a vision tower",
    "qwen3_next_hmf": "it has other mixers beside GKA",
    "qwen3_5_moe_hmf": "it has other mixers beside GKA",
}
# Fields of ours that theirs has no name for: they must have the value of the published layer and of a plain decoder.
_UNSPOKEN = (
    *("use_local_values", "key_activation", "value_activation", "solver", "solver_tolerance"),
    *("norm_style", "norm_placement", "qk_norm_full", "fused_projections", "mlp_bias", "rope_layers"),
    "rope_in_float32",
    *("embedding_multiplier", "scale_embeddings", "attention_multiplier", "residual_multiplier", "logits_scaling"),
    "final_logit_softcapping",
)
_ARCHITECTURES = {
    "hybrid_qwen3": "HybridQwen3ForCausalLM",
    "hybrid_llama": "HybridLlamaForCausalLM",
    "hybrid_qwen2": "HybridQwen2ForCausalLM",
}


def _import_name(name: str) -> str:
    return re.sub(r"\.gka\.(A_log|dt_bias)$", r".gka.decay_bias.\1", name).replace(".gka.", ".mixer.")


def _export_name(name: str) -> str:
    return name.replace(".mixer.decay_bias.", ".mixer.").replace(".mixer.", ".gka.")


def _read_config(folder: Path) -> tuple[GKAConfig, tuple[int, ...]]:
    """Our configuration of their folder, and the layers that still hold their teacher's attention."""
    raw: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = raw.get("model_type")
    if kind not in _FAMILIES:
        reason = _REFUSED.get(str(kind))
        raise ValueError(
            f"import_awslabs: `model` must be of type {', '.join(_FAMILIES)}, got {kind!r}"
            + (f": {reason}." if reason else ".")
        )
    symbols = str(raw.get("hybrid_override_pattern") or "").split("-")
    fused = tuple(index for index, symbol in enumerate(symbols) if symbol == "GKA*")
    raw["hybrid_override_pattern"] = "-".join("GKA" if s == "GKA*" else s for s in symbols) or None
    for name in ("model_type", "architectures", "transformers_version"):
        raw.pop(name, None)
    read = HybridQwen3Config(**{**raw, **_FAMILIES[kind]})
    fields = {name: getattr(read, name) for name in GKAConfig.__dataclass_fields__ if hasattr(read, name)}
    for name in ("transformers_version", "architectures", "model_type"):
        fields.pop(name, None)
    if "sliding_attention" not in fields["layer_types"]:
        fields["sliding_window"] = None
    return GKAConfig(**{**fields, **_FAMILIES[kind]}), fused


def _check_tensors(config: GKAConfig, shards: dict[str, dict[str, StoredTensor]], function: str) -> None:
    """Every tensor that the configuration asks for is there under our name, in its shape, and no other."""
    tensors = all_tensors(shards)
    with torch.device("meta"):
        wanted = {name: tuple(tensor.shape) for name, tensor in GKAForCausalLM(config).state_dict().items()}
    if config.tie_word_embeddings and "lm_head.weight" not in tensors:
        del wanted["lm_head.weight"]
    missing, extra = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if missing or extra:
        raise ValueError(
            f"{function}: the weights of `model` do not fit its config.json: {len(missing)} are missing "
            f"{missing[:3]}, {len(extra)} are not known {extra[:3]}."
        )
    for name, shape in wanted.items():
        if tensors[name].shape != shape:
            raise ValueError(
                f"{function}: `model` holds {name!r} in shape {tensors[name].shape}, its config.json asks for {shape}."
            )


def import_awslabs(model: str | Path, output: str | Path) -> GKAConfig:
    """Make a `kalman_gka` checkpoint of theirs.

    Args:
        model: folder with a standard or stage-1 checkpoint, in one file or in shards.
        output: folder to write; must not exist.

    Returns:
        The configuration written.

    Raises:
        ValueError, FileNotFoundError: before anything is written: another model type, mixers that are not GKA, weights
            that do not fit the configuration, a damaged file.
        OSError: the disk has no room.
    """
    source = Path(model)
    check_source(source, "import_awslabs")
    config, fused = _read_config(source)
    teacher = tuple(f"model.layers.{index}.self_attn." for index in fused)
    shards = {
        file: {_import_name(name): stored for name, stored in tensors.items() if not name.startswith(teacher)}
        for file, tensors in read_shards(source).items()
    }
    _check_tensors(config, shards, "import_awslabs")
    config.architectures = ["GKAForCausalLM"]
    _write(source, output, shards, config.to_dict())
    return config


def _write(source: Path, output: str | Path, shards: dict[str, dict[str, StoredTensor]], config: dict) -> None:
    size = sum(stored.end - stored.begin for stored in all_tensors(shards).values())
    check_output(output, needed=size + (64 << 20))
    with new_folder(output) as folder:
        write_checkpoint(folder, shards)
        copy_rest(source, folder)
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def export_awslabs(model: str | Path, output: str | Path) -> str:
    """Write a `kalman_gka` checkpoint in their layout; the way back from `import_awslabs`, bit for bit.

    Args:
        model: folder with a `kalman_gka` checkpoint.
        output: folder to write; must not exist.

    Returns:
        The model type written: `hybrid_qwen3`, `hybrid_qwen2` or `hybrid_llama`.

    Raises:
        ValueError, FileNotFoundError: before anything is written: another model type, or a field that theirs has no
            name for (`use_local_values`, linear activations, solvers but "chebyshev", other decoders).
        OSError: the disk has no room.
    """
    source = Path(model)
    check_source(source, "export_awslabs")
    raw = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if raw.get("model_type") != "kalman_gka":
        raise ValueError(f"export_awslabs: `model` must be of type kalman_gka, got {raw.get('model_type')!r}.")
    config = GKAConfig(**{k: v for k, v in raw.items() if k in GKAConfig.__dataclass_fields__})
    kind = _their_family(config)
    ours = read_shards(source)
    _check_tensors(config, ours, "export_awslabs")
    shards = {file: {_export_name(n): stored for n, stored in tensors.items()} for file, tensors in ours.items()}
    carried = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
        "hidden_act max_position_embeddings initializer_range rms_norm_eps use_cache tie_word_embeddings "
        "rope_parameters attention_dropout sliding_window pad_token_id bos_token_id eos_token_id dtype"
    )
    theirs = {name: raw[name] for name in carried.split() if name in raw}
    theirs |= {
        "model_type": kind,
        "architectures": [_ARCHITECTURES[kind]],
        "attention_bias": config.attention_bias,
        "hybrid_override_pattern": "-".join(SYMBOLS[layer] for layer in config.layer_types or ()),
        "gka_config": {name: getattr(config, ours) for name, ours in MIXER_FIELDS.items()}
        | {"hidden_size": config.hidden_size, "head_dim": config.head_dim, "norm_eps": config.rms_norm_eps},
    }
    _write(source, output, shards, theirs)
    return kind


def _their_family(config: GKAConfig) -> str:
    """The model type of theirs that has this decoder, after making sure that it can say all of the configuration."""
    plain = GKAConfig()
    wanted = {name: getattr(plain, name) for name in _UNSPOKEN}
    wanted |= dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), config.head_dim)
    wanted |= dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), config.num_key_value_heads)
    wanted["linear_num_query_heads"] = config.num_attention_heads
    for name, value in wanted.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"export_awslabs: their checkpoints cannot say {name}={getattr(config, name)!r}; it must be {value!r}."
            )
    for kind, fields in _FAMILIES.items():
        bias = fields.get("attention_bias", False), fields.get("attention_output_bias", False)
        if (
            config.use_qk_norm == fields["use_qk_norm"]
            and (config.attention_bias, config.attention_output_bias) == bias
        ):
            return kind
    raise ValueError(
        f"export_awslabs: their decoders have no use_qk_norm={config.use_qk_norm} with attention_bias="
        f"{config.attention_bias} and attention_output_bias={config.attention_output_bias}."
    )
