"""The cache layer of recurrent mixers, inside the host's own `DynamicCache` and `StaticCache`."""

# The host types submodules as `Tensor | Module`, fills optional fields after construction and unpacks kwargs loosely.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportPrivateImportUsage=false, reportAssignmentType=false
# pyright: reportOptionalSubscript=false, reportOptionalMemberAccess=false, reportOptionalOperand=false

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionLayer

__all__ = ["KalmanCacheLayer", "cache_bytes", "swap_cache_layers"]


class KalmanCacheLayer(LinearAttentionLayer, CacheLayerMixin):
    """States of one recurrent layer: convolution contexts and float32 recurrent states, both by slot.

    Unlike the host's layer it counts its tokens, so that a model without any attention layer can generate, it can be
    indexed by batch, and a layer without a convolution keeps its state.
    """

    is_compileable = True
    supports_early_init = False
    is_sliding = False

    def __init__(self, number_of_states: int = 1, **kwargs) -> None:
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)
        self.keys = self.values = None
        self.cumulative_length = 0
        # The first full-attention layer of the same cache. transformers 5.17 sizes the masks of attention layers
        # by the first layer that does not slide, whatever its kind.
        self.attention_layer: CacheLayerMixin | None = None

    def lazy_initialization(self, *args, **kwargs) -> None:
        """Allocate the slot named by the keyword arguments, as the host's layer does."""
        recurrent = kwargs.get("recurrent_states")
        if recurrent is not None and self.device is None:
            self.dtype, self.device = recurrent.dtype, recurrent.device
        LinearAttentionLayer.lazy_initialization(self, *args, **kwargs)

    @property
    def is_initialized(self) -> bool:
        """Whether any state has been written."""
        return any(self.is_conv_states_initialized.values()) or any(self.is_recurrent_states_initialized.values())

    @is_initialized.setter
    def is_initialized(self, value: bool) -> None:
        if value:
            raise AttributeError("KalmanCacheLayer: `is_initialized` follows from the states and cannot be set.")

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """A recurrent layer holds no keys and values.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "KalmanCacheLayer: `update` is for attention layers; use `write` with the recurrent states."
        )

    def read(self, slot: int) -> tuple[Tensor | None, Tensor | None]:
        """(convolution context, recurrent state) of a slot, None where nothing has been written yet."""
        if not self.has_previous_state[slot]:
            return None, None
        return self.conv_states[slot], self.recurrent_states[slot]

    def write(self, slot: int, conv_state: Tensor | None, recurrent_state: Tensor | None) -> None:
        """Replace what a slot holds, in place once it has been allocated (addresses stay for CUDA graphs)."""
        if conv_state is not None:
            if not self.is_conv_states_initialized[slot]:
                self.lazy_initialization(conv_states=conv_state, state_idx=slot, conv_kernel_size=conv_state.shape[-1])
            self.conv_states[slot].copy_(conv_state)
        if recurrent_state is not None:
            self.update_recurrent_state(recurrent_state, slot)
        self.has_previous_state[slot] = True

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs) -> Tensor:
        """As the host's, and marks the slot as written even when the layer has no convolution."""
        state = LinearAttentionLayer.update_recurrent_state(self, recurrent_states, state_idx)
        self.has_previous_state[state_idx] = True
        return state

    def get_seq_length(self) -> int:
        """Tokens read so far, padding included."""
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of the mask that an attention layer with the same past would need."""
        if self.attention_layer is not None:
            return self.attention_layer.get_mask_sizes(query_length)
        return self.cumulative_length + query_length, 0

    def get_max_length(self) -> int:
        """-1: the state does not grow, there is no maximum."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """A recurrent state cannot forget its last tokens.

        Raises:
            NotImplementedError: `tokens_to_remove` is not 0.
        """
        if tokens_to_remove != 0:
            raise NotImplementedError(
                f"KalmanCacheLayer: `crop` cannot remove tokens from a recurrent state, got {tokens_to_remove}; run "
                "the shorter sequence again with a new cache."
            )

    def reset(self) -> None:
        """Forget everything and keep the memory."""
        LinearAttentionLayer.reset(self)
        self.cumulative_length = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select the states of the surviving beams."""
        self._map(lambda state: state.index_select(0, beam_idx.to(state.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given batch rows."""
        self._map(lambda state: state[indices.to(state.device), ...])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each batch row `repeats` times."""
        self._map(lambda state: state.repeat_interleave(repeats, dim=0))

    def _map(self, function) -> None:
        for states in (self.conv_states, self.recurrent_states):
            for slot, state in states.items():
                if state is not None:
                    states[slot] = function(state)


def swap_cache_layers(cache: Cache, layer_types: list[str], number_of_states: int) -> Cache:
    """Replace the host's untouched linear-attention layers of `cache` by `KalmanCacheLayer`, in place.

    The cache itself stays the object that it was: the host's generation code looks at its class.

    Raises:
        ValueError: the cache was made without `config=` or for another model.
    """
    if len(cache.layers) != len(layer_types):
        raise ValueError(
            f"`past_key_values` must hold one entry per layer ({len(layer_types)}), got {len(cache.layers)}; build it "
            "with DynamicCache(config=model.config)."
        )
    for index, kind in enumerate(layer_types):
        layer = cache.layers[index]
        if kind != "linear_attention" or isinstance(layer, KalmanCacheLayer):
            continue
        if not isinstance(layer, LinearAttentionLayer) or isinstance(layer, CacheLayerMixin):
            raise ValueError(
                f"`past_key_values` must hold a linear-attention entry for layer {index}, got "
                f"{type(layer).__name__}; build it with DynamicCache(config=model.config)."
            )
        if any(layer.has_previous_state.values()):
            raise ValueError(
                f"`past_key_values` must be fresh or filled by this model, but layer {index} was filled by another one."
            )
        cache.layers[index] = KalmanCacheLayer(number_of_states)
        if layer.record_past:
            cache.layers[index].activate_past_recording()
    full = next(
        (layer for layer, kind in zip(cache.layers, layer_types, strict=True) if kind == "full_attention"), None
    )
    for layer in cache.layers:
        if isinstance(layer, KalmanCacheLayer):
            layer.attention_layer = full
    return cache


def cache_bytes(config: PreTrainedConfig, context: int, dtype: torch.dtype) -> int:
    """Bytes that generation keeps for one sequence after `context` tokens.

    Args:
        config: of a model of this package or of a Llama-like decoder of the host library.
        context: tokens read so far.
        dtype: of keys, values and convolution contexts; recurrent states are float32.
    """
    total = 0
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for kind in kinds or ["full_attention" if window is None else "sliding_attention"] * config.num_hidden_layers:
        if kind == "linear_attention":
            total += config.linear_state_bytes(dtype.itemsize)
        else:
            # A sliding layer keeps window - 1 tokens.
            tokens = context if kind == "full_attention" else min(context, window - 1)
            total += 2 * config.num_key_value_heads * head_dim * tokens * dtype.itemsize
    return total
