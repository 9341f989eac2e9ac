"""Training as filtering: beliefs about parameters, updated by gains and innovations."""

from .covariance import (
    STRUCTURES,
    Covariance,
    DiagonalCovariance,
    FullCovariance,
    LowRankCovariance,
    RowBlockCovariance,
)
from .optimizer import KalmanOptimizer, sampled_label_loss

__all__ = [
    "STRUCTURES",
    "Covariance",
    "DiagonalCovariance",
    "FullCovariance",
    "KalmanOptimizer",
    "LowRankCovariance",
    "RowBlockCovariance",
    "sampled_label_loss",
]
