"""The Kalman filter on parameters as a torch optimizer, and the Fisher factor that it needs."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from kalman_kernels.numerics import widen

from .checks import check_ranges
from .covariance import STRUCTURES, Covariance

__all__ = ["KalmanOptimizer", "sampled_label_loss"]


def sampled_label_loss(
    logits: Tensor, labels: Tensor, generator: torch.Generator | None = None, uniforms: Tensor | None = None
) -> Tensor:
    r"""Summed cross-entropy at labels drawn from the model's own distribution: its gradient is a Fisher factor.

        y~_t ~ Cat(softmax(z_t)),   L~ = sum_t -log softmax(z_t)[y~_t]
        E[grad L~ grad L~^T] = sum_t J_t^T (diag p_t - p_t p_t^T) J_t

    The errors of different tokens are independent and have mean zero, so that one backward pass for all of them is
    unbiased, and no V x V matrix is formed. The gradient at the true labels is no such factor: it takes the variance
    away along the very direction of the surprise. [Fisher information of a softmax; Martens, arXiv 1412.1193]

    Args:
        logits: (..., V); shifted already where the model predicts the next token.
        labels: (...) int64; only where they are not -100 a label is drawn.
        generator: for the draws; torch's own when None.
        uniforms: (N,) numbers in [0, 1), one for each label that is not -100, which say where in the cumulated
            distribution a label is drawn; instead of a generator.

    Returns:
        Scalar, in at least float32.

    Raises:
        ValueError: `labels` do not have the shape of `logits` without its last dimension, or `uniforms` are not as many
            as the labels.
    """
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"sampled_label_loss: `labels` must have shape {tuple(logits.shape[:-1])}, got {tuple(labels.shape)}."
        )
    kept = logits[labels != -100]
    logs = widen(kept).log_softmax(-1)
    p = logs.detach().exp()
    if uniforms is not None:
        if uniforms.shape != logs.shape[:1]:
            raise ValueError(
                f"sampled_label_loss: `uniforms` must have shape ({len(logs)},), got {tuple(uniforms.shape)}."
            )
        cumulated = p.cumsum(-1)
        # Rounding may leave the sum below 1; the last label is the end in any case.
        drawn = torch.searchsorted(cumulated, uniforms[:, None] * cumulated[:, -1:]).clamp(max=p.shape[-1] - 1)
    else:
        drawn = torch.multinomial(p, 1, generator=generator) if len(logs) else labels.new_zeros(0, 1)
    return -logs.gather(-1, drawn).sum()


# Mean square of a Fisher factor below which it says nothing.
_NO_INFORMATION = 1e-30
# Rows and columns that say less than that share of the mean get the prior of that share. What no early sample has
# seen (rare tokens, inputs that are 0) would otherwise move furthest: a small BERT then stays at chance.
_LEAST_SHARE = 0.3
# State of a parameter that is not its belief's.
_OWN_STATE = {"steps", "row_information", "column_information", "information", "told", "innovations"}


class KalmanOptimizer(torch.optim.Optimizer):
    r"""Kalman filter on parameters: the step is gain times innovation, P g with g the gradient of the log-likelihood.

    Each parameter tensor has a belief of its own (`hf_kalman.training.covariance`). A step is

        predict        P <- ((1 - decay) P + decay P_0) / forgetting + process_noise
        information    P <- (P^{-1} + Q^T Q / temper)^{-1}           Q: accumulated Fisher factors
        step           theta <- theta + lr P g / temper

    in this order, with g = -`gradient_scale` p.grad. For the filter to be one, p.grad must be the gradient of the loss
    *summed* over the observations of the step; where the loss is their mean, `gradient_scale` is their number. Factors
    come from a second backward pass:

        sampled_label_loss(logits, labels).backward(retain_graph=True)
        optimizer.accumulate_fisher()              # takes p.grad as a row of Q and clears it
        loss.backward()
        optimizer.step()

    Args:
        params: parameters or groups; a group may have its own value of every argument below.
        variance: P_0, prior variance of each entry, in squared units of the parameter; the argument that decides most.
            None begins where the filter settles in the long run, at sqrt(process_noise / i): the information i of a
            step is estimated by the first `prior_steps` Fisher factors, entry by entry as the product of its row's and
            its column's share, and sqrt(process_noise) is then the only scale to choose. (It is what a learning rate of
            RMSprop is, times sqrt(temper).) A tensor waits for its first factor that is not 0.
        prior_steps: steps with a factor in which the prior is estimated, where `variance` is None; and again after as
            many more when the information has grown fourfold, as it does for a LoRA A while its B leaves zero.
        boost: >= 1: how far above that prior the variance begins, where `variance` is None; with a `decay` it goes back
            to it. Larger steps at first.
        structure: one of `STRUCTURES`, or "block": "row_block" or "column_block", whichever has the smaller blocks, for
            each tensor; vectors are then diagonal.
        rank: of "low_rank".
        process_noise: see `Covariance.predict`; stationary steps are RMSprop's with learning rate sqrt(process_noise).
        forgetting: see `Covariance.predict`.
        decay: see `Covariance.predict`.
        temper: >= 1; observations that depend on one another count for that many times less.
        noise_memory: in [0, 1): memory of a running estimate of how much noisier each tensor's innovations are than the
            model expects, r = mean g^T P g / mean q^T P q, at least 1 (which it is where the model is right about its
            uncertainty); they then count r times less. None for r = 1. [adaptive noise from innovations: Mehra 1970;
            the ratio is ours]
        max_step: largest Mahalanobis length sqrt(step^T P^{-1} step) of a step of one tensor; none when None.
        fisher: "sampled" for accumulated factors; "empirical" takes g itself as the only row of Q, which needs
            "diagonal": with correlations it removes the variance along the surprise.
        gradient_scale: observations behind a mean loss, 1 for a summed one.
        lr: factor on the step, 1 for the filter's own; what learning-rate schedules change.

    `step_length` is the Mahalanobis length sqrt(step^T P^{-1} step) of the last step over all tensors.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        params,
        variance: float | None = 1e-3,
        *,
        prior_steps: int = 8,
        boost: float = 1.0,
        structure: str = "diagonal",
        rank: int = 10,
        process_noise: float = 0.0,
        forgetting: float = 1.0,
        decay: float = 0.0,
        temper: float = 1.0,
        noise_memory: float | None = None,
        max_step: float | None = None,
        fisher: str = "sampled",
        gradient_scale: float = 1.0,
        lr: float = 1.0,
    ) -> None:
        defaults = {
            "variance": variance,
            "prior_steps": prior_steps,
            "boost": boost,
            "structure": structure,
            "rank": rank,
            "process_noise": process_noise,
            "forgetting": forgetting,
            "decay": decay,
            "temper": temper,
            "noise_memory": noise_memory,
            "max_step": max_step,
            "fisher": fisher,
            "gradient_scale": gradient_scale,
            "lr": lr,
        }
        self.beliefs: dict[Tensor, Covariance] = {}
        self.step_length = torch.zeros(())
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As every optimizer's; the group's arguments are checked and its beliefs begin at the prior."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check(group)
            for parameter in group["params"]:
                self._begin(parameter, group)
        except ValueError:
            self.param_groups.pop()
            raise

    def _begin(self, parameter: Tensor, group: dict[str, Any]) -> None:
        name = group["structure"]
        options = {"rank": group["rank"]} if name == "low_rank" else {}
        if name == "block":
            rows, columns = parameter.shape[:1].numel(), parameter.shape[1:].numel()
            name = "diagonal" if parameter.dim() < 2 else "row_block" if columns <= rows else "column_block"
        variance = 1.0 if group["variance"] is None else group["variance"]
        belief = STRUCTURES[name](parameter.shape, variance, device=parameter.device, **options)
        self.beliefs[parameter] = belief
        # The same tensors: what the filter changes is what `state_dict` saves. A narrow parameter has a wide mean.
        self.state[parameter] = {**belief.state(), "steps": torch.zeros(())}
        if group["noise_memory"] is not None:
            # Running means of g^T P g and of q^T P q.
            self.state[parameter]["innovations"] = torch.zeros(2, device=parameter.device)
        if group["variance"] is None:
            rows, columns = parameter.shape[:1].numel(), parameter.shape[1:].numel()
            own = {"device": parameter.device, "dtype": torch.float32}
            # Running means over what each row and column told, of how many factors, and the mean that is the prior's.
            sizes = {"row_information": (rows,), "column_information": (columns,), "information": ()}
            self.state[parameter] |= {name: torch.zeros(size, **own) for name, size in sizes.items()}
            self.state[parameter]["told"] = torch.zeros(())
        if parameter.dtype != torch.float32:
            self.state[parameter]["mean"] = parameter.detach().to(torch.float32).clone()

    @torch.no_grad()
    def accumulate_fisher(self) -> None:
        """Take every p.grad, the gradient of a *summed* sampled-label loss, as a row of Q, and clear it."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.beliefs[parameter].accumulate(parameter.grad[None])
                    parameter.grad = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step of the filter; the closure's loss where one is given.

        Raises:
            RuntimeError: `fisher="sampled"` and no factor was accumulated for a parameter that has a gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        squares = []
        for group in self.param_groups:
            moving = [p for p in group["params"] if p.grad is not None]
            if group["fisher"] == "sampled" and any(not self.beliefs[p].factors for p in moving):
                raise RuntimeError(
                    "KalmanOptimizer.step: no Fisher factor was accumulated since the last step; run "
                    "sampled_label_loss(logits, labels).backward(retain_graph=True) and accumulate_fisher() before the "
                    "loss's own backward, or use fisher='empirical' with structure='diagonal'."
                )
            squares += [self._filter(parameter, group) for parameter in moving]
        if squares:
            self.step_length = torch.stack([square.to(squares[0].device) for square in squares]).sum().sqrt()
        return loss

    def _filter(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """The squared Mahalanobis length of the step that was taken, for `lr` 1."""
        belief, state = self.beliefs[parameter], self.state[parameter]
        gradient = -group["gradient_scale"] * parameter.grad.to(torch.float32)  # pyright: ignore
        belief.predict(group["process_noise"], group["forgetting"], group["decay"])
        if group["fisher"] == "empirical":
            belief.accumulate(gradient[None])
        belief.factors = [factor / math.sqrt(group["temper"]) for factor in belief.factors]
        if group["variance"] is None and sum(map(len, belief.factors)):
            self._estimate_prior(belief, state, group)
        if group["variance"] is None and not state["told"]:
            belief.factors = []
            return torch.zeros_like(gradient.sum())  # Without a prior nothing moves.
        gradient = gradient / group["temper"]
        if group["noise_memory"] is not None and sum(map(len, belief.factors)):
            gradient = self._noise_adapted(belief, state["innovations"], gradient, group["noise_memory"])
        step = belief.update(gradient)
        # (P g)^T P^{-1} (P g) = g^T P g.
        square = (gradient * step).sum().clamp(min=torch.finfo(torch.float32).tiny)
        if group["max_step"] is not None:
            cut = (group["max_step"] / square.sqrt()).clamp(max=1)
            step, square = step * cut, square * cut**2
        mean = state.get("mean", parameter)
        mean.add_(step, alpha=group["lr"])
        if mean is not parameter:
            parameter.copy_(mean)
        state["steps"] += 1
        return square

    @staticmethod
    def _noise_adapted(belief: Covariance, sums: Tensor, gradient: Tensor, memory: float) -> Tensor:
        """The gradient, and the belief's factors, counted less by how far innovations exceed what was expected."""
        found = (gradient * belief.times(gradient)).sum()
        wanted = torch.stack([(row * belief.times(row)).sum() for factor in belief.factors for row in factor]).sum()
        sums.mul_(memory).add_((1 - memory) * torch.stack([found, wanted]))
        # Both sums have seen the same share of the past, which drops out of their ratio.
        ratio = (sums[0] / sums[1].clamp(min=torch.finfo(sums.dtype).tiny)).clamp(min=1)
        belief.factors = [factor / ratio.sqrt() for factor in belief.factors]
        return gradient / ratio

    @staticmethod
    def _estimate_prior(belief: Covariance, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        """Begin again at the variance that the filter would settle at with the information seen so far.

        In the first `prior_steps` factors, and after as many more whenever information has grown fourfold, as it does
        behind a tensor that begins at zero.
        """
        squares = torch.cat(belief.factors).square().sum(0).reshape(len(state["row_information"]), -1)
        steps, told = group["prior_steps"], state["told"]
        if told < steps and squares.mean() < _NO_INFORMATION:
            return  # A tensor behind one that is still zero.
        told += 1
        weight = 1 / told.clamp(max=steps)
        state["row_information"].lerp_(squares.mean(1), weight)
        state["column_information"].lerp_(squares.mean(0), weight)
        rows, columns = state["row_information"], state["column_information"]
        mean = rows.mean()
        if told > steps and (told % steps != 0 or mean < 4 * state["information"]):
            return
        state["information"].copy_(mean)
        # Shares before their product, which would underflow for a bias that hardly matters.
        rows, columns = (rows / mean).clamp(min=_LEAST_SHARE), (columns / mean).clamp(min=_LEAST_SHARE)
        belief.restart((group["process_noise"] / mean / (rows[:, None] * columns)).sqrt().view(belief.shape))
        belief.inflate(group["boost"])

    @torch.no_grad()
    def inflate(self, factor: float) -> None:
        """Multiply all covariances: what was known is known less, as after a change of the data.

        Raises:
            ValueError: `factor` is not positive.
        """
        if not factor > 0:
            raise ValueError(f"KalmanOptimizer.inflate: `factor` must be > 0, got {factor!r}.")
        for belief in self.beliefs.values():
            belief.inflate(factor)

    def variances(self) -> dict[Tensor, Tensor]:
        """{parameter: posterior variance of its entries}."""
        return {parameter: belief.variances() for parameter, belief in self.beliefs.items()}

    def state_dict(self) -> dict[str, Any]:
        """As every optimizer's, with factors that were accumulated and not used yet."""
        saved = super().state_dict()
        for index, parameter in enumerate(chain.from_iterable(g["params"] for g in self.param_groups)):
            saved["state"][index] = {**saved["state"][index], **self.beliefs[parameter].state_dict()}
        return saved

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved state bit for bit; states stay float32 also for narrow parameters.

        Raises:
            ValueError: it is the state of other parameters or of another structure.
        """
        super().load_state_dict({**state_dict, "state": {}})
        indices = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        for group in self.param_groups:
            for parameter, index in zip(group["params"], indices, strict=False):
                self._begin(parameter, group)
                saved, state = dict(state_dict["state"][index]), self.state[parameter]
                for name in _OWN_STATE & saved.keys():
                    state[name].copy_(saved.pop(name))
                if (mean := saved.pop("mean", None)) is not None:
                    state["mean"].copy_(mean)
                self.beliefs[parameter].load_state_dict(saved)


def _check(group: dict[str, Any]) -> None:
    structures = (*STRUCTURES, "block")
    if group["structure"] not in structures:
        raise ValueError(f"KalmanOptimizer: `structure` must be one of {structures}, got {group['structure']!r}.")
    if group["fisher"] not in ("sampled", "empirical"):
        raise ValueError(f"KalmanOptimizer: `fisher` must be 'sampled' or 'empirical', got {group['fisher']!r}.")
    if group["fisher"] == "empirical" and group["structure"] != "diagonal":
        raise ValueError(
            f"KalmanOptimizer: `fisher='empirical'` needs structure='diagonal', got {group['structure']!r}: with "
            "correlations it removes the variance along the surprise."
        )
    if group["variance"] is None and not group["process_noise"] > 0:
        raise ValueError(
            f"KalmanOptimizer: `process_noise` must be > 0 with variance=None, got {group['process_noise']!r}: the "
            "variance is estimated from it."
        )
    check_ranges(
        "KalmanOptimizer",
        (
            ("prior_steps", group["prior_steps"], group["prior_steps"] >= 1, ">= 1"),
            ("boost", group["boost"], group["boost"] >= 1, ">= 1"),
            ("temper", group["temper"], group["temper"] >= 1, ">= 1"),
            ("gradient_scale", group["gradient_scale"], group["gradient_scale"] > 0, "> 0"),
            (
                "noise_memory",
                group["noise_memory"],
                group["noise_memory"] is None or 0 <= group["noise_memory"] < 1,
                "in [0, 1) or None",
            ),
            ("max_step", group["max_step"], group["max_step"] is None or group["max_step"] > 0, "> 0 or None"),
            ("lr", group["lr"], group["lr"] >= 0, ">= 0"),
            ("process_noise", group["process_noise"], group["process_noise"] >= 0, ">= 0"),
            ("forgetting", group["forgetting"], 0 < group["forgetting"] <= 1, "in (0, 1]"),
            ("decay", group["decay"], 0 <= group["decay"] <= 1, "in [0, 1]"),
        ),
    )
