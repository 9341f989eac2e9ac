"""Kalman filtering inside Hugging Face Transformers.

Importing the package registers its architectures with the Auto classes; nothing else is needed. Public names are
loaded on first use.
"""

from importlib import import_module

from .registration import register

__version__ = "0.1.0"

_PUBLIC = {
    "GKAConfig": ".gka.configuration_gka",
    "GKAForCausalLM": ".gka.modeling_gka",
    "GKAForQuestionAnswering": ".gka.modeling_gka",
    "GKAForSequenceClassification": ".gka.modeling_gka",
    "GKAForTokenClassification": ".gka.modeling_gka",
    "GKAModel": ".gka.modeling_gka",
    "GKAPreTrainedModel": ".gka.modeling_gka",
    "KLAConfig": ".kla.configuration_kla",
    "KLAForCausalLM": ".kla.modeling_kla",
    "KLAForQuestionAnswering": ".kla.modeling_kla",
    "KLAForSequenceClassification": ".kla.modeling_kla",
    "KLAForTokenClassification": ".kla.modeling_kla",
    "KLAModel": ".kla.modeling_kla",
    "KLAPreTrainedModel": ".kla.modeling_kla",
    "KalmanCacheLayer": ".cache",
    "encode_chunks": ".composition",
    "push_to_hub": ".hub",
}

__all__ = ["__version__", *sorted(_PUBLIC)]  # pyright: ignore[reportUnsupportedDunderAll]

register()


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'hf_kalman' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name], __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
