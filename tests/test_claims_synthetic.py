"""The claims on synthetic tasks: what runs, what is kept, and what the tables and plots say about it."""

import time

import pytest

from deltanet.eval.claims import recall, state_tracking, synthetic
from deltanet.eval.claims.synthetic import Results, run_units
from deltanet.eval.synthetic.models import build_model
from deltanet.eval.synthetic.tasks import TASKS, check_sizes

TINY_RECALL = recall.TASK.resized(
    vocab=32, sizes={"vocab": 32, "length": 16, "pairs": 2}, examples=64, test_examples=32, epochs=1, batch_size=16
)
TINY_WORDS = {"examples": 64, "test_examples": 32, "batch_size": 16, "test_batch_size": 32, "epochs": 1}
TINY_TRACKING = {
    "parity": TASKS["parity"].resized(
        **TINY_WORDS, sizes={"shortest": 3, "longest": 12}, test_sizes={"shortest": 12, "longest": 20}
    ),
    "s3_swaps": TASKS["s3_swaps"].resized(**TINY_WORDS, sizes={"length": 6, "swaps_only": True}, test_sizes={"length": 12}),
}


UNITS = [*recall.units([0]), *state_tracking.units([0])]


def _recall_units(seeds):
    return recall.units(seeds, TINY_RECALL, widths=(64,))


def _result(best=0.5, complete=True, **changes):
    curve, shares = [[1.0, best / 2], [2.0, best]], [[20, best], [40, best / 2]]
    numbers = {"steps": 1234, "step_ms": 2.0, "seconds": 3.0, "recorded": True, "parameters": 5, "loss": 1.0}
    return {**numbers, "best": best, "scaled": best, "curve": curve, "by_position": shares, "complete": complete, **changes}


def _filled(path, units, best):
    results = Results(path, environment={"device": "H100", "torch": "2.11", "date": "2026-11-25"})
    for unit in units:
        results.add(unit, _result(best(unit)))
    return results


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: f"{unit.task_name} {unit.name} {unit.width}")
def test_what_runs_by_default_can_be_built(unit):
    check_sizes(unit.task_name, unit.task)
    model = build_model(unit.model, unit.task.vocab, **{**unit.task.model, "width": unit.width})
    if unit.task_name == "mqar" and unit.name != "Transformer":
        assert _state_size(model.config) == unit.width**2 // 2, "recurrent models are compared at one size of state"
    if unit.task_name != "mqar":
        assert model.config.allow_neg_eigval == (unit.name == "β ≤ 2")


def _state_size(config) -> int:
    if config.model_type == "mamba2":
        return config.num_heads * config.head_dim * config.state_size
    return config.num_heads * (config.hidden_size // config.num_heads) ** 2


def test_the_first_learning_rate_of_everything_comes_first():
    units = recall.units([0, 1])
    half = len(units) // 2
    assert [unit.seed for unit in units] == [0] * half + [1] * half
    first, second = units[: half // 2], units[half // 2 : half]
    points = [{(unit.name, unit.width) for unit in part} for part in (first, second)]
    assert points[0] == points[1] and len(points[0]) == len(first), "each model once at each rate"
    assert all(unit.rate == recall.RATES[unit.name][0] for unit in first)
    assert [unit.name for unit in units[:2]] == ["DeltaNet", "Transformer"]


def test_a_claim_runs_keeps_each_run_and_goes_on(tmp_path, monkeypatch):
    arguments = ["--output_path", str(tmp_path), "--device", "cpu"]
    call = ("synthetic_recall", _recall_units, recall.section, recall.plot, arguments)
    results = synthetic.command(*call)
    assert [(run["name"], run["rate"]) for run in results.runs] == [(x.name, x.rate) for x in _recall_units([0])]
    assert all(run["complete"] and run["steps"] == 4 and not run["recorded"] for run in results.runs)
    assert (tmp_path / "synthetic_recall.png").stat().st_size > 5000
    assert (tmp_path / "synthetic_recall.md").read_text() == recall.section(results)

    results.runs.pop(1)
    results.add(_recall_units([0])[0], _result(complete=False))
    trained = []
    monkeypatch.setattr(synthetic, "train", lambda *args, **options: trained.append(args[2]) or _result())
    again = synthetic.command(*call)
    names = [unit.model for unit in _recall_units([0])[:2]]
    assert trained == names, "what is missing and what was cut off"
    assert len(again.runs) == len(_recall_units([0]))


def test_a_second_learning_rate_is_for_what_the_first_did_not_solve(tmp_path, monkeypatch):
    def train(task, data, model, width, rate, *rest, deadline):
        return _result(0.995 if model == "llama" else 0.3)

    monkeypatch.setattr(synthetic, "train", train)
    results = Results(tmp_path / "x.json")
    run_units(_recall_units([0]), results, "cpu", time.time() + 60)
    rates = {name: [run["rate"] for run in results.runs if run["name"] == name] for name in ("Transformer", "DeltaNet")}
    assert rates == {"Transformer": [2e-3], "DeltaNet": [5e-3, 2e-3]}


def test_a_failing_run_stops_no_other_and_time_does(tmp_path, monkeypatch, capsys):
    def train(task, data, model, *rest, deadline):
        if model == "llama":
            raise RuntimeError("out of memory")
        return _result()

    monkeypatch.setattr(synthetic, "train", train)
    results = Results(tmp_path / "x.json")
    run_units(_recall_units([0]), results, "cpu", time.time() + 60)
    assert {run["name"] for run in results.runs} == {unit.name for unit in _recall_units([0])} - {"Transformer"}
    assert "out of memory" in capsys.readouterr().err
    late = Results(tmp_path / "y.json")
    run_units(_recall_units([0]), late, "cpu", time.time() - 1)
    assert late.runs == [] and "out of time before run 1" in capsys.readouterr().out


def test_a_run_is_cut_off_at_the_deadline(tmp_path):
    unit, results = _recall_units([0])[0], Results(tmp_path / "x.json")
    data = synthetic.make_data(unit.task, 0)
    run = synthetic.train(unit.task, data, unit.model, 64, 1e-3, 0.1, 0, "cpu", deadline=time.time() - 1)
    assert run["steps"] == 1 and not run["complete"]
    results.add(unit, run)
    assert Results.read(tmp_path / "x.json").like(unit) == results.runs


def test_the_recall_table_takes_the_best_learning_rate(tmp_path):
    units = recall.units([0])
    best = {"DeltaNet": 0.995, "Transformer": 0.5}

    def accuracy(unit):
        return best.get(unit.name, 0.1) * (1 if unit.rate == recall.RATES[unit.name][0] else 0.5)

    results = _filled(tmp_path / "x.json", units, accuracy)
    text = recall.section(results)
    assert "| DeltaNet | 0 | 99.5 (2.0, 0.005) | 99.5 (2.0, 0.005) | 99.5 (2.0, 0.005) |" in text
    assert "| Transformer | 0 | 50.0 (2.0, 0.002) |" in text and "H100, torch 2.11" in text
    assert "Length 512, 64 pairs, 100,000 examples, batch 64" in text


def test_the_tracking_table_has_a_column_for_each_range_of_beta(tmp_path):
    results = _filled(tmp_path / "x.json", state_tracking.units([0]), lambda unit: 0.01 if unit.name == "β ≤ 1" else 1.0)
    text = state_tracking.section(results)
    assert "| parity | 0 | 2 | 3–40 | 40–256 | 1.0 (1,234) | 100.0 (1,234) |" in text
    assert "| S3, swaps only | 0 | 1 | 128 | 512 | 1.0 (1,234) | 100.0 (1,234) |" in text


def test_state_tracking_runs(tmp_path):
    def units(seeds):
        return state_tracking.units(seeds, TINY_TRACKING)

    arguments = ["--output_path", str(tmp_path), "--device", "cpu"]
    results = synthetic.command("synthetic_state_tracking", units, state_tracking.section, state_tracking.plot, arguments)
    assert [(run["task"], run["name"]) for run in results.runs] == [
        (task, name) for task in TINY_TRACKING for name in ("β ≤ 2", "β ≤ 1")
    ]
    positions = [position for position, _ in results.runs[0]["by_position"]]
    assert positions == list(range(11, 20)), "parity is asked for at the last bit, of tests only beyond the training lengths"
    assert (tmp_path / "synthetic_state_tracking.png").stat().st_size > 5000
