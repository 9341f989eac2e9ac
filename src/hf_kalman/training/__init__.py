"""Training as filtering: beliefs about parameters, updated by gains and innovations."""

from .baselines import LastLayerLaplace, WarmStart
from .bayesian_head import HeadPrediction, KalmanBayesianHead, relu_moments, softmax_moments
from .bayesian_model import (
    KalmanBayesianConfig,
    KalmanBayesianDecisionTransformer,
    KalmanBayesianForCausalLM,
    KalmanBayesianForSequenceClassification,
    KalmanBayesianForTokenClassification,
    KalmanBayesianOutput,
    StreamReport,
)
from .callback import KalmanCallback
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
from .drift import DriftDetector, chi_square_quantile, log_loss_innovation
from .innovation import InnovationReport, InnovationTuner
from .optimizer import KalmanOptimizer, sampled_label_loss
from .posterior import load_posterior, save_posterior
from .world_model import KalmanWorldModel, KalmanWorldModelConfig, KalmanWorldModelOutput, WorldModelReport

__all__ = [
    "STRUCTURES",
    "ColumnBlockCovariance",
    "Covariance",
    "DiagonalCovariance",
    "DriftDetector",
    "FullCovariance",
    "HeadPrediction",
    "InnovationReport",
    "InnovationTuner",
    "KalmanBayesianConfig",
    "KalmanBayesianDecisionTransformer",
    "KalmanBayesianForCausalLM",
    "KalmanBayesianForSequenceClassification",
    "KalmanBayesianForTokenClassification",
    "KalmanBayesianHead",
    "KalmanBayesianOutput",
    "KalmanCallback",
    "KalmanOptimizer",
    "KalmanWorldModel",
    "KalmanWorldModelConfig",
    "KalmanWorldModelOutput",
    "KroneckerCovariance",
    "LastLayerLaplace",
    "LowRankCovariance",
    "RowBlockCovariance",
    "StreamReport",
    "WarmStart",
    "WorldModelReport",
    "chi_square_quantile",
    "load_posterior",
    "log_loss_innovation",
    "relu_moments",
    "sampled_label_loss",
    "save_posterior",
    "softmax_moments",
]
