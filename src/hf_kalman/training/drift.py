"""Innovations of a loss: how far it is from what a model expects, and whether that has changed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kalman_kernels.numerics import widen

__all__ = ["DriftDetector", "chi_square_quantile", "log_loss_innovation"]

# Labels whose logits are softmaxed at a time.
_ROWS = 4096


def chi_square_quantile(probability: float, degrees: int = 1) -> float:
    """Quantile of chi-square, by halving an interval of its distribution function, a regularised gamma function.

    Args:
        probability: in (0, 1).
        degrees: of freedom, >= 1.
    """
    half = torch.tensor(degrees / 2, dtype=torch.float64)
    low, high = 0.0, 2.0 * degrees + 100 * math.sqrt(degrees)
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        below = torch.special.gammainc(half, torch.tensor(middle / 2, dtype=torch.float64)).item() < probability
        low, high = (middle, high) if below else (low, middle)
    return high


def log_loss_innovation(logits: Tensor, labels: Tensor) -> Tensor:
    r"""How far the log loss of some labels is from what the model expects it to be.

        L = sum_t -log p_t(y_t)      H = sum_t E_p[-log p_t] = sum_t entropy of p_t      V = sum_t Var_p[-log p_t]

    For a model that is right about its uncertainty, (L - H)^2 / V has mean 1: it is the normalised innovation squared
    of the log loss as a scalar observation. [definition of the entropy; the test is ours]

    Args:
        logits: (N, V).
        labels: (N,) int64, all of them labels.

    Returns:
        (3,) float64: L, H, V in nats and nats squared.
    """
    total = torch.zeros(3, dtype=torch.float64, device=logits.device)
    for rows, wanted in zip(logits.split(_ROWS), labels.split(_ROWS), strict=True):
        logs = widen(rows).log_softmax(-1)
        p = logs.exp()
        entropy = -(p * logs).sum(-1)
        variance = (p * (logs + entropy[:, None]).square()).sum(-1)
        loss = -logs.gather(-1, wanted[:, None])
        total += torch.stack([loss.double().sum(), entropy.double().sum(), variance.double().sum()])
    return total


class DriftDetector:
    """Page's cumulative-sum test on standardised innovations: says when the loss has risen beyond what was usual.

        m_t = m_{t-1} + (z_t - m_{t-1}) / min(t, memory),   c_t = max(0, c_{t-1} + z_t - m_{t-1} - slack)
        alarm when c_t > threshold, and then again from the start

    [Page, Biometrika 1954; with a running mean in place of a known one]

    Args:
        threshold: sum of excesses that makes an alarm, in standard deviations of z.
        slack: excess per step that is not counted.
        memory: steps over which the usual z is remembered; also how many pass before the first alarm is possible,
            divided by four.
    """

    def __init__(self, threshold: float = 8.0, slack: float = 0.5, memory: int = 32) -> None:
        self.threshold, self.slack, self.memory = threshold, slack, memory
        self.start()

    def start(self) -> None:
        """Forget everything."""
        self.count, self.mean, self.square, self.excess = 0, 0.0, 0.0, 0.0

    def update(self, value: float) -> bool:
        """Take in the next z; whether it makes an alarm."""
        if self.count >= self.memory // 4:
            spread = math.sqrt(max(self.square - self.mean**2, 1e-12))
            self.excess = max(0.0, self.excess + (value - self.mean) / spread - self.slack)
        self.count += 1
        weight = 1 / min(self.count, self.memory)
        self.mean += weight * (value - self.mean)
        self.square += weight * (value**2 - self.square)
        if self.excess > self.threshold:
            self.start()
            return True
        return False

    def state(self) -> dict[str, float]:
        """What it remembers."""
        return {"count": self.count, "mean": self.mean, "square": self.square, "excess": self.excess}
