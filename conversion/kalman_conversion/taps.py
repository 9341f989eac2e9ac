"""What goes into and comes out of a teacher's attention layers, in one forward pass for all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

__all__ = ["AttentionTaps", "windowed_attention", "zeroed_attention"]


class _Finished(Exception):
    """Nothing above the last tapped layer is needed."""


class AttentionTaps:
    """Reads (hidden states in, attention out) of some layers of a teacher.

    Args:
        teacher: a causal LM with `model.layers[i].self_attn`.
        layers: indices of the layers to read.

    Raises:
        ValueError: a layer of the teacher has no softmax attention.
    """

    def __init__(self, teacher: PreTrainedModel, layers: Sequence[int]) -> None:
        self.teacher, self.layers = teacher, tuple(layers)
        for index in self.layers:
            if index >= len(teacher.model.layers) or not hasattr(teacher.model.layers[index], "self_attn"):
                raise ValueError(
                    f"AttentionTaps: `teacher` must have softmax attention in layer {index}; give the model that the "
                    "student was made from."
                )

    @torch.no_grad()
    def read(self, input_ids: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
        """{layer: (hidden states (B, T, hidden), attention output (B, T, hidden))} for tokens (B, T)."""
        read: dict[int, tuple[Tensor, Tensor]] = {}

        def tap(index: int):
            def hook(module, args, kwargs, output):
                hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
                read[index] = (hidden, output[0] if isinstance(output, tuple) else output)
                if len(read) == len(self.layers):
                    raise _Finished

            return hook

        decoder = self.teacher.model
        handles = [decoder.layers[i].self_attn.register_forward_hook(tap(i), with_kwargs=True) for i in self.layers]
        try:
            decoder(input_ids=input_ids, use_cache=False)
        except _Finished:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return read


class zeroed_attention:  # noqa: N801 - used as a function
    """Within this context the given attention layers of a model add nothing: the floor of any replacement."""

    def __init__(self, model: PreTrainedModel, layers: Sequence[int]) -> None:
        self.attention = [model.model.layers[index].self_attn for index in layers]

    def __enter__(self) -> None:
        """Silence the layers."""
        self.handles = [
            module.register_forward_hook(lambda _, __, output: (torch.zeros_like(output[0]), *output[1:]))
            for module in self.attention
        ]

    def __exit__(self, *_) -> None:
        """Give them their voice back."""
        for handle in self.handles:
            handle.remove()


class windowed_attention:  # noqa: N801 - used as a function
    """Within this context the given attention layers of a model see only the last `window` tokens."""

    def __init__(self, model: PreTrainedModel, layers: Sequence[int], window: int) -> None:
        self.attention, self.window = [model.model.layers[index].self_attn for index in layers], window

    def __enter__(self) -> None:
        """Put the mask in."""
        self.handles = [m.register_forward_pre_hook(self._mask, with_kwargs=True) for m in self.attention]

    def _mask(self, module, args, kwargs):
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        seen = torch.ones(hidden.shape[1], hidden.shape[1], dtype=torch.bool, device=hidden.device)
        seen = seen.tril().triu(1 - self.window)[None, None]
        mask = torch.zeros(seen.shape, dtype=hidden.dtype, device=hidden.device)
        mask.masked_fill_(~seen, torch.finfo(hidden.dtype).min)
        return args, {**kwargs, "attention_mask": mask}

    def __exit__(self, *_) -> None:
        """Take the mask away."""
        for handle in self.handles:
            handle.remove()
