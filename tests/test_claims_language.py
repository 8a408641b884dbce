"""The claims on language models: what is hidden and asked, how a model is trained, and the command from end to end."""

import json
import math
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from deltanet.eval.claims import chunked_mamba2, language, needles, text_measures
from deltanet.eval.claims.language import Results, Settings
from deltanet.eval.claims.language_models import CONFIGURATIONS, LABELS, Size, build, parameters
from deltanet.eval.claims.language_training import (
    MasterWeights,
    OutOfTime,
    TooSlow,
    cast,
    next_token_loss,
    recall_exercises,
    train,
    train_recall,
    training_tokens,
)
from deltanet.eval.claims.needles import Words, ask, exercise
from deltanet.eval.synthetic.models import build_model
from deltanet.eval.synthetic.recall_tasks import IGNORE
from deltanet.train.prepare import prepare
from deltanet.train.sources import FileSource
from deltanet.train.text import DATA, shipped_chapters
from deltanet.train.tokenization import train_tokenizer

WORDS = Words(np.array([900, 901]), np.arange(100, 120), np.arange(200, 240).reshape(20, 2), np.array([902]))
TINY = Settings.tiny()
TEXT = np.arange(1000, 1200)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(shipped_chapters("heldout"), 512)


@pytest.fixture(scope="module")
def data(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("claims")
    for split in language.SPLITS:
        prepare(folder / split, FileSource(sorted(DATA.glob("heldout-*.txt")), "text"), tokenizer)
    return folder


def _mentions(tokens):
    """(place, key, value) of every mention in tokens, whose rest is text in its order."""
    places = np.flatnonzero(tokens == 900)
    for place in places:
        assert tokens[place + 1] == 901 and tokens[place + 4] == 902
    rest = np.delete(tokens, (places[:, None] + np.arange(WORDS.size)).ravel())
    assert rest.tolist() == TEXT[: len(rest)].tolist()
    keys, values = tokens[places + 2], tokens[places + 3]
    assert ((values - 200) // 2 == keys - 100).all(), "each key has values of its own"
    return list(zip(places.tolist(), keys.tolist(), values.tolist()))


def test_exercises_label_every_value_that_was_mentioned_before():
    tokens, labels = exercise(TEXT, WORDS, np.random.default_rng(0), 6, 15)
    mentions, known, again = _mentions(tokens), {}, {}
    assert len(tokens) == len(labels) == len(TEXT) and len(mentions) == 15
    for place, key, value in mentions:
        if known.setdefault(key, (place, value))[0] != place:
            again[place + WORDS.value_offset] = value
    assert len(known) == 6 and all(known[key][1] == value for _, key, value in mentions)
    assert {place: labels[place] for place in np.flatnonzero(labels != IGNORE)} == again and len(again) == 9


def test_questions_stand_at_the_end_and_their_answers_in_the_text():
    tokens, values, distances = ask(TEXT, WORDS, np.random.default_rng(0), 6, 4)
    mentions = _mentions(tokens)
    assert len(tokens) == len(TEXT) and len(mentions) == 10
    first = {key: (place, value) for place, key, value in mentions[:6]}
    assert len(first) == 6 and mentions[6][0] == len(TEXT) - 4 * WORDS.size
    for (place, key, value), position, distance in zip(mentions[6:], values, distances):
        assert position == place + 3 and distance == place - first[key][0]
        assert value == tokens[position] == first[key][1]


def test_facts_are_drawn_anew_and_those_that_do_not_fit_are_refused():
    rng = np.random.default_rng(0)
    assert (WORDS.facts(rng, 5) != WORDS.facts(rng, 5)).any()
    with pytest.raises(ValueError, match="`count` is 21; allowed: at most 20"):
        WORDS.facts(rng, 21)
    with pytest.raises(ValueError, match="12 mentions do not fit into 30 tokens"):
        exercise(TEXT[:30], WORDS, rng, 6, 12)


def _counts(words, stream):
    """How often the words come, the most frequent first."""
    return np.sort([(stream == word).sum() for word in (*words.keys, *words.values.flat)])[::-1].tolist()


def test_words_are_whole_words_of_the_tokenizer_and_neither_rare_nor_the_most_frequent(tokenizer, monkeypatch):
    stream = np.array(tokenizer.encode(" ".join(shipped_chapters("heldout"))))
    words = Words.of(tokenizer, stream)
    fact = tokenizer.decode(words.facts(np.random.default_rng(0), 1)[0])
    key, value = fact.removeprefix(" ( ").removesuffix(")").split(" ")
    assert fact == f" ( {key} {value})" and key.isalpha() and value.isalpha()
    assert len({*words.keys, *words.values.flat}) == words.keys.size + words.values.size
    with pytest.raises(ValueError, match="has 0 pieces that are whole words"):
        Words.of(train_tokenizer(["x"], 257), stream)
    monkeypatch.setattr(needles, "VALUES", 2)
    monkeypatch.setattr(needles, "MORE_FREQUENT", 0)
    all_counts = _counts(Words.of(tokenizer, stream), stream)
    monkeypatch.setattr(needles, "KEYS", 3)
    monkeypatch.setattr(needles, "MORE_FREQUENT", 2)
    assert _counts(Words.of(tokenizer, stream), stream) == all_counts[2:11]


class _Oracle(torch.nn.Module):
    """Knows the answer to the first `knows` questions of a passage: the value that followed the same key before."""

    device = "cpu"

    def __init__(self, knows):
        super().__init__()
        self.knows, self.base_model = knows, self.answer
        self.lm_head = torch.nn.Linear(1200, 1200, bias=False)
        self.lm_head.weight.data = torch.eye(1200)

    def get_output_embeddings(self):
        return self.lm_head

    def answer(self, input_ids, use_cache):
        logits = torch.zeros(*input_ids.shape, 1200)
        for row, tokens in enumerate(input_ids.tolist()):
            seen, asked = {}, 0
            for place, token in enumerate(tokens[:-1]):
                if 100 <= token < 120:
                    asked += token in seen
                    logits[row, place, seen.get(token, 0) if asked <= self.knows else 0] = 1
                    seen.setdefault(token, tokens[place + 1])
        return SimpleNamespace(last_hidden_state=logits)


@pytest.mark.parametrize(("knows", "share"), [(8, 1.0), (2, 0.25), (0, 0.0)])
def test_recall_counts_right_answers(knows, share):
    right, distances = needles.recall(_Oracle(knows), TEXT, WORDS, 150, 9, sequences=3, tokens_at_once=320)
    assert right.shape == distances.shape == (24,) and right.mean() == share
    assert (distances >= WORDS.size).all() and (distances < 150).all()


def test_training_tokens_are_seeded_blocks_of_the_stream():
    settings = Settings(steps=5, batch=4, length=50)
    stream = np.arange(500) + 1000
    tokens = training_tokens(stream, settings, seed=0)
    assert tokens.shape == (5, 4, 50) and (tokens == training_tokens(stream, settings, 0)).all()
    assert (tokens != training_tokens(stream, settings, 1)).any()
    blocks = tokens.reshape(-1, 50)
    assert (blocks[:, 0] % 50 == 0).all() and (np.diff(blocks) == 1).all()
    begins = blocks[:, 0].tolist()
    assert all(begins.count(begin) == 2 for begin in range(1000, 1500, 50)), "two epochs, every block once in each"


def test_recall_exercises_are_seeded_and_have_facts_up_to_the_most_in_every_stage():
    sizes = {"exercise_lengths": (40, 100), "exercise_steps": (3, 20), "most_facts": 4, "most_mentioned": 0.6}
    settings = Settings(batch=4, length=200, **sizes)
    stages = recall_exercises(np.arange(500) + 1000, WORDS, settings, seed=0)
    assert [tokens.shape for tokens, _ in stages] == [labels.shape for _, labels in stages] == [(3, 20, 40), (20, 8, 100)]
    for most, (tokens, labels) in zip((4, 12), stages):
        mentions, asked = (tokens == 900).sum(-1), (labels != IGNORE).sum(-1)
        assert set(np.unique(mentions - asked)) == {*range(1, 1 + min(4, most // 2))}, "facts"
        assert mentions.min() == 2 and mentions.max() == most and (labels == tokens)[labels != IGNORE].all()
    again, other = (recall_exercises(np.arange(500) + 1000, WORDS, settings, seed) for seed in (0, 1))
    assert (again[1][0] == stages[1][0]).all() and (other[1][0] != stages[1][0]).any()


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_models_have_the_same_size_and_tied_embeddings(name):
    with torch.device("meta"):
        model = build(name, Size(), 8192)
    assert parameters(model) == pytest.approx(17.35e6, rel=0.02)
    assert model.lm_head.weight is model.get_input_embeddings().weight and name in LABELS


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_loss_is_that_of_the_model(name):
    model = build(name, TINY.size, 61).eval()
    ids = torch.randint(61, (2, 24), generator=torch.Generator().manual_seed(0))
    expected = model(input_ids=ids, labels=ids, use_cache=False).loss
    torch.testing.assert_close(next_token_loss(model, ids), expected, rtol=1e-5, atol=1e-5)
    labels = torch.where(ids < 20, ids, IGNORE)
    some = model(input_ids=ids, labels=labels, use_cache=False).loss
    torch.testing.assert_close(next_token_loss(model, ids, labels), some, rtol=1e-5, atol=1e-5)
    losses = text_measures.token_losses(model, ids.flatten().numpy(), 24, 24)
    torch.testing.assert_close(losses.mean(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_models_run_in_bfloat16_as_on_a_gpu(name):
    model = build(name, TINY.size, 61)
    ids = torch.randint(61, (2, 64), generator=torch.Generator().manual_seed(0))
    exact = next_token_loss(model, ids)
    cast(model, torch.bfloat16)
    loss = next_token_loss(model, ids)
    loss.backward()
    assert all(weight.grad.isfinite().all() and weight.grad.any() for weight in model.parameters())
    torch.testing.assert_close(loss.float(), exact, rtol=1e-2, atol=0)
    losses = text_measures.token_losses(model, ids.flatten().numpy(), 64, 64)
    torch.testing.assert_close(losses.mean(), exact.detach(), rtol=1e-2, atol=0)


def test_master_weights_step_as_adamw_does():
    model, other = (build("deltanet", TINY.size, 61, seed=3) for _ in range(2))
    weights = MasterWeights(model, torch.float32, weight_decay=0.1, betas=(0.9, 0.95), clip=0.5)
    groups = [[p for p in other.parameters() if (p.ndim > 1) == decayed] for decayed in (True, False)]
    groups = [{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1], "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    for step in range(3):
        ids = torch.randint(61, (2, 16), generator=torch.Generator().manual_seed(step))
        for one in (model, other):
            next_token_loss(one, ids).backward()
        weights.rate.fill_(1e-2)
        weights.step()
        model.zero_grad()
        torch.nn.utils.clip_grad_norm_(other.parameters(), 0.5)
        reference.step()
        reference.zero_grad()
    for one, another in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(one, another, rtol=1e-5, atol=1e-6)


def test_master_weights_gather_what_bfloat16_would_lose_and_leave_buffers():
    model = build("transformer", TINY.size, 61)
    weights = MasterWeights(model, torch.bfloat16, weight_decay=0.0, betas=(0.9, 0.95), clip=1.0)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}
    norm = model.model.norm.weight
    weights.rate.fill_(1e-4)
    for _ in range(200):
        for weight in model.parameters():
            weight.grad = torch.ones_like(weight)
        weights.step()
    assert norm.float().mean().item() == pytest.approx(0.98, abs=0.004), "steps of 1e-4, each below bfloat16's spacing"


def test_train_returns_a_curve_and_stops_when_it_must():
    model = build("deltanet", TINY.size, 61)
    tokens = torch.randint(61, (TINY.steps, 4, 32), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    later = time.monotonic() + 100
    loss = lambda model: next_token_loss(model, tokens[0]).item()  # noqa: E731
    figures = train(model, tokens, TINY, loss, later)
    assert [seen for seen, _ in figures["curve"]] == [TINY.steps * 64, TINY.steps * 128]
    assert figures["curve"][-1][1] < math.log(61) and figures["step_ms"] > 0
    with pytest.raises(OutOfTime):
        train(model, tokens, TINY, loss, time.monotonic() - 1)
    with pytest.raises(TooSlow, match="the 12 steps of a run would take"):
        train(model, tokens, Settings(steps=12, longest_s=0.0), loss, later)


def test_a_model_learns_the_answers_of_its_exercises():
    model = build("deltanet", TINY.size, 61)
    ids = torch.randint(61, (8, 32), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    labels = torch.where(ids < 10, ids, IGNORE)
    before = next_token_loss(model, ids, labels).item()
    stages = [tuple(part.reshape(1, -1, length).repeat(15, 1, 1) for part in (ids, labels)) for length in (16, 32)]
    settings = Settings(exercise_steps=(15, 15), learning_rate=1e-2)
    assert train_recall(model, stages, settings, time.monotonic() + 100) > 0
    assert next_token_loss(model, ids, labels) < before / 2
    with pytest.raises(OutOfTime):
        train_recall(model, stages, settings, time.monotonic() - 1)


@pytest.mark.parametrize(("length", "chunk"), [(40, 8), (37, 16), (5, 8)])
@pytest.mark.parametrize("groups", [1, 2])
def test_mamba2_in_chunks_is_its_matrix_form(length, chunk, groups, monkeypatch):
    monkeypatch.setattr(chunked_mamba2, "CHUNK", chunk)
    model = build_model(f"mamba2:state_size=8,n_groups={groups},num_heads=4,head_dim=32", 32, 64, 2).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    ids = torch.randint(0, 32, (2, length), generator=generator)
    results = []
    for change in (lambda model: None, chunked_mamba2.use_chunked_form):
        change(model)
        logits = model(ids, use_cache=False).logits
        results.append((logits, *torch.autograd.grad(logits.square().mean(), list(model.parameters()))))
    for matrix, chunked in zip(*results):
        torch.testing.assert_close(chunked, matrix, rtol=1e-4, atol=1e-7)


def test_perplexities_by_length_and_position(monkeypatch):
    seen = []

    def losses(model, stream, length, tokens_at_once):
        seen.append((len(stream), length))
        return torch.arange(1, length).repeat(len(stream) // length, 1) / length

    monkeypatch.setattr(text_measures, "token_losses", losses)
    by_length, by_position = text_measures.context_perplexities(None, np.zeros(1700), (128, 512), 0)
    assert seen == [(1536, 128), (1536, 512)]
    assert by_length == [(128, pytest.approx(math.exp(0.5))), (512, pytest.approx(math.exp(0.5)))]
    assert [end for end, _ in by_position] == [128, 256, 512]
    assert by_position[0][1] == pytest.approx(math.exp(64.5 / 512))


def _command(data, output, *more):
    return language.main(["--data", str(data), "--output_path", str(output), "--tiny", "--device", "cpu", *more])


def test_command_keeps_each_run_and_goes_on(data, tmp_path, monkeypatch, capsys):
    assert _command(data, tmp_path, "--models", "deltanet", "--seeds", "0") == 0
    file = tmp_path / language.FILE
    first = json.loads(file.read_text())
    assert [(run["kind"], run["model"]) for run in first["runs"]] == [("train", "deltanet"), ("generation", "deltanet")]
    trained = first["runs"][0]
    assert trained["curve"][-1][1] == trained["validation"] and 1 < trained["test"] < 2 * 512
    assert [length for length, _ in trained["lengths"]] == list(TINY.lengths)
    assert sum(cell["asked"] for cell in trained["distances"]) == 2 * 4 * 4
    monkeypatch.setattr(language, "run_generation", None)
    assert _command(data, tmp_path, "--models", "deltanet", "transformer", "--seeds", "0", "--seconds", "60") == 0
    second = json.loads(file.read_text())
    assert second["runs"][:2] == first["runs"] and second["runs"][2]["model"] == "transformer"
    assert "TypeError" in second["runs"][3]["error"], "a unit that fails leaves the others"
    assert "kept" in capsys.readouterr().out


def test_command_stops_in_time_and_refuses_other_settings(data, tmp_path, capsys):
    assert _command(data, tmp_path, "--seconds", "5") == 0
    assert not (tmp_path / language.FILE).exists() and "no time is left" in capsys.readouterr().out
    assert _command(data, tmp_path, "--models", "transformer", "--seeds", "0") == 0
    assert _command(data, tmp_path, "--steps", "13") == 2
    assert "has runs of another settings" in capsys.readouterr().err


def test_what_is_slow_is_measured_once_and_comes_last(data, tmp_path, monkeypatch):
    units = language.units(["mamba2", "deltanet", "transformer"], [0, 1])
    names = [" ".join(map(str, unit.values())) for unit in units]
    assert names == [
        *("train deltanet 0", "train transformer 0", "generation deltanet", "generation transformer"),
        *("train deltanet 1", "train transformer 1", "train mamba2 0", "train mamba2 1"),
    ]
    corpus = SimpleNamespace(identity={})
    results = Results(tmp_path / "r.json", "cpu", TINY, corpus)

    def slow(*_):
        raise TooSlow(900.0, 640)

    monkeypatch.setattr(language, "run_training", slow)
    unit = units[-2]
    figures = language.run(unit, corpus, TINY, "cpu", time.monotonic() + 60)
    results.add(unit, figures)
    again = Results(tmp_path / "r.json", "cpu", TINY, corpus)
    assert again.has(unit) and not again.has(units[-1]) and again.data["runs"][0]["step_ms"] == 900.0
    assert again.data["runs"][0]["error"] == "a step takes 900 ms, the 640 steps of a run would take 576 s"
