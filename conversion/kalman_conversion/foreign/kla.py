"""Checkpoints of the `kla` package (reference code of arXiv 2602.10743), in and out.

Its `SequenceModel` is the decoder of `KLAForCausalLM` under other names; the projections of its SwiGLU are one matrix.
Process noise is stored as it is (`process_noise`) or, since later versions, as its logarithm (`p_log`), with a bias of
the observation variance (`obs_noise_bias`). Ranks are read off the shapes.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_kalman import KLAConfig, KLAForCausalLM

from ..files import new_folder

__all__ = ["export_kla", "import_kla"]

_MIXER = {
    "in_proj.weight": "in_proj.weight",
    "in_proj.bias": "in_proj.bias",
    "conv.weight": "conv1d.weight",
    "conv.bias": "conv1d.bias",
    "sensor_proj.weight": "sensor_proj.weight",
    "sensor_proj.bias": "sensor_proj.bias",
    "value_expand.weight": "value_expand.weight",
    "value_expand.bias": "value_expand.bias",
    "var_expand.weight": "var_expand.weight",
    "var_expand.bias": "var_expand.bias",
    "delta": "dynamics_bias.delta",
    "lambda_log": "dynamics_bias.lambda_log",
    "process_noise": "dynamics_bias.process_noise",
    "p_log": "dynamics_bias.process_noise_log",
    "obs_noise_bias": "dynamics_bias.observation_bias",
    "lambda_skip": "skip",
    "out_proj.weight": "o_proj.weight",
    "out_proj.bias": "o_proj.bias",
}
_TOP = {"embedding.weight": "model.embed_tokens.weight", "norm_f.weight": "model.norm.weight"}
_NORMS = {"mixer_norm.weight": "input_layernorm.weight", "mlp_norm.weight": "post_attention_layernorm.weight"}
# Their field and what this package calls it.
_FIELDS = {
    "d_state": "linear_state_size",
    "expand": "linear_expand",
    "dt_min": "dt_min",
    "dt_max": "dt_max",
    "dt_init_floor": "dt_init_floor",
    "discretization": "discretization",
    "obs_var_min": "observation_variance_min",
    "obs_var_max": "observation_variance_max",
    "qk_norm": "linear_qk_norm",
    "bias": "linear_bias",
    "use_gating": "use_output_gate",
    "lambda_skip_init": "skip_init",
    "decode_from_prior": "decode_from_prior",
    "clip_value": "process_noise_max",
}
# Chosen by how things are computed, or read elsewhere.
_OTHER = {
    "process_noise_scale",
    "process_noise_init",
    "process_noise_param",
    "process_noise_mode",
    "obs_noise_init",
    "learnable_process_noise",
    "zero_process_noise",
    "value_rank",
    "var_rank",
    "use_conv",
    "conv_kernel_size",
    "use_lambda_skip",
    "lambda_skip_mode",
    "return_variance",
    "dt_rank",
    "backend",
    "scan_impl",
    "mobius_impl",
    "checkpoint_ssm",
}
_ONLY = {"conv_activation": "silu", "gating_activation": "silu"}


def import_kla(model: str | Path, output: str | Path) -> KLAForCausalLM:
    """Write a checkpoint of the `kla` package as one of this package.

    Args:
        model: folder with `model.safetensors` (or a `model.pt` state dict) and a JSON configuration (`config.json` or
            `golden.json`) with the sections `kla_config` and `model_config`.
        output: folder to write; must not exist.

    Returns:
        The model as it was written.

    Raises:
        FileNotFoundError: weights or configuration are missing.
        ValueError: the checkpoint holds something that this package does not have.
    """
    model = Path(model)
    theirs = _read_config(model)
    weights = _read_weights(model)
    config = _config(theirs, weights)
    result = KLAForCausalLM(config)
    renamed = _renamed(weights, config)
    wanted = result.state_dict()
    if config.tie_word_embeddings:
        renamed.setdefault("lm_head.weight", renamed["model.embed_tokens.weight"])
    if renamed.keys() != wanted.keys():
        missing, extra = sorted(wanted.keys() - renamed.keys()), sorted(renamed.keys() - wanted.keys())
        raise ValueError(f"`model` {str(model)!r} does not fit its configuration: missing {missing}, unknown {extra}.")
    for name, tensor in renamed.items():
        if tensor.shape != wanted[name].shape:
            raise ValueError(
                f"`model` {str(model)!r}: {name} must have shape {tuple(wanted[name].shape)}, got "
                f"{tuple(tensor.shape)}."
            )
    result.load_state_dict(renamed)
    with new_folder(output) as folder:
        result.save_pretrained(folder)
    return result.eval()


def export_kla(model: KLAForCausalLM, output: str | Path) -> None:
    """Write a pure KLA model as a checkpoint of the `kla` package: the way back of `import_kla`.

    Args:
        model: a `KLAForCausalLM` without attention layers.
        output: folder to write `model.safetensors` and `config.json` to; must not exist.

    Raises:
        ValueError: the model holds something that the `kla` package does not have.
    """
    config = model.config
    if set(config.layer_types) != {"linear_attention"}:
        raise ValueError(f"`model` must be made of KLA layers alone, got layer_types={config.layer_types}.")
    weights = _their_names(model)
    fields = {theirs: getattr(config, ours) for theirs, ours in _FIELDS.items()} | _ONLY
    fields |= {
        "learnable_process_noise": config.process_noise == "learned",
        "zero_process_noise": config.process_noise == "none",
        "value_rank": config.value_rank,
        "var_rank": config.variance_rank,
        "use_conv": config.linear_conv_kernel_dim > 0,
        "conv_kernel_size": config.linear_conv_kernel_dim or 4,
        "use_lambda_skip": config.skip != "none",
        "lambda_skip_mode": "scalar" if config.skip == "none" else config.skip,
    }
    about = {
        "vocab_size": config.vocab_size,
        "d_model": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "mlp": "swiglu",
        "norm_eps": config.rms_norm_eps,
        "tie_embeddings": config.tie_word_embeddings,
        "logit_softcap": None,
    }
    with new_folder(output) as folder:
        save_file(weights, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"kla_config": fields, "model_config": about}, indent=1) + "\n")


def _read_config(model: Path) -> dict[str, dict[str, Any]]:
    for name in ("config.json", "golden.json"):
        if (model / name).is_file():
            found = json.loads((model / name).read_text())
            for section in ("kla_config", "model_config"):
                if not isinstance(found.get(section), dict):
                    raise ValueError(f"`model`: {str(model / name)!r} must hold a section {section!r}.")
            return found
    raise FileNotFoundError(f"`model` {str(model)!r} must hold config.json or golden.json.")


def _read_weights(model: Path) -> dict[str, Tensor]:
    if (model / "model.safetensors").is_file():
        return load_file(model / "model.safetensors")
    if (model / "model.pt").is_file():
        return torch.load(model / "model.pt", map_location="cpu", weights_only=True)
    raise FileNotFoundError(f"`model` {str(model)!r} must hold model.safetensors or model.pt.")


def _config(found: dict[str, dict[str, Any]], weights: dict[str, Tensor]) -> KLAConfig:
    theirs, about = found["kla_config"], found["model_config"]
    if about.get("mlp", "swiglu") != "swiglu":
        raise ValueError(f"`model_config.mlp` must be 'swiglu', got {about['mlp']!r}.")
    if about.get("logit_softcap") is not None:
        raise ValueError(f"`model_config.logit_softcap` must be None, got {about['logit_softcap']}.")
    unknown = theirs.keys() - _FIELDS.keys() - _OTHER - _ONLY.keys()
    if unknown:
        raise ValueError(f"`kla_config` holds fields that are not known: {sorted(unknown)}.")
    for name, value in _ONLY.items():
        if theirs.get(name, value) != value:
            raise ValueError(f"`kla_config.{name}` must be {value!r}, got {theirs[name]!r}.")
    first = "blocks.0.mixer."
    for name in ("embedding.weight", first + "out_proj.weight", first + "sensor_proj.weight", first + "delta"):
        if name not in weights:
            raise ValueError(f"`model` holds no {name}: it is no checkpoint of the kla package's SequenceModel.")
    hidden, inner = weights[first + "out_proj.weight"].shape
    states = weights[first + "delta"].shape[1]
    expanded = {n: weights.get(f"{first}{n}_expand.weight") for n in ("value", "var")}
    variance_rank = "full" if expanded["var"] is None else expanded["var"].shape[1]
    value_rank = None if expanded["value"] is None else expanded["value"].shape[1]
    if value_rank is None:
        sensors = weights[first + "sensor_proj.weight"].shape[0] - 2 * states
        sensors -= inner if variance_rank == "full" else variance_rank
        value_rank = "conv" if sensors == 0 else "full"
    skip = weights.get(first + "lambda_skip")
    learned = theirs.get("learnable_process_noise", True) and theirs.get("process_noise_mode", "learned") != "fixed"
    conv = weights.get(first + "conv.weight")
    layers = about["n_layers"]
    return KLAConfig(
        vocab_size=weights["embedding.weight"].shape[0],
        hidden_size=hidden,
        intermediate_size=weights["blocks.0.mlp.w3.weight"].shape[1],
        num_hidden_layers=layers,
        # Of attention layers, of which there are none.
        num_attention_heads=1,
        rms_norm_eps=about.get("norm_eps", 1e-5),
        tie_word_embeddings=about.get("tie_embeddings", False),
        linear_inner_size=inner,
        linear_conv_kernel_dim=0 if conv is None else conv.shape[-1],
        value_rank=value_rank,
        variance_rank=variance_rank,
        process_noise="none" if theirs.get("zero_process_noise") else "learned" if learned else "fixed",
        process_noise_parameterization="log" if first + "p_log" in weights else "raw",
        use_observation_bias=first + "obs_noise_bias" in weights,
        skip="none" if skip is None else "scalar" if skip.ndim == 0 else "channel",
        **{ours: theirs[name] for name, ours in _FIELDS.items() if name in theirs},
    )


def _their_names(model: KLAForCausalLM) -> dict[str, Tensor]:
    """The weights under their names; the two halves of `w12` as one."""
    config = model.config
    names = {ours: theirs for theirs, ours in _MIXER.items()}
    norms = {ours: theirs for theirs, ours in _NORMS.items()}
    top = {ours: theirs for theirs, ours in _TOP.items()}
    state = {name: tensor.to("cpu").contiguous().clone() for name, tensor in model.state_dict().items()}
    if config.skip == "scalar":
        state = {name: t.reshape(()) if name.endswith(".mixer.skip") else t for name, t in state.items()}
    weights = {}
    for name, tensor in state.items():
        layer = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", name)
        if layer is None:
            if not (name == "lm_head.weight" and config.tie_word_embeddings):
                weights[top.get(name, name)] = tensor
            continue
        index, rest = layer.groups()
        if rest in norms:
            weights[f"blocks.{index}.{norms[rest]}"] = tensor
        elif rest == "mlp.down_proj.weight":
            weights[f"blocks.{index}.mlp.w3.weight"] = tensor
        elif rest.startswith("mixer."):
            weights[f"blocks.{index}.mixer.{names[rest.removeprefix('mixer.')]}"] = tensor
        elif rest == "mlp.gate_proj.weight":
            weights[f"blocks.{index}.mlp.w12.weight"] = torch.cat([tensor, state[name.replace("gate_proj", "up_proj")]])
        elif rest != "mlp.up_proj.weight":
            raise ValueError(f"`model` holds {name}, which the kla package does not have.")
    return weights


def _renamed(weights: dict[str, Tensor], config: KLAConfig) -> dict[str, Tensor]:
    """Our names; the two halves of `w12` apart."""
    renamed = {}
    for name, tensor in weights.items():
        block = re.fullmatch(r"blocks\.(\d+)\.(.*)", name)
        if block is None:
            renamed[_TOP.get(name, name)] = tensor
            continue
        index, rest = block.groups()
        prefix = f"model.layers.{index}."
        if rest in _NORMS:
            renamed[prefix + _NORMS[rest]] = tensor
        elif rest == "mlp.w12.weight":
            renamed[prefix + "mlp.gate_proj.weight"], renamed[prefix + "mlp.up_proj.weight"] = tensor.chunk(2)
        elif rest == "mlp.w3.weight":
            renamed[prefix + "mlp.down_proj.weight"] = tensor
        elif rest == "mixer.process_noise" and config.process_noise == "none":
            continue
        else:
            mixer = _MIXER.get(rest.removeprefix("mixer."), rest)
            tensor = tensor.reshape(1) if mixer == "skip" and tensor.ndim == 0 else tensor
            renamed[prefix + ("mixer." + mixer if rest.startswith("mixer.") else mixer)] = tensor
    return renamed
