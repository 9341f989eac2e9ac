"""`kalman-convert`: swap, heal, verify, import-kla, export-kla."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from hf_kalman.cache import cache_bytes

from .files import check_output, new_folder
from .foreign.kla import export_kla, import_kla
from .heal import PRIOR_TOKENS, check_pair, heal_layerwise, heal_rls, layer_errors
from .plan import MIXERS, mixer_options, plan_conversion
from .recipe import load_recipe
from .swap import check_checkpoint, load_model, swap_attention
from .text import read_documents, token_windows
from .verify import verify

__all__ = ["main"]

_HEAL_DEFAULTS = {
    "method": "layerwise",
    "window": 1024,
    "rls_tokens": 65536,
    "tokens": 65536,
    "prior_tokens": PRIOR_TOKENS,
    "learning_rate": 1e-2,
    "small_factor": 3.0,
    "forgetting": 0.06,
    "batch_size": 1,
    "epochs": 1.0,
    "seed": 0,
}
_LAYERWISE = ("learning_rate", "small_factor", "forgetting", "prior_tokens", "batch_size", "epochs", "seed")
# Windows held back from healing, on which the layers' errors are reported.
_HELD_OUT = 4


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; 0 when it succeeded, 2 with one line on stderr when it could not."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"kalman-convert {options.command}: {error}\n")
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kalman-convert", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    swap = commands.add_parser("swap", help="replace attention layers of a pretrained model by Kalman mixers")
    swap.set_defaults(run=_swap)
    swap.add_argument("--model", required=True, help="folder or Hub id of a Llama, Mistral, Qwen2 or Qwen3 causal LM")
    swap.add_argument("--recipe", help="YAML recipe; the options below override it")
    swap.add_argument("--mixer", help=f"one of {', '.join(MIXERS)}")
    swap.add_argument("--layers", help="indices like 2,4,7, or half, all, none")
    swap.add_argument("--initialisation", help="identity or reference")
    swap.add_argument(
        "--option", action="append", default=[], metavar="FIELD=VALUE", help="field of GKAConfig or KLAConfig"
    )
    swap.add_argument("--seed", type=int)
    swap.add_argument("--max-shard-size", default="5GB", help="of one safetensors file")
    swap.add_argument("--output", required=True, help="folder to write; must not exist")
    swap.add_argument("--dry-run", action="store_true", help="say what would be done and write nothing")

    heal = commands.add_parser("heal", help="make the mixers compute what the attention computed")
    heal.set_defaults(run=_heal)
    heal.add_argument("--model", required=True, help="converted model")
    heal.add_argument("--teacher", required=True, help="the model that it was made from")
    heal.add_argument("--data", required=True, help="text: .txt, .txt.gz, .jsonl or .jsonl.gz")
    heal.add_argument("--recipe", help="YAML recipe; the options below override it")
    heal.add_argument("--method", choices=("rls", "layerwise"), help="layerwise starts from rls")
    heal.add_argument("--window", type=int, help="tokens read at once")
    heal.add_argument("--rls-tokens", type=int, help="tokens for least squares")
    heal.add_argument("--tokens", type=int, help="tokens for layerwise distillation")
    heal.add_argument("--prior-tokens", type=float, help="weight of the prior of least squares, in tokens")
    heal.add_argument("--learning-rate", type=float)
    heal.add_argument("--small-factor", type=float, help="on the learning rate of decays, gates and convolutions")
    heal.add_argument("--forgetting", type=float, help="share of the past that the filtered read-out forgets per batch")
    heal.add_argument("--batch-size", type=int)
    heal.add_argument("--epochs", type=float)
    heal.add_argument("--seed", type=int)
    heal.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    heal.add_argument("--output", required=True, help="folder to write; OUTPUT.work holds what a rerun continues from")
    heal.add_argument("--dry-run", action="store_true", help="say what would be done and write nothing")

    check = commands.add_parser("verify", help="compare a converted model with the model it was made from")
    check.set_defaults(run=_verify)
    check.add_argument("--model", required=True)
    check.add_argument("--teacher", required=True)
    check.add_argument("--data", required=True, help="text that was not used for healing")
    check.add_argument("--window", type=int, default=1024)
    check.add_argument("--tokens", type=int, default=4096)
    check.add_argument("--context", type=int, default=8192, help="context length for the cache sizes")
    check.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")

    for name, other, run in (("import-kla", "into one of", _import_kla), ("export-kla", "out of one of", _export_kla)):
        foreign = commands.add_parser(name, help=f"a checkpoint of the kla package {other} this package")
        foreign.set_defaults(run=run)
        foreign.add_argument("--model", required=True, help="folder with the checkpoint")
        foreign.add_argument("--output", required=True, help="folder to write; must not exist")
    return parser


def _import_kla(options: argparse.Namespace) -> int:
    model = import_kla(options.model, options.output)
    _say(f"{sum(p.numel() for p in model.parameters()):,} parameters written to {options.output}")
    return 0


def _export_kla(options: argparse.Namespace) -> int:
    export_kla(load_model(options.model), options.output)
    _say(f"written to {options.output}")
    return 0


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _merge(options: argparse.Namespace, section: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Defaults, overridden by the recipe, overridden by the command line."""
    given = {name: getattr(options, name) for name in defaults if getattr(options, name) is not None}
    return {**defaults, **section, **given}


def _mixer_fields(pairs: list[str]) -> dict[str, Any]:
    fields = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator:
            raise ValueError(f"`--option` must look like FIELD=VALUE, got {pair!r}.")
        fields[name] = yaml.safe_load(value)
    return fields


def _swap(options: argparse.Namespace) -> int:
    section = load_recipe(options.recipe).get("swap", {}) if options.recipe else {}
    defaults = {"mixer": "gka", "layers": "half", "initialisation": "identity", "seed": 0}
    settings = _merge(options, {k: v for k, v in section.items() if k != "options"}, defaults)
    fields = {**section.get("options", {}), **_mixer_fields(options.option)}
    if Path(options.model).exists():
        check_checkpoint(options.model)
    source = AutoConfig.from_pretrained(options.model)
    fields = mixer_options(source, settings["initialisation"], fields, settings["mixer"])
    plan = plan_conversion(source, settings["mixer"], settings["layers"], **fields)
    check_output(options.output)
    before, after = (cache_bytes(c, 8192, torch.float32) for c in (source, plan.config))
    _say(f"{options.model}: {plan.source_type}, {source.num_hidden_layers} layers")
    _say(f"{settings['mixer']} in {len(plan.layers)} layers: {', '.join(map(str, plan.layers)) or 'none'}")
    _say(f"cache of one sequence at 8192 tokens, float32: {before / 2**20:.1f} MiB -> {after / 2**20:.1f} MiB")
    if options.dry_run:
        _say("dry run: nothing written")
        return 0
    model = swap_attention(options.model, **settings, progress=True, **fields)
    record = {"model": str(options.model), **settings, "layers": list(plan.layers), "options": fields}
    _save(model, options.model, options.output, "conversion.json", record, options.max_shard_size)
    _say(f"written to {options.output}; heal it with `kalman-convert heal`")
    return 0


def _save(
    model: PreTrainedModel, tokenizer_from: str, output: str, name: str, record: dict, max_shard_size: str = "5GB"
) -> None:
    """Model, tokenizer and record of the conversion, all or nothing; earlier records are carried along."""
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    check_output(output, needed=size + (64 << 20))
    with new_folder(output) as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        AutoTokenizer.from_pretrained(tokenizer_from).save_pretrained(folder)
        for earlier in ("conversion.json", "healing.json"):
            if earlier != name and (Path(tokenizer_from) / earlier).is_file():
                shutil.copy(Path(tokenizer_from) / earlier, folder / earlier)
        (folder / name).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _heal(options: argparse.Namespace) -> int:
    section = load_recipe(options.recipe).get("heal", {}) if options.recipe else {}
    settings = _merge(options, section, _HEAL_DEFAULTS)
    layerwise = settings["method"] == "layerwise"
    length = settings["window"]
    for name in ("window", "rls_tokens", *(("tokens",) if layerwise else ())):
        if settings[name] < (2 if name == "window" else length):
            raise ValueError(
                f"`--{name.replace('_', '-')}` must be at least {2 if name == 'window' else length}, got "
                f"{settings[name]}."
            )
    documents = read_documents(options.data)
    check_output(options.output)
    for folder in (options.model, options.teacher):
        if Path(folder).exists():
            check_checkpoint(folder)
    rls_windows = settings["rls_tokens"] // length
    train_windows = settings["tokens"] // length if layerwise else 0
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    windows = token_windows(tokenizer, documents, length, max(rls_windows, train_windows) + _HELD_OUT)
    _say(f"{settings['method']} on {windows.numel() - _HELD_OUT * length} tokens of {options.data}")
    work = Path(f"{options.output}.work")
    identity = {**settings, "model": options.model, "teacher": options.teacher, "data": options.data}
    _check_work(work, identity)
    teacher = load_model(options.teacher, torch.float32, options.device)
    student = load_model(options.model, torch.float32, options.device)
    check_pair(student, teacher)
    if options.dry_run:
        _say("dry run: nothing written")
        return 0
    work.mkdir(parents=True, exist_ok=True)
    (work / "settings.json").write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")
    held_out, windows = windows[:_HELD_OUT], windows[_HELD_OUT:]
    prior = settings["prior_tokens"]
    report, filters = heal_rls(student, teacher, windows[:rls_windows], prior_tokens=prior, work=work)
    reports = [report]
    errors = {"rls": layer_errors(student, teacher, held_out)}
    if layerwise:
        chosen = {name: settings[name] for name in _LAYERWISE}
        folder = work / "layerwise"
        reports.append(heal_layerwise(student, teacher, windows[:train_windows], filters, work=folder, **chosen))
        errors["layerwise"] = layer_errors(student, teacher, held_out)
    stages = [{"stage": r.stage, "tokens": r.tokens, "seconds": round(r.seconds, 1)} for r in reports]
    _save(student, options.model, options.output, "healing.json", {**identity, "stages": stages, "errors": errors})
    shutil.rmtree(work)
    for stage in stages:
        mean = sum(errors[stage["stage"]].values()) / len(errors[stage["stage"]])
        _say(f"{stage['stage']}: {stage['tokens']} tokens, {stage['seconds']} s, mean relative error {mean:.3f}")
    _say(f"written to {options.output}")
    return 0


def _check_work(work: Path, identity: dict[str, Any]) -> None:
    """Only the run that left a work folder may continue it."""
    file = work / "settings.json"
    if not file.is_file():
        return
    found = json.loads(file.read_text(encoding="utf-8"))
    changed = sorted(name for name in identity if found.get(name) != identity[name])
    if changed:
        raise ValueError(
            f"{str(work)!r} was left by a run with other settings ({', '.join(changed)}); repeat that run to finish "
            "it, or remove the folder."
        )


def _verify(options: argparse.Namespace) -> int:
    documents = read_documents(options.data)
    for folder in (options.model, options.teacher):
        if Path(folder).exists():
            check_checkpoint(folder)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    windows = token_windows(tokenizer, documents, options.window, max(1, options.tokens // options.window))
    student = load_model(options.model, torch.float32, options.device)
    teacher = load_model(options.teacher, torch.float32, options.device)
    check_pair(student, teacher)
    result = verify(student, teacher, windows, options.context, progress=True)
    _say(json.dumps(result, indent=2))
    return 0 if not result["changed_weights"] else 1


if __name__ == "__main__":
    sys.exit(main())
