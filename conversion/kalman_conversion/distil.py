"""End-to-end healing: the student as a whole against its teacher, or on text.

    distil      the student's next-token distribution, its final hidden states or both against the teacher's
    finetune    next-token prediction on text, of everything, of the mixers or of LoRA adapters

Both run on `transformers.Trainer`. They come after the stages of `heal`, whose errors add up over the layers because
every mixer is healed on the teacher's hidden states; here each sees what the student really feeds it.
"""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from kalman_kernels.numerics import widen

from .heal import HealingReport, check_pair
from .trainer import HealingTrainer, TokenWindows, flags_kept, training_arguments

__all__ = ["DistillationTrainer", "Training", "heal_distil", "heal_finetune", "share_frozen", "soft_divergence"]

# Rows of logits whose softmax is held in float32 at a time.
_ROWS = 4096


class _SoftDivergence(torch.autograd.Function):
    """`soft_divergence` with its gradient computed along, some rows at a time."""

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor, temperature: float, top_k: int | None) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=student.device)
        gradient = torch.empty_like(student) if student.requires_grad else None
        for start in range(0, len(student), _ROWS):
            rows = slice(start, start + _ROWS)
            loss, slope = _divergence(widen(student[rows]) / temperature, widen(teacher[rows]) / temperature, top_k)
            total += loss.double()
            if gradient is not None:
                gradient[rows] = slope * (temperature / len(student))
        ctx.save_for_backward(gradient)
        return (total * (temperature**2 / len(student))).to(torch.promote_types(student.dtype, torch.float32))

    @staticmethod
    def backward(ctx, d_loss: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (gradient,) = ctx.saved_tensors
        return gradient * d_loss.to(gradient.dtype), None, None, None


def _divergence(student: Tensor, teacher: Tensor, top_k: int | None) -> tuple[Tensor, Tensor]:
    """Sum over rows of KL(p || q), and its gradient by the student's scaled logits."""
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    if top_k is None:
        p, q = log_p.exp(), log_q.exp()
        return (p * (log_p - log_q)).sum(), q - p
    log_p, kept = log_p.topk(top_k, dim=-1)
    p, q = log_p.exp(), log_q.exp()
    log_q = log_q.gather(-1, kept)
    # The other tokens together are one event of probability p_rest, q_rest.
    tiny = torch.finfo(p.dtype).tiny
    p_rest = (1 - p.sum(-1, keepdim=True)).clamp(min=tiny)
    q_rest = (1 - log_q.exp().sum(-1, keepdim=True)).clamp(min=torch.finfo(p.dtype).eps)
    loss = (p * (log_p - log_q)).sum() + (p_rest * (p_rest.log() - q_rest.log())).sum()
    # d/ds_j: q_j - p_j for kept tokens, q_j - p_rest q_j / q_rest for the others.
    slope = q * (1 - p_rest / q_rest)
    return loss, slope.scatter(-1, kept, q.gather(-1, kept) - p)


def soft_divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0, top_k: int | None = None) -> Tensor:
    r"""Mean over tokens of the divergence of the student's next-token distribution from the teacher's.

        p = softmax(z_teacher / T)    q = softmax(z_student / T)
        loss = T^2 mean KL(p || q)    d loss / d z_student = T (q - p) / N

    With `top_k`, over k + 1 events: the teacher's k likeliest tokens, and all others as one. That is a lower bound.
    [distillation with a temperature: arXiv 1503.02531, section 2]

    Args:
        student: logits (..., V) in any float dtype; softmax and sums are at least float32.
        teacher: logits of the same shape; no gradient flows to them.
        temperature: T > 0; above 1 unlikely tokens count more.
        top_k: tokens of the teacher that count one by one; all when None.

    Raises:
        ValueError: shapes differ, or an argument is out of its range.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"soft_divergence: `student` and `teacher` must have one shape, got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}."
        )
    _check_loss(temperature, top_k, student.shape[-1])
    return _SoftDivergence.apply(student.flatten(0, -2), teacher.detach().flatten(0, -2), temperature, top_k)


def _check_loss(temperature: float, top_k: int | None, vocabulary: int) -> None:
    if not temperature > 0 or not math.isfinite(temperature):
        raise ValueError(f"`temperature` must be > 0, got {temperature!r}.")
    if top_k is not None and not 1 <= top_k < vocabulary:
        raise ValueError(f"`top_k` must be from 1 to {vocabulary - 1} or None, got {top_k!r}.")


@torch.no_grad()
def share_frozen(student: PreTrainedModel, teacher: PreTrainedModel) -> int:
    """Let the frozen parameters of a student use the teacher's memory wherever the two are bit-equal.

    Returns:
        Bytes that are now held once instead of twice.
    """
    theirs, saved = dict(teacher.named_parameters()), 0
    for name, parameter in student.named_parameters():
        other = theirs.get(name)
        if parameter.requires_grad or other is None or other.data_ptr() == parameter.data_ptr():
            continue
        same_kind = other.dtype == parameter.dtype and other.device == parameter.device
        if same_kind and other.shape == parameter.shape and torch.equal(other, parameter):
            parameter.data = other.data
            saved += parameter.numel() * parameter.element_size()
    return saved


class _Final:
    """The last input of a model's head, kept while a forward call lasts."""

    def __init__(self, model: nn.Module) -> None:
        self.hidden: Tensor | None = None
        self.handle = model.model.norm.register_forward_hook(self._keep)  # pyright: ignore

    def _keep(self, module, args, output: Tensor) -> None:
        self.hidden = output

    def take(self) -> Tensor:
        hidden, self.hidden = self.hidden, None
        assert hidden is not None
        return hidden


class DistillationTrainer(HealingTrainer):
    """`Trainer` whose loss compares a student with a frozen teacher on the same tokens.

        loss = logits_weight * T^2 mean KL(teacher || student) + hidden_weight * |h_s - h_t|^2 / |h_t|^2
             + text_weight * mean -log student(next token)

    with h the final hidden states, after the last norm. The teacher is no part of the model: it is neither trained nor
    saved nor sharded.

    Args:
        teacher: frozen model with the student's vocabulary.
        logits_weight: weight of the divergence of next-token distributions.
        hidden_weight: weight of the relative squared error of the final hidden states.
        temperature: T of `soft_divergence`.
        top_k: see `soft_divergence`.
        text_weight: weight of next-token prediction on the text itself, which moves the student from its teacher to the
            text.
    """

    loss_is_scaled_for_ga = False

    def __init__(
        self,
        *args,
        teacher: PreTrainedModel,
        logits_weight: float = 1.0,
        hidden_weight: float = 0.0,
        temperature: float = 1.0,
        top_k: int | None = None,
        text_weight: float = 0.0,
        **kwargs,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.text_weight = text_weight
        self.teacher = teacher.to(self.args.device).eval()  # pyright: ignore[reportArgumentType]
        self.weights, self.temperature, self.top_k = (logits_weight, hidden_weight), temperature, top_k
        self._finals = (_Final(self.accelerator.unwrap_model(self.model)), _Final(teacher)) if hidden_weight else ()

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        """The loss of a batch of `input_ids` (B, T)."""
        logits_weight, hidden_weight = self.weights
        tokens = inputs["input_ids"]
        options = {"use_cache": False, "logits_to_keep": 0 if logits_weight or self.text_weight else 1}
        with torch.no_grad(), self.accelerator.autocast():
            wanted = self.teacher(input_ids=tokens, **options).logits
        outputs = model(input_ids=tokens, **options)
        loss = torch.zeros((), device=wanted.device)
        if logits_weight:
            loss = loss + logits_weight * soft_divergence(outputs.logits, wanted, self.temperature, self.top_k)
        if hidden_weight:
            found, target = (final.take().float() for final in self._finals)
            loss = loss + hidden_weight * (found - target).square().sum() / target.square().sum()
        if self.text_weight:
            logits = widen(outputs.logits[:, :-1]).flatten(0, 1)
            loss = loss + self.text_weight * F.cross_entropy(logits, tokens[:, 1:].flatten())
        return (loss, outputs) if return_outputs else loss

    def run(self) -> int:
        """As `HealingTrainer.run`; leaves no hook behind."""
        try:
            return super().run()
        finally:
            for final in self._finals:
                final.handle.remove()


class Training(NamedTuple):
    """How an end-to-end stage trains.

    Args:
        learning_rate: peak; linear warm-up, then cosine to 0.
        small_factor: times that for decays, gates and convolutions.
        mixer_factor: times that for all else in the mixers.
        batch_size: windows per device and step.
        accumulation: batches per optimizer step.
        epochs: passes over the windows.
        warmup_steps: of the learning rate.
        seed: of the order of windows.
        bf16: autocast over float32 weights; where the device has bfloat16 when None.
        save_every: steps between two checkpoints.
        progress: whether to show a progress bar.
    """

    learning_rate: float = 1e-3
    small_factor: float = 3.0
    mixer_factor: float = 1.0
    batch_size: int = 8
    accumulation: int = 1
    epochs: float = 1.0
    warmup_steps: int = 20
    seed: int = 0
    bf16: bool | None = None
    save_every: int = 64
    progress: bool = True

    def arguments(self, work: str | Path, device: torch.device, more: dict[str, Any]) -> TrainingArguments:
        """As the host's `TrainingArguments`, with `more` of them."""
        options = self._asdict()
        bf16, accumulation = options.pop("bf16"), options.pop("accumulation")
        options = {k: v for k, v in options.items() if k not in ("small_factor", "mixer_factor")}
        if bf16 is None:
            bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        own = {"bf16": bf16, "gradient_accumulation_steps": accumulation}
        return training_arguments(work, device=device, more={**own, **more}, **options)


def _run(stage: str, student: PreTrainedModel, make: Callable[[PreTrainedModel], HealingTrainer]) -> HealingReport:
    """Train a student with the trainer that `make` makes for it, and leave it a plain model."""
    started = time.monotonic()
    # What FSDP2 has sharded stays so: it gets a copy, whose weights come back whole.
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")
    model = copy.deepcopy(student) if sharded else student
    trainer = make(model)
    try:
        tokens = trainer.run()
    finally:
        # Takes autocast off the student's forward.
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    if sharded:
        whole = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in model.state_dict().items()}
        student.load_state_dict(whole)
    return HealingReport(stage, tokens, time.monotonic() - started)


def _check(stage: str, student: PreTrainedModel, trained: str, known: Sequence[str]) -> None:
    if trained not in known:
        raise ValueError(f"{stage}: `trained` must be one of {tuple(known)}, got {trained!r}.")
    for name, parameter in student.named_parameters():
        if parameter.dtype != torch.float32:
            raise ValueError(
                f"{stage}: `student` must have float32 weights, which autocast narrows where that is safe, got "
                f"{parameter.dtype} in {name}; load it with dtype=torch.float32."
            )


@contextmanager
def _training_only(student: PreTrainedModel, trained: str) -> Iterator[None]:
    """Gradients for `trained`, "mixers" or "all", and the student's own flags again afterwards."""
    training = student.training
    with flags_kept(student):
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(trained == "all" or ".mixer." in name)
            if trained == "all":
                # It may be in a teacher's memory since an earlier stage.
                parameter.data = parameter.data.clone()
        try:
            yield
        finally:
            student.train(training)


def heal_distil(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    windows: Tensor,
    *,
    work: str | Path,
    training: Training = Training(),
    trained: Literal["mixers", "all"] = "mixers",
    logits_weight: float = 1.0,
    hidden_weight: float = 0.0,
    temperature: float = 1.0,
    top_k: int | None = None,
    text_weight: float = 0.0,
    repeated: float = 0.0,
    callbacks: Sequence[TrainerCallback] = (),
    **more: Any,
) -> HealingReport:
    """Distil a teacher into its converted student end to end; changes `student` in place.

    With `trained="mixers"` everything else of the student is frozen and uses the teacher's memory (`share_frozen`).

    Args:
        student: converted model in float32, best after `heal_rls` or `heal_layerwise`.
        teacher: the model it was made from.
        windows: (N, T) tokens.
        work: folder for Trainer's checkpoints; a run that finds one there continues from it bit for bit.
        training: see `Training`.
        trained: "mixers", or "all" for the whole student.
        logits_weight: see `DistillationTrainer`.
        hidden_weight: see `DistillationTrainer`.
        temperature: see `DistillationTrainer`.
        top_k: see `DistillationTrainer`.
        text_weight: see `DistillationTrainer`.
        repeated: share of windows in which the second half is pieces of the first, so that the student practises
            finding things in its context; see `TokenWindows`.
        callbacks: further callbacks for the `Trainer`.
        more: passed on to `transformers.TrainingArguments` (`report_to`, `logging_steps`, `gradient_checkpointing`).

    Raises:
        ValueError: teacher and student do not fit, or an argument is out of its range.
    """
    check_pair(student, teacher)
    _check("heal_distil", student, trained, ("mixers", "all"))
    _check_loss(temperature, top_k, student.config.vocab_size)
    weights = (logits_weight, hidden_weight, text_weight)
    if min(weights) < 0 or not logits_weight + hidden_weight > 0:
        raise ValueError(
            "heal_distil: `logits_weight`, `hidden_weight` and `text_weight` must be >= 0 and the first two not both "
            f"0, got {weights}."
        )

    def make(model: PreTrainedModel) -> DistillationTrainer:
        trainer = DistillationTrainer(
            model,
            training.arguments(work, student.device, more),
            train_dataset=TokenWindows(windows, repeated=repeated),
            callbacks=[*callbacks],
            small_factor=training.small_factor,
            mixer_factor=training.mixer_factor,
            teacher=teacher,
            logits_weight=logits_weight,
            hidden_weight=hidden_weight,
            temperature=temperature,
            top_k=top_k,
            text_weight=text_weight,
        )
        share_frozen(model, teacher)
        return trainer

    with _training_only(student, trained):
        return _run("distil", student, make)


def heal_finetune(
    student: PreTrainedModel,
    windows: Tensor,
    *,
    work: str | Path,
    training: Training = Training(learning_rate=2e-5, small_factor=1.0),
    trained: Literal["all", "mixers", "lora"] = "all",
    lora_rank: int = 16,
    callbacks: Sequence[TrainerCallback] = (),
    **more: Any,
) -> HealingReport:
    """Train a converted model on text by next-token prediction; changes `student` in place.

    Args:
        student: converted model in float32.
        windows: (N, T) tokens.
        work: folder for Trainer's checkpoints; a run that finds one there continues from it bit for bit.
        training: see `Training`.
        trained: "all", "mixers", or "lora": adapters of rank `lora_rank` on all projections that `peft` knows for the
            model type, merged into the weights at the end.
        lora_rank: rank of the adapters; their alpha is twice that.
        callbacks: further callbacks for the `Trainer`.
        more: passed on to `transformers.TrainingArguments`.

    Raises:
        ValueError: an argument is out of its range.
        ImportError: `trained="lora"` without peft.
    """
    _check("heal_finetune", student, trained, ("all", "mixers", "lora"))

    def make(model: PreTrainedModel) -> HealingTrainer:
        arguments = training.arguments(work, student.device, more)
        data = TokenWindows(windows, labels=True)
        options = {
            "callbacks": [*callbacks],
            "small_factor": training.small_factor,
            "mixer_factor": training.mixer_factor,
        }
        return HealingTrainer(model, arguments, train_dataset=data, **options)

    if trained != "lora":
        with _training_only(student, trained):
            return _run("finetune", student, make)
    from peft import LoraConfig, get_peft_model

    with _training_only(student, "all"):
        torch.manual_seed(training.seed)
        model = get_peft_model(student, LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, task_type="CAUSAL_LM"))
        try:
            report = _run("finetune", model, make)  # pyright: ignore[reportArgumentType]
        except BaseException:
            model.unload()  # pyright: ignore[reportCallIssue]
            raise
        model.merge_and_unload()  # pyright: ignore[reportCallIssue]
        return report
