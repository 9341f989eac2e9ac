"""Checkpoints on the Hub: cards, push, the code that travels with them, and whether one is whole."""

from .bundle import write_bundle
from .card import BaseModel, model_card, validate_card
from .check import check_checkpoint
from .kernel import use_kernel, write_kernel
from .push import PushReport, push_to_hub

__all__ = [
    "BaseModel",
    "PushReport",
    "check_checkpoint",
    "model_card",
    "push_to_hub",
    "use_kernel",
    "validate_card",
    "write_bundle",
    "write_kernel",
]
