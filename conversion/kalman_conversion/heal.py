"""Healing: make swapped mixers compute what the attention that they replaced computed.

Two stages that a laptop can do. Both look only at the swapped layers, each on the teacher's own hidden states against
the teacher's own attention output, with one forward pass of the teacher for all of them:

    rls         exact recursive least squares for what the mixer's output is linear in: no gradients, one pass
    layerwise   gradient distillation of everything else in the mixers, while a Kalman filter with forgetting keeps the
                linear part at its optimum; started by rls, on `transformers.Trainer`
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, TrainerCallback

from hf_kalman import GKAForCausalLM, KLAForCausalLM
from hf_kalman.gka.modeling_gka import GKAMixer
from hf_kalman.kla.modeling_kla import KLAMixer

from .rls import RecursiveLeastSquares
from .taps import AttentionTaps
from .trainer import HealingTrainer, TokenWindows, flags_kept, training_arguments

__all__ = [
    "HealingReport",
    "LayerwiseDistillation",
    "Readout",
    "check_pair",
    "heal_layerwise",
    "heal_rls",
    "layer_errors",
    "swapped_layers",
]

# Weight of the belief "the weights are zero" in recursive least squares, in tokens: with about ten tokens to a feature
# a weak prior fits noise.
PRIOR_TOKENS = 500.0
# Steps of gradient descent between two solves of the filtered linear part.
SOLVE_EVERY = 4


class HealingReport(NamedTuple):
    """What a stage did: its name, the tokens that it read and its seconds."""

    stage: str
    tokens: int
    seconds: float


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
    layers = swapped_layers(student) if hasattr(student.config, "layer_types") else ()
    if not layers:
        raise ValueError("heal: `model` has no swapped layer; run `kalman-convert swap` first.")
    AttentionTaps(teacher, layers)
    return layers


def _mixers(student: PreTrainedModel, layers: Sequence[int]) -> dict[int, GKAMixer | KLAMixer]:
    return {index: student.model.layers[index].mixer for index in layers}


class Readout:
    """The part of a mixer that its output is linear in, as one matrix.

        output = W [gated normalised read-out; last values; 1]

    Args:
        mixer: the columns of W are its `o_proj`, `local_proj` (where it has one) and the bias of `o_proj` (likewise).
    """

    def __init__(self, mixer: GKAMixer | KLAMixer) -> None:
        self.mixer: Any = mixer
        local = self.mixer.local_proj.in_features if hasattr(mixer, "local_proj") else 0
        self.widths = (self.mixer.o_proj.in_features, local, int(self.mixer.o_proj.bias is not None))
        self.features, self.outputs = sum(self.widths), self.mixer.o_proj.out_features

    def parameters(self) -> list[Tensor]:
        """The mixer's parameters that W is made of."""
        weights: list[Tensor] = [self.mixer.o_proj.weight]
        weights += [self.mixer.local_proj.weight] if self.widths[1] else []
        return weights + ([self.mixer.o_proj.bias] if self.widths[2] else [])

    def read(self, hidden: Tensor) -> Tensor:
        """Features (B, T, F) for hidden states (B, T, hidden)."""
        features, local = self.mixer.features(hidden)
        parts = [features] if local is None else [features, local]
        return torch.cat(parts + ([torch.ones_like(features[..., :1])] if self.widths[2] else []), dim=-1)

    @torch.no_grad()
    def write(self, weight: Tensor) -> None:
        """Set W (O, F)."""
        pieces = [piece for piece in weight.split(self.widths, dim=1) if piece.shape[1]]
        for parameter, piece in zip(self.parameters(), pieces, strict=True):
            parameter.copy_(piece.view_as(parameter))


@torch.no_grad()
def layer_errors(student: PreTrainedModel, teacher: PreTrainedModel, windows: Tensor) -> dict[int, float]:
    """Relative error of every swapped mixer on the teacher's hidden states.

        sum |mixer(h) - attention(h)|^2 / sum |attention(h) - mean attention|^2

    Args:
        student: converted model.
        teacher: the model it was made from.
        windows: (N, T) tokens.

    Returns:
        {layer: error}; 1 is the error of the best constant.
    """
    layers = check_pair(student, teacher)
    mixers, taps = _mixers(student, layers), AttentionTaps(teacher, layers)
    error, power = (dict.fromkeys(layers, 0.0) for _ in range(2))
    total = {index: torch.zeros(student.config.hidden_size, dtype=torch.float64) for index in layers}
    for window in windows:
        for index, (hidden, target) in taps.read(window[None].to(teacher.device)).items():
            error[index] += (mixers[index](hidden) - target).double().square().sum().item()
            power[index] += target.double().square().sum().item()
            total[index] += target.double().sum((0, 1)).cpu()
    return {i: error[i] / (power[i] - total[i].square().sum().item() / windows.numel()) for i in layers}


@torch.no_grad()
def heal_rls(
    student: GKAForCausalLM | KLAForCausalLM,
    teacher: PreTrainedModel,
    windows: Tensor,
    *,
    prior_tokens: float = PRIOR_TOKENS,
    work: str | Path | None = None,
    save_every: int = 64,
    progress: bool = True,
) -> tuple[HealingReport, dict[int, RecursiveLeastSquares]]:
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

    Returns:
        What was done, and the filters, from which `heal_layerwise` can go on.

    Raises:
        ValueError: teacher and student do not fit.
    """
    started = time.monotonic()
    layers = check_pair(student, teacher)
    readouts, taps = {i: Readout(m) for i, m in _mixers(student, layers).items()}, AttentionTaps(teacher, layers)
    filters = {i: RecursiveLeastSquares(r.features, r.outputs, teacher.device) for i, r in readouts.items()}
    file = None if work is None else Path(work) / "rls.pt"
    done = _load_filters(filters, file)
    bar = tqdm(total=len(windows), initial=done, desc="least squares", unit="window", disable=not progress)
    for number in range(done, len(windows)):
        for index, (hidden, target) in taps.read(windows[number : number + 1].to(teacher.device)).items():
            filters[index].update(readouts[index].read(hidden), target)
        bar.update()
        if file is not None and (number + 1 == len(windows) or (number + 1) % save_every == 0):
            _save_filters(filters, file, number + 1)
    bar.close()
    for index, readout in readouts.items():
        readout.write(filters[index].solve(prior_tokens))
    return HealingReport("rls", windows.numel(), time.monotonic() - started), filters


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

    Gradients train all of a mixer but its read-out W. That one is filtered: after each batch the sums of
    `RecursiveLeastSquares` forget a little, take in the batch, and W is solved anew every few batches. So the gradient
    always sees the best read-out of the present features (variable projection). Forgetting follows the learning rate:
    features that no longer move need no forgetting.

    The teacher is frozen and not a part of this module: its weights are neither trained nor saved.

    Args:
        student: converted model; its mixers are trained in place.
        teacher: the model it was made from.
        filters: sums to start from, those of `heal_rls`.
        forgetting: share of the sums that a batch forgets at the peak of the learning rate.
        prior_tokens: weight of the prior of W, in tokens.
    """

    tokens: Tensor

    def __init__(
        self,
        student: GKAForCausalLM | KLAForCausalLM,
        teacher: PreTrainedModel,
        filters: dict[int, RecursiveLeastSquares],
        forgetting: float,
        prior_tokens: float = PRIOR_TOKENS,
    ) -> None:
        super().__init__()
        layers = check_pair(student, teacher)
        mixers = {str(index): mixer for index, mixer in _mixers(student, layers).items()}
        self.mixers = nn.ModuleDict(mixers)
        self.readouts = {index: Readout(mixer) for index, mixer in mixers.items()}
        self.prior_tokens, self.peak_forgetting, self.forgetting = prior_tokens, forgetting, 0.0
        for index in self.mixers:
            # Buffers, so that a checkpoint holds them and a resumed run is the same run.
            self.register_buffer(f"precision_{index}", filters[int(index)].precision.clone())
            self.register_buffer(f"information_{index}", filters[int(index)].information.clone())
        self.register_buffer("tokens", torch.tensor(float(filters[layers[0]].tokens), dtype=torch.float64))
        # In a tuple, so that it is not registered.
        self._taps = (AttentionTaps(teacher, layers),)
        for parameter in self.parameters():
            parameter.requires_grad_(True)
        for readout in self.readouts.values():
            for parameter in readout.parameters():
                parameter.requires_grad_(False)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        """{"loss": scalar, "errors": (layers,)} for tokens (B, T); in training mode the filters take them in."""
        read, errors = self._taps[0].read(input_ids), []
        if self.training:
            self.tokens.mul_(1 - self.forgetting).add_(input_ids.numel())
        for index, readout in self.readouts.items():
            hidden, target = read[int(index)]
            features = readout.read(hidden)
            weight = torch.cat([p.view(readout.outputs, -1) for p in readout.parameters()], dim=1)
            spread = (target - target.mean((0, 1))).square().mean()
            errors.append((features @ weight.T - target).square().mean() / spread)
            if self.training:
                self._filter(index).forget(self.forgetting).update(features.detach(), target)
        errors = torch.stack(errors)
        return {"loss": errors.mean(), "errors": errors.detach()}

    def _filter(self, index: str) -> RecursiveLeastSquares:
        """The filter of a layer as a view of this module's buffers."""
        return RecursiveLeastSquares.of(
            self.get_buffer(f"precision_{index}"), self.get_buffer(f"information_{index}"), self.tokens.item()
        )

    def solve(self) -> None:
        """Bring every read-out to the filters' posterior mean."""
        for index, readout in self.readouts.items():
            readout.write(self._filter(index).solve(self.prior_tokens))


class _FilterSchedule(TrainerCallback):
    """Sets the forgetting from the learning rate before a step and solves after some steps and at the end."""

    def __init__(self, model: LayerwiseDistillation, peak: float) -> None:
        self.model, self.peak = model, peak

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        if optimizer is None:
            return
        rate = optimizer.param_groups[0]["lr"]
        self.model.forgetting = self.model.peak_forgetting * rate / self.peak

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % SOLVE_EVERY == 0:
            self.model.solve()

    def on_train_end(self, args, state, control, **kwargs):
        self.model.solve()


def heal_layerwise(
    student: GKAForCausalLM | KLAForCausalLM,
    teacher: PreTrainedModel,
    windows: Tensor,
    filters: dict[int, RecursiveLeastSquares],
    *,
    work: str | Path,
    learning_rate: float = 1e-2,
    small_factor: float = 3.0,
    forgetting: float = 0.06,
    prior_tokens: float = PRIOR_TOKENS,
    batch_size: int = 1,
    epochs: float = 1.0,
    seed: int = 0,
    save_every: int = 64,
    callbacks: Sequence[TrainerCallback] = (),
    progress: bool = True,
    **more: Any,
) -> HealingReport:
    """Distil each attention layer into its mixer by gradients and a filtered read-out; changes `student` in place.

    Args:
        student: converted model after `heal_rls`.
        teacher: the model it was made from.
        windows: (N, T) tokens.
        filters: what `heal_rls` returned.
        work: folder for Trainer's checkpoints; a run that finds one there continues from it bit for bit.
        learning_rate: peak for projections; 10 steps of warm-up, then cosine to 0.
        small_factor: times that for decays, gates and convolutions.
        forgetting: see `LayerwiseDistillation`.
        prior_tokens: see `LayerwiseDistillation`.
        batch_size: windows per step.
        epochs: passes over the windows.
        seed: of the order of windows.
        save_every: steps between two checkpoints.
        callbacks: further callbacks for the `Trainer`.
        progress: whether to show a progress bar.
        more: passed on to `transformers.TrainingArguments`.

    Raises:
        ValueError: teacher and student do not fit.
    """
    started = time.monotonic()
    with flags_kept(student):
        model = LayerwiseDistillation(student, teacher, filters, forgetting, prior_tokens)
        arguments = training_arguments(
            work,
            learning_rate=learning_rate,
            batch_size=batch_size,
            epochs=epochs,
            seed=seed,
            warmup_steps=10,
            save_every=save_every,
            progress=progress,
            device=teacher.device,
            more=more,
        )
        trainer = HealingTrainer(
            model,
            arguments,
            train_dataset=TokenWindows(windows),
            callbacks=[_FilterSchedule(model, learning_rate), *callbacks],
            small_factor=small_factor,
        )
        tokens = trainer.run()
    return HealingReport("layerwise", tokens, time.monotonic() - started)
