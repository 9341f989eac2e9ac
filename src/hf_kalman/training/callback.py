"""Kalman fine-tuning with the stock `Trainer`: a callback that puts the filter in the optimizer's place."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

from .checks import check_ranges
from .drift import DriftDetector, chi_square_quantile, log_loss_innovation
from .optimizer import KalmanOptimizer, sampled_label_loss
from .posterior import load_posterior

__all__ = ["KalmanCallback"]

# A sequence of tokens counts as that many observations where `temper` is "auto".
OBSERVATIONS_PER_SEQUENCE = 16


class _Scaled(torch.autograd.Function):
    """A loss whose gradient is `scale` times as large."""

    @staticmethod
    def forward(ctx, loss: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return loss.clone()

    @staticmethod
    def backward(ctx, d_loss: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return d_loss * ctx.scale, None


class KalmanCallback(TrainerCallback):
    r"""Turns a run of the stock `Trainer` into Kalman fine-tuning.

        Trainer(model, args, train_dataset=data, callbacks=[KalmanCallback()]).train()

    Every step of the Trainer's optimizer becomes a step of a `KalmanOptimizer` on the same parameters. What a filter
    needs beyond a gradient comes from a hook on the model's forward:

    - the gradient of the *summed* log-likelihood, whatever mean the model's loss is;
    - a Fisher factor, from one more backward pass at labels that are drawn from the model (`sampled_label_loss`). The
      draws depend on seed, step and row of the batch alone: accumulated batches and several processes take the step
      that one process takes on all rows at once;
    - the innovation of every step (`log_loss_innovation`), for gate, drift alarm and logs.

    In the Trainer's logs, means since the last log: `kalman_prequential_loss` (nats per label, before the update),
    `kalman_nis` (normalised innovation squared, 1 where the model is as surprised as it expects to be),
    `kalman_step_length` (Mahalanobis), `kalman_temper`; as of the log: `kalman_variance_ratio` (trace of P over that of
    P_0), `kalman_variance_min`, `kalman_variance_max`, `kalman_drift_alarms` (so far); `learning_rate` is the factor on
    the gain. The filter is saved in the checkpoint's `optimizer.pt`, and a resumed run continues bit for bit.

    Args:
        variance: see `KalmanOptimizer`; None lets the filter begin where its process noise would bring it.
        prior_steps: see `KalmanOptimizer`.
        boost: see `KalmanOptimizer`.
        drift_boost: >= 1: what covariances are multiplied by at a drift alarm.
        structure: see `KalmanOptimizer`.
        rank: see `KalmanOptimizer`.
        step_size: size of an entry's steps in the long run, in units of the parameter, what a learning rate is to
            RMSprop; the argument that decides most where `variance` is None. The process noise is its square, times
            `temper`.
        process_noise: see `KalmanOptimizer`; in place of `step_size`.
        forgetting: see `KalmanOptimizer`.
        decay: see `KalmanOptimizer`.
        temper: see `KalmanOptimizer`; "auto" lets a sequence count as 16 observations, as tokens of one text depend on
            one another, and a sequence with fewer labels as so many.
        noise_memory: see `KalmanOptimizer`.
        max_step: see `KalmanOptimizer`.
        fisher: "sampled", or "empirical" for no second backward pass, with structure="diagonal" only.
        fisher_every: steps from one Fisher factor to the next, which counts that many times; for speed.
        gate: probability in (0, 1): where the innovation is larger than its chi-square quantile of this probability,
            the step counts less, by their ratio, as if its noise were larger; None for no gate.
        overrides: {part of parameter names: arguments of `KalmanOptimizer` for those}, the first that fits.
        schedule: whether the Trainer's learning-rate schedule scales the gain, as a factor that starts at 1. A filter
            needs none: its gain follows from what it knows.
        seed: of the draws; that of the `TrainingArguments` when None.
        posterior: folder with a `kalman_posterior.safetensors` (`save_posterior`) of the same structure: the filter
            begins with that belief in place of a prior, as where a pushed adapter learns on.

    Raises:
        ValueError: an argument is out of its range; when training begins, arguments of the Trainer with which the
            result would be no filter.
    """

    def __init__(
        self,
        variance: float | None = None,
        *,
        prior_steps: int = 8,
        boost: float = 1.0,
        drift_boost: float = 1.0,
        structure: str = "diagonal",
        rank: int = 10,
        step_size: float = 5e-4,
        process_noise: float | None = None,
        forgetting: float = 1.0,
        decay: float = 0.0,
        temper: float | str = "auto",
        noise_memory: float | None = None,
        max_step: float | None = 1.0,
        fisher: str = "sampled",
        fisher_every: int = 1,
        gate: float | None = None,
        overrides: dict[str, dict[str, Any]] | None = None,
        schedule: bool = False,
        seed: int | None = None,
        posterior: str | Path | None = None,
    ) -> None:
        check_ranges(
            "KalmanCallback",
            (
                ("temper", temper, temper == "auto" or (not isinstance(temper, str) and temper >= 1), '"auto" or >= 1'),
                ("step_size", step_size, step_size > 0, "> 0"),
                ("drift_boost", drift_boost, drift_boost >= 1, ">= 1"),
                ("fisher_every", fisher_every, fisher_every >= 1, ">= 1"),
                ("gate", gate, gate is None or 0 < gate < 1, "in (0, 1) or None"),
            ),
        )
        self.options = {
            "variance": variance,
            "prior_steps": prior_steps,
            "boost": boost,
            "structure": structure,
            "rank": rank,
            "process_noise": step_size**2 if process_noise is None else process_noise,
            "forgetting": forgetting,
            "decay": decay,
            "noise_memory": noise_memory,
            "max_step": max_step,
            "fisher": fisher,
        }
        KalmanOptimizer([nn.Parameter(torch.zeros(1, 1))], **self.options)  # Checks the arguments.
        self.noise_follows_temper = process_noise is None
        self.temper, self.fisher_every, self.seed, self.drift_boost = temper, fisher_every, seed, drift_boost
        self.bound = None if gate is None else chi_square_quantile(gate)
        self.overrides, self.schedule, self.posterior = dict(overrides or {}), schedule, posterior
        self.optimizer: KalmanOptimizer | None = None
        self.drift, self.hook = DriftDetector(), None
        self._start()

    def _start(self) -> None:
        """Figures of a run at its beginning."""
        self.drift.start()
        self.sums: dict[str, float] = dict.fromkeys(("loss", "nis", "length", "temper"), 0.0)
        self.alarms, self.count, self.labels, self.steps = 0, 0, 0, 0
        self.drift_alarm = False

    # -- the Trainer's events ------------------------------------------------------------------------------------------

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        """Check the Trainer's arguments, put the filter in place of the optimizer, restore it when resuming."""
        assert model is not None and optimizer is not None
        _check_arguments(args)
        self._align = _aligner(model)
        self._start()
        if self.hook is not None:  # A run before this one that did not come to its end.
            self.hook.remove()
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.process = dist.get_rank() if self.world > 1 else 0
        self.rows_per_batch, self.key = args.train_batch_size, args.seed if self.seed is None else self.seed
        self.inner = getattr(optimizer, "optimizer", optimizer)
        self.parameters = [p for group in self.inner.param_groups for p in group["params"]]
        self.optimizer = KalmanOptimizer(self._groups(model), **self.options)
        saved = self.inner.param_groups[0].pop("kalman", None)
        if saved is not None:
            self._restore(saved)
        elif state.global_step > 0:
            raise ValueError(
                f"KalmanCallback: the checkpoint of step {state.global_step} holds no filter; it comes from a run "
                "without this callback. Start a new run from its weights."
            )
        elif self.posterior is not None:
            load_posterior(self.optimizer, model, self.posterior)
        self._forget_batch()
        self.hook = model.register_forward_hook(self._observe, with_kwargs=True)
        # The Trainer's own optimizer stays for its schedule; its step and what it saves are the filter's.
        self.inner.step, self.inner.state_dict = self._step, self._state_dict_of(type(self.inner).state_dict)
        _before_reporters(self)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        """Add the filter's figures to a log of training."""
        if logs is None or "loss" not in logs or self.optimizer is None:
            return
        figures = self._figures()
        logs.update(figures)
        if state.log_history:
            state.log_history[-1].update(figures)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        """Take the hook off and give the Trainer its optimizer back; `self.optimizer` stays the filter."""
        if self.hook is not None:
            self.hook.remove()
        self.hook = None
        del self.inner.step, self.inner.state_dict

    # -- one step ------------------------------------------------------------------------------------------------------

    def _forget_batch(self) -> None:
        self.factors: list[Tensor | None] = [None] * len(self.parameters)
        self.innovation, self.batches, self.divided = None, 0, False
        self.draws = self.options["fisher"] == "sampled" and self.steps % self.fisher_every == 0

    def _observe(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """After a forward pass of training: innovation, Fisher factor, and a loss whose gradient is the sum's."""
        if not (module.training and torch.is_grad_enabled()):
            return None
        labels = kwargs.get("labels")
        if labels is None or getattr(output, "loss", None) is None or getattr(output, "logits", None) is None:
            raise ValueError(
                "KalmanCallback: the model must be given `labels` and return `loss` and `logits`; use a data collator "
                "that makes labels, and a model with a head."
            )
        logits, wanted = self._align(output.logits, labels)
        kept = wanted != -100
        moments, count = log_loss_innovation(logits.detach()[kept], wanted[kept]), int(kept.sum())
        scale, self.divided = _scale_of(output.loss, moments[0], kwargs.get("num_items_in_batch"), count)
        moments = torch.cat([moments, moments.new_tensor([count, len(wanted)])])
        self.innovation = moments if self.innovation is None else self.innovation + moments
        if self.draws:
            self._draw(logits, wanted, kept)
        self.batches += 1
        output["loss"] = _Scaled.apply(output.loss, scale)
        return output

    def _draw(self, logits: Tensor, wanted: Tensor, kept: Tensor) -> None:
        first = (self.batches * self.world + self.process) * self.rows_per_batch
        counts = kept.reshape(len(kept), -1).sum(1).tolist()
        uniforms = np.concatenate(
            [
                np.random.Generator(np.random.Philox([self.key, self.steps, first + row])).random(count)
                for row, count in enumerate(counts)
            ]
        )
        drawn = torch.from_numpy(uniforms).to(logits.device, torch.float32)
        loss = sampled_label_loss(logits, wanted, uniforms=drawn)
        rows = torch.autograd.grad(loss, self.parameters, retain_graph=True, allow_unused=True)
        # Sums of independent factors are a factor: one row for all batches and processes.
        for index, row in enumerate(rows):
            if row is not None:
                own = self.factors[index]
                self.factors[index] = row.float() if own is None else own + row.float()

    @torch.no_grad()
    def _step(self, closure: Callable[[], Any] | None = None) -> None:
        """What the Trainer calls as its optimizer's step."""
        self.inner._opt_called = True  # Schedules warn when they see no step.
        assert self.optimizer is not None and self.innovation is not None
        self._reduce()
        loss, entropy, variance, labels, sequences = self.innovation.tolist()
        temper, gate, standard = self._weigh(loss - entropy, variance, labels, sequences)
        # Several processes: their gradients are a mean, and so is that over accumulated batches where it is one.
        scale = 1.0 if self.divided else float(self.batches * self.world)
        for group in self.optimizer.param_groups:
            group["temper"] = temper * gate
            if group["noise_follows_temper"]:
                group["process_noise"] = self.options["process_noise"] * temper
            if self.schedule:
                group["lr"] = self._schedule_factor()
        for parameter, row in zip(self.parameters, self.factors, strict=True):
            if parameter.grad is None:
                continue
            if scale != 1.0:
                parameter.grad.mul_(scale)
            if self.options["fisher"] == "sampled":
                empty = parameter.grad.new_zeros(0, *parameter.shape)
                own = row[None] * math.sqrt(self.fisher_every) if row is not None else empty
                self.optimizer.beliefs[parameter].accumulate(own)
        self.optimizer.step()
        self.drift_alarm = self.drift.update(standard)
        self.alarms += self.drift_alarm
        if self.drift_alarm:
            self.optimizer.inflate(self.drift_boost)
        length = self.optimizer.step_length.item()
        for name, value in (("loss", loss), ("nis", standard**2), ("length", length), ("temper", temper * gate)):
            self.sums[name] += value
        self.labels += labels
        self.count += 1
        self.steps += 1
        self._forget_batch()

    def _schedule_factor(self) -> float:
        """The Trainer's learning rate over what its schedule began with."""
        ours = self.inner.param_groups[0]
        start = ours.get("initial_lr", ours["lr"])
        return ours["lr"] / start if start else 0.0

    def _weigh(self, surprise: float, variance: float, labels: float, sequences: float) -> tuple[float, float, float]:
        """How many labels of this step count as one, how far the gate weakens it, and its standardised innovation."""
        temper = self.temper
        if isinstance(temper, str):
            temper = max(1.0, labels / max(sequences, 1) / OBSERVATIONS_PER_SEQUENCE)
        standard = surprise / math.sqrt(max(temper * variance, 1e-12))
        gate = 1.0 if self.bound is None else max(1.0, standard**2 / self.bound)
        return temper, gate, standard

    def _reduce(self) -> None:
        """Sums over the processes, of innovations and of factors."""
        if self.world == 1:
            return
        dist.all_reduce(self.innovation)
        for index, parameter in enumerate(self.parameters if self.draws else ()):
            own = self.factors[index]
            own = torch.zeros(parameter.shape, device=parameter.device) if own is None else own
            dist.all_reduce(own)
            self.factors[index] = own

    # -- figures and state ---------------------------------------------------------------------------------------------

    def _groups(self, model: nn.Module) -> list[dict[str, Any]]:
        groups: dict[str | None, dict[str, Any]] = {}
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        for parameter in self.parameters:
            key = next((part for part in self.overrides if part in names.get(id(parameter), "")), None)
            own = self.overrides[key] if key else {}
            follows = self.noise_follows_temper and "process_noise" not in own
            groups.setdefault(key, {"params": [], "noise_follows_temper": follows, **own})["params"].append(parameter)
        return list(groups.values())

    def _figures(self) -> dict[str, float]:
        assert self.optimizer is not None
        beliefs = list(self.optimizer.beliefs.values())
        variances = [belief.variances() for belief in beliefs]
        prior = sum(b.prior_variance * b.shape.numel() if b.prior is None else b.prior.sum().item() for b in beliefs)
        lowest, highest = (torch.stack([f(v) for v in variances]) for f in (torch.min, torch.max))
        steps = max(self.count, 1)
        figures = {
            "kalman_prequential_loss": self.sums["loss"] / max(self.labels, 1),
            "kalman_nis": self.sums["nis"] / steps,
            "kalman_step_length": self.sums["length"] / steps,
            "kalman_temper": self.sums["temper"] / steps,
            "kalman_variance_ratio": (torch.stack([v.sum() for v in variances]).sum() / prior).item(),
            "kalman_variance_min": lowest.min().item(),
            "kalman_variance_max": highest.max().item(),
            "kalman_drift_alarms": self.alarms,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
        }
        self.sums, self.count, self.labels = dict.fromkeys(self.sums, 0.0), 0, 0
        return figures

    def _state_dict_of(self, original: Callable[..., dict[str, Any]]) -> Callable[[], dict[str, Any]]:
        def state_dict() -> dict[str, Any]:
            assert self.optimizer is not None
            saved = original(self.inner)
            own = {name: getattr(self, name) for name in ("sums", "count", "labels", "steps", "alarms")}
            kalman = {"filter": self.optimizer.state_dict(), "callback": {**own, "drift": self.drift.state()}}
            groups = [dict(group) for group in saved["param_groups"]]
            groups[0]["kalman"] = kalman
            return {**saved, "param_groups": groups}

        return state_dict

    def _restore(self, saved: dict[str, Any]) -> None:
        assert self.optimizer is not None
        for ours, theirs in zip(self.optimizer.param_groups, saved["filter"]["param_groups"], strict=False):
            if ours["structure"] != theirs["structure"] or len(ours["params"]) != len(theirs["params"]):
                raise ValueError(
                    f"KalmanCallback: the checkpoint's filter has structure {theirs['structure']!r} for "
                    f"{len(theirs['params'])} parameters, got {ours['structure']!r} for {len(ours['params'])}; resume "
                    "with the arguments that the run began with."
                )
        self.optimizer.load_state_dict(saved["filter"])
        own = dict(saved["callback"])
        vars(self.drift).update(own.pop("drift"))
        vars(self).update(own)


def _aligner(model: nn.Module) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Logits and the labels that they are for, by the kind of head."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore
    kind = getattr(base, "loss_type", None)
    if kind == "ForCausalLM":
        return lambda logits, labels: (logits, F.pad(labels[:, 1:], (0, 1), value=-100))
    if kind in ("ForTokenClassification", "ForMaskedLM"):
        return lambda logits, labels: (logits, labels)
    if kind == "ForSequenceClassification":

        def single(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            if labels.dtype not in (torch.int64, torch.int32) or logits.shape[-1] == 1:
                raise ValueError(
                    "KalmanCallback: sequence classification must have one class label per row, got labels of type "
                    f"{labels.dtype} for {logits.shape[-1]} outputs; use `KalmanOptimizer` with factors of your own "
                    "for regression or several labels per row."
                )
            return logits, labels.long()

        return single
    raise ValueError(
        "KalmanCallback: the model must have a head for causal or masked language modelling, token classification or "
        f"sequence classification, got {type(base).__name__}; use `KalmanOptimizer` with factors of your own."
    )


def _scale_of(loss: Tensor, total: Tensor, items: Any, labels: int) -> tuple[float, bool]:
    """What makes the loss the sum over labels, and whether the Trainer leaves it undivided.

    Raises:
        ValueError: the loss is no mean of cross-entropies.
    """
    wanted, found = total.item(), loss.detach().float().item()
    if not (math.isfinite(wanted) and math.isfinite(found)):
        raise ValueError(
            f"KalmanCallback: the model's loss must be finite, got {found}: the run has diverged. A smaller "
            "`step_size` (or `process_noise` or `variance`, where they are given) makes smaller steps; checkpoints are "
            "intact."
        )
    for scale in (None if items is None else float(items), float(labels)):
        if scale is not None and abs(found * scale - wanted) <= 0.02 * abs(wanted) + 1e-6:
            return scale, items is not None
    raise ValueError(
        f"KalmanCallback: the model's loss must be the mean cross-entropy of its logits at the labels, got {found:.6g} "
        f"for a sum of {wanted:.6g} over {labels} labels. Label smoothing, class weights and auxiliary losses (such as "
        "a router's) make it something else; turn them off."
    )


def _check_arguments(args: Any) -> None:
    """Refuse arguments of the Trainer under which the steps would be no filter's.

    Raises:
        ValueError: naming the argument and what works.
    """
    reentrant = (args.gradient_checkpointing_kwargs or {}).get("use_reentrant", False)
    processes = args.world_size > 1
    for name, value, fits, reason in (
        (
            "max_grad_norm",
            args.max_grad_norm,
            not args.max_grad_norm,
            "0: it rescales innovations; `max_step` bounds the step",
        ),
        ("fp16", args.fp16, not args.fp16, "False: its scaler multiplies gradients; use bf16=True"),
        ("weight_decay", args.weight_decay, not args.weight_decay, "0: the prior is the decay (`decay`)"),
        ("label_smoothing_factor", args.label_smoothing_factor, not args.label_smoothing_factor, "0"),
        ("deepspeed", args.deepspeed, not args.deepspeed, "None: it cuts parameters to pieces; use several processes"),
        ("fsdp", args.fsdp, not args.fsdp, "off: it cuts parameters to pieces; use several processes (DDP)"),
        (
            "torch_compile",
            args.torch_compile,
            not args.torch_compile,
            "False: a second backward runs inside the forward",
        ),
        (
            "n_gpu",
            args.n_gpu,
            args.n_gpu <= 1,
            "1: start one process per GPU with torchrun, or set CUDA_VISIBLE_DEVICES",
        ),
        (
            "use_reentrant",
            reentrant,
            not (args.gradient_checkpointing and reentrant),
            "False in `gradient_checkpointing_kwargs`",
        ),
        (
            "average_tokens_across_devices",
            args.average_tokens_across_devices,
            args.average_tokens_across_devices or not processes,
            "True: gradients of processes are a mean of means otherwise",
        ),
    ):
        if not fits:
            raise ValueError(f"KalmanCallback: `{name}` of TrainingArguments must be {reason}; got {value!r}.")


def _before_reporters(callback: TrainerCallback) -> None:
    """Move a callback to the front of its handler, so that what it adds to logs reaches those that report them."""
    handler = sys._getframe(2).f_locals.get("self")
    if isinstance(handler, CallbackHandler) and callback in handler.callbacks:
        flow = sum(isinstance(other, DefaultFlowCallback) for other in handler.callbacks)
        handler.callbacks.remove(callback)
        handler.callbacks.insert(flow, callback)
