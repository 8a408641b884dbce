"""The synthetic tasks: every label follows from the sequence, train and test are apart, and a sweep runs and goes on."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from deltanet.eval.synthetic import __main__ as command
from deltanet.eval.synthetic import recall_tasks, state_tracking
from deltanet.eval.synthetic.mamba2 import MatrixMamba2Mixer
from deltanet.eval.synthetic.models import build_model, parse_model
from deltanet.eval.synthetic.recall_tasks import IGNORE
from deltanet.eval.synthetic.tasks import TASKS, make_data
from deltanet.eval.synthetic.training import asked, evaluate, rate_factor

SMALL = {
    "mqar": {"vocab": 256, "length": 64, "pairs": 4},
    "s3": {"length": 24},
    "s3_swaps": {"length": 24},
    "parity": {"longest": 24},
    "modular_arithmetic": {"longest": 24},
}
SMALL_TEST = {"s3": {"length": 40}, "s3_swaps": {"length": 40}, "parity": {"shortest": 24, "longest": 40}}
SMALL_TEST["modular_arithmetic"] = SMALL_TEST["parity"]


def _data(name, seed=0, **changes):
    task = TASKS[name]
    sizes = {**task.sizes, **SMALL.get(name, {})}
    test_sizes = {**task.test_sizes, **SMALL_TEST.get(name, {})}
    return make_data(task.resized(examples=300, test_examples=200, sizes=sizes, test_sizes=test_sizes, **changes), seed)


def _rng():
    return np.random.default_rng(7)


@pytest.mark.parametrize("name", TASKS)
def test_data_are_seeded_in_range_and_apart(name):
    inputs, labels, test_inputs, test_labels = data = _data(name)
    assert all(torch.equal(part, again) for part, again in zip(data, _data(name)))
    assert not torch.equal(inputs, _data(name, seed=1)[0])
    for tokens in (inputs, test_inputs):
        assert tokens.min() >= 0 and tokens.max() < TASKS[name].vocab
    for marked in (labels, test_labels):
        assert ((marked == IGNORE) | ((marked >= 0) & (marked < TASKS[name].vocab))).all()
        assert (marked != IGNORE).any(1).all(), "every sequence asks for something"
    known = {tuple(row) for row in inputs.tolist()}
    assert not known & {tuple(row[: inputs.shape[1]]) for row in test_inputs.tolist() if not any(row[inputs.shape[1] :])}


def test_too_few_sequences_to_keep_apart_is_an_error():
    with pytest.raises(ValueError, match="nearly every test sequence"):
        sizes = {"shortest": 3, "longest": 5}
        make_data(TASKS["parity"].resized(examples=2000, test_examples=50, sizes=sizes, test_sizes=sizes), 0)


def test_mqar_labels_are_the_values_at_repeated_keys():
    inputs, labels = recall_tasks.multi_query_recall(_rng(), 300, True, vocab=64, length=48, pairs=6)
    for row, marked in zip(inputs.tolist(), labels.tolist()):
        value_of = dict(zip(row[0:12:2], row[1:12:2]))
        assert len(value_of) == 6 and all(1 <= key < 32 <= value < 64 for key, value in value_of.items())
        asked = [index for index, label in enumerate(marked) if label != IGNORE]
        assert Counter(row[index] for index in asked) == Counter(value_of.keys()), "each key once more"
        assert all(marked[index] == value_of[row[index]] and index % 2 == 0 and index >= 12 for index in asked)
        assert all(row[index] == 0 for index in range(12, 48) if index not in asked)


def test_mqar_queries_come_early_as_the_power_law_says():
    space, power = 24, 0.1
    sizes = {"vocab": 64, "length": 2 * space + 2, "pairs": 1}
    _, labels = recall_tasks.multi_query_recall(_rng(), 20_000, True, **sizes, power=power)
    slots = (np.argmax(labels != IGNORE, 1) - 2) // 2
    weight = np.arange(1, space + 1) ** (power - 1.0)
    assert np.bincount(slots, minlength=space) / 20_000 == pytest.approx(weight / weight.sum(), abs=0.012)


def test_mqar_filling_leaves_keys_and_labels():
    plain, marked = recall_tasks.multi_query_recall(_rng(), 50, True, vocab=64, length=48, pairs=6)
    filled, same = recall_tasks.multi_query_recall(_rng(), 50, True, vocab=64, length=48, pairs=6, random_filling=True)
    assert (marked == same).all() and (filled[plain != 0] == plain[plain != 0]).all()
    assert (filled[plain == 0] != 0).mean() > 0.9


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_in_context_recall_asks_for_values_of_known_keys(noise):
    sizes = {"vocab": 32, "noise_vocab": 16, "length": 40, "noise": noise}
    inputs, labels = recall_tasks.in_context_recall(_rng(), 200, False, **sizes)
    noisy = 0
    for row, marked in zip(inputs.tolist(), labels.tolist()):
        value_of = {}
        for index in range(0, 39, 2):
            key, value = row[index], row[index + 1] if index + 1 < 39 else None
            if key >= 16:
                assert marked[index] == IGNORE and value >= 16
                noisy += 1
                continue
            assert 0 <= key < 8, "keys are the lower half"
            assert marked[index] == value_of.get(key, IGNORE)
            assert value is None or value_of.setdefault(key, value) == value and 8 <= value < 16
        assert marked[38] == value_of[row[38]], "the last key has come before"
        assert all(label == IGNORE for label in marked[1::2])
    assert noisy / (200 * 19) == pytest.approx(noise * 18 / 19, abs=0.05)


def test_in_context_recall_trains_on_every_next_token():
    inputs, labels = recall_tasks.in_context_recall(_rng(), 20, True)
    assert inputs.shape == (20, 127) and (labels[:, :-1] == inputs[:, 1:]).all() and (labels >= 0).all()


def _fuzzy_pairs(row):
    """(position, key, value) of a fuzzy sequence without filling: runs of key tokens and runs of value tokens."""
    pairs, start = [], 0
    while start < len(row):
        middle = start
        while middle < len(row) and row[middle] < 7:
            middle += 1
        end = middle
        while end < len(row) and 7 <= row[end] < 15:
            end += 1
        pairs.append((middle, tuple(row[start:middle]), tuple(row[middle:end])))
        start = end
    return pairs


@pytest.mark.parametrize("train", [True, False])
def test_fuzzy_recall_is_consistent_and_ends_with_a_known_key(train):
    inputs, labels = recall_tasks.fuzzy_recall(_rng(), 200, train, length=64)
    sizes = Counter()
    for row, marked in zip(inputs.tolist(), labels.tolist()):
        full = [token for token in row if token != 15] + ([marked[-1]] if marked[-1] != IGNORE else [])
        assert row[: row.count(15)] == [15] * row.count(15) and row.count(15) < 30, "filled up on the left only"
        value_of, offset = {}, row.count(15)
        for position, key, value in _fuzzy_pairs(full):
            assert len(set(key)) == len(key) <= 3 and 1 <= len(set(value)) == len(value) <= 3
            assert len(key) == 3 or train
            sizes[len(key)] += 1
            asked = marked[offset + position - 1 : offset + position - 1 + len(value)]
            if not train:
                assert asked == (list(value) if key in value_of else [IGNORE] * len(value))
            known = key in value_of
            assert value_of.setdefault(key, value) == value, "one value for a key"
        assert known, "the last key has come before"
        if train:
            assert marked[:-1] == row[1:]
    assert train == (min(sizes[1], sizes[2], sizes[3]) > 300)


def test_memorization_is_one_map_for_training_and_testing():
    train, test = (recall_tasks.memorization(_rng(), 300, flag) for flag in (True, False))
    value_of = {}
    for inputs, labels in (train, test):
        assert (inputs[:, 1::2] == 255).all() and (inputs[:, 0::2] < 127).all() and (labels[:, 0::2] == IGNORE).all()
        for key, value in zip(inputs[:, 0::2].ravel().tolist(), labels[:, 1::2].ravel().tolist()):
            assert value_of.setdefault(key, value) == value >= 127
    assert len(set(value_of.values())) == len(value_of) == 127


def test_selective_copying_asks_for_the_tokens_in_order():
    inputs, labels = recall_tasks.selective_copying(_rng(), 200, True, length=40, tokens=5)
    for row, marked in zip(inputs.tolist(), labels.tolist()):
        assert row[34] == 15 and row[35:] == [14] * 5 and row.count(15) == 1
        tokens = [token for token in row[:34] if token != 14]
        assert len(tokens) == 5 and row[33] == tokens[-1], "the last stands before the copy sign"
        assert marked == [IGNORE] * 35 + tokens


def test_parity_is_the_parity_of_the_bits():
    inputs, labels = state_tracking.parity(_rng(), 500, True, 3, 20)
    lengths = set()
    for row, marked in zip(inputs.tolist(), labels.tolist()):
        bits = [token for token in row if token]
        assert row == bits + [0] * (19 - len(bits))
        assert [index for index, label in enumerate(marked) if label != IGNORE] == [len(bits) - 1]
        assert marked[len(bits) - 1] == 1 + sum(token - 1 for token in bits) % 2
        lengths.add(len(bits))
    assert lengths == set(range(2, 20))


def test_modular_arithmetic_is_what_python_computes():
    inputs, labels = state_tracking.modular_arithmetic(_rng(), 500, True, 3, 21)
    lengths = set()
    for row, marked in zip(inputs.tolist(), labels.tolist()):
        end = row.index(4)
        text = "".join({1: "+", 2: "-", 3: "*"}.get(token) or str(token - 5) for token in row[:end])
        assert marked == [IGNORE] * end + [5 + eval(text) % 5] + [IGNORE] * (len(row) - end - 1)
        assert row[end + 1 :] == [0] * (len(row) - end - 1)
        lengths.add(end + 2)
    assert lengths == set(range(3, 22, 2))


@pytest.mark.parametrize("swaps_only", [False, True])
def test_s3_labels_are_running_products(swaps_only):
    inputs, labels = state_tracking.s3(_rng(), 100, True, 30, swaps_only)
    group = [tuple(element) for element in state_tracking._GROUP]
    for row, marked in zip(inputs.tolist(), labels.tolist()):
        state = (0, 1, 2)
        for element, label in zip(row, marked):
            state = tuple(group[element][place] for place in state)
            assert group[label] == state
    used = {group[element] for element in np.unique(inputs)}
    assert used == ({(0, 2, 1), (1, 0, 2), (2, 1, 0)} if swaps_only else set(group))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: recall_tasks.multi_query_recall(_rng(), 1, True, 64, 30, 8), "at least 4"),
        (lambda: recall_tasks.fuzzy_recall(_rng(), 1, True, 16, 20), "at least 8"),
        (lambda: recall_tasks.selective_copying(_rng(), 1, True, 16, 20, 10), "at least 2"),
        (lambda: parse_model("llama:heads"), "key=value"),
        (lambda: build_model("no_such_model", 16, 32, 1), "'no_such_model' is no model type"),
        (lambda: command.main(["--tasks", "s3", "mqar", "--sizes", '{"length": 10}']), "task 'mqar' with .*'length': 10"),
        (lambda: command.main(["--tasks", "parity", "--sizes", '{"length": 10}']), "unexpected keyword argument 'length'"),
    ],
)
def test_sizes_that_cannot_work(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("text", ["deltanet", "deltanet:allow_neg_eigval=true", "llama", "mamba2:chunk_size=16"])
def test_any_causal_model_is_built_and_causal(text):
    model = build_model(text, 32, 32, 2, mlp=False, dropout=0.5, tied=True, seed=3).eval()
    ids = torch.randint(0, 32, (2, 12), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[:, 8] = (ids[:, 8] + 1) % 32
    with torch.no_grad():
        logits, other = model(ids).logits, model(changed).logits
    assert torch.allclose(logits[:, :8], other[:, :8], atol=1e-5)
    assert not torch.allclose(logits[:, 8], other[:, 8], atol=1e-3)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert not any("mlp." in name for name, _ in model.named_parameters())
    assert not torch.equal(model.train()(ids).logits, model(ids).logits), "dropout in training"


def test_negative_eigenvalues_are_an_option_of_the_specification():
    assert build_model("deltanet:allow_neg_eigval=true", 8, 32, 1).config.allow_neg_eigval is True
    assert build_model("deltanet", 8, 32, 1, deltanet={"num_heads": 4}).config.num_heads == 4


class Echo(torch.nn.Module):
    """A model that predicts the token it reads."""

    def __init__(self, vocab):
        super().__init__()
        self.base_model = lambda input_ids, use_cache: SimpleNamespace(
            last_hidden_state=torch.nn.functional.one_hot(input_ids, vocab).float() * 9
        )

    def get_output_embeddings(self):
        return torch.nn.Identity()


def test_accuracy_counts_labelled_positions_only():
    inputs = torch.tensor([[1, 2, 3], [4, 0, 1]])
    labels = torch.tensor([[1, IGNORE, 0], [IGNORE, 0, IGNORE]])
    found = evaluate(Echo(5), inputs, *asked(labels), 1, "cpu")
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["by_position"] == [(1, 1.0), (2, 1.0), (3, 0.0)]
    assert found["loss"] == pytest.approx(3 + np.log(1 + 4 * np.exp(-9)), abs=1e-6)


def test_asked_positions_are_those_with_labels():
    labels = torch.randint(0, 3, (50, 20), generator=torch.Generator().manual_seed(0))
    labels = torch.where(labels == 2, labels, IGNORE)
    positions, targets = asked(labels)
    assert positions.shape[1] == (labels == 2).sum(1).max()
    for row, places, target in zip(labels, positions, targets):
        count = int((row == 2).sum())
        assert places[:count].tolist() == row.eq(2).nonzero()[:, 0].tolist()
        assert target.tolist() == [2] * count + [IGNORE] * (len(target) - count)


@pytest.mark.parametrize("groups", [1, 2])
def test_mamba2_in_matrix_form_is_transformers_mamba2(groups):
    """Outputs and gradients, with weights that are no special case."""
    model = build_model(f"mamba2:state_size=8,n_groups={groups},chunk_size=16,num_heads=4,head_dim=32", 32, 64, 2).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    ids = torch.randint(0, 32, (2, 40), generator=generator)
    results = []
    for _ in range(2):
        logits = model(ids, use_cache=False).logits
        results.append((logits, *torch.autograd.grad(logits.square().mean(), list(model.parameters()))))
        mixers = [module for module in model.modules() if type(module) is MatrixMamba2Mixer]
        for mixer in mixers:
            mixer.__class__ = Mamba2Mixer
    assert not mixers and len(results) == 2
    for ours, theirs in zip(*results):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-7)


def test_mamba2_in_matrix_form_refuses_masks_and_caches():
    model = build_model("mamba2", 8, 32, 1)
    ids = torch.zeros(1, 4, dtype=torch.long)
    for options in ({"attention_mask": torch.tensor([[0, 1, 1, 1]])}, {"use_cache": True}):
        with pytest.raises(NotImplementedError, match="neither a mask nor a cache"):
            model(ids, **options)


def test_the_transformer_attends_as_with_a_mask():
    ids = torch.randint(0, 32, (2, 12), generator=torch.Generator().manual_seed(0))
    fast, eager = (build_model(text, 32, 32, 2).eval() for text in ("llama", "llama:attn_implementation=eager"))
    assert torch.allclose(fast(ids).logits, eager(ids).logits, atol=1e-6)


@pytest.mark.parametrize(("choices", "count"), [(8, 4), (8, 5)])
def test_distinct_numbers_are_uniform_orderings(choices, count):
    """First and last number are any two equally often, both where rows are drawn again and where choices are too few."""
    drawn = recall_tasks._distinct(_rng(), 60_000, choices, count)
    orderings = choices * (choices - 1)
    pairs = drawn[:, 0] * choices + drawn[:, -1]
    counts = np.bincount(pairs, minlength=choices**2)
    assert (counts > 0).sum() == orderings and all(len(set(row)) == count for row in drawn[:500].tolist())
    assert counts[counts > 0] == pytest.approx(60_000 / orderings, rel=0.15)


def test_learning_rates_follow_the_published_shapes():
    mad = TASKS["in_context_recall"].training
    assert rate_factor(0, 100, 200, 1e-3, mad) == 1 and rate_factor(99, 100, 200, 1e-3, mad) == 1
    assert rate_factor(100 * 200 - 1, 100, 200, 1e-3, mad) == pytest.approx(1e-3, rel=0.07)
    parity = TASKS["parity"].training
    assert rate_factor(999, 20_000, 1, 1e-3, parity) == pytest.approx(0.5)
    assert rate_factor(19_999, 20_000, 1, 1e-3, parity) == pytest.approx(1e-3, abs=1e-6)


def test_a_sweep_learns_writes_and_goes_on(tmp_path, monkeypatch):
    common = ["--tasks", "memorization", "--sizes", '{"vocab": 16, "length": 8}', "--test_examples", "40", "--device", "cpu"]
    arguments = [*common, *"--models deltanet llama --learning_rates 1e-2 --weight_decays 0 --epochs 20".split()]
    arguments += [*"--widths 32 64 --batch_size 64 --output_path".split(), str(tmp_path)]
    results = command.main(arguments)
    assert [run["best"] > 0.99 for run in results] == [True] * 4, [run["curve"] for run in results]
    assert [run["scaled"] for run in results] == [pytest.approx((run["best"] - 1 / 7) * 7 / 6) for run in results]
    table = (tmp_path / "table.md").read_text()
    assert table.count("| memorization |") == 4 and (tmp_path / "memorization.png").stat().st_size > 5000

    (tmp_path / "runs").joinpath(sorted(path.name for path in (tmp_path / "runs").iterdir())[0]).unlink()
    trained = []
    original = command.train
    monkeypatch.setattr(command, "train", lambda *args: trained.append(args) or original(*args))
    again = command.main(arguments)
    assert len(trained) == 1
    times = {"seconds": 0, "step_ms": 0}
    for first, second in zip(results, again):
        assert {**first, **times} == {**second, **times}, "seeded"
