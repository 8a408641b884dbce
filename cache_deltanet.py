"""The recurrent state of DeltaNet as one layer of Transformers' caches."""

import inspect
from contextlib import nullcontext
from functools import wraps

import torch
from transformers.cache_utils import STATIC_LAYER_TYPE_MAPPING, Cache, CacheLayerMixin, LinearAttentionLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_deltanet import DELTA_LAYER_TYPE

# Transformers 5.24 renamed the argument and output field `past_key_values` to `cache`; both ends of the range work.
CACHE_NAME = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


def accept_cache_name(forward):
    """Let a `forward` that takes `past_key_values` be called with `cache` as well, as newer Transformers do."""

    @wraps(forward)
    def wrapper(self, *args, **kwargs):
        if "cache" in kwargs:
            if kwargs.get("past_key_values") is not None:
                raise ValueError("`cache` and `past_key_values` are one argument under two names; pass one of them.")
            kwargs["past_key_values"] = kwargs.pop("cache")
        return forward(self, *args, **kwargs)

    # Pipeline parallelism in Transformers takes arguments apart by the signature, and knows its own release's name.
    signature = inspect.signature(forward)
    names = {"past_key_values": CACHE_NAME}
    parameters = [x.replace(name=names.get(x.name, x.name)) for x in signature.parameters.values()]
    wrapper.__signature__ = signature.replace(parameters=parameters)
    return wrapper


class DeltaNetCacheLayer(LinearAttentionLayer, CacheLayerMixin):
    """
    State of one delta-rule layer; `DynamicCache(config=...)` and `StaticCache(config=..., max_cache_len=...)` create it.

    `recurrent_states[0]` is [B, H, K, V] float32. `conv_states[0..2]` are the last `conv_size - 1` inputs of the
    convolutions of queries, keys and values, [B, D, conv_size - 1] in the dtype of the first forward. The size does not
    depend on the number of tokens. Buffers keep their address from the first forward on; every update is in place.

    `state_dtype`, set by `use_state_dtype`, is that of the recurrent state in place of float32.
    """

    _layer_type = DELTA_LAYER_TYPE
    # Truthy, yet equal to neither `True` nor `False`: causal masks are sized on the first layer that is not sliding and
    # windows on the first that is, and this layer must be taken for neither.
    is_sliding = "recurrent"
    is_croppable = False
    state_dtype: torch.dtype | None = None

    def __init__(self, **kwargs):
        CacheLayerMixin.__init__(self)
        LinearAttentionLayer.__init__(self, number_of_states=3)
        with _changeable_later():
            # A tensor, so that a compiled decoding step does not recompile for each length.
            self.cumulative_length = torch.zeros((), dtype=torch.long)

    def read(self, x: torch.Tensor) -> tuple[list[torch.Tensor | None], torch.Tensor | None]:
        """
        The three convolution states and the recurrent state, all `None` before the first token.

        Raises `ValueError` unless they are of the batch size and on the device of `x` [B, T, D].
        """
        if not self.has_previous_state[0]:
            return [None, None, None], None
        state = self.recurrent_states[0]
        if state.shape[0] != x.shape[0] or state.device != x.device:
            raise ValueError(
                f"`past_key_values` holds states of {state.shape[0]} sequences on {state.device}; allowed: those of the "
                f"input, {x.shape[0]} on {x.device}."
            )
        # Autograd needs this forward's state after `write` has overwritten the buffer.
        return [self.conv_states[i] for i in range(3)], state.clone() if torch.is_grad_enabled() else state

    def write(self, conv_states: list[torch.Tensor | None], recurrent_state: torch.Tensor, num_new_tokens: int) -> None:
        """Copy new states into the buffers and count `num_new_tokens` absorbed tokens, padding included."""
        for i, state in enumerate(conv_states):
            if state is not None:
                self._copy(self.conv_states, self.is_conv_states_initialized, i, state)
        dtype = self.state_dtype or recurrent_state.dtype
        self._copy(self.recurrent_states, self.is_recurrent_states_initialized, 0, recurrent_state, dtype)
        self.advance(num_new_tokens)

    def advance(self, num_new_tokens: int) -> None:
        """Count tokens whose states were updated in place."""
        if self.device is None:
            self.dtype, self.device = self.recurrent_states[0].dtype, self.recurrent_states[0].device
            with _changeable_later():
                # Made there: to copy the count from the host would wait for all that the device has still to do.
                self.cumulative_length = torch.full_like(self.cumulative_length, num_new_tokens, device=self.device)
            self.is_initialized = True
        else:
            self.cumulative_length.add_(num_new_tokens)
        self.has_previous_state = dict.fromkeys(range(3), True)

    def _copy(self, states: dict, initialized: dict, index: int, value: torch.Tensor, dtype=None) -> None:
        # After a reset nothing is lost with the old buffers, and another batch size may come.
        if not initialized[index] or not self.has_previous_state[0] and _lies_elsewhere(states[index], value):
            # What a forward without gradients has just made is nobody else's, and need not be copied.
            if is_ours := _is_changeable(value) and dtype in (None, value.dtype) and value.is_contiguous():
                states[index] = value
            else:
                with _changeable_later():
                    states[index] = torch.empty_like(value, dtype=dtype)
            if not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(states[index])
            initialized[index] = True
            if is_ours:
                return
        if states[index].shape != value.shape:
            raise ValueError(
                f"`past_key_values` holds a state of shape {tuple(states[index].shape)}; this forward made one of shape "
                f"{tuple(value.shape)}. A cache belongs to one model and one batch."
            )
        states[index].copy_(value.detach())

    def _map_states(self, function) -> None:
        with _changeable_later():
            for states in (self.conv_states, self.recurrent_states):
                states.update({index: function(state) for index, state in states.items() if state is not None})

    def get_seq_length(self) -> torch.Tensor:
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[torch.Tensor, int]:
        return self.cumulative_length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        LinearAttentionLayer.reset(self)
        self.cumulative_length.zero_()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._map_states(lambda state: state.copy_(state.index_select(0, beam_idx.to(state.device))))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_states(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._map_states(lambda state: state[indices])

    def offload(self) -> None:
        LinearAttentionLayer.offload(self)

    def prefetch(self) -> None:
        LinearAttentionLayer.prefetch(self)

    def lazy_initialization(self, *args, **kwargs) -> None:
        raise NotImplementedError("A DeltaNet cache layer allocates its states in `write`, on the first forward.")

    def update(self, *args, **kwargs):
        raise NotImplementedError("A DeltaNet layer keeps a recurrent state; it has no keys and values to update.")

    def crop(self, *args) -> None:
        raise NotImplementedError(_IRREVERSIBLE)

    def activate_past_recording(self) -> None:
        raise NotImplementedError(_IRREVERSIBLE)


def _lies_elsewhere(state: torch.Tensor, value: torch.Tensor) -> bool:
    return (state.shape, state.device) != (value.shape, value.device)


def _is_changeable(value: torch.Tensor) -> bool:
    """Whether a tensor of this forward may be updated in place later on."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or value.requires_grad:
        return False
    return not value.is_inference()


def _changeable_later():
    """A context whose new tensors may be updated in place after `torch.inference_mode`, which `generate` does not use."""
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        return nullcontext()
    return torch.inference_mode(False)


_IRREVERSIBLE = (
    "The recurrent state of a DeltaNet layer cannot be rolled back: tokens are folded into it for good. Cropping a cache "
    "and assisted decoding are therefore not possible; `copy.deepcopy(cache)` keeps a state to return to."
)

STATIC_LAYER_TYPE_MAPPING[DELTA_LAYER_TYPE] = DeltaNetCacheLayer


def delta_cache_layer(past_key_values: Cache | None, layer_idx: int) -> DeltaNetCacheLayer | None:
    """The layer of `past_key_values` that belongs to block `layer_idx`; raises `ValueError` where it is another kind."""
    if past_key_values is None:
        return None
    layers = past_key_values.layers
    # By type name and not by class: Transformers keeps one class a name, and two Hub repositories may hold equal copies
    # of this file.
    if layer_idx >= len(layers) or layers[layer_idx]._layer_type != DELTA_LAYER_TYPE:
        raise ValueError(
            f"`past_key_values` has no delta-rule state for layer {layer_idx}. Build the cache from the model's "
            "configuration: `DynamicCache(config=model.config)` or `StaticCache(config=model.config, max_cache_len=...)`."
        )
    return layers[layer_idx]


def use_state_dtype(past_key_values: Cache, dtype: torch.dtype) -> Cache:
    """
    Keep the recurrent states of an unused cache in `dtype`, `torch.bfloat16` or `torch.float32` (the default); returns it.

    bfloat16 halves the memory of the states and what a decoding step of many rows moves. Every step rounds the state, while
    arithmetic stays float32: after 10,000 tokens a layer's output is off by 1.4 % for independent keys and by 6.6 % for
    keys that resemble each other (`benchmarks/results/state_precision.json`); with float32 by a millionth.

        cache = use_state_dtype(DynamicCache(config=model.config), torch.bfloat16)
        model.generate(**inputs, past_key_values=cache)
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"`dtype` is {dtype}; allowed: torch.float32, torch.bfloat16.")
    layers = [layer for layer in past_key_values.layers if getattr(layer, "_layer_type", None) == DELTA_LAYER_TYPE]
    if not layers:
        raise ValueError("`past_key_values` has no delta-rule layer; use a cache like `DynamicCache(config=model.config)`.")
    if any(layer.is_recurrent_states_initialized[0] for layer in layers):
        raise ValueError("`past_key_values` holds states already; their dtype is set before the first token.")
    for layer in layers:
        layer.state_dtype = dtype
    return past_key_values


def prefetch_next_layer(past_key_values: Cache, layer_idx: int, device: torch.device) -> None:
    """
    Start bringing back the keys and values of the attention layer that follows block `layer_idx` in an offloaded cache.

    Transformers does so in attention layers only, for the layer right behind, which here is a delta-rule layer.
    """
    if not getattr(past_key_values, "offloading", False) or past_key_values.only_non_sliding:
        return
    if any(layer.keys is not None for layer in past_key_values.layers):
        # What was sent away must have arrived before it is fetched.
        past_key_values.prefetch_stream.wait_stream(torch.cuda.default_stream(device))
        past_key_values.prefetch(layer_idx + 1, past_key_values.only_non_sliding)


__all__ = [
    "CACHE_NAME",
    "DeltaNetCacheLayer",
    "accept_cache_name",
    "delta_cache_layer",
    "prefetch_next_layer",
    "use_state_dtype",
]
