"""Training as filtering: beliefs about parameters, updated by gains and innovations."""

from .covariance import (
    STRUCTURES,
    Covariance,
    DiagonalCovariance,
    FullCovariance,
    LowRankCovariance,
    RowBlockCovariance,
)

__all__ = [
    "STRUCTURES",
    "Covariance",
    "DiagonalCovariance",
    "FullCovariance",
    "LowRankCovariance",
    "RowBlockCovariance",
]
