"""layout_deltanet.py: padding anywhere, packed sequences, and what cannot be honoured; losses of padded batches are in
test_modeling_features.py."""

import pytest
import torch
import torch.nn.functional as F
from models import KINDS, tiny_model, token_ids
from oracle import relative_error
from transformers import DataCollatorWithFlattening, DynamicCache

from deltanet import layout_deltanet
from deltanet.cache_deltanet import CACHE_NAME
from deltanet.layout_deltanet import TokenLayout, find_boundaries, packed_layout, padding_layout

all_kinds = pytest.mark.parametrize("kind", KINDS)
LENGTHS = (5, 1, 9, 2)
TOTAL = sum(LENGTHS)


def documents(lengths=LENGTHS):
    return [row[:length] for row, length in zip(token_ids(len(lengths), max(lengths)), lengths)]


def boundaries(lengths=LENGTHS, dtype=torch.int32):
    return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(dtype)


def state_of(output):
    return getattr(output, CACHE_NAME)


def recurrent_states(cache):
    return [layer.recurrent_states[0] for layer in cache.layers if layer._layer_type == "linear_attention_delta"]


# Padding

# Which tokens of a row exist; the pattern of each row of a batch.
MASKS = {
    "left": ["..xxxxxx", "xxxxxxxx", "......xx"],
    "right": ["xxxxx...", "xxxxxxxx", "x......."],
    "inner": ["xx..xxxx", "x.x.x.xx", "xxxxxxxx"],
    "both_sides": ["..xxxx..", ".xxxxxxx", "xxxxxxx."],
    "empty_row": ["xxxxxxxx", "........", "xxxx...."],
    "one_row": ["..xxxxxx"],
    "one_row_right": ["xxxxx..."],
    "nothing_padded": ["xxxxxxxx", "xxxxxxxx"],
}


def mask_of(name):
    return torch.tensor([[int(c == "x") for c in row] for row in MASKS[name]])


# A window counts columns, as in every model of Transformers, so padding inside a row shortens it.
KINDS_AND_MASKS = [(kind, name) for kind in KINDS for name in MASKS if (kind, name) != ("sliding", "inner")]


@pytest.mark.parametrize(
    "dtype, use_cache", [(torch.long, True), (torch.long, False), (torch.bool, True), (torch.float32, True)]
)
@pytest.mark.parametrize("kind, name", KINDS_AND_MASKS)
def test_padded_logits(kind, name, dtype, use_cache):
    """Every real token is as in its row with the padding cut out."""
    model, mask = tiny_model(kind), mask_of(name)
    ids = token_ids(*mask.shape)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask.to(dtype), use_cache=use_cache).logits
        assert bool(logits.isfinite().all())
        for row, real, actual in zip(ids, mask.bool(), logits):
            if real.any():
                assert relative_error(actual[real], model(row[real][None]).logits[0]) <= 1e-5


@pytest.mark.parametrize("second", ["left", "right", "inner", "empty_row"])
@pytest.mark.parametrize("first", ["left", "right", "inner", "empty_row", "one_row"])
def test_padding_in_a_continued_forward(first, second):
    """The state of every row is that of its real tokens, which a second padded part continues."""
    rows = len(MASKS[first])
    masks = mask_of(first), mask_of(second)[:rows]
    model, ids = tiny_model(), [token_ids(*mask.shape, seed=i) for i, mask in enumerate(masks)]
    with torch.no_grad():
        cache = state_of(model(ids[0], attention_mask=masks[0]))
        both = torch.cat(masks, 1)
        logits = model(ids[1], attention_mask=both, past_key_values=cache).logits
        for i, real in enumerate(both.bool()):
            row = torch.cat(ids, 1)[i][real][None]
            if not real.any():
                assert not any(state[i].any() for state in recurrent_states(cache))
                continue
            alone = model(row)
            new = masks[1][i].bool()
            if new.any():
                assert relative_error(logits[i][new], alone.logits[0, -int(new.sum()) :]) <= 1e-5
            for actual, expected in zip(recurrent_states(cache), recurrent_states(state_of(alone))):
                assert relative_error(actual[i], expected[0]) <= 1e-5


@all_kinds
def test_left_padding_in_a_continued_forward(kind):
    """Steps of one token and a longer part behind a left-padded prompt, for hybrids too."""
    model, mask = tiny_model(kind), mask_of("left")
    ids = token_ids(3, 8 + 6)
    mask = F.pad(mask, (0, 6), value=1)
    with torch.no_grad():
        cache, seen, parts = DynamicCache(config=model.config), 0, []
        for part in ids.split((8, 1, 1, 4), 1):
            seen += part.shape[1]
            parts.append(model(part, attention_mask=mask[:, :seen], past_key_values=cache).logits)
        for row, real, actual in zip(ids, mask.bool(), torch.cat(parts, 1)):
            assert relative_error(actual[real], model(row[real][None]).logits[0]) <= 1e-5


@pytest.mark.parametrize("length", [1, 3])
def test_only_padding_leaves_the_cache_alone(length):
    model, ids = tiny_model(), token_ids(2, 6)
    with torch.no_grad():
        cache = state_of(model(ids))
        before = [state.clone() for state in recurrent_states(cache)]
        convolutions = [layer.conv_states[i].clone() for layer in cache.layers for i in range(3)]
        mask = F.pad(torch.ones_like(ids), (0, length))
        model(ids[:, :length], attention_mask=mask, past_key_values=cache)
        assert all(map(torch.equal, recurrent_states(cache), before))
        assert all(map(torch.equal, [layer.conv_states[i] for layer in cache.layers for i in range(3)], convolutions))


@all_kinds
def test_gradients_of_an_empty_row(kind):
    model, ids = tiny_model(kind).train(), token_ids(2, 7)
    mask = torch.ones_like(ids)
    mask[1] = 0
    gradients = []
    for inputs in ({"input_ids": ids[:1]}, {"input_ids": ids, "attention_mask": mask}):
        model.zero_grad(set_to_none=True)
        labels = inputs["input_ids"].clone()
        labels[1:] = -100
        model(**inputs, labels=labels).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(relative_error(gradients[1][name], grad) <= 1e-5 for name, grad in gradients[0].items())


# Packed sequences


def by_collator(**options):
    return lambda rows: DataCollatorWithFlattening(**options)([{"input_ids": row.tolist()} for row in rows])


def by_trl(rows, multiple=1):
    """The padding-free keys of `trl.trainer.sft_trainer.DataCollatorForLanguageModeling` (TRL 1.16)."""
    ids, positions = torch.cat(rows), torch.cat([torch.arange(len(row)) for row in rows])
    fill = -len(ids) % multiple
    ids, positions = F.pad(ids, (0, fill))[None], F.pad(positions, (0, fill))[None]
    labels = ids.masked_fill((positions == 0) | (torch.arange(ids.shape[1]) >= ids.shape[1] - fill), -100)
    starts = (positions[0] == 0).nonzero().flatten()
    ends = torch.cat([starts, torch.tensor([positions.shape[1]])]).int()
    index = torch.repeat_interleave(torch.arange(len(starts), dtype=torch.int32), ends.diff())[None]
    longest = int(ends.diff().max())
    keys = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
    return {"input_ids": ids, "labels": labels, "position_ids": positions, "seq_idx": index, **keys}


def only(*names, source=by_trl):
    return lambda rows: {name: value for name, value in source(rows).items() if name in ("input_ids", "labels", *names)}


def misleading(rows):
    """Positions that run on, next to boundaries that say otherwise."""
    return {**only("cu_seq_lens_q")(rows), "position_ids": torch.arange(sum(map(len, rows)))[None]}


PACKINGS = {
    "positions": by_collator(),
    "flash": by_collator(return_flash_attn_kwargs=True),
    "flash_alone": by_collator(return_flash_attn_kwargs=True, return_position_ids=False),
    "index_alone": by_collator(return_seq_idx=True, return_position_ids=False),
    "everything": by_collator(return_flash_attn_kwargs=True, return_seq_idx=True),
    "trl": by_trl,
    "trl_multiple": lambda rows: by_trl(rows, multiple=8),
    "cu_seq_lens_q": only("cu_seq_lens_q"),
    "misleading": misleading,
}


def summed_gradients(model, batches, count):
    model.zero_grad(set_to_none=True)
    outputs = [model(**batch, num_items_in_batch=count) for batch in batches]
    sum(output.loss for output in outputs).backward()
    return outputs, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", PACKINGS)
@all_kinds
def test_packed_equals_separate(kind, name):
    model, rows = tiny_model(kind).train(), documents()
    separate = [{"input_ids": row[None], "labels": row[None]} for row in rows]
    expected, expected_gradients = summed_gradients(model, separate, TOTAL - len(rows))
    (packed,), actual_gradients = summed_gradients(model, [PACKINGS[name](rows)], TOTAL - len(rows))
    logits = torch.cat([output.logits for output in expected], 1)
    assert relative_error(packed.logits[:, :TOTAL], logits) <= 1e-5
    torch.testing.assert_close(packed.loss, sum(output.loss for output in expected))
    errors = {n: relative_error(actual_gradients[n], grad) for n, grad in expected_gradients.items()}
    assert all(error <= 2e-5 for error in errors.values()), errors
    assert state_of(packed) is None


@pytest.mark.parametrize("options", [{"use_short_conv": False}, {"attn_mode": "fused_recurrent"}, {"conv_size": 2}])
@pytest.mark.parametrize("lengths", [LENGTHS, (1, 1, 1), (70, 2, 66), (3, 0, 4)])
def test_packed_options(options, lengths):
    model, rows = tiny_model(**options), documents(lengths)
    with torch.no_grad():
        packed = model(torch.cat(rows)[None], cu_seq_lens_q=boundaries(lengths)).logits
        expected = torch.cat([model(row[None]).logits for row in rows if len(row)], 1)
    # Rounding of short sequences is amplified where no convolution smooths it.
    assert relative_error(packed, expected) <= 3e-5


@pytest.mark.parametrize("kind", ["sliding", "global"])
def test_packed_with_eager_attention(kind):
    model, rows = tiny_model(kind, attn_implementation="eager"), documents()
    with torch.no_grad():
        expected = torch.cat([model(row[None]).logits for row in rows], 1)
        assert relative_error(model(**by_trl(rows)).logits, expected) <= 1e-5


@pytest.mark.parametrize("with_positions", [False, True])
@all_kinds
def test_tail(kind, with_positions):
    """Behind the last boundary every mixer gives zero, and nothing there changes anything."""
    model, rows, tail = tiny_model(kind).train(), documents(), 4
    ids = torch.cat([*rows, token_ids(1, tail, seed=9)[0]])[None]
    packing = {"cu_seq_lens_q": boundaries()}
    if with_positions:
        packing["position_ids"] = torch.arange(TOTAL + tail)[None]
    mixed = []
    for block in model.model.layers:
        first = (lambda output: output) if block.is_delta else (lambda output: output[0])
        block.attn.register_forward_hook(lambda _, args, output, first=first: mixed.append(first(output)))
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embeds, **packing).logits
    assert not any(x[:, TOTAL:].any() for x in mixed) and all(bool(x[:, :TOTAL].any()) for x in mixed)

    def gradients(logits, wanted):
        direction = torch.randn(1, TOTAL, 61, generator=torch.Generator().manual_seed(4))
        return torch.autograd.grad((logits[:, :TOTAL] * direction).sum(), wanted)

    parameters = [p for n, p in model.named_parameters() if "embed" not in n]
    with_tail = gradients(logits, [embeds, *parameters])
    short = embeds[:, :TOTAL].detach().requires_grad_()
    packing["position_ids"] = None
    without = model(inputs_embeds=short, **packing).logits
    assert relative_error(logits[:, :TOTAL], without) <= 1e-6
    without_tail = gradients(without, [short, *parameters])
    assert not with_tail[0][:, TOTAL:].any()
    assert relative_error(with_tail[0][:, :TOTAL], without_tail[0]) <= 1e-5
    assert all(relative_error(a, e) <= 1e-5 for a, e in zip(with_tail[1:], without_tail[1:]))


def test_the_mixers_at_the_tail_have_no_gradient():
    """Not even for a gradient that arrives there."""
    model = tiny_model("global").train()
    x = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    layout, positions = packed_layout(torch.tensor([0, 3, 5]), 8)
    rope = {model.model.layers[1].attn.rope: (torch.ones(1, 8, 8), torch.zeros(1, 8, 8))}
    delta = model.model.layers[0].attn(x, layout)
    attention, _ = model.model.layers[1].attn(x, None, rope, packed=layout.real)
    for output in (delta, attention):
        (gradient,) = torch.autograd.grad(output.sum(), x)
        assert not gradient[:, 5:].any() and gradient[:, :5].any()
    assert positions.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]


# The parts


def test_padding_layout():
    assert padding_layout(None, 4, 4) == padding_layout(torch.ones(2, 9), 4, 4) == TokenLayout()
    layout = padding_layout(torch.tensor([[0, 1, 0, 1, 1]]), 3, 4)
    assert layout.real.tolist() == [[False, True, True]] and layout.cu_seqlens is None


def test_find_boundaries():
    find = lambda **given: find_boundaries(  # noqa: E731
        (1, 6), *(given.get(n) for n in ("position_ids", "cu_seq_lens_q", "seq_idx", "attention_mask", "past_key_values"))
    )
    given = torch.tensor([0, 2, 2, 5])
    assert find(cu_seq_lens_q=given, position_ids=torch.arange(6)[None]) is given
    assert find(position_ids=torch.tensor([[0, 1, 0, 1, 2, 0]])).tolist() == [0, 2, 5, 6]
    assert find(position_ids=torch.tensor([[2, 3, 2, 3, 4, 2]])).tolist() == [0, 2, 5, 6]
    assert find(seq_idx=torch.tensor([[0, 0, 1, 2, 2, 2]], dtype=torch.int32)).tolist() == [0, 2, 3, 6]
    assert find(position_ids=torch.arange(4, 10)[None]) is None
    assert find(seq_idx=torch.zeros(1, 6)) is None
    assert find() is None
    # What `generate` passes for left padding is no packing.
    padded = {"position_ids": torch.tensor([[0, 0, 0, 1, 2, 3]]), "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1]])}
    assert find(**padded) is None


# What cannot be honoured

IDS, RESTARTS = token_ids(1, 6), torch.tensor([[0, 1, 2, 0, 1, 2]])
BAD_PACKING = {
    "decreasing": ({"cu_seq_lens_q": torch.tensor([0, 4, 3, 6])}, r"is \[0, 4, 3, 6\]; .* never decreasing, up to 6"),
    "beyond": ({"cu_seq_lens_q": torch.tensor([0, 3, 7])}, r"is \[0, 3, 7\]; allowed: from 0, .* up to 6 tokens"),
    "late_start": ({"cu_seq_lens_q": torch.tensor([1, 3, 6])}, r"is \[1, 3, 6\]; allowed: from 0"),
    "negative": ({"cu_seq_lens_q": torch.tensor([-1, 3, 6])}, r"is \[-1, 3, 6\]; allowed: from 0"),
    "one_boundary": ({"cu_seq_lens_q": torch.tensor([0])}, r"torch.int64 of shape \(1,\); allowed: integers of shape"),
    "rank": ({"cu_seq_lens_q": torch.tensor([[0, 6]])}, r"of shape \(1, 2\); allowed: integers of shape"),
    "floats": ({"cu_seq_lens_q": torch.tensor([0.0, 6.0])}, r"is torch.float32 of shape \(2,\); allowed: integers"),
    "two_rows": ({"input_ids": token_ids(2, 6), "cu_seq_lens_q": torch.tensor([0, 6])}, r"allowed: one row \(batch is 2\)"),
    "index_in_two_rows": ({"input_ids": token_ids(2, 6), "seq_idx": torch.zeros(2, 6)}, r"`seq_idx` .* \(batch is 2\)"),
    "index_shape": ({"seq_idx": torch.zeros(1, 5)}, r"`seq_idx` has shape \(1, 5\); allowed: \[1, 6\]"),
    "index_rank": ({"seq_idx": torch.zeros(6)}, r"`seq_idx` has shape \(6,\); allowed: \[1, 6\]"),
    "positions_shape": ({"position_ids": torch.arange(5)[None]}, r"`position_ids` has shape \(1, 5\); allowed: \[1, 6\]"),
    "positions_rows": ({"position_ids": RESTARTS.repeat(3, 1)}, r"`position_ids` has shape \(3, 6\); allowed: \[1, 6\]"),
    "with_mask": ({"cu_seq_lens_q": torch.tensor([0, 6]), "attention_mask": torch.ones(1, 6)}, "without `attention_mask`"),
    "index_with_mask": ({"seq_idx": torch.zeros(1, 6), "attention_mask": torch.ones(1, 6)}, "without `attention_mask`"),
    "restarts_with_mask": ({"position_ids": RESTARTS, "attention_mask": torch.ones(1, 6)}, "`position_ids` restart inside"),
    "restarts_in_rows": ({"input_ids": token_ids(2, 6), "position_ids": RESTARTS.repeat(2, 1)}, r"restart .*\(batch is 2\)"),
}


@pytest.mark.parametrize("name", BAD_PACKING)
@pytest.mark.parametrize("kind", ["pure", "global"])
def test_bad_packing(kind, name):
    inputs, message = BAD_PACKING[name]
    with pytest.raises(ValueError, match=message):
        tiny_model(kind)(**{"input_ids": IDS, **inputs})


@pytest.mark.parametrize(
    "packing", [{"cu_seq_lens_q": torch.tensor([0, 3, 6])}, {"seq_idx": torch.zeros(1, 6)}, {"position_ids": RESTARTS}]
)
@all_kinds
def test_packing_with_a_cache(kind, packing):
    model = tiny_model(kind)
    for cache in (DynamicCache(config=model.config), state_of(model(IDS))):
        with pytest.raises(ValueError, match="without `past_key_values`"):
            model(IDS, past_key_values=cache, **packing)
        assert cache.get_seq_length() in (0, 6)


def test_restarts_are_not_looked_for_where_that_would_wait(monkeypatch):
    """On a GPU the positions next to a mask are not read; DELTANET_CHECK=1 reads them."""
    mask = torch.ones(1, 6)
    monkeypatch.setattr(layout_deltanet, "values_are_readable", lambda tensor: False)
    assert find_boundaries((1, 6), RESTARTS, None, None, mask, None) is None
