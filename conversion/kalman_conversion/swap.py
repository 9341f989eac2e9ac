"""Swap softmax attention for a Kalman mixer in a pretrained model; every other weight carries over untouched."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from hf_kalman import GKAConfig, GKAForCausalLM, KLAConfig, KLAForCausalLM
from hf_kalman.decoder import ScaledEmbedding, build_rotary
from hf_kalman.gka.modeling_gka import GKAMixer
from hf_kalman.hub.check import damage
from hf_kalman.kla.modeling_kla import KLAMixer
from hf_kalman.layers import ShortConvolution, inverse_softplus

from .files import check_output, new_folder
from .plan import ConversionPlan, mixer_options, plan_conversion
from .streaming import (
    DTYPES,
    NewTensor,
    StoredTensor,
    all_tensors,
    copy_rest,
    read_shards,
    read_tensor,
    shard_names,
    write_checkpoint,
)

__all__ = ["check_source", "initialise_mixer", "load_model", "swap_attention", "swap_checkpoint"]

_FAMILIES = {"gka": (GKAForCausalLM, GKAMixer), "kla": (KLAForCausalLM, KLAMixer)}
# Half-lives in tokens over the heads of a mixer at the start: from a phrase to a long context.
HALF_LIVES = (4.0, 4096.0)


def check_source(path: str | Path, function: str = "swap_attention") -> None:
    """Read the headers of a local checkpoint's safetensors files, so that a damaged one is found before any work.

    Args:
        path: folder.
        function: who asks, for the message.

    Raises:
        FileNotFoundError: no config.json, or a weight file that the index names is missing.
        ValueError: a weight file is truncated or not a safetensors file.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{function}: `model` {str(path)!r} has no config.json.")
    for name in shard_names(path):
        if not (path / name).is_file():
            raise FileNotFoundError(f"{function}: `model` {str(path)!r} lacks the weight file {name!r}.")
        if (text := damage(path / name)) is not None:
            raise ValueError(
                f"{function}: `model` weight file {str(path / name)!r} is damaged ({text}); fetch it again."
            )


def load_model(path: str | Path, dtype: torch.dtype | str = "auto", device: str | torch.device = "cpu"):
    """`AutoModelForCausalLM.from_pretrained` behind a check of a local folder's files."""
    if Path(path).exists():
        check_source(path)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    return model.to(torch.device(device))  # pyright: ignore[reportArgumentType]


def swap_attention(
    model: PreTrainedModel | str | Path,
    mixer: Literal["gka", "kla"] = "gka",
    layers: str | Path | Sequence[int] = "half",
    *,
    initialisation: Literal["identity", "reference"] = "identity",
    share_weights: bool = False,
    seed: int = 0,
    progress: bool = False,
    **mixer_fields,
) -> GKAForCausalLM | KLAForCausalLM:
    """A copy of a pretrained causal LM with some attention layers replaced by a Kalman mixer.

    Embeddings, norms, MLPs, the head and the attention layers that stay carry over bit for bit; with no layer swapped
    the logits are those of the source. A swapped layer takes over the projections that it has a place for (GKA: query,
    key, value, output; KLA: value, output) with their biases; its own parts start as `initialise_mixer` says. It
    computes something else than the attention that it replaces until it has been healed (`kalman_conversion.heal`).

    Args:
        model: a causal LM of one of `FAMILIES`, an already converted one, or the path or Hub id of one.
        mixer: what replaces softmax attention: "gka" (Gated KalmaNet) or "kla" (Kalman Linear Attention).
        layers: indices, "half", "all", "none", or the path of a recipe, whose layers are taken.
        initialisation: see `initialise_mixer`.
        share_weights: whether the result shares the tensors of `model` instead of copying them. Halves the memory of
            healing, where the shared weights are frozen; what changes one model then changes the other.
        seed: for the parameters that start at random.
        progress: whether to show a progress bar.
        mixer_fields: fields of `GKAConfig` or `KLAConfig` for the mixers; where nothing is said, `CONVERSION_MIXER`
            holds for the "identity" initialisation and the published layer for the "reference" one.

    Raises:
        ValueError, FileNotFoundError: before any weight is touched, with the argument, its value and what works.
    """
    _check_initialisation(initialisation)
    if isinstance(model, (str, Path)):
        if Path(model).exists():
            check_source(model)
        source = AutoConfig.from_pretrained(model)
        plan_conversion(source, mixer, layers, **mixer_options(source, initialisation, mixer_fields, mixer))
        model, share_weights = AutoModelForCausalLM.from_pretrained(model, dtype="auto"), True
    options = mixer_options(model.config, initialisation, mixer_fields, mixer)
    plan = plan_conversion(model.config, mixer, layers, **options)
    source = model.state_dict()
    _check_biases(plan, source)
    with torch.device("meta"):
        result = _FAMILIES[mixer][0](plan.config)
    weights = {
        name: tensor if share_weights else tensor.detach().clone()
        for name, tensor in source.items()
        if name in result.state_dict()
    }
    for index in tqdm(plan.layers, desc="swap", unit="layer", disable=not progress):
        attention = _submodule(source, f"model.layers.{index}.self_attn.")
        weights |= _mixer_weights(result, index, attention, initialisation, seed)
    result.load_state_dict(weights, strict=False, assign=True)
    result.tie_weights()
    _materialise_buffers(result, model.device)
    left = [name for name, tensor in result.state_dict().items() if tensor.is_meta]
    if left:
        raise ValueError(f"swap_attention: `model` has no weights for {left[:5]}.")
    result.generation_config = model.generation_config
    return result.train(model.training)


def _mixer_weights(
    result: GKAForCausalLM | KLAForCausalLM, index: int, attention: dict[str, Tensor], initialisation: Any, seed: int
) -> dict[str, Tensor]:
    """The weights of a mixer, under their names in the model, made of the attention layer that it replaces."""
    mixer_class = _FAMILIES["gka" if isinstance(result, GKAForCausalLM) else "kla"][1]
    attention = _unfused(attention, result.config)
    with torch.random.fork_rng(devices=[]):
        # A seed for each layer: what one starts from does not depend on which others are swapped.
        torch.manual_seed(seed * 1_000_003 + index)
        fresh = mixer_class(result.config, index)
        fresh.apply(result._init_weights)
    initialise_mixer(fresh, attention, initialisation)
    dtype, device = attention["o_proj.weight"].dtype, attention["o_proj.weight"].device
    return {
        f"model.layers.{index}.mixer.{name}": tensor.to(device, None if _is_wide(result, name) else dtype)
        for name, tensor in fresh.state_dict().items()
    }


def _is_wide(result: GKAForCausalLM | KLAForCausalLM, name: str) -> bool:
    """Whether a mixer's parameter stays float32 in a narrow model."""
    return name.partition(".")[0] in type(result)._keep_in_fp32_modules_strict


class _LayerOnDemand:
    """The mixer of one layer, made when its first tensor is written and let go with its last."""

    def __init__(self, result, index: int, attention: dict[str, StoredTensor], initialisation: str, seed: int) -> None:
        prefix = f"model.layers.{index}.mixer."
        narrow = _torch_dtype(attention["o_proj.weight"].dtype)
        self.made: dict[str, Tensor] = {}
        self.arguments = (result, index, attention, initialisation, seed)
        self.tensors = {
            name: NewTensor(
                torch.float32 if _is_wide(result, name[len(prefix) :]) else narrow,
                tuple(tensor.shape),
                lambda name=name: self._take(name),
            )
            for name, tensor in result.state_dict().items()
            if name.startswith(prefix)
        }

    def _take(self, name: str) -> Tensor:
        if not self.made:
            result, index, attention, initialisation, seed = self.arguments
            read = {part: read_tensor(stored) for part, stored in attention.items()}
            self.made = _mixer_weights(result, index, read, initialisation, seed)
        return self.made.pop(name)


def _torch_dtype(name: str) -> torch.dtype:
    return next(dtype for dtype, written in DTYPES.items() if written == name)


def swap_checkpoint(
    model: str | Path,
    output: str | Path,
    mixer: Literal["gka", "kla"] = "gka",
    layers: str | Path | Sequence[int] = "half",
    *,
    initialisation: Literal["identity", "reference"] = "identity",
    seed: int = 0,
    record: Callable[[Path], None] | None = None,
    **mixer_fields,
) -> ConversionPlan:
    """`swap_attention` from folder to folder, without ever holding more than one new mixer in memory.

    The result is bit for bit what `swap_attention(model, ...).save_pretrained(output)` writes, in the files of the
    source; tokenizer and generation settings come along.

    Args:
        model: folder of a causal LM of one of `FAMILIES`, or of an already converted one, in safetensors files.
        output: folder to write; must not exist.
        mixer: see `swap_attention`.
        layers: see `swap_attention`.
        initialisation: see `swap_attention`.
        seed: see `swap_attention`.
        record: called with the folder before it takes its name, to add files.
        mixer_fields: see `swap_attention`.

    Raises:
        ValueError, FileNotFoundError: before anything is written, with the argument, its value and what works.
        OSError: the disk has no room.
    """
    folder = Path(model)
    check_source(folder)
    _check_initialisation(initialisation)
    source = AutoConfig.from_pretrained(folder)
    options = mixer_options(source, initialisation, mixer_fields, mixer)
    plan = plan_conversion(source, mixer, layers, **options)
    shards = read_shards(folder)
    stored = all_tensors(shards)
    _check_biases(plan, stored)
    with torch.device("meta"):
        result = _FAMILIES[mixer][0](plan.config)
    gone = tuple(f"model.layers.{index}.self_attn." for index in plan.layers)
    known = result.state_dict()
    missing = {n for n in known if ".mixer." not in n or int(n.split(".")[2]) not in plan.layers}
    missing -= stored.keys() | ({"lm_head.weight"} if plan.config.tie_word_embeddings else set())
    if missing:
        raise ValueError(f"swap_attention: `model` {str(folder)!r} has no weights for {sorted(missing)[:5]}.")
    rest = [name for name in stored if name not in known and not name.startswith(gone)]
    if rest:
        raise ValueError(f"swap_attention: `model` {str(folder)!r} has weights that are not known: {sorted(rest)[:5]}.")
    written: dict[str, dict[str, StoredTensor | NewTensor]] = {}
    for file, tensors in shards.items():
        written[file] = {name: tensor for name, tensor in tensors.items() if not name.startswith(gone)}
        for index in plan.layers:
            prefix = f"model.layers.{index}.self_attn."
            if f"{prefix}o_proj.weight" in tensors:
                attention = {n[len(prefix) :]: t for n, t in stored.items() if n.startswith(prefix)}
                written[file] |= _LayerOnDemand(result, index, attention, initialisation, seed).tensors
    config = plan.config
    config.dtype = _torch_dtype(stored["model.embed_tokens.weight"].dtype)
    config.architectures = [type(result).__name__]
    size = sum(t.end - t.begin for t in stored.values())
    new = sum(t.numel() * 4 for n, t in known.items() if ".mixer." in n)
    check_output(output, needed=size + new + (64 << 20))
    with new_folder(output) as target:
        write_checkpoint(target, written)
        copy_rest(folder, target)
        config.save_pretrained(target)
        if record is not None:
            record(target)
    return plan


def _check_initialisation(initialisation: str) -> None:
    if initialisation not in ("identity", "reference"):
        raise ValueError(f"swap_attention: `initialisation` must be 'identity' or 'reference', got {initialisation!r}.")


def _submodule(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in state.items() if name.startswith(prefix)}


def _unfused(attention: dict[str, Tensor], config: GKAConfig | KLAConfig) -> dict[str, Tensor]:
    """Weights of an attention layer with one projection for queries, keys and values as those of three."""
    if not config.fused_projections:
        return attention
    head_dim = int(config.head_dim or 0)
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    pieces = attention.pop("qkv_proj.weight").split([int(count or 0) * head_dim for count in heads])
    return {**attention, **{f"{n}_proj.weight": piece for n, piece in zip("qkv", pieces, strict=True)}}


def _materialise_buffers(result: GKAForCausalLM | KLAForCausalLM, device: torch.device) -> None:
    """What is not in a state dict: computed where the weights are."""
    rotary = build_rotary(result.config)
    result.model.rotary_emb = None if rotary is None else rotary.to(device)
    embedding = result.model.embed_tokens
    if isinstance(embedding, ScaledEmbedding):
        embedding.embed_scale = torch.tensor(embedding.embedding_dim**0.5, device=device)


def _check_biases(plan: ConversionPlan, source: Mapping[str, Any]) -> None:
    """A mixer has a query, key, value and output bias exactly where the configuration says so."""
    config = plan.config
    for index in plan.layers:
        for name, kept in (
            ("q_proj", config.attention_bias),
            ("k_proj", config.attention_bias),
            ("v_proj", config.attention_bias),
            ("o_proj", config.attention_output_bias),
        ):
            key = f"model.layers.{index}.self_attn.{name}.bias"
            if (key in source) != kept:
                found = "a bias" if key in source else "no bias"
                raise ValueError(
                    f"swap_attention: layer {index} has {found} in {name}, which does not fit the model's other "
                    f"layers; leave layer {index} out of `layers`."
                )


@torch.no_grad()
def initialise_mixer(
    mixer: GKAMixer | KLAMixer,
    attention: dict[str, Tensor],
    initialisation: Literal["identity", "reference"] = "identity",
) -> None:
    """Fill a freshly initialised mixer from the attention layer that it replaces.

    GKA: both initialisations copy the query, key, value and output projections and start the output gate at
    `(W_o^T + repeat(W_v)) / 2` (papers' surgery). "reference" leaves the rest random, as the published conversions
    do. "identity" starts the convolutions as identity, and the decays as constants with half-lives spread over the
    heads, so that the layer begins as a regression on the source layer's own keys and values with a long memory.

    KLA: "identity" puts the value projection, repeated for the query heads that share it, where the filtered channels
    come from, the output projection where they go, and starts the convolution as identity; keys and queries of a width
    that all channels share have no counterpart and stay random. "reference" leaves everything random.

    Args:
        mixer: on the CPU, initialised as a new model's.
        attention: state dict of the attention layer.
        initialisation: which of the two.

    Raises:
        ValueError: a projection has another shape.
    """
    wide = {name: tensor.detach().to(torch.float32).cpu() for name, tensor in attention.items()}
    if isinstance(mixer, GKAMixer):
        _seed_gka(mixer, wide, initialisation)
    elif initialisation == "identity":
        _seed_kla(mixer, wide)


def _seed_gka(mixer: GKAMixer, wide: dict[str, Tensor], initialisation: str) -> None:
    """Both initialisations of a GKA mixer."""
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        target = getattr(mixer, name)
        if target.weight.shape != wide[f"{name}.weight"].shape:
            raise ValueError(
                f"swap_attention: layer {mixer.layer_idx} has a {name} of shape "
                f"{tuple(wide[f'{name}.weight'].shape)}, but the mixer's heads and widths need "
                f"{tuple(target.weight.shape)}; leave the linear_num_*_heads and linear_*_head_dim options out."
            )
        target.weight.copy_(wide[f"{name}.weight"])
        if target.bias is not None:
            target.bias.copy_(wide[f"{name}.bias"])
    config = mixer.config
    if config.use_output_gate:
        value = wide["v_proj.weight"].unflatten(0, (-1, mixer.o_norm.weight.shape[0]))
        value = value.repeat_interleave(config.linear_num_heads // value.shape[0], dim=0).flatten(0, 1)
        mixer.g_proj.weight.copy_(0.5 * (wide["o_proj.weight"].T + value))
    if config.use_local_values:
        nn.init.zeros_(mixer.local_proj.weight)
    if initialisation == "identity":
        for module in mixer.modules():
            if isinstance(module, ShortConvolution):
                module.weight.zero_()[..., -1] = 1
        if config.use_decay:
            nn.init.zeros_(mixer.a_proj.weight)
            first, last = (math.log2(life) for life in HALF_LIVES)
            lives = torch.logspace(first, last, config.linear_num_heads, base=2.0)
            # log 2 / half-life = exp(A_log) * softplus(dt_bias), the step at its published middle.
            step = torch.full_like(lives, 0.01)
            mixer.decay_bias.dt_bias.copy_(inverse_softplus(step))
            mixer.decay_bias.A_log.copy_((torch.log(torch.tensor(2.0)) / lives / step).log())


def _seed_kla(mixer: KLAMixer, attention: dict[str, Tensor]) -> None:
    """The "identity" initialisation of a KLA mixer."""
    config = mixer.config
    inner, width = int(config.linear_inner_size or 0), attention["o_proj.weight"].shape[1]
    if inner != width:
        raise ValueError(
            f"swap_attention: layer {mixer.layer_idx} has an output projection from {width} channels, but the mixer "
            f"has {inner}; leave `linear_inner_size` out or use initialisation='reference'."
        )

    def repeated(tensor: Tensor) -> Tensor:
        heads = tensor.unflatten(0, (-1, inner // config.num_attention_heads))
        return heads.repeat_interleave(inner // tensor.shape[0], dim=0).flatten(0, 1)

    mixer.in_proj.weight[:inner].copy_(repeated(attention["v_proj.weight"]))
    mixer.o_proj.weight.copy_(attention["o_proj.weight"])
    if mixer.in_proj.bias is not None:
        for target, name in ((mixer.in_proj.bias[:inner], "v_proj.bias"), (mixer.o_proj.bias, "o_proj.bias")):
            if name in attention:
                target.copy_(repeated(attention[name]) if name == "v_proj.bias" else attention[name])
    if config.linear_conv_kernel_dim:
        mixer.conv1d.weight.zero_()[..., -1] = 1
