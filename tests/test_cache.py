"""cache_deltanet.py: the recurrent state as a layer of Transformers' caches."""

import copy

import pytest
import torch
from models import KINDS, tiny_config, tiny_model, token_ids
from oracle import delta_rule, relative_error
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, STATIC_LAYER_TYPE_MAPPING, CacheLayerMixin

from deltanet import DeltaNetCacheLayer
from deltanet.cache_deltanet import CACHE_NAME, delta_cache_layer

all_kinds = pytest.mark.parametrize("kind", KINDS)
H, K, V, D = 2, 16, 16, 32


def states(batch=3, fill=None, value_dim=V):
    """Three convolution states and a recurrent state, random or full of `fill`."""
    make = torch.randn if fill is None else lambda *shape: torch.full(shape, float(fill))
    return [make(batch, D, 3) for _ in range(3)], make(batch, H, K, value_dim)


def filled(batch=3, tokens=5):
    layer = DeltaNetCacheLayer()
    layer.write(*states(batch), tokens)
    return layer


def tensors(layer):
    return [x for held in (layer.conv_states, layer.recurrent_states) for x in held.values() if x is not None]


def copies(layer):
    return [x.clone() for x in tensors(layer)]


def addresses(layer):
    return [x.data_ptr() for x in tensors(layer)]


def tokens_like(batch, device="cpu"):
    return torch.empty(batch, 1, D, device=device)


def all_equal(actual, expected):
    return len(actual) == len(expected) and all(map(torch.equal, actual, expected))


# What a cache consists of


@all_kinds
@pytest.mark.parametrize("make", [DynamicCache, lambda config: StaticCache(config=config, max_cache_len=8)])
def test_caches_are_built_from_the_configuration(kind, make):
    config = tiny_config(kind)
    cache = make(config=config)
    is_delta = [isinstance(layer, DeltaNetCacheLayer) for layer in cache.layers]
    assert is_delta == [kind == "linear_attention_delta" for kind in config.layer_types]
    assert DYNAMIC_LAYER_TYPE_MAPPING["linear_attention_delta"] is DeltaNetCacheLayer
    assert STATIC_LAYER_TYPE_MAPPING["linear_attention_delta"] is DeltaNetCacheLayer
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", [{}, {"expand_k": 0.5, "expand_v": 2.0}, {"conv_size": 1}, {"use_short_conv": False}])
@all_kinds
def test_shapes_and_dtypes(kind, options, dtype):
    model = tiny_model(kind, **options).to(dtype)
    config = model.config
    key_dim, value_dim = int(32 * config.expand_k), int(32 * config.expand_v)
    with torch.no_grad():
        cache = getattr(model(token_ids(3, 7), use_cache=True), CACHE_NAME)
    for layer in (layer for layer in cache.layers if isinstance(layer, DeltaNetCacheLayer)):
        assert layer.recurrent_states[0].shape == (3, 2, key_dim // 2, value_dim // 2)
        assert layer.recurrent_states[0].dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
        held = [layer.conv_states[i] for i in range(3)]
        if config.use_short_conv:
            assert [x.shape for x in held] == [(3, dim, config.conv_size - 1) for dim in (key_dim, key_dim, value_dim)]
            assert {x.dtype for x in held} == {dtype}
        else:
            assert held == [None] * 3
        assert not any(x.requires_grad for x in tensors(layer))


def test_contents():
    """The last inputs of the convolutions, and the state of the recurrence."""
    model, ids = tiny_model(), token_ids(2, 9)
    mixer, seen = model.model.layers[0].attn, {}
    mixer.register_forward_hook(lambda module, args, output: seen.update(x=args[0]))
    with torch.no_grad():
        layer = getattr(model(ids, use_cache=True), CACHE_NAME).layers[0]
        projected = [projection(seen["x"]) for projection in (mixer.q_proj, mixer.k_proj, mixer.v_proj)]
        beta = mixer.b_proj(seen["x"]).sigmoid()
        for i, x in enumerate(projected):
            assert torch.equal(layer.conv_states[i], x[:, -3:].mT)
        convolutions = (mixer.q_conv1d, mixer.k_conv1d, mixer.v_conv1d)
        q, k, v = (
            torch.nn.functional.silu(
                torch.nn.functional.conv1d(torch.nn.functional.pad(x.mT, (3, 0)), c.weight, groups=32).mT
            ).unflatten(-1, (2, 16))
            for x, c in zip(projected, convolutions)
        )
        _, expected = delta_rule(q, k, v, beta, l2=True)
    assert relative_error(layer.recurrent_states[0], expected) <= 1e-5


def test_what_the_layer_says_of_itself():
    layer = filled(tokens=5)
    assert isinstance(layer, CacheLayerMixin) and layer.is_initialized
    assert layer.get_seq_length() == 5 and layer.get_mask_sizes(3) == (8, 0) and layer.get_max_length() == -1
    assert layer.is_compileable and not layer.is_croppable
    # Neither the first layer that is not sliding nor the first that is.
    assert layer.is_sliding not in (True, False) and layer.is_sliding
    assert layer.keys is None and layer.values is None


# Reading and writing


def test_empty():
    layer = DeltaNetCacheLayer()
    assert layer.read(tokens_like(3)) == ([None, None, None], None)
    assert layer.get_seq_length() == 0 and not layer.is_initialized
    for nothing in (layer.reset, layer.offload, layer.prefetch, lambda: layer.reorder_cache(torch.tensor([0]))):
        nothing()
    assert tensors(layer) == [] and layer.read(tokens_like(3)) == ([None, None, None], None)


def test_write_then_read():
    layer, new = DeltaNetCacheLayer(), states()
    layer.write(*new, 4)
    with torch.no_grad():
        conv_states, state = layer.read(tokens_like(3))
    assert all_equal([*conv_states, state], [*new[0], new[1]])
    assert state.data_ptr() == layer.recurrent_states[0].data_ptr()
    first = addresses(layer)
    second = states()
    layer.write(*second, 3)
    assert addresses(layer) == first and all_equal(tensors(layer), [*second[0], second[1]])
    assert layer.get_seq_length() == 7
    layer.advance(2)
    assert layer.get_seq_length() == 9


def test_a_state_read_for_gradients_survives_the_next_write():
    layer = filled()
    state, before = layer.read(tokens_like(3))[1], layer.recurrent_states[0].clone()
    layer.write(*states(fill=0), 1)
    assert torch.equal(state, before) and not layer.recurrent_states[0].any()


def test_writing_cuts_the_graph():
    layer, (conv_states, state) = DeltaNetCacheLayer(), states()
    layer.write([x.requires_grad_() for x in conv_states], state.requires_grad_(), 1)
    assert not any(x.requires_grad for x in tensors(layer))


def test_one_address():
    """From the first forward on, every state is updated where it lies: CUDA graphs rely on that."""
    model = tiny_model()
    cache, places = DynamicCache(config=model.config), []
    with torch.no_grad():
        for length in (7, 1, 1, 5, 70, 1):
            model(token_ids(2, length), past_key_values=cache)
            places.append([addresses(layer) for layer in cache.layers])
    assert len(places[0][0]) == 4 and all(place == places[0] for place in places)


@all_kinds
def test_inference_mode_and_back(kind):
    """A prompt read in `torch.inference_mode` can be continued outside, as `generate` does, and the other way round."""
    model, ids = tiny_model(kind), token_ids(2, 9)
    parts, cache = [], None
    for part, mode in zip(ids.split((4, 1, 3, 1), 1), (torch.inference_mode, torch.no_grad) * 2):
        with mode():
            cache = DynamicCache(config=model.config) if cache is None else cache
            parts.append(model(part, past_key_values=cache).logits)
            cache.reorder_cache(torch.tensor([1, 0]))
            cache.batch_select_indices(torch.tensor([1, 0]))
    with torch.no_grad():
        assert relative_error(torch.cat(parts, 1), model(ids, use_cache=False).logits) <= 1e-5


# The batch


def test_reorder():
    layer, order = filled(), torch.tensor([2, 0, 0])
    before, place = copies(layer), addresses(layer)
    layer.reorder_cache(order)
    assert all_equal(tensors(layer), [x[[2, 0, 0]] for x in before])
    assert addresses(layer) == place and layer.get_seq_length() == 5


def test_repeat_and_select():
    layer = filled()
    before = copies(layer)
    layer.batch_repeat_interleave(2)
    assert all_equal(tensors(layer), [x[[0, 0, 1, 1, 2, 2]] for x in before])
    layer.batch_select_indices(torch.tensor([4, 1]))
    assert all_equal(tensors(layer), [x[[2, 0]] for x in before])
    with torch.no_grad():
        assert layer.read(tokens_like(2))[1].shape[0] == 2


def test_reset():
    layer = filled()
    place = addresses(layer)
    layer.reset()
    assert layer.get_seq_length() == 0 and layer.read(tokens_like(3)) == ([None, None, None], None)
    assert not any(x.any() for x in tensors(layer))
    layer.write(*states(), 2)
    assert addresses(layer) == place and layer.get_seq_length() == 2


def test_reset_for_another_batch():
    layer = filled()
    layer.reset()
    new = states(batch=2)
    layer.write(*new, 2)
    assert all_equal(tensors(layer), [*new[0], new[1]])


def test_deepcopy():
    layer = filled()
    fork, before = copy.deepcopy(layer), copies(layer)
    layer.write(*states(), 3)
    assert all_equal(tensors(fork), before) and not all_equal(tensors(layer), before)
    assert fork.get_seq_length() == 5 and layer.get_seq_length() == 8
    assert not set(addresses(fork)) & set(addresses(layer))


def test_offload_and_prefetch():
    layer = filled()
    before = copies(layer)
    layer.offload()
    assert {x.device.type for x in tensors(layer)} == {"cpu"}
    layer.prefetch()
    assert all_equal(tensors(layer), before) and layer.get_seq_length() == 5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_offload_and_prefetch_from_a_gpu():
    layer = DeltaNetCacheLayer()
    conv_states, state = states()
    layer.write([x.cuda() for x in conv_states], state.cuda(), 1)
    layer.offload()
    assert {x.device.type for x in tensors(layer)} == {"cpu"}
    layer.prefetch()
    assert {x.device.type for x in tensors(layer)} == {"cuda"}
    torch.cuda.synchronize()
    assert all_equal([x.cpu() for x in tensors(layer)], [*conv_states, state])


# What does not fit


def test_wrong_shape():
    layer = filled()
    before = copies(layer)
    with pytest.raises(ValueError, match=r"state of shape \(3, 2, 16, 16\); this forward made one of shape \(3, 2, 16, 8\)"):
        layer.write([None] * 3, states(value_dim=8)[1], 1)
    with pytest.raises(ValueError, match=r"a state of shape \(3, 32, 3\); this forward made one of shape \(2, 32, 3\)"):
        layer.write(*states(batch=2), 1)
    assert all_equal(tensors(layer), before) and layer.get_seq_length() == 5


@pytest.mark.parametrize("x, found", [(tokens_like(2), "2 on cpu"), (tokens_like(3, "meta"), "3 on meta")])
def test_wrong_batch_or_device(x, found):
    with pytest.raises(ValueError, match=f"`past_key_values` holds states of 3 sequences on cpu; allowed: .* {found}"):
        filled().read(x)


@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("kind", ["pure", "global"])
def test_a_forward_with_another_batch(kind, length):
    """Whether it takes one token or several, and nothing of the cache changes."""
    model = tiny_model(kind)
    with torch.no_grad():
        cache = getattr(model(token_ids(2, 6), use_cache=True), CACHE_NAME)
        before = copies(cache.layers[0])
        with pytest.raises(ValueError, match="holds states of 2 sequences on cpu; allowed: those of the input, 3 on cpu"):
            model(token_ids(3, length), past_key_values=cache)
    assert all_equal(copies(cache.layers[0]), before) and cache.get_seq_length() == 6


@pytest.mark.parametrize("length", [1, 4])
def test_a_cache_of_another_model(length):
    cache = getattr(tiny_model(expand_v=2.0)(token_ids(2, 6), use_cache=True), CACHE_NAME)
    with pytest.raises(ValueError, match=r"state has shape \(2, .*; it must be"), torch.no_grad():
        tiny_model()(token_ids(2, length), past_key_values=cache)


@pytest.mark.parametrize("layer_idx", [1, 3])
def test_no_state_for_a_layer(layer_idx):
    cache = DynamicCache(config=tiny_config("global"))
    with pytest.raises(ValueError, match=f"no delta-rule state for layer {layer_idx}.*model's configuration"):
        delta_cache_layer(cache, layer_idx)
    assert delta_cache_layer(cache, 0) is cache.layers[0]
    assert delta_cache_layer(None, layer_idx) is None


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda layer: layer.update(None, None), "has no keys and values to update"),
        (lambda layer: layer.lazy_initialization(None, None), "allocates its states in `write`"),
        (lambda layer: layer.crop(-1), "cannot be rolled back"),
        (lambda layer: layer.activate_past_recording(), "cannot be rolled back"),
    ],
)
def test_not_possible(call, message):
    with pytest.raises(NotImplementedError, match=message):
        call(filled())
