"""Exact recursive least squares: a Kalman filter for a linear map."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["RecursiveLeastSquares"]


class RecursiveLeastSquares:
    r"""Posterior mean of the weights W of y = W f + noise, one pass, any number of outputs.

    A Kalman filter for constant weights, whose covariance P all outputs share, in information form (no inverse and no
    gain per token, so that a block of tokens is one product):

        P^-1 <- P^-1 + sum_t f_t f_t^T        P^-1 W^T <- P^-1 W^T + sum_t f_t y_t^T

    The result does not depend on how the tokens are split into blocks. `forget` lets older tokens fade, for weights or
    features that change.

    Args:
        features: width of f.
        outputs: width of y.
        device: where the float64 sums are kept.
    """

    def __init__(self, features: int, outputs: int, device: torch.device | str = "cpu") -> None:
        self.precision = torch.zeros(features, features, dtype=torch.float64, device=device)
        self.information = torch.zeros(features, outputs, dtype=torch.float64, device=device)
        self.tokens = 0.0

    @classmethod
    def of(cls, precision: Tensor, information: Tensor, tokens: float) -> RecursiveLeastSquares:
        """A filter on existing sums, which it changes in place."""
        filter_ = cls(0, 0)
        filter_.precision, filter_.information, filter_.tokens = precision, information, tokens
        return filter_

    @torch.no_grad()
    def update(self, features: Tensor, targets: Tensor) -> None:
        """Take in a block of tokens: features (..., F) and targets (..., O), any float dtype.

        Raises:
            ValueError: the two do not hold the same tokens, or have another width than the filter.
        """
        features, targets = features.flatten(0, -2).double(), targets.flatten(0, -2).double()
        wanted = (self.precision.shape[0], self.information.shape[1])
        if len(features) != len(targets) or (features.shape[1], targets.shape[1]) != wanted:
            raise ValueError(
                f"RecursiveLeastSquares.update: `features` and `targets` must have widths {wanted} and one row per "
                f"token, got {tuple(features.shape)} and {tuple(targets.shape)}."
            )
        self.precision.addmm_(features.T, features)
        self.information.addmm_(features.T, targets)
        self.tokens += len(features)

    @torch.no_grad()
    def forget(self, share: float) -> RecursiveLeastSquares:
        """Multiply the weight of all tokens so far by 1 - share; the exponential forgetting of a Kalman filter."""
        self.precision.mul_(1 - share)
        self.information.mul_(1 - share)
        self.tokens *= 1 - share
        return self

    def solve(self, prior_tokens: float, prior: Tensor | None = None) -> Tensor:
        """Posterior mean (O, F), float64.

        Args:
            prior_tokens: weight of the prior, in tokens of average feature power; > 0 keeps the solve regular.
            prior: prior mean (O, F), what W is believed to be before any token; 0 when None.

        Raises:
            ValueError: nothing has been taken in, or `prior_tokens` is not positive.
        """
        if not self.tokens > 0 or not prior_tokens > 0:
            raise ValueError(
                f"RecursiveLeastSquares.solve: needs tokens and `prior_tokens` > 0, got {self.tokens} tokens and "
                f"{prior_tokens}."
            )
        strength = prior_tokens * self.precision.diagonal().mean() / self.tokens
        eye = torch.eye(len(self.precision), dtype=torch.float64, device=self.precision.device)
        information = self.information if prior is None else self.information + strength * prior.to(eye).T
        return torch.cholesky_solve(information, torch.linalg.cholesky(self.precision + strength * eye)).T

    def state_dict(self) -> dict:
        """The sums, for saving."""
        return {"precision": self.precision, "information": self.information, "tokens": self.tokens}

    def load_state_dict(self, state: dict) -> None:
        """Continue from saved sums."""
        self.precision.copy_(state["precision"])
        self.information.copy_(state["information"])
        self.tokens = state["tokens"]
