"""Makes the host's Auto classes, and PEFT where it is installed, know the architectures of this package."""

from __future__ import annotations

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.utils.import_utils import is_peft_available

from .gka.configuration_gka import GKAConfig
from .gka.hybrid_qwen3 import (
    HybridQwen3Config,
    HybridQwen3ForCausalLM,
    HybridQwen3Model,
    register_weight_names,
)
from .gka.modeling_gka import (
    GKAForCausalLM,
    GKAForQuestionAnswering,
    GKAForSequenceClassification,
    GKAForTokenClassification,
    GKAModel,
)
from .kla.configuration_kla import KLAConfig
from .kla.modeling_kla import (
    KLAForCausalLM,
    KLAForQuestionAnswering,
    KLAForSequenceClassification,
    KLAForTokenClassification,
    KLAModel,
)
from .training.bayesian_model import (
    KalmanBayesianConfig,
    KalmanBayesianDecisionTransformer,
    KalmanBayesianForCausalLM,
    KalmanBayesianForSequenceClassification,
    KalmanBayesianForTokenClassification,
)
from .training.world_model import KalmanWorldModel, KalmanWorldModelConfig

__all__ = ["ARCHITECTURES", "register"]

ARCHITECTURES = {
    GKAConfig: {
        AutoModel: GKAModel,
        AutoModelForCausalLM: GKAForCausalLM,
        AutoModelForSequenceClassification: GKAForSequenceClassification,
        AutoModelForTokenClassification: GKAForTokenClassification,
        AutoModelForQuestionAnswering: GKAForQuestionAnswering,
    },
    KLAConfig: {
        AutoModel: KLAModel,
        AutoModelForCausalLM: KLAForCausalLM,
        AutoModelForSequenceClassification: KLAForSequenceClassification,
        AutoModelForTokenClassification: KLAForTokenClassification,
        AutoModelForQuestionAnswering: KLAForQuestionAnswering,
    },
    HybridQwen3Config: {AutoModel: HybridQwen3Model, AutoModelForCausalLM: HybridQwen3ForCausalLM},
    KalmanWorldModelConfig: {AutoModel: KalmanWorldModel},
    KalmanBayesianConfig: {
        AutoModel: KalmanBayesianDecisionTransformer,
        AutoModelForCausalLM: KalmanBayesianForCausalLM,
        AutoModelForSequenceClassification: KalmanBayesianForSequenceClassification,
        AutoModelForTokenClassification: KalmanBayesianForTokenClassification,
    },
}
# Attention layers, GKA mixers and MLPs name their projections alike.
_LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "g_proj", "gate_proj", "up_proj", "down_proj"]
_KLA_LORA_TARGETS = ["in_proj", "sensor_proj"]


def register() -> None:
    """Register every architecture; calling it again changes nothing."""
    for config, models in ARCHITECTURES.items():
        AutoConfig.register(config.model_type, config, exist_ok=True)
        for auto, model in models.items():
            auto.register(config, model, exist_ok=True)
    register_weight_names()
    if is_peft_available():
        _register_peft()


def _register_peft() -> None:
    from peft.utils import constants

    for name in dir(constants):
        if name.endswith("TO_LORA_TARGET_MODULES_MAPPING"):
            for config in (c for c, models in ARCHITECTURES.items() if AutoModelForCausalLM in models):
                own = _KLA_LORA_TARGETS if config is KLAConfig else []
                getattr(constants, name)[config.model_type] = [*_LORA_TARGETS, *own]
