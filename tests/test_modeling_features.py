"""modeling_deltanet.py as Transformers uses it: losses, heads, memory, tying, padding, precision, bad input."""

import json

import pytest
import torch
import torch.nn.functional as F
from models import KINDS, WINDOW, tiny_model, token_ids
from oracle import relative_error
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from deltanet import (
    DeltaNetForCausalLM,
    DeltaNetForSequenceClassification,
    DeltaNetForTokenClassification,
    DeltaNetModel,
)
from deltanet.cache_deltanet import CACHE_NAME

VOCAB = 61
all_kinds = pytest.mark.parametrize("kind", KINDS)


def cross_entropy(logits, labels, reduction="mean"):
    """Of logits [B, T, vocab] against labels [B, T] that are shifted already."""
    return F.cross_entropy(logits.double().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction=reduction)


def shift(labels):
    return F.pad(labels[:, 1:], (0, 1), value=-100)


def state_of(output):
    return getattr(output, CACHE_NAME)


def gradients(model, **inputs):
    """Loss and gradients of every parameter, by name."""
    model.zero_grad(set_to_none=True)
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def pad(rows, side, value):
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)


def assert_equal_gradients(actual, expected, limit):
    errors = {name: relative_error(actual[name], expected[name]) for name in expected}
    assert actual.keys() == expected.keys()
    assert all(error <= limit for error in errors.values()), errors


# Losses


@all_kinds
def test_loss(kind):
    model, ids = tiny_model(kind), token_ids(2, 11)
    labels = ids.masked_fill(torch.arange(11) % 3 == 0, -100)
    with torch.no_grad():
        output = model(ids, labels=labels)
        torch.testing.assert_close(output.logits, model(ids).logits)
        torch.testing.assert_close(output.loss.double(), cross_entropy(output.logits, shift(labels)))
        total = cross_entropy(output.logits, shift(labels), "sum")
        torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=5).loss.double(), total / 5)
        count = torch.tensor(7)
        torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=count).loss.double(), total / 7)


def test_shift_labels():
    model, ids = tiny_model(), token_ids(2, 11)
    shifted = token_ids(2, 11, seed=5)
    with torch.no_grad():
        output = model(ids, labels=ids, shift_labels=shifted)
    torch.testing.assert_close(output.loss.double(), cross_entropy(output.logits, shifted))


@pytest.mark.parametrize("keep", [0, 1, 4, torch.tensor([0, 3, 9])], ids=["all", "one", "four", "tensor"])
@pytest.mark.parametrize("with_shift_labels", [False, True])
def test_logits_to_keep(keep, with_shift_labels):
    model, ids = tiny_model(), token_ids(2, 11)
    kept = keep if isinstance(keep, torch.Tensor) else torch.arange(11 - keep if keep else 0, 11)
    shifted = token_ids(2, 11, seed=5) if with_shift_labels else shift(ids)
    labels = {"labels": ids, **({"shift_labels": shifted} if with_shift_labels else {})}
    if not with_shift_labels and kept.tolist() == [10]:
        labels = {}  # The last token has nothing to predict.
    with torch.no_grad():
        full, output = model(ids), model(ids, logits_to_keep=keep, **labels)
    torch.testing.assert_close(output.logits, full.logits[:, kept])
    if labels:
        torch.testing.assert_close(output.loss.double(), cross_entropy(full.logits[:, kept], shifted[:, kept]))


# Inputs and outputs


@all_kinds
def test_embeddings_in_place_of_ids(kind):
    model, ids = tiny_model(kind), token_ids(2, 9)
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
        assert torch.equal(model(inputs_embeds=embeds).logits, model(ids).logits)


@all_kinds
def test_hidden_states(kind):
    model, ids = tiny_model(kind), token_ids(2, 9)
    with torch.no_grad():
        output = model(ids, output_hidden_states=True)
        states = output.hidden_states
        assert len(states) == model.config.num_hidden_layers + 1
        assert torch.equal(states[0], model.model.embed_tokens(ids))
        assert torch.equal(model.lm_head(states[-1]), output.logits)
        for before, block, after in zip(states, model.model.layers[:-1], states[1:]):
            if block.is_delta:
                torch.testing.assert_close(block(before), after)
        assert model(ids).hidden_states is None


@pytest.mark.parametrize("kind", ["sliding", "global"])
def test_attention_weights(kind):
    model, ids = tiny_model(kind, attn_implementation="eager"), token_ids(2, 9)
    with torch.no_grad():
        (weights,) = model(ids, output_attentions=True).attentions
    assert weights.shape == (2, 4, 9, 9)
    distance = torch.arange(9)[:, None] - torch.arange(9)
    visible = (distance >= 0) & (distance < (WINDOW if kind == "sliding" else 9))
    assert bool((weights[..., visible] > 0).all()) and not weights[..., ~visible].any()
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 9))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["sliding", "global"])
def test_eager_attention_is_sdpa(kind, padded):
    ids, mask = token_ids(2, 12), torch.ones(2, 12, dtype=torch.long)
    if padded:
        mask[0, :4] = 0
    model = tiny_model(kind)
    logits = {}
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            logits[implementation] = model(ids, attention_mask=mask).logits[mask.bool()]
    assert relative_error(logits["eager"], logits["sdpa"]) <= 1e-5


@all_kinds
def test_the_state_is_returned_in_evaluation_only(kind):
    model, ids = tiny_model(kind), token_ids(1, 5)
    assert state_of(model(ids)).get_seq_length() == 5
    assert state_of(model(ids, use_cache=False)) is None
    assert state_of(model.train()(ids)) is None
    assert state_of(model(ids, use_cache=True)).get_seq_length() == 5
    model.eval().config.use_cache = False
    assert state_of(model(ids)) is None


def test_tuple_output():
    model, ids = tiny_model(), token_ids(2, 5)
    with torch.no_grad():
        loss, logits = model(ids, labels=ids, use_cache=False, return_dict=False)
    torch.testing.assert_close(loss.double(), cross_entropy(logits, shift(ids)))


# Training


@all_kinds
def test_every_parameter_is_trained(kind):
    model = tiny_model(kind, use_gate=True).train()
    _, grads = gradients(model, input_ids=token_ids(2, 9), labels=token_ids(2, 9))
    assert not [name for name, grad in grads.items() if grad is None or not grad.any()]


@pytest.mark.parametrize("use_reentrant", [True, False])
@all_kinds
def test_gradient_checkpointing(kind, use_reentrant):
    model, ids = tiny_model(kind).train(), token_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    loss, expected = gradients(model, **inputs)
    calls = []
    model.model.layers[0].attn.register_forward_pre_hook(lambda *_: calls.append(1))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    again, actual = gradients(model, **inputs)
    assert len(calls) == 2  # once more in the backward pass
    assert torch.equal(loss, again)
    assert_equal_gradients(actual, expected, 1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("use_short_conv", [True, False])
@all_kinds
def test_padding_disturbs_nothing(kind, use_short_conv, side):
    """A padded batch has the losses and gradients of its rows one by one, whatever stands in the padding."""
    model, rows = tiny_model(kind, use_short_conv=use_short_conv).train(), token_ids(3, 12).unbind()
    rows = [row[:length] for row, length in zip(rows, (12, 7, 3))]
    separate = [gradients(model, input_ids=x[None], labels=x[None], num_items_in_batch=10) for x in rows]
    expected = {name: sum(grads[name] for _, grads in separate) for name in separate[0][1]}
    # Nothing predicts the first token of a row; under left padding, padding would.
    labels = pad([F.pad(row[1:], (1, 0), value=-100) for row in rows], side, -100)
    mask = pad([torch.ones_like(row) for row in rows], side, 0)
    for filler in (0, 17):
        loss, grads = gradients(
            model, input_ids=pad(rows, side, filler), attention_mask=mask, labels=labels, num_items_in_batch=10
        )
        torch.testing.assert_close(loss, sum(loss for loss, _ in separate))
        assert_equal_gradients(grads, expected, 2e-5)


def test_sum_normalised_features_at_padding():
    """Features of padding add up to zero, which divided by themselves would be NaN everywhere."""
    model = tiny_model(qk_norm="sum", qk_activation="relu", use_short_conv=False).train()
    with torch.no_grad():
        model.model.embed_tokens.weight[0] = 0
    ids = token_ids(1, 8)
    padded, mask = F.pad(ids, (0, 3)), F.pad(torch.ones_like(ids), (0, 3))
    loss, expected = gradients(model, input_ids=ids, labels=ids)
    labels = F.pad(ids, (0, 3), value=-100)
    padded_loss, actual = gradients(model, input_ids=padded, attention_mask=mask, labels=labels)
    torch.testing.assert_close(loss, padded_loss)
    assert_equal_gradients(actual, expected, 1e-5)


# Embeddings


def stored_names(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


@pytest.mark.parametrize("tied", [False, True])
def test_tied_weights(tmp_path, tied):
    model, ids = tiny_model(tie_word_embeddings=tied), token_ids(2, 7)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    model.save_pretrained(tmp_path)
    names = stored_names(tmp_path)
    assert "model.embeddings.weight" in names and ("lm_head.weight" in names) != tied
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("model_class", [DeltaNetModel, DeltaNetForCausalLM])
def test_load_state_dict_accepts_a_saved_file(tmp_path, model_class):
    model, other = (tiny_model(model_class=model_class, seed=seed) for seed in (0, 1))
    model.save_pretrained(tmp_path)
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", [40, 70])
def test_resize_embeddings(tmp_path, tied, size):
    model, common = tiny_model(tie_word_embeddings=tied), min(size, VOCAB)
    ids = token_ids(2, 7, vocab_size=common)
    with torch.no_grad():
        before = model(ids).logits
        model.resize_token_embeddings(size)
        after = model(ids).logits
        assert after.shape[-1] == size == model.config.vocab_size
        assert torch.equal(after[..., :common], before[..., :common])
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        last = torch.tensor([[size - 1]])
        loss = model(last.repeat(1, 3), labels=last.repeat(1, 3)).loss
        assert loss.isfinite()
        with pytest.raises(ValueError, match=f"allowed: 0 to {size - 1}"):
            model(last + 1)
        model.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == size
        assert torch.equal(DeltaNetForCausalLM.from_pretrained(tmp_path)(ids).logits, after)


# The other heads


@pytest.mark.parametrize("side", ["left", "right"])
@all_kinds
def test_sequence_classification(kind, side):
    model = tiny_model(kind, DeltaNetForSequenceClassification, num_labels=3)
    ids, lengths = token_ids(3, 8), (8, 5, 2)
    rows = [row[:length] for row, length in zip(ids, lengths)]
    padded = pad(rows, side, 0)
    labels = torch.tensor([0, 2, 1])
    with torch.no_grad():
        output = model(padded, attention_mask=(padded != 0).long(), labels=labels)
        hidden = [model.model(row[None]).last_hidden_state[0, -1] for row in rows]
    expected = torch.stack(hidden) @ model.score.weight.T
    assert output.logits.shape == (3, 3)
    assert relative_error(output.logits, expected) <= 1e-5
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, labels))


@all_kinds
def test_token_classification(kind):
    model = tiny_model(kind, DeltaNetForTokenClassification, num_labels=4)
    ids, labels = token_ids(2, 8), token_ids(2, 8, seed=3, vocab_size=4)
    labels[0, 3] = -100
    with torch.no_grad():
        output = model(ids, labels=labels)
        expected = model.score(model.model(ids).last_hidden_state)
    torch.testing.assert_close(output.logits, expected)
    torch.testing.assert_close(output.loss.double(), cross_entropy(expected, labels))


@pytest.mark.parametrize(
    "auto_class, model_class",
    [
        (AutoModelForSequenceClassification, DeltaNetForSequenceClassification),
        (AutoModelForTokenClassification, DeltaNetForTokenClassification),
    ],
)
def test_heads_by_auto_class(tmp_path, auto_class, model_class):
    ids = token_ids(2, 8)
    tiny_model().save_pretrained(tmp_path / "pretrained")
    model, info = auto_class.from_pretrained(tmp_path / "pretrained", num_labels=5, output_loading_info=True)
    assert type(model) is model_class and model.num_labels == 5
    assert {name.split(".")[0] for name in info["missing_keys"]} == {"score"}
    model.save_pretrained(tmp_path / "classifier")
    loaded = auto_class.from_pretrained(tmp_path / "classifier")
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        backbone = DeltaNetModel.from_pretrained(tmp_path / "classifier")
        assert torch.equal(backbone(ids).last_hidden_state, model.model(ids).last_hidden_state)


# Precision


@all_kinds
def test_autocast(kind):
    model, ids = tiny_model(kind, initializer_range=0.05).train(), token_ids(2, 20)
    loss, expected = gradients(model, input_ids=ids, labels=ids)
    with torch.autocast("cpu", torch.bfloat16):
        cast_loss, actual = gradients(model, input_ids=ids, labels=ids)
    assert not torch.equal(loss, cast_loss)
    assert relative_error(cast_loss, loss) <= 1e-2
    assert {x.dtype for x in actual.values()} == {torch.float32}
    assert_equal_gradients(actual, expected, 6e-2)


# Checkpointing and the cache

IDS = token_ids(2, 6)


@all_kinds
def test_a_cache_in_checkpointed_training(kind):
    model = tiny_model(kind)
    cache = state_of(model(IDS))
    model.train().gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="cannot be used with gradient checkpointing"):
        model(IDS, past_key_values=cache)
    assert state_of(model(IDS)) is None


@all_kinds
def test_generation_between_checkpointed_training_steps(kind):
    model = tiny_model(kind)
    expected = model.generate(IDS, max_new_tokens=4, do_sample=False)
    model.train().gradient_checkpointing_enable()
    assert torch.equal(model.generate(IDS, max_new_tokens=4, do_sample=False), expected)
