"""The decoding step inside the layer: the same bits as its modules one by one, when it is taken, and states in bfloat16."""

import pytest
import torch
from models import tiny_model, token_ids
from oracle import relative_error
from transformers import DynamicCache, StaticCache

from deltanet import DeltaNetCacheLayer, mixer_deltanet, use_state_dtype
from deltanet.cache_deltanet import CACHE_NAME

OPTIONS = [
    {},
    {"use_gate": True, "allow_neg_eigval": True},
    {"use_beta": False, "conv_size": 2},
    {"expand_k": 0.5, "expand_v": 2.0, "conv_size": 3, "use_gate": True},
]
NOT_COVERED = [{"qk_activation": "relu"}, {"qk_activation": "identity"}, {"qk_norm": "sum"}, {"use_short_conv": False}]


def decode(model, ids, prompt, cache=None):
    """Logits [B, T, vocabulary] of a prompt and then one token after the other, and the cache."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    parts = [ids[:, :prompt], *ids[:, prompt:].split(1, 1)]
    with torch.no_grad():
        return torch.cat([model(part, past_key_values=cache).logits for part in parts], 1), cache


@pytest.fixture
def steps(monkeypatch):
    """The calls of `decode_step` by the mixer."""
    calls, step = [], mixer_deltanet.decode_step
    monkeypatch.setattr(mixer_deltanet, "decode_step", lambda *a, **k: calls.append(1) or step(*a, **k))
    return calls


def mixers(model):
    return [block.attn for block in model.model.layers]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_same_bits_as_the_modules(steps, options, dtype):
    model, ids = tiny_model(**options).to(dtype), token_ids(3, 30)
    fused, cache = decode(model, ids, 5)
    assert len(steps) == 2 * 25
    for mixer in mixers(model):
        mixer.is_fusable = False
    plain, expected = decode(model, ids, 5)
    assert len(steps) == 2 * 25 and torch.equal(fused, plain)
    for layer, other in zip(cache.layers, expected.layers):
        assert torch.equal(layer.recurrent_states[0], other.recurrent_states[0])
        assert all(torch.equal(layer.conv_states[i], other.conv_states[i]) for i in range(3))
        assert layer.get_seq_length() == other.get_seq_length() == 30


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_steps_are_the_chunks_are_the_recurrence(options):
    model, ids = tiny_model(**options), token_ids(2, 300)
    with torch.no_grad():
        chunked = model(ids, use_cache=False).logits
        recurrent = tiny_model(attn_mode="fused_recurrent", **options)(ids, use_cache=False).logits
    steps, _ = decode(model, ids, 3)
    assert relative_error(steps, chunked) <= 2e-5 and relative_error(recurrent, chunked) <= 2e-5


@pytest.mark.parametrize("options", NOT_COVERED, ids=str)
def test_options_without_a_kernel(steps, options):
    model, ids = tiny_model(**options), token_ids(2, 12)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    assert relative_error(decode(model, ids, 4)[0], expected) <= 1e-5
    assert not steps


class OwnNorm(mixer_deltanet.DeltaNetRMSNorm):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("change", ["hook", "pre-hook", "subclass"])
def test_changed_modules_keep_their_say(steps, change):
    model, ids, seen = tiny_model(), token_ids(2, 8), []
    first, second = mixers(model)
    if change == "hook":
        first.q_conv1d.register_forward_hook(lambda *_: seen.append(1))
    elif change == "pre-hook":
        first.o_norm.register_forward_pre_hook(lambda *_: seen.append(1))
    else:
        norm = OwnNorm(16, 1e-6)
        norm.load_state_dict(first.o_norm.state_dict())
        first.o_norm = norm
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    del seen[:]
    assert relative_error(decode(model, ids, 4)[0], expected) <= 1e-5
    assert len(steps) == 4  # the second layer's
    assert len(seen) == (0 if change == "subclass" else 5)


def test_with_a_gradient_the_modules_run(steps):
    model, ids = tiny_model(), token_ids(2, 6)
    cache = DynamicCache(config=model.config)
    model(ids[:, :5], past_key_values=cache)
    model(ids[:, 5:], past_key_values=cache).logits.sum().backward()
    assert not steps and mixers(model)[0].q_conv1d.weight.grad.any()


# States in bfloat16


@pytest.mark.parametrize("make", [DynamicCache, lambda config: StaticCache(config=config, max_cache_len=80)])
@pytest.mark.parametrize("covered", [True, False])
def test_states_in_bfloat16(make, covered):
    """Through a prompt, single tokens, a part of several, and single ones again."""
    model, ids = tiny_model(**({} if covered else {"qk_activation": "relu"})), token_ids(2, 60)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    cache = use_state_dtype(make(config=model.config), torch.bfloat16)
    first, _ = decode(model, ids[:, :40], 20, cache)
    second, _ = decode(model, ids[:, 40:], 10, cache)
    assert {layer.recurrent_states[0].dtype for layer in cache.layers} == {torch.bfloat16}
    assert {layer.conv_states[0].dtype for layer in cache.layers} == {torch.float32}
    error = relative_error(torch.cat([first, second], 1), expected)
    assert 1e-5 < error < 3e-2


@pytest.mark.parametrize("kind", ["pure", "sliding", "global"])
def test_generation_with_states_in_bfloat16(kind):
    model, ids = tiny_model(kind).bfloat16(), token_ids(2, 9)
    cache = use_state_dtype(DynamicCache(config=model.config), torch.bfloat16)
    assert model.generate(ids, **{CACHE_NAME: cache}, max_new_tokens=6, num_beams=2).shape[1] == 15
    held = [layer for layer in cache.layers if isinstance(layer, DeltaNetCacheLayer)]
    assert {layer.recurrent_states[0].dtype for layer in held} == {torch.bfloat16}


def test_a_reset_keeps_the_dtype():
    model, ids = tiny_model(), token_ids(2, 6)
    cache = use_state_dtype(DynamicCache(config=model.config), torch.bfloat16)
    decode(model, ids, 4, cache)
    cache.reset()
    decode(model, token_ids(3, 6), 4, cache)
    assert cache.layers[0].recurrent_states[0].dtype is torch.bfloat16


def test_errors_of_the_state_dtype():
    model = tiny_model()
    with pytest.raises(ValueError, match="`dtype` is torch.float16; allowed: torch.float32, torch.bfloat16"):
        use_state_dtype(DynamicCache(config=model.config), torch.float16)
    with pytest.raises(ValueError, match="no delta-rule layer"):
        use_state_dtype(DynamicCache(), torch.bfloat16)
    _, cache = decode(model, token_ids(1, 3), 2)
    with pytest.raises(ValueError, match="holds states already"):
        use_state_dtype(cache, torch.bfloat16)
