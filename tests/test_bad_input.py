"""What the model refuses, and what it does with what it cannot see; packing is in test_layout.py, the cache in
test_cache.py, the operations in test_kernels_*.py."""

import pytest
import torch
from models import KINDS, tiny_model, token_ids
from oracle import relative_error
from transformers import DynamicCache

from deltanet.cache_deltanet import CACHE_NAME

VOCAB = 61
all_kinds = pytest.mark.parametrize("kind", KINDS)

IDS = token_ids(2, 6)
BAD_INPUTS = {
    "neither": ({}, "exactly one of `input_ids` and `inputs_embeds`"),
    "both": ({"input_ids": IDS, "inputs_embeds": torch.zeros(2, 6, 32)}, "exactly one of"),
    "ids_1d": ({"input_ids": IDS[0]}, r"`input_ids` has shape \(6,\) and is torch.int64; allowed: integers \[batch,"),
    "ids_real": ({"input_ids": IDS.float()}, r"`input_ids` has shape \(2, 6\) and is torch.float32; allowed: integers"),
    "ids_too_large": ({"input_ids": IDS + VOCAB}, r"`input_ids` holds ids from \d+ to \d+; allowed: 0 to 60"),
    "ids_negative": ({"input_ids": IDS - VOCAB}, r"ids from -\d+ to .*; allowed: 0 to 60"),
    "embeds_2d": ({"inputs_embeds": torch.zeros(6, 32)}, r"`inputs_embeds` has shape \(6, 32\)"),
    "embeds_width": ({"inputs_embeds": torch.zeros(2, 6, 31)}, r"`inputs_embeds` has shape \(2, 6, 31\)"),
    "no_tokens": ({"input_ids": IDS[:, :0]}, r"shape \(2, 0\); allowed: at least one token"),
    "no_rows": ({"input_ids": IDS[:0]}, r"shape \(0, 6\); allowed: at least one token"),
    "no_embeddings": ({"inputs_embeds": torch.zeros(2, 0, 32)}, r"shape \(2, 0\); allowed: at least one token"),
    "mask_1d": ({"input_ids": IDS, "attention_mask": torch.ones(6)}, r"`attention_mask` has shape \(6,\)"),
    "mask_4d": ({"input_ids": IDS, "attention_mask": torch.ones(2, 1, 6, 6)}, r"\(2, 1, 6, 6\); allowed: \[2, tokens\]"),
    "mask_batch": ({"input_ids": IDS, "attention_mask": torch.ones(1, 6)}, r"shape \(1, 6\); allowed: \[2, tokens\]"),
    "mask_short": ({"input_ids": IDS, "attention_mask": torch.ones(2, 5)}, "covers 5 tokens; allowed: 6"),
    "mask_long": ({"input_ids": IDS, "attention_mask": torch.ones(2, 7)}, "covers 7 tokens; allowed: 6"),
    "mask_additive": ({"input_ids": IDS, "attention_mask": torch.full((2, 6), -1e9)}, "other values than 0 and 1"),
    "mask_of_documents": ({"input_ids": IDS, "attention_mask": torch.ones(2, 6) * 2}, "other values than 0.*`seq_idx`"),
    "two_caches": ({"input_ids": IDS, "cache": DynamicCache(), "past_key_values": DynamicCache()}, "one argument under two"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
@pytest.mark.parametrize("kind", ["pure", "sliding"])
def test_bad_input(kind, name):
    inputs, message = BAD_INPUTS[name]
    with pytest.raises(ValueError, match=message):
        tiny_model(kind)(**inputs)


@all_kinds
def test_a_cache_without_a_configuration(kind):
    with pytest.raises(ValueError, match=r"no delta-rule state for layer 0.*DynamicCache\(config=model.config\)"):
        tiny_model(kind)(IDS, past_key_values=DynamicCache())


@all_kinds
def test_mask_of_a_continued_forward(kind):
    model = tiny_model(kind)
    cache = getattr(model(IDS), CACHE_NAME)
    with pytest.raises(ValueError, match=r"covers 2 tokens; allowed: 8 \(6 in the cache and 2 new\)"):
        model(IDS[:, :2], past_key_values=cache, attention_mask=torch.ones(2, 2))


@pytest.mark.parametrize("length", [1, 3])
@all_kinds
def test_nan_in_beta(kind, length):
    """In a prompt, and in a step that follows a sound one."""
    model = tiny_model(kind)
    with torch.no_grad():
        cache = getattr(model(IDS), CACHE_NAME)
        model.model.layers[0].attn.b_proj.weight[0, 0] = float("nan")
        for inputs in ({"input_ids": IDS}, {"input_ids": IDS[:, :length], "past_key_values": cache}):
            with pytest.raises(ValueError, match="beta contains NaN"):
                model(**inputs)


@all_kinds
def test_embeddings_of_another_dtype(kind):
    with pytest.raises(RuntimeError, match="same dtype"):
        tiny_model(kind)(inputs_embeds=torch.randn(2, 6, 32, dtype=torch.bfloat16))


def test_a_cache_of_another_dtype():
    """The states keep the dtype of the forward that made them; later inputs are converted to it."""
    model = tiny_model(initializer_range=0.1)
    with torch.no_grad():
        expected = model(IDS).logits[:, 3:]
        cache = getattr(model.to(torch.bfloat16)(IDS[:, :3]), CACHE_NAME)
        parts = [model.float()(IDS[:, t : t + 1], past_key_values=cache).logits for t in (3, 4, 5)]
    assert {x.dtype for layer in cache.layers for x in layer.conv_states.values()} == {torch.bfloat16}
    assert relative_error(torch.cat(parts, 1), expected) <= 3e-2


def test_a_refused_input_leaves_the_cache_alone():
    model = tiny_model()
    with torch.no_grad():
        cache = getattr(model(IDS), CACHE_NAME)
        before = [layer.recurrent_states[0].clone() for layer in cache.layers]
        short_mask = {"input_ids": IDS, "attention_mask": torch.ones(2, 6)}
        for inputs in ({"input_ids": IDS + VOCAB}, short_mask, {"input_ids": IDS[:1]}):
            with pytest.raises(ValueError):
                model(**inputs, past_key_values=cache)
        assert all(map(torch.equal, [layer.recurrent_states[0] for layer in cache.layers], before))
        assert cache.get_seq_length() == 6
