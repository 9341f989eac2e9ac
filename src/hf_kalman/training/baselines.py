"""What a Bayesian head is compared with: warm-started retraining on a memory of samples, and last-layer Laplace.

Both have the interface of `KalmanBayesianHead`: a call predicts, `filter_step` scores a sample and then learns it.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor, nn

from .bayesian_head import HeadPrediction, log_of, softmax_moments, with_one
from .checks import check_ranges

__all__ = ["LastLayerLaplace", "WarmStart"]


class WarmStart(nn.Module):
    """A linear layer that is trained on with each sample: gradient steps on the samples in memory, from where it is.

    Args:
        linear: where it begins; it is copied.
        memory: samples that are kept, the newest; None for all.
        optimizer: "sgd" or "adamw".
        learning_rate: of the optimizer, whose state is kept from sample to sample.
        steps: gradient steps for each new sample, on the whole memory.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        linear: nn.Linear,
        memory: int | None = 1,
        *,
        optimizer: str = "sgd",
        learning_rate: float = 0.1,
        steps: int = 5,
    ) -> None:
        super().__init__()
        check_ranges(
            "WarmStart",
            (
                ("memory", memory, memory is None or memory >= 1, ">= 1 or None"),
                ("optimizer", optimizer, optimizer in ("sgd", "adamw"), "'sgd' or 'adamw'"),
                ("learning_rate", learning_rate, learning_rate > 0, "> 0"),
                ("steps", steps, steps >= 1, ">= 1"),
            ),
        )
        self.linear = nn.Linear(linear.in_features, linear.out_features).to(linear.weight.device)
        with torch.no_grad():
            self.linear.weight.copy_(linear.weight)
            self.linear.bias.zero_() if linear.bias is None else self.linear.bias.copy_(linear.bias)
        self.memory: deque[tuple[Tensor, Tensor]] = deque(maxlen=memory)
        kind = torch.optim.SGD if optimizer == "sgd" else torch.optim.AdamW
        self.optimizer, self.steps = kind(self.linear.parameters(), lr=learning_rate), steps

    @torch.no_grad()
    def forward(self, features: Tensor) -> HeadPrediction:
        """Predictions for (B, inputs); without uncertainty of the weights."""
        logits = self.linear(features.float())
        nothing = torch.zeros_like(logits)
        return HeadPrediction(logits, nothing, logits.softmax(-1), nothing)

    def filter_step(self, features: Tensor, label: Tensor | int) -> float:
        """Learn one sample; the log-likelihood of its label before that.

        Args:
            features: (inputs,).
            label: a class.
        """
        score = log_of(self(features[None]).probabilities[0, label]).item()
        self.learn(features, label)
        return score

    def learn(self, features: Tensor, label: Tensor | int) -> None:
        """Learn one sample.

        Args:
            features: (inputs,).
            label: a class.
        """
        self.memory.append((features.detach().float(), torch.as_tensor(label, device=features.device)))
        inputs, labels = (torch.stack(parts) for parts in zip(*self.memory, strict=True))
        with torch.enable_grad():
            for _ in range(self.steps):
                self.optimizer.zero_grad()
                nn.functional.cross_entropy(self.linear(inputs), labels).backward()
                self.optimizer.step()


class LastLayerLaplace(nn.Module):
    r"""Warm-started retraining with the uncertainty of a Laplace approximation of its weights.

        Lambda = I / variance + sum_i x_i x_i^T mean_n p_n (1 - p_n)        (x with a constant 1)
        variance of every logit: x^T Lambda^{-1} x

    the curvature of the loss at the samples seen, each taken where it was learned, one matrix for all outputs.
    [Daxberger et al., arXiv 2106.14806; one shared matrix in place of its Kronecker factors: ours]

    Args:
        linear: where it begins; it is copied.
        variance: prior variance of each weight.
        start: see `WarmStart`; the trained part.

    Raises:
        ValueError: `variance` is not positive.
    """

    def __init__(self, linear: nn.Linear, variance: float = 0.1, **start) -> None:
        super().__init__()
        if not variance > 0:
            raise ValueError(f"LastLayerLaplace: `variance` must be > 0, got {variance!r}.")
        self.trained = WarmStart(linear, **start)
        device = linear.weight.device
        self.register_buffer("covariance", variance * torch.eye(linear.in_features + 1, device=device))

    @torch.no_grad()
    def forward(self, features: Tensor) -> HeadPrediction:
        """Predictions for (B, inputs), with the variance of the logits."""
        logits = self.trained(features).mean
        x = with_one(features.float())
        variance = ((x @ self.covariance) * x).sum(-1, keepdim=True).expand_as(logits)
        return HeadPrediction(logits, variance, *softmax_moments(logits, variance, order=2))

    def filter_step(self, features: Tensor, label: Tensor | int) -> float:
        """Learn one sample; the log-likelihood of its label before that.

        Args:
            features: (inputs,).
            label: a class.
        """
        score = log_of(self(features[None]).probabilities[0, label]).item()
        self.trained.learn(features, label)
        with torch.no_grad():
            p = self.trained(features[None]).probabilities
            x = with_one(features.float())
            crossed = self.covariance @ x
            weight = (p * (1 - p)).mean()
            self.covariance -= weight * torch.outer(crossed, crossed) / (1 + weight * (x @ crossed))
        return score
