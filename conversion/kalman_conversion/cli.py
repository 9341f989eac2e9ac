"""`kalman-convert`: select, swap, heal and its stages one by one, verify, foreign checkpoints in and out, the Hub."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import ModelCard
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from hf_kalman.cache import cache_bytes
from hf_kalman.hub import BaseModel, check_checkpoint, model_card, push_to_hub
from hf_kalman.hub.card import draw_cache

from .files import check_output, new_folder
from .foreign.awslabs import export_awslabs, import_awslabs
from .foreign.kla import export_kla, import_kla
from .heal import HealingReport, check_pair, layer_errors
from .layer_selection import CRITERIA, choose_layers, plot_ranking, rank_layers, read_ranking
from .plan import FAMILIES, MIXERS, mixer_options, plan_conversion
from .recipe import load_recipe
from .stages import STAGES, Stage, is_main, read_stages, run_stages, window_counts
from .swap import check_source, load_model, swap_checkpoint
from .text import read_documents, token_windows
from .verify import verify

__all__ = ["main"]

_STAGE_HELP = {
    "rls": "exact recursive least squares for what each mixer's output is linear in: no gradients",
    "layerwise": "each mixer against the teacher's attention output on the teacher's hidden states",
    "distil": "the student's next tokens, final hidden states or both against the teacher's, end to end",
    "finetune": "next-token prediction on text, of everything, the mixers or LoRA adapters",
}
_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
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
    swap.add_argument("--model", required=True, help=f"folder or Hub id of a causal LM: {', '.join(FAMILIES)}")
    swap.add_argument("--recipe", help="YAML recipe; the options below override it")
    swap.add_argument("--mixer", help=f"one of {', '.join(MIXERS)}")
    swap.add_argument("--layers", help="indices like 2,4,7, or half, all, none, or auto:COUNT with --ranking or --data")
    swap.add_argument("--ranking", help="what `select` wrote, for --layers auto:COUNT")
    swap.add_argument("--criterion", default="greedy", help=f"for --layers auto:COUNT; one of {', '.join(CRITERIA)}")
    _add_ranking(swap, required=False)
    swap.add_argument("--initialisation", help="identity or reference")
    swap.add_argument(
        "--option", action="append", default=[], metavar="FIELD=VALUE", help="field of GKAConfig or KLAConfig"
    )
    swap.add_argument("--seed", type=int)
    swap.add_argument("--device", default=_DEVICE, help="for --layers auto:COUNT")
    swap.add_argument("--output", required=True, help="folder to write; must not exist")
    swap.add_argument("--dry-run", action="store_true", help="say what would be done and write nothing")

    select = commands.add_parser("select", help="measure which attention layers the model misses least")
    select.set_defaults(run=_select)
    select.add_argument("--model", required=True, help="folder or Hub id of a causal LM that can be converted")
    select.add_argument("--mixer", default="gka", help=f"one of {', '.join(MIXERS)}")
    select.add_argument("--count", type=int, help="layers that the greedy criterion chooses; half of them by default")
    select.add_argument(
        "--option", action="append", default=[], metavar="FIELD=VALUE", help="field of GKAConfig or KLAConfig"
    )
    _add_ranking(select, required=True)
    select.add_argument("--device", default=_DEVICE)
    select.add_argument("--output", required=True, help="JSON file to write, with a .png beside it; must not exist")

    heal = commands.add_parser("heal", help="make the mixers compute what the attention computed, by stages")
    heal.add_argument("--recipe", help="YAML recipe; the options below override it")
    heal.add_argument("--stages", nargs="+", help=f"of {', '.join(STAGES)}; rls and layerwise when nothing is said")
    heal.add_argument(
        "--set", action="append", default=[], metavar="STAGE.SETTING=VALUE", help="setting of a stage; may be repeated"
    )
    _add_healing(heal)
    for name, settings in STAGES.items():
        stage = commands.add_parser(name, help=_STAGE_HELP[name])
        for setting, default in settings.items():
            stage.add_argument(f"--{setting.replace('_', '-')}", type=yaml.safe_load, help=f"{default} by default")
        _add_healing(stage)

    check = commands.add_parser("verify", help="compare a converted model with the model it was made from")
    check.set_defaults(run=_verify)
    check.add_argument("--model", required=True)
    check.add_argument("--teacher", required=True)
    check.add_argument("--data", required=True, help="text that was not used for healing")
    check.add_argument("--window", type=int, default=1024)
    check.add_argument("--tokens", type=int, default=4096)
    check.add_argument("--context", type=int, default=8192, help="context length for the cache sizes")
    check.add_argument("--device", default=_DEVICE)

    for name, other, run in (
        ("import-kla", "a checkpoint of the kla package into one of this package", _import_kla),
        ("export-kla", "a checkpoint of this package into one of the kla package", _export_kla),
        ("import-awslabs", "a checkpoint of awslabs/hybrid-model-factory into one of this package", _import_awslabs),
        ("export-awslabs", "a checkpoint of this package into one of awslabs/hybrid-model-factory", _export_awslabs),
    ):
        foreign = commands.add_parser(name, help=other)
        foreign.set_defaults(run=run)
        foreign.add_argument("--model", required=True, help="folder with the checkpoint")
        foreign.add_argument("--output", required=True, help="folder to write; must not exist")
    _add_hub(commands)
    return parser


def _add_hub(commands) -> None:
    """Cards, push, and whether a checkpoint is whole."""
    card = commands.add_parser("card", help="write the model card of a checkpoint from what is known of it")
    card.set_defaults(run=_card)
    card.add_argument("--output", required=True, help="folder for README.md and cache.png")
    push = commands.add_parser("push", help="weights, tokenizer, card, figures and code to the Hub, in one commit")
    push.set_defaults(run=_push)
    push.add_argument("--public", action="store_true", help="a repository that is created is private otherwise")
    push.add_argument("--without-code", action="store_true", help="who loads it must install hf-kalman then")
    push.add_argument("--revision", help="branch")
    push.add_argument("--message", default="Upload model", help="of the commit")
    push.add_argument("--dry-run", action="store_true", help="list every file and its size and send nothing")
    for command in (card, push):
        command.add_argument("--model", required=True, help="folder of the checkpoint")
        command.add_argument("--repo", required=True, help="owner/name on the Hub")
        command.add_argument("--base-model", help="Hub id of the model that it was converted from")
        command.add_argument("--license", help="of the weights, like apache-2.0; a base model needs one")
        command.add_argument("--teacher", help="folder of the base model, for its cache beside ours")
        command.add_argument("--result", help="JSON of benchmarks/conversion_recipes.py for this model")
        command.add_argument("--teacher-result", help="the same for the base model")
        command.add_argument("--training-text", default="", help="what it was trained on, in a sentence")
    check = commands.add_parser("check", help="whether a checkpoint is whole, and what to do where it is not")
    check.set_defaults(run=_check)
    check.add_argument("--model", required=True, help="folder or Hub id")
    check.add_argument("--revision", help="of the repository")


def _add_ranking(parser: argparse.ArgumentParser, required: bool) -> None:
    """What a ranking of layers is measured on."""
    parser.add_argument("--data", required=required, help="text for least squares: .txt or .jsonl, plain or .gz")
    parser.add_argument("--selection-data", help="text for the criteria; the start of --data when it is not given")
    parser.add_argument("--window", type=int, default=1024, help="tokens read at once")
    parser.add_argument("--rls-tokens", type=int, default=65536)
    parser.add_argument("--selection-tokens", type=int, default=8192)
    parser.add_argument("--keep", default="0,1", help="layers that must stay attention, like 0,1")


def _add_healing(parser: argparse.ArgumentParser) -> None:
    """What `heal` and its single stages have in common."""
    parser.set_defaults(run=_heal)
    parser.add_argument("--model", required=True, help="converted model")
    parser.add_argument("--teacher", help="the model that it was made from; finetune does without")
    parser.add_argument("--data", required=True, help="text: .txt, .txt.gz, .jsonl or .jsonl.gz")
    parser.add_argument("--window", type=int, help="tokens read at once, 1024 by default")
    parser.add_argument("--seed", type=int, help="of the order of windows, 0 by default")
    parser.add_argument("--report-to", default="none", help="where the Trainer logs: tensorboard, wandb, none, ...")
    parser.add_argument("--device", default=_DEVICE)
    parser.add_argument(
        "--output", required=True, help="folder to write; OUTPUT.work holds what a rerun continues from"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be done and write nothing")


def _import_kla(options: argparse.Namespace) -> int:
    model = import_kla(options.model, options.output)
    _say(f"{sum(p.numel() for p in model.parameters()):,} parameters written to {options.output}")
    return 0


def _export_kla(options: argparse.Namespace) -> int:
    export_kla(load_model(options.model), options.output)
    _say(f"written to {options.output}")
    return 0


def _import_awslabs(options: argparse.Namespace) -> int:
    config = import_awslabs(options.model, options.output)
    mixers = (config.layer_types or []).count("linear_attention")
    _say(f"{config.num_hidden_layers} layers, {mixers} of them GKA, written to {options.output}")
    return 0


def _export_awslabs(options: argparse.Namespace) -> int:
    _say(f"{export_awslabs(options.model, options.output)} written to {options.output}")
    return 0


def _write_card(options: argparse.Namespace, folder: Path) -> ModelCard:
    """The card of a checkpoint; its figure goes into `folder`."""
    if (options.base_model is None) != (options.license is None):
        raise ValueError("`--base-model` and `--license` must be given together.")
    base = options.base_model and BaseModel(options.base_model, options.license, options.base_model.split("/")[-1])
    config = AutoConfig.from_pretrained(options.model)
    base_config = AutoConfig.from_pretrained(options.teacher) if options.teacher else None
    result, base_result = (
        json.loads(Path(path).read_text(encoding="utf-8")) if path else None
        for path in (options.result, options.teacher_result)
    )
    card = model_card(
        options.model,
        options.repo,
        base=base or None,
        base_config=base_config,
        result=result,
        base_result=base_result,
        figures=("cache.png",),
        training_text=options.training_text,
    )
    draw_cache(folder / "cache.png", config, base_config)
    return card


def _card(options: argparse.Namespace) -> int:
    check_output(options.output)
    with new_folder(options.output) as folder:
        (folder / "README.md").write_text(str(_write_card(options, folder)), encoding="utf-8")
    _say(f"written to {options.output}")
    return 0


def _push(options: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as work:
        report = push_to_hub(
            options.model,
            options.repo,
            card=_write_card(options, Path(work)),
            figures=[Path(work) / "cache.png"],
            code=False if options.without_code else None,
            private=not options.public,
            dry_run=options.dry_run,
            revision=options.revision,
            message=options.message,
        )
    for name, size in report.files.items():
        _say(f"{size:>14,}  {name}")
    _say("dry run: nothing sent" if report.url is None else f"pushed: {report.url}")
    return 0


def _check(options: argparse.Namespace) -> int:
    names = check_checkpoint(options.model, revision=options.revision)
    _say(f"{options.model}: {len(names)} weight files, whole")
    return 0


def _say(text: str) -> None:
    if not is_main():
        return
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _merge(options: argparse.Namespace, section: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Defaults, overridden by the recipe, overridden by the command line."""
    given = {name: getattr(options, name) for name in defaults if getattr(options, name) is not None}
    return {**defaults, **section, **given}


def _assignments(option: str, pairs: list[str]) -> dict[str, Any]:
    """NAME=VALUE pairs with the values read as YAML."""
    fields = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator:
            raise ValueError(f"`{option}` must look like NAME=VALUE, got {pair!r}.")
        fields[name] = yaml.safe_load(value)
    return fields


def _rank(options: argparse.Namespace, count: int | None, mixer: str, fields: dict[str, Any]) -> dict[str, Any]:
    """The ranking of `rank_layers` on the text that the options name."""
    try:
        keep = [int(part) for part in options.keep.split(",") if part]
    except ValueError:
        raise ValueError(f"`--keep` must be indices like 0,1, got {options.keep!r}.") from None
    length = options.window
    numbers = {name: getattr(options, name) // length for name in ("rls_tokens", "selection_tokens")}
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"`--{name.replace('_', '-')}` must be at least {length}, got {getattr(options, name)}.")
    if Path(options.model).exists():
        check_source(options.model)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    healing, measuring = numbers["rls_tokens"] + 1, numbers["selection_tokens"]
    if options.selection_data is None:
        windows = token_windows(tokenizer, read_documents(options.data), length, healing + measuring)
        selection, windows = windows[:measuring], windows[measuring:]
    else:
        windows = token_windows(tokenizer, read_documents(options.data), length, healing)
        selection = token_windows(tokenizer, read_documents(options.selection_data), length, measuring)
    teacher = load_model(options.model, torch.float32, options.device).eval()
    count = (teacher.config.num_hidden_layers - len(keep)) // 2 if count is None else count
    arguments: dict[str, Any] = {"count": count, "mixer": mixer, "keep": keep, **fields}
    return rank_layers(teacher, windows, selection, **arguments)


def _select(options: argparse.Namespace) -> int:
    output = Path(options.output)
    if output.exists():
        raise FileExistsError(f"`--output` {str(output)!r} exists already; choose another file or remove it.")
    if output.suffix != ".json":
        raise ValueError(f"`--output` must end in .json, got {output.name!r}.")
    ranking = _rank(options, options.count, options.mixer, _assignments("--option", options.option))
    ranking["model"] = str(options.model)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_suffix(".tmp")
    temporary.write_text(json.dumps(ranking, indent=1) + "\n", encoding="utf-8")
    temporary.replace(output)
    plot_ranking(ranking, output.with_suffix(".png"))
    chosen = choose_layers(ranking, len(ranking["greedy"]))
    _say(f"greedy: {', '.join(str(index) for index, *_ in ranking['greedy'])}")
    _say(f"written to {output}; use it with `kalman-convert swap --layers auto:{len(chosen)} --ranking {output}`")
    return 0


def _chosen_layers(options: argparse.Namespace, layers: Any, mixer: str, fields: dict[str, Any]) -> Any:
    """`layers`, with auto:COUNT turned into indices."""
    if not isinstance(layers, str) or not layers.startswith("auto"):
        return layers
    word, _, number = layers.partition(":")
    if word != "auto" or not number.isdigit():
        raise ValueError(f"`--layers` must look like auto:COUNT, got {layers!r}.")
    if options.ranking is not None:
        return choose_layers(read_ranking(options.ranking), int(number), options.criterion)
    if options.data is None:
        raise ValueError(f"`--layers {layers}` needs `--ranking`, or `--data` to measure on.")
    return choose_layers(_rank(options, int(number), mixer, fields), int(number), options.criterion)


def _swap(options: argparse.Namespace) -> int:
    section = load_recipe(options.recipe).get("swap", {}) if options.recipe else {}
    defaults = {"mixer": "gka", "layers": "half", "initialisation": "identity", "seed": 0}
    settings = _merge(options, {k: v for k, v in section.items() if k != "options"}, defaults)
    fields = {**section.get("options", {}), **_assignments("--option", options.option)}
    folder = _local(options.model)
    check_source(folder)
    source = AutoConfig.from_pretrained(folder)
    fields = mixer_options(source, settings["initialisation"], fields, settings["mixer"])
    check_output(options.output)
    settings["layers"] = _chosen_layers(options, settings["layers"], settings["mixer"], fields)
    plan = plan_conversion(source, settings["mixer"], settings["layers"], **fields)
    before, after = (cache_bytes(c, 8192, torch.float32) for c in (source, plan.config))
    _say(f"{options.model}: {plan.source_type}, {source.num_hidden_layers} layers")
    _say(f"{settings['mixer']} in {len(plan.layers)} layers: {', '.join(map(str, plan.layers)) or 'none'}")
    _say(f"cache of one sequence at 8192 tokens, float32: {before / 2**20:.1f} MiB -> {after / 2**20:.1f} MiB")
    if options.dry_run:
        _say("dry run: nothing written")
        return 0
    told = {"model": str(options.model), **settings, "layers": list(plan.layers), "options": fields}

    def record(target: Path) -> None:
        (target / "conversion.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")

    swap_checkpoint(folder, options.output, record=record, **settings, **fields)
    _say(f"written to {options.output}; heal it with `kalman-convert heal`")
    return 0


def _local(model: str) -> Path:
    """The folder of a model, fetched from the Hub when there is none."""
    if Path(model).exists():
        return Path(model)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]))


def _save(model: PreTrainedModel, tokenizer_from: str, output: str, name: str, record: dict) -> None:
    """Model, tokenizer and record of the conversion, all or nothing; earlier records are carried along."""
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    check_output(output, needed=size + (64 << 20))
    with new_folder(output) as folder:
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(tokenizer_from).save_pretrained(folder)
        for earlier in ("conversion.json", "healing.json"):
            if earlier != name and (Path(tokenizer_from) / earlier).is_file():
                shutil.copy(Path(tokenizer_from) / earlier, folder / earlier)
        (folder / name).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _healing(options: argparse.Namespace) -> tuple[tuple[Stage, ...], int, int]:
    """Stages, window and seed: defaults, overridden by the recipe, overridden by the command line."""
    section: dict[str, Any] = {}
    if options.command in STAGES:
        given = {name: getattr(options, name) for name in STAGES[options.command]}
        stages: Any = [{options.command: {name: value for name, value in given.items() if value is not None}}]
    else:
        section = load_recipe(options.recipe).get("heal", {}) if options.recipe else {}
        stages = options.stages or section.get("stages", ["rls", "layerwise"])
        stages = _with_settings(stages, options.set)
    settings = _merge(options, {k: v for k, v in section.items() if k != "stages"}, {"window": 1024, "seed": 0})
    return read_stages(stages), settings["window"], settings["seed"]


def _with_settings(stages: list[Any], pairs: list[str]) -> list[Any]:
    """Stages with STAGE.SETTING=VALUE put into every stage of that name."""
    own = {stage.name: {} for stage in read_stages(stages)}
    for name, value in _assignments("--set", pairs).items():
        stage, _, setting = name.partition(".")
        if stage not in own or not setting:
            raise ValueError(f"`--set` must look like STAGE.SETTING=VALUE with a stage of {tuple(own)}, got {name!r}.")
        own[stage][setting] = value
    pieces = [(stage, {}) if isinstance(stage, str) else next(iter(stage.items())) for stage in stages]
    return [{name: {**(given or {}), **own[name]}} for name, given in pieces]


def _load_pair(options: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedModel | None]:
    """Student and, where one is given, teacher, on this process's device."""
    device = options.device
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    student = load_model(options.model, torch.float32, device)
    if options.teacher is None:
        return student, None
    teacher = load_model(options.teacher, torch.float32, device)
    check_pair(student, teacher)
    return student, teacher


def _heal(options: argparse.Namespace) -> int:
    stages, length, seed = _healing(options)
    needed = window_counts(stages, length) + _HELD_OUT
    documents = read_documents(options.data)
    check_output(options.output)
    if options.teacher is None and any(stage.name != "finetune" for stage in stages):
        raise ValueError("`--teacher` must be given for all stages but finetune.")
    for folder in filter(None, (options.model, options.teacher)):
        if Path(folder).exists():
            check_source(folder)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    windows = token_windows(tokenizer, documents, length, needed)
    names = ", ".join(stage.name for stage in stages)
    _say(f"{names} on up to {(needed - _HELD_OUT) * length} tokens of {options.data}")
    work = Path(f"{options.output}.work")
    told = [{stage.name: stage.settings} for stage in stages]
    identity = {"model": options.model, "teacher": options.teacher, "data": options.data}
    identity = {**identity, "window": length, "seed": seed, "stages": told}
    _check_work(work, identity)
    student, teacher = _load_pair(options)
    if options.dry_run:
        _say("dry run: nothing written")
        return 0
    work.mkdir(parents=True, exist_ok=True)
    if is_main():
        (work / "settings.json").write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")
    held_out, windows, ran = windows[:_HELD_OUT], windows[_HELD_OUT:], []

    def after(report: HealingReport) -> None:
        ran.append({"stage": report.stage, "tokens": report.tokens, "seconds": round(report.seconds, 1)})
        text = f"{report.stage}: {report.tokens} tokens, {report.seconds:.1f} s"
        if teacher is not None:
            errors = layer_errors(student, teacher, held_out)
            ran[-1]["layer_errors"] = errors
            text += f", mean relative error {sum(errors.values()) / len(errors):.3f}"
        _say(text)

    report_to = [] if options.report_to == "none" else options.report_to.split(",")
    run_stages(student, teacher, windows, stages, work=work, seed=seed, after=after, report_to=report_to)
    if is_main():
        record = {**identity, "ran": ran}
        earlier = Path(options.model) / "healing.json"
        if earlier.is_file():
            record["earlier"] = json.loads(earlier.read_text(encoding="utf-8"))
        _save(student, options.model, options.output, "healing.json", record)
        shutil.rmtree(work)
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
            check_source(folder)
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
