"""The cache layer of recurrent mixers, inside the host's own `DynamicCache` and `StaticCache`."""

# The host types submodules as `Tensor | Module`, fills optional fields after construction and unpacks kwargs loosely.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportPrivateImportUsage=false, reportAssignmentType=false
# pyright: reportOptionalSubscript=false, reportOptionalMemberAccess=false, reportOptionalOperand=false

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionLayer, StaticCache

from kalman_kernels import Segments

__all__ = ["KalmanCacheLayer", "cache_bytes", "swap_cache_layers"]

# A rollback reaches back at least so many tokens; a recording layer copies its state no later than after so many.
WINDOW = 64
# Last stretches that are kept apart, each with its own copy of the state: a call of several tokens is a guess to be
# verified, and going back into it shall run no more than its own tokens again.
APART = 2


class SingleLayer(NamedTuple):
    """As much of a cache as one mixer looks at."""

    layers: dict[int, KalmanCacheLayer]


class _Stretch(NamedTuple):
    """Calls since a copy of the state was taken: what a rollback starts from and runs again."""

    conv_states: dict[int, Tensor | None]
    recurrent_states: dict[int, Tensor | None]
    filled: dict[int, bool]
    length: int | Tensor
    calls: list[tuple[Tensor, Segments | None]]

    @property
    def tokens(self) -> int:
        return sum(hidden.shape[1] for hidden, _ in self.calls)


class KalmanCacheLayer(LinearAttentionLayer, CacheLayerMixin):
    """States of one recurrent layer: convolution contexts and float32 recurrent states, both by slot.

    Unlike the host's layer it counts its tokens, so that a model without any attention layer can generate, it can be
    indexed by batch, and a layer without a convolution keeps its state.
    """

    is_compileable = True
    supports_early_init = False
    is_sliding = False
    # Once it records: `remember`.
    is_croppable = True

    def __init__(self, number_of_states: int = 1, static: bool = False, **kwargs) -> None:
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)
        self.keys = self.values = None
        # In a static cache a tensor: a compiled step would be compiled again for every new integer.
        self.cumulative_length: int | Tensor = torch.tensor(0) if static else 0
        self.stretches: list[_Stretch] = []
        self.layer_idx = -1
        # Model type and size of the states of the configuration that it serves.
        self.made_for: tuple[str, int] | None = None
        # Where a list, a Gated KalmaNet layer leaves its log decays (B, H) over the call: Gram matrix's, value state's.
        self.log_decays: list[Tensor] | None = None
        self.replay: Callable[[SingleLayer, Tensor, Segments | None], object] | None = None
        # The first full-attention layer of the same cache. transformers 5.17 sizes the masks of attention layers
        # by the first layer that does not slide, whatever its kind.
        self.attention_layer: CacheLayerMixin | None = None

    def lazy_initialization(self, *args, **kwargs) -> None:
        """Allocate the slot named by the keyword arguments, as the host's layer does."""
        recurrent = kwargs.get("recurrent_states")
        if recurrent is not None and self.device is None:
            self.dtype, self.device = recurrent.dtype, recurrent.device
        LinearAttentionLayer.lazy_initialization(self, *args, **kwargs)
        if isinstance(self.cumulative_length, Tensor):
            self.cumulative_length = self.cumulative_length.to(self.device)
            if not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(self.cumulative_length)

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
        """(convolution context, recurrent state) of a slot, None where nothing has been written yet.

        With gradients on copies: the cache is overwritten in place, and the backward pass wants what was read.
        """
        if not self.has_previous_state[slot]:
            return None, None
        context, state = self.conv_states[slot], self.recurrent_states[slot]
        if torch.is_grad_enabled():
            context, state = (None if t is None else t.clone() for t in (context, state))
        return context, state

    def claim(self, made_for: tuple[str, int]) -> None:
        """Belong to a model from now on.

        Raises:
            ValueError: the layer belongs to one of another kind or width.
        """
        if self.made_for not in (None, made_for):
            raise ValueError(
                "`past_key_values` must be fresh or filled by this model, but its states are of a "
                f"{self.made_for[0]} model with layers of another kind or width; build a new one with "
                "DynamicCache(config=model.config)."
            )
        self.made_for = made_for

    @property
    def rows(self) -> int | None:
        """Sequences that the states are of; None where nothing has been written yet."""
        held = (*self.conv_states.values(), *self.recurrent_states.values())
        return next((state.shape[0] for state in held if state is not None), None)

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

    def advance(self, tokens: int) -> None:
        """Count tokens that have been read."""
        if isinstance(self.cumulative_length, Tensor):
            self.cumulative_length.add_(tokens)
        else:
            self.cumulative_length += tokens

    def get_seq_length(self) -> int | Tensor:
        """Tokens read so far, padding included; a scalar tensor in a static cache that has been written to."""
        return self.cumulative_length if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int | Tensor, int]:
        """(length, offset) of the mask that an attention layer with the same past would need."""
        if self.attention_layer is not None:
            return self.attention_layer.get_mask_sizes(query_length)
        return self.cumulative_length + query_length, 0

    def get_max_length(self) -> int:
        """-1: the state does not grow, there is no maximum."""
        return -1

    def remember(
        self,
        replay: Callable[[SingleLayer, Tensor, Segments | None], object],
        layer_idx: int,
        hidden_states: Tensor,
        segments: Segments | None,
    ) -> None:
        """Before a call: keep what a rollback needs. Does nothing unless `activate_past_recording` has been called.

        Args:
            replay: runs the mixer on hidden states (B, T, hidden) with the cache that it is given. A plain function, so
                that a deep copy of the cache neither copies the mixer nor writes into the original.
            layer_idx: the mixer's index.
            hidden_states: of the call.
            segments: of the call.
        """
        if not self.record_past:
            return
        if not self.stretches or self.stretches[-1].tokens >= WINDOW or hidden_states.shape[1] > 1:

            def copy(value):
                return value.clone() if isinstance(value, Tensor) else value

            self.stretches.append(
                _Stretch(
                    {slot: copy(state) for slot, state in self.conv_states.items()},
                    {slot: copy(state) for slot, state in self.recurrent_states.items()},
                    dict(self.has_previous_state),
                    copy(self.cumulative_length),
                    [],
                )
            )
            self._thin()
        self.replay, self.layer_idx = replay, layer_idx
        self.stretches[-1].calls.append((hidden_states.detach(), segments))

    def _thin(self) -> None:
        """Give up copies that a rollback over the window does not need."""
        joined = -APART - 1
        if len(self.stretches) > APART + 1 and self.stretches[joined - 1].tokens < WINDOW:
            self.stretches[joined - 1].calls.extend(self.stretches.pop(joined).calls)
        while sum(stretch.tokens for stretch in self.stretches[1:]) >= WINDOW:
            self.stretches.pop(0)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens exactly: go back to a copied state and run the tokens that stay again.

        Args:
            tokens_to_remove: 0 or minus the number of tokens, as in the host's layers.

        Raises:
            ValueError: it is positive.
            NotImplementedError: more tokens than have been recorded, or recording is off.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"KalmanCacheLayer: `crop` takes minus the number of tokens to remove, got {tokens_to_remove}."
            )
        recorded = sum(stretch.tokens for stretch in self.stretches)
        if -tokens_to_remove > recorded:
            raise NotImplementedError(
                f"KalmanCacheLayer: `crop` can remove the last {recorded} tokens, which have been recorded, got "
                f"{tokens_to_remove}; call `activate_past_recording` before the tokens are read, or run the shorter "
                "sequence again with a new cache."
            )
        replay = self.replay
        if tokens_to_remove == 0 or replay is None:
            return
        while -tokens_to_remove > self.stretches[-1].tokens:
            tokens_to_remove += self.stretches.pop().tokens
        stretch = self.stretches.pop()
        kept, calls = stretch.tokens + tokens_to_remove, []
        for hidden_states, segments in stretch.calls:
            if kept > 0:
                cut = None
                if segments is not None:
                    cut = Segments(*(None if t is None else t[:, :kept] for t in segments))
                calls.append((hidden_states[:, :kept], cut))
            kept -= hidden_states.shape[1]
        self._restore(stretch)
        if calls and all(cut is None for _, cut in calls):
            calls = [(torch.cat([hidden_states for hidden_states, _ in calls], dim=1), None)]
        with torch.no_grad():
            for call in calls:
                # Each call is recorded again.
                replay(SingleLayer({self.layer_idx: self}), *call)

    def _restore(self, stretch: _Stretch) -> None:
        """Take over a copied state, in place."""
        for states, copies in (
            (self.conv_states, stretch.conv_states),
            (self.recurrent_states, stretch.recurrent_states),
        ):
            for slot, copy in copies.items():
                if states[slot] is not None and copy is not None:
                    states[slot].copy_(copy)
        self.has_previous_state.update(stretch.filled)
        self._count_from(stretch.length)

    def reset(self) -> None:
        """Forget everything and keep the memory."""
        LinearAttentionLayer.reset(self)
        self._count_from(0)
        self.stretches = []

    def _count_from(self, tokens: int | Tensor) -> None:
        if isinstance(self.cumulative_length, Tensor):
            self.cumulative_length.fill_(tokens)
        else:
            self.cumulative_length = tokens

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
        # What was recorded belongs to the rows as they were.
        self.stretches = []
        for states in (self.conv_states, self.recurrent_states):
            for slot, state in states.items():
                if state is not None:
                    states[slot] = function(state)


def swap_cache_layers(cache: Cache, config: PreTrainedConfig) -> Cache:
    """Replace the host's untouched linear-attention layers of `cache` by `KalmanCacheLayer`, in place.

    The cache itself stays the object that it was: the host's generation code looks at its class.

    Raises:
        ValueError: the cache was made without `config=` or for another model.
    """
    layer_types, made_for = config.layer_types, (config.model_type, config.linear_state_bytes(2))
    if len(cache.layers) != len(layer_types):
        raise ValueError(
            f"`past_key_values` must hold one entry per layer ({len(layer_types)}), got {len(cache.layers)}; build it "
            "with DynamicCache(config=model.config)."
        )
    for index, kind in enumerate(layer_types):
        layer = cache.layers[index]
        if kind != "linear_attention":
            continue
        if isinstance(layer, KalmanCacheLayer):
            layer.claim(made_for)
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
        cache.layers[index] = KalmanCacheLayer(config.number_of_conv_states, static=isinstance(cache, StaticCache))
        cache.layers[index].claim(made_for)
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
