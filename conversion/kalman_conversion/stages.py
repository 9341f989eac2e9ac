"""Healing as a list of stages that runs as one job: what each stage may be told, and a run that resumes exactly."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback

from .distil import Training, heal_distil, heal_finetune
from .heal import PRIOR_TOKENS, HealingReport, heal_layerwise, heal_rls
from .rls import RecursiveLeastSquares

__all__ = ["STAGES", "Stage", "is_main", "read_stages", "run_stages", "window_counts"]

# `tokens` is how much text a stage uses; with `epochs` it sees it more than once.
_TRAINING = {name: value for name, value in Training()._asdict().items() if name not in ("seed", "progress")}
STAGES: dict[str, dict[str, Any]] = {
    "rls": {"tokens": 65536, "prior_tokens": PRIOR_TOKENS},
    "layerwise": {
        "tokens": 65536,
        "rls_tokens": 65536,
        "prior_tokens": PRIOR_TOKENS,
        "learning_rate": 1e-2,
        "small_factor": 3.0,
        "forgetting": 0.06,
        "batch_size": 1,
        "epochs": 1.0,
    },
    "distil": {
        "tokens": 4194304,
        **_TRAINING,
        "trained": "mixers",
        "logits_weight": 1.0,
        "hidden_weight": 0.0,
        "temperature": 1.0,
        "top_k": None,
        "text_weight": 0.0,
        "repeated": 0.0,
    },
    "finetune": {
        "tokens": 4194304,
        **_TRAINING,
        "learning_rate": 2e-5,
        "small_factor": 1.0,
        "trained": "all",
        "lora_rank": 16,
    },
}
# Settings that may be None, and what they are otherwise.
_OPTIONAL = {"top_k": int, "bf16": bool}


class Stage(NamedTuple):
    """One stage of healing: a name of `STAGES` and all its settings."""

    name: str
    settings: dict[str, Any]

    def count(self, window: int) -> int:
        """Windows of text that the stage needs."""
        return max(self.settings["tokens"], self.settings.get("rls_tokens", 0)) // window


def read_stages(stages: Sequence[str | dict[str, Any]]) -> tuple[Stage, ...]:
    """Stages with all their settings.

    Args:
        stages: in their order, names, or mappings {name: settings that differ from `STAGES`}.

    Raises:
        ValueError: an unknown stage or setting, or a value of another type.
    """
    found = []
    for entry in stages:
        name, given = (entry, {}) if isinstance(entry, str) else _only(entry)
        if name not in STAGES:
            raise ValueError(f"heal: stages must be of {tuple(STAGES)}, got {name!r}.")
        settings = dict(STAGES[name])
        if found and found[-1].name == "rls":
            settings.pop("rls_tokens", None)  # Least squares has just run.
        for setting, value in (given or {}).items():
            if setting not in settings:
                raise ValueError(f"heal: stage {name!r} must hold settings of {tuple(settings)}, got {setting!r}.")
            settings[setting] = _typed(name, setting, value)
        found.append(Stage(name, settings))
    if not found:
        raise ValueError("heal: at least one stage is needed, got none.")
    return tuple(found)


def _only(entry: Any) -> tuple[Any, Any]:
    if not isinstance(entry, dict) or len(entry) != 1:
        raise ValueError(f"heal: a stage must be a name or one {{name: settings}}, got {entry!r}.")
    ((name, given),) = entry.items()
    if given is not None and not isinstance(given, dict):
        raise ValueError(f"heal: the settings of stage {name!r} must be a mapping, got {given!r}.")
    return name, given


def _typed(stage: str, setting: str, value: Any) -> Any:
    default = STAGES[stage][setting]
    kind = _OPTIONAL.get(setting, type(default))
    if value is None and setting in _OPTIONAL:
        return None
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):  # YAML reads 1e-3 as a string.
            value = float(value)
    if isinstance(value, bool) != (kind is bool) or not isinstance(value, kind):
        raise ValueError(f"heal: `{setting}` of stage {stage!r} must be of type {kind.__name__}, got {value!r}.")
    return value


def window_counts(stages: Sequence[Stage], window: int) -> int:
    """Windows of text that the hungriest stage needs.

    Raises:
        ValueError: `window` is below 2 tokens, or a stage has less text than one window.
    """
    if window < 2:
        raise ValueError(f"heal: `window` must be at least 2, got {window}.")
    for name, settings in stages:
        for setting in ("tokens", "rls_tokens"):
            if settings.get(setting, window) < window:
                raise ValueError(
                    f"heal: `{setting}` of stage {name!r} must be at least {window}, a window, got {settings[setting]}."
                )
    return max(stage.count(window) for stage in stages)


def run_stages(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    windows: Tensor,
    stages: Sequence[Stage],
    *,
    work: str | Path,
    seed: int = 0,
    progress: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
    after: Callable[[HealingReport], None] | None = None,
    **more: Any,
) -> list[HealingReport]:
    """Heal a student by stages, each from where the last one ended; changes `student` in place.

    Args:
        student: freshly converted model in float32, also where an interrupted run is continued.
        teacher: the model it was made from; only `finetune` does without.
        windows: (N, T) tokens; a stage reads the first of them.
        stages: see `read_stages`.
        work: folder in which finished stages and checkpoints are kept; a run that finds some there continues from
            them, bit for bit.
        seed: of the order of windows.
        progress: whether to show progress bars.
        callbacks: for the `Trainer` of every stage that has one.
        after: called with the report of each stage that has run, or had run before.
        more: passed on to `transformers.TrainingArguments`.

    Raises:
        ValueError: a stage needs a teacher, or one process.
    """
    _check_run(stages, teacher)
    teacher = cast(PreTrainedModel, teacher)
    work, length = Path(work), windows.shape[1]
    reports: list[HealingReport] = []
    ran: list[tuple[Stage, Path]] = []
    for number, stage in enumerate(stages):
        folder = work / f"{number}-{stage.name}"
        report = _load(student, folder)
        if report is None:
            folder.mkdir(parents=True, exist_ok=True)
            options = {"seed": seed, "progress": progress}
            settings = {k: v for k, v in stage.settings.items() if k not in ("tokens", "rls_tokens")}
            part = windows[: stage.settings["tokens"] // length]
            if stage.name == "rls":
                report, _ = heal_rls(student, teacher, part, work=folder, progress=progress, **settings)
            elif stage.name == "layerwise":
                # Least squares on the tokens of its own, or the run right before it, whose sums are kept.
                own = stage._replace(settings={**stage.settings, "tokens": stage.settings.get("rls_tokens")})
                source, sums = (own, folder / "rls") if "rls_tokens" in stage.settings else ran[-1]
                filters = _filters(student, teacher, windows, source, sums, progress)
                common = {"callbacks": callbacks, **options, **more}
                report = heal_layerwise(student, teacher, part, filters, work=folder, **settings, **common)
            else:
                training = Training(**{k: settings.pop(k) for k in _TRAINING}, **options)
                common = {"work": folder, "training": training, "callbacks": callbacks, **settings, **more}
                if stage.name == "distil":
                    report = heal_distil(student, teacher, part, **common)
                else:
                    report = heal_finetune(student, part, **common)
            _save(student, folder, report)
        reports.append(report)
        ran.append((stage, folder))
        if after is not None:
            after(report)
    return reports


def _check_run(stages: Sequence[Stage], teacher: PreTrainedModel | None) -> None:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    for stage in stages:
        if teacher is None and stage.name != "finetune":
            raise ValueError(f"heal: stage {stage.name!r} needs a `teacher`.")
        if processes > 1 and stage.name in ("rls", "layerwise"):
            raise ValueError(
                f"heal: stage {stage.name!r} runs in one process, got {processes}; run it "
                "alone first and the end-to-end stages on several processes after it."
            )


def _filters(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    windows: Tensor,
    source: Stage,
    sums: Path,
    progress: bool,
) -> dict[int, RecursiveLeastSquares]:
    """The sums that layerwise healing starts from, of the tokens and with the prior that `source` says."""
    sums.mkdir(exist_ok=True)
    part, prior = windows[: source.settings["tokens"] // windows.shape[1]], source.settings["prior_tokens"]
    return heal_rls(student, teacher, part, prior_tokens=prior, work=sums, progress=progress)[1]


def is_main() -> bool:
    """Whether this process is the one that writes."""
    return os.environ.get("RANK", "0") == "0"


def _save(student: PreTrainedModel, folder: Path, report: HealingReport) -> None:
    """What the student is after a stage; the report, written last, says that it is whole."""
    if not is_main():
        return
    save_file({n: p.detach().contiguous() for n, p in student.named_parameters()}, folder / "student.safetensors")
    temporary = folder / "report.tmp"
    temporary.write_text(json.dumps(report._asdict()), encoding="utf-8")
    temporary.replace(folder / "report.json")


@torch.no_grad()
def _load(student: PreTrainedModel, folder: Path) -> HealingReport | None:
    if not (folder / "report.json").is_file():
        return None
    weights = load_file(folder / "student.safetensors")
    for name, parameter in student.named_parameters():
        if not torch.equal(parameter.cpu(), weights[name]):
            parameter.data = weights[name].to(parameter.device)
    return HealingReport(**json.loads((folder / "report.json").read_text(encoding="utf-8")))
