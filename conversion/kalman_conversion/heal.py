"""Healing: make swapped mixers compute what the attention that they replaced computed.

Two stages that a laptop can do. Both look only at the swapped layers, each on the teacher's own hidden states against
the teacher's own attention output, with one forward pass of the teacher for all of them:

    rls         exact recursive least squares for what the mixer's output is linear in: no gradients, one pass
    layerwise   gradient distillation of the whole mixers, started by rls, on `transformers.Trainer`
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from hf_kalman import GKAForCausalLM
from hf_kalman.gka.modeling_gka import GKAMixer
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from .rls import RecursiveLeastSquares
from .taps import AttentionTaps

__all__ = ["HealingReport", "LayerwiseDistillation", "check_pair", "heal_layerwise", "heal_rls", "layer_errors"]

# Weight of the belief "the output is zero" in recursive least squares, in tokens; benchmarks/results/healing_rls.json.
PRIOR_TOKENS = 500.0
# Parameters that shape the decays, gates and convolutions: few, and far from where they should be at the start.
_SMALL = ("A_log", "dt_bias", "a_proj", "b_proj", "alpha_proj", "conv1d")


class HealingReport(NamedTuple):
    """What a stage did: its name, the tokens it read, its seconds, and each layer's relative error afterwards."""

    stage: str
    tokens: int
    seconds: float
    errors: dict[int, float]


def swapped_layers(student: PreTrainedModel) -> tuple[int, ...]:
    """Indices of the student's recurrent layers."""
    return tuple(i for i, kind in enumerate(student.config.layer_types) if kind == "linear_attention")


def check_pair(student: PreTrainedModel, teacher: PreTrainedModel) -> tuple[int, ...]:
    """The swapped layers of a student, after making sure that the teacher is the model it was made from.

    Raises:
        ValueError: the teacher has another vocabulary, size or number of layers, or no attention where it is needed;
            or the student has no swapped layer.
    """
    for name in ("vocab_size", "hidden_size", "num_hidden_layers"):
        mine, other = getattr(student.config, name), getattr(teacher.config, name, None)
        if mine != other:
            raise ValueError(
                f"heal: `teacher` must be the model that the student was made from; its {name} is {other}, the "
                f"student's {mine}."
            )
    layers = swapped_layers(student)
    if not layers:
        raise ValueError("heal: `model` has no swapped layer; run `kalman-convert swap` first.")
    AttentionTaps(teacher, layers)
    return layers


def _mixers(student: PreTrainedModel, layers: Sequence[int]) -> dict[int, GKAMixer]:
    return {index: student.model.layers[index].mixer for index in layers}


@torch.no_grad()
def layer_errors(student: PreTrainedModel, teacher: PreTrainedModel, windows: Tensor) -> dict[int, float]:
    """Relative error of every swapped mixer on the teacher's hidden states.

        sum |mixer(h) - attention(h)|^2 / sum |attention(h) - mean attention|^2

    Args:
        student: converted model.
        teacher: the model it was made from.
        windows: (N, T) tokens.

    Returns:
        {layer: error}; 1 is the error of a constant.
    """
    layers = check_pair(student, teacher)
    mixers, taps = _mixers(student, layers), AttentionTaps(teacher, layers)
    sums = {index: [torch.zeros((), dtype=torch.float64) for _ in range(2)] for index in layers}
    first = {index: torch.zeros(()) for index in layers}
    tokens = 0
    for window in windows:
        for index, (hidden, target) in taps.read(window[None].to(teacher.device)).items():
            error = (mixers[index](hidden) - target).double().square().sum().cpu()
            sums[index][0] += error
            sums[index][1] += target.double().square().sum().cpu()
            first[index] = first[index] + target.double().sum((0, 1)).cpu()
        tokens += window.numel()
    return {i: float(e / (power - first[i].square().sum() / tokens)) for i, (e, power) in sums.items()}


@torch.no_grad()
def heal_rls(
    student: GKAForCausalLM,
    teacher: PreTrainedModel,
    windows: Tensor,
    *,
    prior_tokens: float = PRIOR_TOKENS,
    work: str | Path | None = None,
    save_every: int = 64,
    progress: bool = True,
) -> HealingReport:
    """Fit what each mixer's output is linear in, exactly and without gradients; changes `student` in place.

    The features are the gated, normalised read-out (into `o_proj`) and, where the mixer has them, the last values
    (into `local_proj`). One pass of the teacher serves all layers.

    Args:
        student: converted model.
        teacher: the model it was made from.
        windows: (N, T) tokens.
        prior_tokens: weight of the prior, weights 0, in tokens.
        work: folder for the sums, so that an interrupted run continues; nothing is saved when None.
        save_every: windows between two saves.
        progress: whether to show a progress bar.

    Raises:
        ValueError: teacher and student do not fit, or an output projection has a bias (not linear in the features).
    """
    started = time.monotonic()
    layers = check_pair(student, teacher)
    mixers, taps = _mixers(student, layers), AttentionTaps(teacher, layers)
    for index, mixer in mixers.items():
        if mixer.o_proj.bias is not None:
            raise ValueError(f"heal: layer {index} has a bias in o_proj, which method 'rls' does not fit; use 'layerwise'.")
    filters = {i: RecursiveLeastSquares(_width(m), m.o_proj.out_features, m.o_proj.weight.device) for i, m in mixers.items()}
    file = None if work is None else Path(work) / "rls.pt"
    done = _load_filters(filters, file)
    bar = tqdm(total=len(windows), initial=done, desc="least squares", unit="window", disable=not progress)
    for number in range(done, len(windows)):
        for index, (hidden, target) in taps.read(windows[number : number + 1].to(teacher.device)).items():
            features, local = mixers[index].features(hidden)
            filters[index].update(features if local is None else torch.cat([features, local], -1), target)
        bar.update()
        if file is not None and (number + 1 == len(windows) or (number + 1) % save_every == 0):
            _save_filters(filters, file, number + 1)
    bar.close()
    for index, mixer in mixers.items():
        width = mixer.o_proj.in_features
        weight = filters[index].solve(torch.zeros(mixer.o_proj.out_features, _width(mixer)), prior_tokens)
        mixer.o_proj.weight.copy_(weight[:, :width])
        if mixer.config.use_local_values:
            mixer.local_proj.weight.copy_(weight[:, width:])
    return HealingReport("rls", windows.numel(), time.monotonic() - started, {})


def _width(mixer: GKAMixer) -> int:
    return mixer.o_proj.in_features + (mixer.local_proj.in_features if mixer.config.use_local_values else 0)


def _save_filters(filters: dict[int, RecursiveLeastSquares], file: Path, done: int) -> None:
    temporary = file.with_suffix(".tmp")
    torch.save({"done": done, "filters": {i: f.state_dict() for i, f in filters.items()}}, temporary)
    temporary.replace(file)


def _load_filters(filters: dict[int, RecursiveLeastSquares], file: Path | None) -> int:
    if file is None or not file.is_file():
        return 0
    saved = torch.load(file, weights_only=True)
    for index, state in saved["filters"].items():
        filters[index].load_state_dict(state)
    return saved["done"]


class LayerwiseDistillation(nn.Module):
    """The mixers of a student as one trainable model; its loss is their mean relative error on a teacher's layers.

    The teacher is frozen and not a part of it: its weights are neither trained nor saved.

    Args:
        student: converted model; its mixers are trained in place.
        teacher: the model it was made from.
    """

    def __init__(self, student: GKAForCausalLM, teacher: PreTrainedModel) -> None:
        super().__init__()
        layers = check_pair(student, teacher)
        self.mixers = nn.ModuleDict({str(index): mixer for index, mixer in _mixers(student, layers).items()})
        # In a tuple, so that it is not registered.
        self._taps = (AttentionTaps(teacher, layers),)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        """{"loss": scalar, "errors": (layers,)} for tokens (B, T)."""
        read = self._taps[0].read(input_ids)
        errors = []
        for index, mixer in self.mixers.items():
            hidden, target = read[int(index)]
            spread = (target - target.mean((0, 1))).square().mean().float()
            errors.append((mixer(hidden).float() - target.float()).square().mean() / spread)
        errors = torch.stack(errors)
        return {"loss": errors.mean(), "errors": errors.detach()}


class _Windows(torch.utils.data.Dataset):
    def __init__(self, windows: Tensor) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.windows[index]}


def heal_layerwise(
    student: GKAForCausalLM,
    teacher: PreTrainedModel,
    windows: Tensor,
    *,
    work: str | Path,
    learning_rate: float = 3e-3,
    small_factor: float = 3.0,
    batch_size: int = 1,
    epochs: float = 1.0,
    seed: int = 0,
    save_every: int = 64,
    callbacks: Sequence[TrainerCallback] = (),
    progress: bool = True,
    **training_arguments: Any,
) -> HealingReport:
    """Distil each attention layer into its mixer by gradient descent on the mixers alone; changes `student` in place.

    Args:
        student: converted model, best after `heal_rls`.
        teacher: the model it was made from.
        windows: (N, T) tokens.
        work: folder for Trainer's checkpoints; a run that finds one there continues from it bit for bit.
        learning_rate: peak for projections; 10 steps of warm-up, then cosine to 0.
        small_factor: times that for decays, gates and convolutions.
        batch_size: windows per step.
        epochs: passes over the windows.
        seed: of the order of windows.
        save_every: steps between two checkpoints.
        callbacks: further callbacks for the `Trainer`.
        progress: whether to show a progress bar.
        training_arguments: passed on to `transformers.TrainingArguments`.

    Raises:
        ValueError: teacher and student do not fit.
    """
    started = time.monotonic()
    model = LayerwiseDistillation(student, teacher)
    arguments = TrainingArguments(
        output_dir=str(work),
        per_device_train_batch_size=batch_size,
        num_train_epochs=epochs,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        max_grad_norm=1.0,
        save_steps=save_every,
        save_total_limit=1,
        logging_steps=10,
        report_to=[],
        seed=seed,
        data_seed=seed,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        use_cpu=teacher.device.type == "cpu",
        disable_tqdm=not progress,
        **training_arguments,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=_Windows(windows),
        optimizers=(_optimizer(model, learning_rate, small_factor), None),
        callbacks=list(callbacks),
    )
    frozen = [p for p in teacher.parameters() if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    try:
        trainer.train(resume_from_checkpoint=bool(list(Path(work).glob("checkpoint-*"))))
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
    tokens = trainer.state.global_step * batch_size * windows.shape[1]
    return HealingReport("layerwise", tokens, time.monotonic() - started, {})


def _optimizer(model: nn.Module, learning_rate: float, small_factor: float) -> torch.optim.Optimizer:
    small = [p for n, p in model.named_parameters() if any(part in n for part in _SMALL)]
    large = [p for n, p in model.named_parameters() if not any(part in n for part in _SMALL)]
    groups = [{"params": large, "lr": learning_rate}, {"params": small, "lr": learning_rate * small_factor}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
