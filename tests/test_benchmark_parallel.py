"""The plumbing of the benchmark on two GPUs, on CPUs: units, rows that are kept, processes that fail or run out of time."""

import json
import time

import pytest

from deltanet.benchmarks import gpu_parallel
from deltanet.benchmarks.gpu_parallel import Runs


@pytest.fixture
def runs(tmp_path):
    return Runs("cpu", True, tmp_path / "scratch", time.monotonic() + 100)


def test_a_row_is_the_last_line_of_json(runs):
    assert runs.row(["timeit", "-n1", "-r1", "print('{\"a\": 1}'); print('{\"a\": 2}'); print('done')"], 1) == {"a": 2}


def test_a_failure_has_its_output(runs):
    with pytest.raises(RuntimeError, match="No module named"):
        runs.row(["no_such_module"], 1)


def test_a_run_ends_with_the_time(runs):
    runs.deadline = time.monotonic()
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="out of time"):
        runs.row(["timeit", "-n1", "-r1", "import time; time.sleep(60)"], 1)
    assert time.monotonic() - start < 30


def run(monkeypatch, output, *options):
    words = ["--device", "cpu", "--tiny", "--output", str(output), "--scratch", str(output.parent / "scratch"), *options]
    monkeypatch.setattr("sys.argv", ["gpu_parallel", *words])
    gpu_parallel.main()


def test_the_same_command_goes_on(monkeypatch, tmp_path, capsys):
    asked = []

    def unit(self, name):
        asked.append(name)
        if name == "tensor" and len(asked) < 4:
            raise RuntimeError("broken")
        return {"ms": 12345.6, "one_ms": 2 * 12345.6}

    monkeypatch.setattr(Runs, "unit", unit)
    units = ["--units", "model-131072", "tensor", "train-one"]
    run(monkeypatch, tmp_path / "x.json", *units)
    run(monkeypatch, tmp_path / "x.json", *units)
    assert asked == ["model-131072", "tensor", "train-one", "tensor"]
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert rows["model-131072"]["ms"] == 12350 and "failed" not in rows["tensor"]
    assert "model-131072 ms" in capsys.readouterr().out
    run(monkeypatch, tmp_path / "x.json", *units, "--seconds", "1")
    assert len(asked) == 4


def test_rows_of_another_device_are_not_kept(tmp_path):
    gpu_parallel.write(tmp_path / "x.json", {"device": "a", "date": "1"}, {"tensor": {}})
    assert gpu_parallel.load(tmp_path / "x.json", {"device": "a", "date": "2"}) == {"tensor": {}}
    assert gpu_parallel.load(tmp_path / "x.json", {"device": "b", "date": "2"}) == {}


def test_context_parallelism_is_measured(runs):
    """One unit for real: two processes, an exact result, and as many bytes as the operation says."""
    row = runs.unit("context-32768")
    heads, size = 2, 16
    assert row["received_bytes"] == 4 * heads * size * (3 * size)
    assert all(error < 1e-2 for error in row["error"].values()) and all(row[f"forward{x}_ms"] > 0 for x in ("", "_one"))


def test_training_is_measured(runs):
    row = runs.unit("train-one")
    assert row["processes"] == 1 and len(row["losses"]) == gpu_parallel.STEPS and row["tokens_per_s"] > 0
