r"""Adaptation of a frozen language model by forward passes alone: innovations instead of back-propagation.

At the output the innovation of a token and its information have a closed form in the d numbers that the head reads.
With logits W_U h and p their softmax, y the token and y~ a token drawn from p:

    e = W_U^T (y - p)          G = W_U^T (diag p - p p^T) W_U = E[e~ e~^T],   e~ = W_U^T (y~ - p)

so that one row e~ per token stands for the V x V noise. For the linear map h' = (I + M) h in front of the head, e h^T
is the exact gradient of the log-likelihood. For a map deeper down, out = W a, added to the residual stream, the
innovation is carried there: through the last norm by its own Jacobian, and from the last stream z to the stream x of
the map's layer by the identity (what the residual stream does, but for the layers in between) or by the joint
statistics of both ends, Phi = cov(z, x) cov(x)^{-1} in place of the Jacobian, C = cov(x, z) cov(z)^{-1} for corrections
(the smoother's gain). No graph is kept, and memory does not grow with depth.

[information form of a categorical observation: standard for exponential families; gain: Rauch, Tung and Striebel 1965;
statistics of the tokens in place of the Jacobian: our choice]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kalman_kernels.numerics import widen

from .checks import check_ranges
from .covariance import STRUCTURES, Covariance

__all__ = ["InnovationReport", "InnovationTuner"]

# Rows of logits that exist at a time.
_ROWS = 256
_RULES, _CARRIES = ("filter", "least_squares"), ("identity", "statistics")


class InnovationReport(NamedTuple):
    """What a step of `InnovationTuner` saw before it learned.

    Args:
        log_probs: (B, T - 1) log-probability of each next token, 0 where there is none.
        loss: mean of their negative, nats per token.
        tokens: how many there are.
        step_length: Mahalanobis length of the step over all maps.
    """

    log_probs: Tensor
    loss: float
    tokens: int
    step_length: float


class InnovationTuner:
    """Kalman filters on linear maps of a frozen causal language model, fed by forward passes.

        tuner = InnovationTuner(model)
        for input_ids in stream:
            report = tuner.step(input_ids)        # predicted first, then learned from

    Every prediction is made before its token is learned from; a token influences later steps only.

    Args:
        model: causal language model with RMS norm before its head, whose weights are changed only by `merge` or, for
            maps other than "head", by steps.
        maps: "head" for a d x d map in front of the head, and names of linear modules whose output is added to the
            residual stream (`model.layers.3.mlp.down_proj`).
        variance: P_0 of each entry of a map; the argument that decides most.
        structure: of the belief about each map, one of `STRUCTURES`; see `rule`.
        rule: "filter": step P g with g = sum e a^T and information from e~ a^T; "least_squares": each token's e becomes
            a correction (I/s + e~ e~^T)^{-1} e of the map's output, which recursive least squares on the inputs a then
            fits; `structure` is not used.
        carry: "identity" or "statistics", how innovations reach maps other than "head".
        output_variance: s, prior variance of the head's input in rule "least_squares".
        process_noise: see `Covariance.predict`; once a step.
        forgetting: see `Covariance.predict`.
        decay: see `Covariance.predict`.
        temper: >= 1; how many tokens count as one observation.
        max_step: largest Mahalanobis length of a map's step; none when None.
        seed: of the drawn tokens.

    Raises:
        ValueError: an argument is out of its range, or the model does not fit.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        maps: Sequence[str] = ("head",),
        *,
        variance: float = 1e-5,
        structure: str = "kronecker",
        rule: str = "filter",
        carry: str = "identity",
        output_variance: float = 1e-2,
        process_noise: float = 0.0,
        forgetting: float = 1.0,
        decay: float = 1e-3,
        temper: float = 16.0,
        max_step: float | None = None,
        seed: int = 0,
    ) -> None:
        check_ranges(
            "InnovationTuner",
            (
                ("structure", structure, structure in STRUCTURES, f"one of {tuple(STRUCTURES)}"),
                ("rule", rule, rule in _RULES, f"one of {_RULES}"),
                ("carry", carry, carry in _CARRIES, f"one of {_CARRIES}"),
                ("temper", temper, temper >= 1, ">= 1"),
                ("output_variance", output_variance, output_variance > 0, "> 0"),
                ("max_step", max_step, max_step is None or max_step > 0, "> 0 or None"),
            ),
        )
        self.model, self.rule, self.carry, self.temper, self.max_step = model, rule, carry, temper, max_step
        self.output_variance = output_variance
        self.time = {"process_noise": process_noise, "forgetting": forgetting, "decay": decay}
        self.base: Any = model.get_decoder()
        self.head: Any = model.get_output_embeddings()
        if getattr(self.head, "bias", None) is not None or getattr(model.config, "final_logit_softcapping", None):
            raise ValueError(
                f"InnovationTuner: the head of {type(model).__name__} must be linear, without bias or cap."
            )
        self.norm: Any = getattr(self.base, "norm", None)
        self._check_norm()
        device, width = self.head.weight.device, self.head.weight.shape[1]
        self.generator = torch.Generator(device).manual_seed(seed)
        self.weights = {name: self._linear(name) for name in maps if name != "head"}
        self.layers = {name: self._layer(name) for name in self.weights}
        self.correction = torch.zeros(width, width, device=device) if "head" in maps else None
        shapes = {"head": (width, width)} if "head" in maps else {}
        shapes |= {name: tuple(module.weight.shape) for name, module in self.weights.items()}
        if not shapes:
            raise ValueError("InnovationTuner: `maps` must name at least one map, got ().")
        if rule == "least_squares":
            shapes = {name: (shape[1],) for name, shape in shapes.items()}
            structure = "full"
        self.beliefs: dict[str, Covariance] = {
            name: STRUCTURES[structure](shape, variance, device=device) for name, shape in shapes.items()
        }
        self.gains = {name: _Regression(width, device) for name in self.weights} if carry == "statistics" else {}
        # The mean of every deep map in float32, whatever its weight's dtype.
        self.means = {name: module.weight.detach().float().clone() for name, module in self.weights.items()}

    @torch.inference_mode()
    def step(self, input_ids: Tensor, attention_mask: Tensor | None = None, learn: bool = True) -> InnovationReport:
        """Predict the next tokens of `input_ids` with what is known so far, then learn from them.

        Args:
            input_ids: (B, T) int64, T >= 2.
            attention_mask: (B, T), 0 for padding.
            learn: False to predict alone.

        Raises:
            ValueError: a wrong shape, or numbers that are not finite came out of the model; nothing is learned then.
        """
        if input_ids.dim() != 2 or input_ids.shape[1] < 2:
            raise ValueError(f"InnovationTuner.step: `input_ids` must be (B, T >= 2), got {tuple(input_ids.shape)}.")
        inputs, streams, before_norm, handles = {}, {}, [], []
        for name, module in self.weights.items() if learn else ():
            handles.append(module.register_forward_pre_hook(_keeper(inputs, name)))
            handles.append(self.layers[name].register_forward_hook(_keeper(streams, name)))
        handles.append(self.norm.register_forward_pre_hook(lambda _, args: before_norm.append(args[0])))
        training = self.model.training
        self.model.eval()
        try:
            hidden = self.base(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        finally:
            self.model.train(training)
            for handle in handles:
                handle.remove()
        kept = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        kept = kept[:, :-1] & kept[:, 1:]
        hidden, wanted = hidden[:, :-1][kept].float(), input_ids[:, 1:][kept]
        if not torch.isfinite(hidden).all():
            raise ValueError("InnovationTuner.step: the model's hidden states are not finite; nothing was learned.")
        log_probs, innovations, drawn = self._innovations(hidden, wanted)
        length = 0.0
        if learn:
            last = before_norm[0][:, :-1][kept].float()
            parts = {name: values[:, :-1][kept].float() for name, values in inputs.items()}
            ends = {name: values[:, :-1][kept].float() for name, values in streams.items()}
            with torch.autocast(hidden.device.type, enabled=False):  # A covariance in 16 bits loses its sign.
                length = self._learn(hidden, last, parts, ends, innovations, drawn)
        full = torch.zeros(kept.shape, device=hidden.device).masked_scatter(kept, log_probs)
        return InnovationReport(full, -log_probs.mean().item(), len(log_probs), length)

    def _innovations(self, hidden: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probability of y, e and e~ for rows of the head's input."""
        weight, found = self.head.weight, []
        corrected = hidden if self.correction is None else hidden + hidden @ self.correction.T
        for rows, labels in zip(corrected.split(_ROWS), wanted.split(_ROWS), strict=True):
            logits = widen(rows.to(weight.dtype) @ weight.T)
            logs = logits.log_softmax(-1)
            p = logs.exp()
            mean = (p.to(weight.dtype) @ weight).float()
            drawn = torch.multinomial(p, 1, generator=self.generator)[:, 0]
            found.append(
                (logs.gather(1, labels[:, None])[:, 0], weight[labels].float() - mean, weight[drawn].float() - mean)
            )
        return tuple(torch.cat(parts) for parts in zip(*found, strict=True))  # pyright: ignore[reportReturnType]

    def _learn(
        self,
        hidden: Tensor,
        last: Tensor,
        inputs: dict[str, Tensor],
        ends: dict[str, Tensor],
        innovations: Tensor,
        drawn: Tensor,
    ) -> float:
        squares = hidden.new_zeros(())
        for name, belief in self.beliefs.items():
            carry = None
            if name == "head":
                left, sampled, right = innovations, drawn, hidden
            else:
                left, sampled = (self._through_norm(last, rows) for rows in (innovations, drawn))
                right = inputs[name]
                if self.carry == "statistics":
                    x, z = ends[name], last
                    # Rows e Phi for innovations; rows d C^T for corrections.
                    carry = self.gains[name].update(x, z) if self.rule == "filter" else self.gains[name].update(z, x).T
            belief.predict(**self.time)
            learn = self._filter if self.rule == "filter" else self._regress
            step, square = learn(belief, left, sampled, right, carry)
            if self.max_step is not None:
                cut = (self.max_step / square.clamp(min=1e-30).sqrt()).clamp(max=1)
                step, square = step * cut, square * cut**2
            squares = squares + square
            if name == "head":
                cast(Tensor, self.correction).add_(step)
            else:
                self.means[name] += step
                self.weights[name].weight.data.copy_(self.means[name])
        return squares.sqrt().item()

    def _filter(
        self, belief: Covariance, left: Tensor, sampled: Tensor, right: Tensor, carry: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if carry is not None:
            left, sampled = left @ carry, sampled @ carry
        gradient = left.T @ right / self.temper
        belief.observe(sampled / self.temper**0.5, right)
        step = belief.update(gradient)
        return step, (gradient * step).sum()

    def _regress(
        self, belief: Covariance, left: Tensor, sampled: Tensor, right: Tensor, carry: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        s = self.output_variance
        inner = (sampled * left).sum(1, keepdim=True) / (1 / s + sampled.square().sum(1, keepdim=True))
        corrections = s * (left - sampled * inner)
        if carry is not None:
            corrections = corrections @ carry
        scaled = right / (self.temper * s) ** 0.5
        belief.accumulate(scaled)
        belief.update(torch.zeros_like(right[0]))
        products = corrections.T @ right / (self.temper * s)
        step = products @ belief.covariance  # pyright: ignore[reportAttributeAccessIssue]
        return step, (products * step).sum()

    def _through_norm(self, last: Tensor, rows: Tensor) -> Tensor:
        """J^T e of the last norm, y = w h / r with r^2 = mean h^2 + eps."""
        inverse = (last.square().mean(-1, keepdim=True) + self.epsilon).rsqrt()
        weighted = rows * self.norm.weight.float()
        along = (weighted * last).mean(-1, keepdim=True)
        return inverse * (weighted - last * along * inverse.square())

    def _check_norm(self) -> None:
        """Its epsilon, where it is the norm that `_through_norm` differentiates."""
        weight = getattr(self.norm, "weight", None)
        self.epsilon: Any = getattr(self.norm, "variance_epsilon", getattr(self.norm, "eps", None))
        if weight is not None and isinstance(self.epsilon, float):
            with torch.no_grad():
                probe = torch.randn(3, len(weight), generator=torch.Generator().manual_seed(0)).to(weight.device)
                found = self.norm(probe.to(weight.dtype)).float()
                own = probe * (probe.square().mean(-1, keepdim=True) + self.epsilon).rsqrt() * weight.float()
            if torch.allclose(found, own, rtol=2e-2, atol=2e-2):
                return
        raise ValueError(
            f"InnovationTuner: the last norm of {type(self.model).__name__} must be an RMS norm with a weight, got "
            f"{type(self.norm).__name__}."
        )

    def _linear(self, name: str) -> nn.Linear:
        modules = dict(self.model.named_modules())
        module = modules.get(name)
        width = self.head.weight.shape[1]
        if not isinstance(module, nn.Linear) or module.weight.shape[0] != width:
            fitting = [
                n for n, m in modules.items() if isinstance(m, nn.Linear) and n.endswith(("o_proj", "down_proj"))
            ]
            raise ValueError(
                f"InnovationTuner: `maps` must be 'head' or linear modules with {width} outputs, such as "
                f"{fitting[:4]}, got {name!r}."
            )
        return module

    def _layer(self, name: str) -> nn.Module:
        """The decoder layer that a module is in."""
        for layer in self.base.layers:
            if any(module is self.weights[name] for module in layer.modules()):
                return layer
        raise ValueError(f"InnovationTuner: `maps` must name modules of decoder layers, got {name!r}.")

    @torch.no_grad()
    def merge(self) -> PreTrainedModel:
        """Write the map in front of the head into the head, which is untied from the embeddings; the model."""
        if self.correction is not None:
            weight = self.head.weight.float()
            merged = nn.Parameter((weight + weight @ self.correction).to(self.head.weight.dtype))
            self.head.weight = merged
            self.model.config.tie_word_embeddings = False
            self.correction.zero_()
        return self.model

    def state_dict(self) -> dict[str, Any]:
        """Everything that a later `load_state_dict` needs to continue, deep maps included."""
        return {
            "beliefs": {name: belief.state_dict() for name, belief in self.beliefs.items()},
            "means": {name: mean.clone() for name, mean in self.means.items()},
            "correction": None if self.correction is None else self.correction.clone(),
            "gains": {name: gain.state_dict() for name, gain in self.gains.items()},
            "generator": self.generator.get_state(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state.

        Raises:
            ValueError: it is the state of other maps.
        """
        if state["beliefs"].keys() != self.beliefs.keys():
            raise ValueError(
                f"InnovationTuner.load_state_dict: `state` must be of the maps {tuple(self.beliefs)}, got "
                f"{tuple(state['beliefs'])}."
            )
        for name, belief in self.beliefs.items():
            belief.load_state_dict(state["beliefs"][name])
        for name, mean in self.means.items():
            mean.copy_(state["means"][name])
            self.weights[name].weight.data.copy_(mean)
        if self.correction is not None:
            self.correction.copy_(state["correction"])
        for name, gain in self.gains.items():
            gain.load_state_dict(state["gains"][name])
        self.generator.set_state(state["generator"])


class _Regression:
    """cov(z, x) cov(x)^{-1} from all rows so far, shrunk towards the identity while they are few."""

    def __init__(self, width: int, device: torch.device, prior: float = 64.0) -> None:
        self.eye, self.prior = torch.eye(width, device=device), prior
        self.cross, self.own = torch.zeros_like(self.eye), torch.zeros_like(self.eye)
        self.scale = torch.zeros((), device=device)

    def update(self, x: Tensor, z: Tensor) -> Tensor:
        """Take in rows; the matrix that takes x to z."""
        if not self.scale:
            self.scale.copy_(x.square().mean())
        self.cross += z.T @ x
        self.own += x.T @ x
        ridge = self.prior * self.scale * self.eye
        return torch.linalg.solve(self.own + ridge, (self.cross + ridge).T).T

    def state_dict(self) -> dict[str, Tensor]:
        return {name: getattr(self, name).clone() for name in ("cross", "own", "scale")}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, value in state.items():
            getattr(self, name).copy_(value)


def _keeper(place: dict[str, Tensor], name: str) -> Callable[..., None]:
    """A hook that keeps a module's first input, or its output where it is given one."""

    def hook(module: nn.Module, args: tuple, output: Any = None) -> None:
        value = args if output is None else output
        place[name] = value[0] if isinstance(value, tuple) else value

    return hook
