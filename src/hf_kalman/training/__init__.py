"""Training as filtering: beliefs about parameters, updated by gains and innovations."""

from .callback import DriftDetector, KalmanCallback, log_loss_innovation
from .covariance import (
    STRUCTURES,
    ColumnBlockCovariance,
    Covariance,
    DiagonalCovariance,
    FullCovariance,
    KroneckerCovariance,
    LowRankCovariance,
    RowBlockCovariance,
)
from .optimizer import KalmanOptimizer, sampled_label_loss

__all__ = [
    "STRUCTURES",
    "ColumnBlockCovariance",
    "Covariance",
    "DiagonalCovariance",
    "DriftDetector",
    "FullCovariance",
    "KalmanCallback",
    "KalmanOptimizer",
    "KroneckerCovariance",
    "LowRankCovariance",
    "RowBlockCovariance",
    "log_loss_innovation",
    "sampled_label_loss",
]
