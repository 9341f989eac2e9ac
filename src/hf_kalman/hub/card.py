"""Model cards from a checkpoint's configuration and the files that its recipe and measurements left."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse

import torch
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import AutoConfig, PreTrainedConfig

from ..cache import cache_bytes
from .bundle import AUTO_MAPS

__all__ = ["BaseModel", "adapter_card", "draw_cache", "model_card", "validate_card"]


class BaseModel(NamedTuple):
    """The checkpoint that a model was made from."""

    repo_id: str
    """On the Hub."""
    license: str
    """Identifier, like "apache-2.0"."""
    name: str
    """For the tables."""


class _Measure(NamedTuple):
    title: str
    dataset: str
    dataset_name: str
    metric: str
    percent: bool
    counted: str
    """Name of the number of cases in a result."""


MEASURES = {
    "wikitext2_perplexity": _Measure(
        "WikiText-2 test, perplexity", "wikitext", "WikiText-2", "perplexity", False, "wikitext2_tokens"
    ),
    "lambada": _Measure("LAMBADA, accuracy", "lambada", "LAMBADA", "accuracy", True, "lambada"),
    "piqa": _Measure("PIQA, accuracy", "piqa", "PIQA", "accuracy", True, "piqa"),
    "retrieval_16_pairs": _Measure(
        "one of 16 codes in the context", "codes-16", "16 codes", "accuracy", True, "retrieval"
    ),
    "retrieval_64_pairs": _Measure(
        "one of 64 codes in the context", "codes-64", "64 codes", "accuracy", True, "retrieval"
    ),
    "completion": _Measure(
        "end of a sentence in the context", "completion", "Completion", "accuracy", True, "completion"
    ),
}
_FAMILIES = {
    "kalman_gka": ("Gated KalmaNet (GKA)", "2511.21016"),
    "kalman_kla": ("Kalman Linear Attention (KLA)", "2602.10743"),
}
_CITATIONS = {
    "2511.21016": ("gka", "Peng, Chattopadhyay, Zancato, Nunez, Xia, Soatto", "Gated KalmaNet", "2025"),
    "2602.10743": ("kla", "Shaj, Barker, Scannell, Szecsenyi, Crowley, Storkey", "Kalman Linear Attention", "2026"),
}
_CONTEXTS = (2048, 8192, 32768, 131072)
_LETTERS = {"linear_attention": "K", "full_attention": "a", "sliding_attention": "w"}
_PLACEHOLDERS = ("[More Information Needed]", "{{", "}}", "TODO", "TBD", "FIXME")


def model_card(
    source: str | Path | PreTrainedConfig,
    repo_id: str,
    *,
    base: BaseModel | None = None,
    base_config: PreTrainedConfig | None = None,
    result: dict[str, Any] | None = None,
    base_result: dict[str, Any] | None = None,
    speed: dict[str, Any] | None = None,
    speed_name: str | None = None,
    figures: tuple[str, ...] = (),
    training_text: str = "",
    license: str | None = None,
    language: str = "en",
) -> ModelCard:
    """The card of a GKA or KLA model; every number comes from the arguments.

    Args:
        source: folder of the checkpoint (its `conversion.json` and `healing.json` tell how it was made), or its
            configuration.
        repo_id: under which it will be found.
        base: the model that it was converted from.
        base_config: configuration of that model, for its cache beside ours.
        result: what `benchmarks/conversion_recipes.py` wrote: recipe, tokens, seconds, quality, environment.
        base_result: the same of the base model.
        speed: what its `--speed` wrote.
        speed_name: of this model in `speed`; the base model's rows are named "teacher".
        figures: names of image files beside the card.
        training_text: what it was trained on, in a sentence.
        license: of the weights; that of the base model when None.
        language: of the text it was trained on.

    Raises:
        ValueError: the model is none of this package's language models.
    """
    folder = Path(source) if isinstance(source, str | Path) else None
    if folder is not None and (folder / "adapter_config.json").is_file():
        return adapter_card(folder, repo_id, license=license)
    config = source if isinstance(source, PreTrainedConfig) else AutoConfig.from_pretrained(source)
    if config.model_type not in _FAMILIES:
        raise ValueError(
            f"model_card: `source` must be a model of type {sorted(_FAMILIES)}, got {config.model_type!r}; write its "
            "card by hand and give it to `push_to_hub(card=...)`."
        )
    family, arxiv = _FAMILIES[config.model_type]
    result, base_result = result or {}, base_result or {}
    license = license or (base.license if base is not None else None)
    data = ModelCardData(
        language=language,
        license=license,
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=base.repo_id if base is not None else None,
        tags=["hf-kalman", config.model_type, f"arxiv:{arxiv}", "linear-attention", "hybrid"],
        model_name=repo_id.rpartition("/")[2],
        eval_results=_eval_results(result) or None,
    )
    parts = [
        f"# {repo_id.rpartition('/')[2]}",
        _opening(config, family, arxiv, base),
        _layers(config),
        _loading(config, repo_id),
        _made(folder, result, training_text),
        _quality(result, base_result, base),
        _speed(speed, speed_name, base),
        _cache(config, base_config, base),
        "\n".join(f"![{Path(name).stem.replace('_', ' ')}]({name})" for name in figures),
        _limits(config),
        _citation(arxiv),
    ]
    return _card(data, parts)


def adapter_card(
    folder: str | Path,
    repo_id: str,
    *,
    rows: dict[str, dict[str, Any]] | None = None,
    method: str | None = None,
    about: str = "",
    license: str | None = None,
) -> ModelCard:
    """The card of a peft adapter that was trained by Kalman filtering.

    Args:
        folder: with `adapter_config.json`.
        repo_id: under which it will be found.
        rows: {name of a method: {name of a figure: value}}, measured side by side.
        method: of this adapter in `rows`.
        about: what was measured, on what.
        license: of the weights; unstated when None.
    """
    folder = Path(folder)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    base, targets = config["base_model_name_or_path"], config.get("target_modules") or []
    data = ModelCardData(
        license=license,
        library_name="peft",
        pipeline_tag="text-generation",
        base_model=base,
        base_model_relation="adapter",
        tags=["hf-kalman", "lora", "kalman-fine-tuning"],
    )
    targets = ", ".join(f"`{name}`" for name in sorted(targets)) if not isinstance(targets, str) else f"`{targets}`"
    held = (folder / "kalman_posterior.safetensors").is_file()
    posterior = (
        f"`kalman_posterior.safetensors` holds what the filter knows: adaptation goes on with\n\n"
        f'```python\nfolder = snapshot_download("{repo_id}")\n'
        "callbacks = [KalmanCallback(posterior=folder)]  # of the stock Trainer, from hf_kalman.training\n```"
    )
    parts = [
        f"# {repo_id.rpartition('/')[2]}",
        f"LoRA adapter of rank {config.get('r')} on {targets} of `{base}`, trained by Kalman filtering in one pass "
        "with hf-kalman: gains and innovations in place of an optimizer's steps.",
        f"## Use\n\n```python\nfrom peft import AutoPeftModelForCausalLM\n\n"
        f'model = AutoPeftModelForCausalLM.from_pretrained("{repo_id}")\n```',
        posterior if held else "",
        _rows(rows, method, about) if rows else "",
    ]
    return _card(data, parts)


def validate_card(card: ModelCard, folder: str | Path | None = None) -> None:
    """Raise `ValueError` where a card is not fit to be seen.

    Its metadata are YAML with a library and tags; no placeholder is left; links are whole, and those to files beside
    the card point to something.
    """
    found = []
    try:
        data = yaml.safe_load(card.data.to_yaml()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"validate_card: the metadata are no YAML: {error}") from error
    found += [f"metadata lack {name!r}" for name in ("library_name", "tags") if not data.get(name)]
    found += [f"placeholder {text!r}" for text in _PLACEHOLDERS if text in card.text]
    if not re.search(r"^# \S", card.text, re.MULTILINE):
        found.append("no title")
    for target in re.findall(r"\]\(([^)\s]*)\)", card.text):
        parsed = urlparse(target)
        if parsed.scheme in ("http", "https"):
            whole = "." in parsed.netloc
        else:
            whole = bool(target) and (folder is None or target.startswith("#") or (Path(folder) / target).is_file())
        if not whole:
            found.append(f"link {target!r} leads nowhere")
    if found:
        raise ValueError(f"validate_card: the card is not valid: {'; '.join(found)}.")


def draw_cache(path: str | Path, config: PreTrainedConfig, base_config: PreTrainedConfig | None = None) -> None:
    """Cache of one sequence against context, bfloat16, as an image; needs matplotlib."""
    from matplotlib.figure import Figure

    contexts = [2**n for n in range(9, 18)]
    axis = (figure := Figure(figsize=(5, 3.2), layout="constrained")).subplots()
    for name, one in (("this model", config), ("base model", base_config)):
        if one is not None:
            sizes = [cache_bytes(one, context, torch.bfloat16) / 2**20 for context in contexts]
            axis.plot(contexts, sizes, marker="o", label=name)
    axis.set(xscale="log", yscale="log", xlabel="context, tokens", ylabel="cache of one sequence, MiB")
    axis.legend()
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def _card(data: ModelCardData, parts: list[str]) -> ModelCard:
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(part for part in parts if part) + "\n")
    validate_card(card)
    return card


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines)


def _opening(config, family: str, arxiv: str, base: BaseModel | None) -> str:
    swapped, total = config.layer_types.count("linear_attention"), config.num_hidden_layers
    kind = f"{family}, [arXiv {arxiv}](https://arxiv.org/abs/{arxiv})"
    if base is not None:
        return (
            f"[{base.name}](https://huggingface.co/{base.repo_id}) with {swapped} of its {total} attention layers "
            f"replaced by {kind}. Those layers keep a state of constant size in place of a cache that grows with the "
            "context."
        )
    return f"A language model with {kind} in {swapped} of its {total} layers."


def _layers(config) -> str:
    line = "".join(_LETTERS[kind] for kind in config.layer_types)
    kinds = {"K": "Kalman layer", "a": "softmax attention", "w": "sliding-window attention"}
    legend = ", ".join(f"`{letter}` {text}" for letter, text in kinds.items() if letter in line)
    state = config.linear_state_bytes(2) if "K" in line else 0
    rows = [
        ["layers, from the first", f"`{line}` ({legend})"],
        ["parameters", f"{parameter_count(config) / 1e6:.1f} M"],
        [
            "hidden size, heads, key/value heads",
            f"{config.hidden_size}, {config.num_attention_heads}, {config.num_key_value_heads}",
        ],
        ["state of one Kalman layer, one sequence", f"{state / 1024:.0f} KiB"],
    ]
    return "## Layers\n\n" + _table(["", ""], rows if state else rows[:-1])


def parameter_count(config: PreTrainedConfig) -> int:
    """Parameters of the causal LM of a configuration, tied ones once."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def _loading(config, repo_id: str) -> str:
    head = "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
    tail = (
        f'tokenizer = AutoTokenizer.from_pretrained("{repo_id}")\n'
        'inputs = tokenizer("The filter", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))\n"
    )
    with_package = (
        f"import hf_kalman  # pip install hf-kalman\n{head}"
        f'model = AutoModelForCausalLM.from_pretrained("{repo_id}")\n{tail}'
    )
    text = f"## Use\n\nWith the package:\n\n```python\n{with_package}```"
    if config.model_type in AUTO_MAPS:
        without = f'{head}model = AutoModelForCausalLM.from_pretrained("{repo_id}", trust_remote_code=True)\n{tail}'
        text += (
            f"\n\nWithout it, by the code in this repository (transformers 5.17 to 5.23):\n\n```python\n{without}```"
        )
    return text


def _made(folder: Path | None, result: dict, training_text: str) -> str:
    recipe, stages = result.get("recipe", {}), result.get("stages", [])
    if folder is not None and not stages and (folder / "healing.json").is_file():
        stages = json.loads((folder / "healing.json").read_text(encoding="utf-8")).get("ran", [])
    if not stages:
        return ""
    rows = [[row["stage"], f"{row['tokens']:,}", f"{row['seconds']:.0f} s"] for row in stages]
    text = "## How it was made\n\n" + _table(["stage", "tokens", "time"], rows)
    if recipe:
        device = result.get("environment", {}).get("device", "")
        settings = yaml.safe_dump(
            {key: recipe[key] for key in ("source", "swap", "heal") if key in recipe},
            sort_keys=False,
            width=100,
            default_flow_style=None,
        )
        text += f"\n\nOn one {device}; {result['tokens'] / 1e6:.1f} M tokens in {result['seconds']:.0f} s. Recipe of "
        text += f"`kalman-convert`:\n\n```yaml\n{settings}```"
    return text + (f"\n\nTraining text: {training_text}" if training_text else "")


def _eval_results(result: dict) -> list[EvalResult]:
    quality = result.get("quality", {})
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=measure.dataset,
            dataset_name=measure.dataset_name,
            metric_type=measure.metric,
            metric_value=quality[name],
        )
        for name, measure in MEASURES.items()
        if name in quality
    ]


def _shown(measure: _Measure, value: float | None) -> str:
    if value is None:
        return ""
    return f"{100 * value:.1f} %" if measure.percent else f"{value:.2f}"


def _quality(result: dict, base_result: dict, base: BaseModel | None) -> str:
    ours, theirs = result.get("quality", {}), base_result.get("quality", {})
    if not ours:
        return ""
    head = ["", "this model", *([base.name if base is not None else "base model"] if theirs else []), "over"]
    cases, device = ours.get("cases", {}), result.get("environment", {}).get("device", "")
    rows = []
    for name, measure in MEASURES.items():
        if name in ours:
            unit = "tokens" if measure.counted.endswith("tokens") else "cases"
            over = f"{cases[measure.counted]:,} {unit}" if measure.counted in cases else ""
            other = [_shown(measure, theirs.get(name))] if theirs else []
            rows.append([measure.title, _shown(measure, ours[name]), *other, over])
    text = f"Windows of 1,024 tokens. `benchmarks/conversion_recipes.py` of hf-kalman, {device}."
    return f"## Quality\n\n{_table(head, rows)}\n\n{text}"


def _speed(speed: dict | None, name: str | None, base: BaseModel | None) -> str:
    rows = {r["context"]: r for r in (speed or {}).get("rows", []) if r["model"] == name}
    if not rows:
        return ""
    assert speed is not None
    other = {r["context"]: r for r in speed["rows"] if r["model"] == "teacher"}
    label = base.name if base is not None else "base model"
    table = [
        [
            f"{context:,}",
            f"{row['prefill_tokens_per_s']:,}",
            f"{other[context]['prefill_tokens_per_s']:,}" if context in other else "",
        ]
        for context, row in sorted(rows.items())
    ]
    text = f"One sequence, {speed['dtype']}, {speed['environment']['device']}."
    return f"## Prefill\n\n{_table(['context', 'tokens/s', f'of {label}'], table)}\n\n{text}"


def _cache(config, base_config, base: BaseModel | None) -> str:
    def shown(one, context):
        return f"{cache_bytes(one, context, torch.bfloat16) / 2**20:.1f} MiB"

    head = ["context", "this model"] + ([base.name if base is not None else "base model"] if base_config else [])
    rows = [
        [f"{c:,}", shown(config, c)] + ([shown(base_config, c)] if base_config is not None else []) for c in _CONTEXTS
    ]
    return f"## Cache of one sequence, bfloat16\n\n{_table(head, rows)}"


def _limits(config) -> str:
    lines = [
        "- Kalman layers remember what they can in a state of fixed size: exact recall of many items from far back is "
        "what attention layers are for.",
        "- Tensor parallelism shards the weights of Kalman layers; their states are computed on every rank.",
    ]
    if "sliding_attention" in config.layer_types:
        lines.append("- Sliding-window layers count padding as tokens once it is in their cache.")
    return "## Limits\n\n" + "\n".join(lines)


def _citation(arxiv: str) -> str:
    key, authors, title, year = _CITATIONS[arxiv]
    names = " and ".join(authors.split(", "))
    entry = f"@misc{{{key}{year},\n  title = {{{title}}},\n  author = {{{names}}},\n  year = {{{year}}},\n"
    return f"## Citation\n\n```bibtex\n{entry}  eprint = {{{arxiv}}},\n  archivePrefix = {{arXiv}}\n}}\n```"


def _rows(rows: dict[str, dict[str, Any]], method: str | None, about: str) -> str:
    columns = list(next(iter(rows.values())))
    table = [
        [f"**{name}**" if name == method else name, *(f"{row[c]:.3f}" for c in columns)] for name, row in rows.items()
    ]
    return f"## Measured\n\n{_table(['', *columns], table)}\n\n{about}"
