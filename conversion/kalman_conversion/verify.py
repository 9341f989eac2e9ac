"""What a conversion kept and what it cost."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_kalman.cache import cache_bytes

__all__ = ["kept_weights_differ", "perplexity", "verify"]


@torch.no_grad()
def perplexity(
    model: PreTrainedModel, windows: Tensor, progress: bool = False, batch_size: int = 1, skip: int = 1
) -> float:
    """Exp of the mean next-token loss inside windows, each read on its own.

    Args:
        model: a causal LM.
        windows: (N, T) tokens.
        progress: whether to show a progress bar.
        batch_size: windows read at once.
        skip: first tokens of a window that are not scored.

    Raises:
        ValueError: `windows` holds no token to score.
    """
    if windows.ndim != 2 or windows.numel() == 0 or not 1 <= skip < windows.shape[1]:
        raise ValueError(
            f"perplexity: `windows` must have shape (N >= 1, T > {max(skip, 1)}), got {tuple(windows.shape)}."
        )
    training = model.training
    model.eval()
    total = 0.0
    for rows in tqdm(windows.split(batch_size), desc="perplexity", unit="batch", disable=not progress):
        rows = rows.to(model.device)
        logits = model(rows, use_cache=False).logits[:, skip - 1 : -1].float()
        total += torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), rows[:, skip:].flatten(), reduction="sum"
        ).item()
    model.train(training)
    return math.exp(total / (windows.shape[0] * (windows.shape[1] - skip)))


def kept_weights_differ(student: PreTrainedModel, teacher: PreTrainedModel) -> list[str]:
    """Names of weights outside the mixers that are not bit-equal to the teacher's."""
    theirs = teacher.state_dict()
    return [
        name
        for name, tensor in student.state_dict().items()
        if ".mixer." not in name and not torch.equal(tensor.cpu(), theirs[name].cpu())
    ]


def verify(
    student: PreTrainedModel, teacher: PreTrainedModel, windows: Tensor, context: int = 8192, progress: bool = False
) -> dict[str, Any]:
    """Kept weights, swapped layers, perplexity and cache of a converted model beside the model it was made from.

    Args:
        student: converted model.
        teacher: the model it was made from.
        windows: (N, T) tokens for the perplexities.
        context: tokens for the cache sizes.
        progress: whether to show progress bars.
    """
    return {
        "swapped_layers": [i for i, kind in enumerate(student.config.layer_types) if kind == "linear_attention"],
        "changed_weights": kept_weights_differ(student, teacher),
        "tokens": windows.numel(),
        "perplexity": {n: perplexity(m, windows, progress) for n, m in (("model", student), ("teacher", teacher))},
        "context": context,
        "cache_bytes": {
            "model": cache_bytes(student.config, context, student.dtype),
            "teacher": cache_bytes(teacher.config, context, teacher.dtype),
        },
    }
