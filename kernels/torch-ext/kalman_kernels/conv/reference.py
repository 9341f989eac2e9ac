"""Short causal depthwise convolution, one token at a time: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from ..segments import Segments

__all__ = ["causal_conv_reference"]


def causal_conv_reference(
    inputs: Tensor, weight: Tensor, initial_state: Tensor | None = None, segments: Segments | None = None
) -> tuple[Tensor, Tensor]:
    """Shapes and meaning as in `causal_conv`; a loop over rows and tokens, any float dtype."""
    batch, length, channels = inputs.shape
    taps = weight.shape[1]
    segments = segments or Segments()
    state = inputs.new_zeros(batch, channels, taps - 1) if initial_state is None else initial_state
    rows, states = [], []
    for b in range(batch):
        window = list(state[b].unbind(-1))  # oldest first
        out = []
        for t in range(length):
            if segments.reset is not None and segments.reset[b % segments.reset.shape[0], t]:
                window = [torch.zeros_like(inputs[b, 0])] * (taps - 1)
            if segments.valid is not None and not segments.valid[b % segments.valid.shape[0], t]:
                out.append(torch.zeros_like(inputs[b, 0]))
                continue
            window.append(inputs[b, t])
            out.append(sum((tap * x for tap, x in zip(weight.unbind(1), window, strict=True)), 0 * inputs[b, t]))
            window = window[1:]
        rows.append(torch.stack(out))
        states.append(torch.stack(window, -1) if window else state[b])
    return torch.stack(rows), torch.stack(states)
