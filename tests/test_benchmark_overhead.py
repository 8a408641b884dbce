"""What `generate` costs outside of the model: operators are counted here, times are in the committed figures."""

import json

import pytest

from deltanet.benchmarks import generate_overhead
from deltanet.benchmarks.generate_overhead import BATCHES, MODES, RESULT, WAYS, Nothing, make_models, operators


@pytest.fixture
def models(monkeypatch):
    monkeypatch.setitem(generate_overhead.RECORDERS, "cpu", Nothing)
    return make_models()


@pytest.mark.parametrize("mode, saved", [("greedy", 9), ("sampling", 9), ("beam 4", 200)])
def test_a_replayed_token_takes_fewer_operators(models, mode, saved):
    """Those of the masks and positions that any model's tokens carry, and of the order of beams in 24 layers."""
    counts = {way: operators(models[way], 2, mode) for way in ("transformers", "replay")}
    assert counts["transformers"] - counts["replay"] >= saved


def test_the_committed_figures_are_complete():
    runs = json.loads(RESULT.read_text())
    assert len(runs) == 2
    for run in runs.values():
        rows = {(row["mode"], row["batch"], row["way"]): row for row in run["rows"]}
        assert rows.keys() == {(mode, batch, way) for mode in MODES for batch in BATCHES for way in WAYS}
        assert all(rows[m, b, "replay"]["us_a_token"] < rows[m, b, "transformers"]["us_a_token"] for m, b, _ in rows)
