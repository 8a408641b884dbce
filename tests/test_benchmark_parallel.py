"""The plumbing of the benchmark on two GPUs, on CPUs: units, rows that are kept, processes that fail or run out of time."""

import json
import time

import pytest

from deltanet.benchmarks import gpu_parallel
from deltanet.benchmarks.gpu_parallel import Runs


@pytest.fixture
def runs(tmp_path):
    return Runs("cpu", True, tmp_path / "scratch", time.monotonic() + 100)


def test_rows_are_lines_of_json(runs):
    command = ["timeit", "-n1", "-r1", "print('{\"a\": 1}'); print('{\"a\": 2}'); print('done')"]
    assert runs.rows(command, 1) == [{"a": 1}, {"a": 2}]


def test_a_failure_begins_with_its_traceback_and_keeps_the_rows_before(runs):
    first, failure = runs.rows(["timeit", "-n1", "-r1", "print('noise'); print('{\"a\": 1}'); 1 / 0"], 1)
    assert first == {"a": 1} and failure["failed"].startswith("ended with 1: Traceback")
    assert "ZeroDivisionError" in failure["failed"]


def test_a_run_ends_with_the_time(runs):
    runs.deadline = time.monotonic()
    start = time.monotonic()
    assert runs.rows(["timeit", "-n1", "-r1", "import time; time.sleep(60)"], 1) == [{"failed": "out of time"}]
    assert time.monotonic() - start < 30


def run(monkeypatch, output, *options):
    words = ["--device", "cpu", "--tiny", "--output", str(output), "--scratch", str(output.parent / "scratch"), *options]
    monkeypatch.setattr("sys.argv", ["gpu_parallel", *words])
    gpu_parallel.main()


def test_the_same_command_goes_on(monkeypatch, tmp_path, capsys):
    asked = []

    def together(self, names):
        asked.append(names)
        row = {"ms": 12345.6, "one_ms": 2 * 12345.6}
        if "tensor" in names and len(asked) < 4:
            return [{"failed": "broken"}]
        return [row] if names[0] == "context-32768" else [row] * len(names)

    def train(self, how):
        asked.append(how)
        raise RuntimeError("broken, too")

    monkeypatch.setattr(Runs, "together", together)
    monkeypatch.setattr(Runs, "train", train)
    units = ["--units", "context-32768", "context-65536", "tensor", "train-one"]
    run(monkeypatch, tmp_path / "x.json", *units)
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert rows["tensor"]["failed"] == "broken" and rows["train-one"]["failed"] == "broken, too"
    run(monkeypatch, tmp_path / "x.json", *units)
    assert asked == [["context-32768", "context-65536"], ["tensor"], "one", ["tensor"], "one"]
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert rows["context-65536"]["ms"] == 12350 and "failed" not in rows["tensor"]
    assert "tensor ms" in capsys.readouterr().out
    run(monkeypatch, tmp_path / "x.json", *units, "--seconds", "1")
    assert len(asked) == 5


def test_rows_of_another_device_are_not_kept(tmp_path):
    gpu_parallel.write(tmp_path / "x.json", {"device": "a", "date": "1"}, {"tensor": {}})
    assert gpu_parallel.load(tmp_path / "x.json", {"device": "a", "date": "2"}) == {"tensor": {}}
    assert gpu_parallel.load(tmp_path / "x.json", {"device": "b", "date": "2"}) == {}


def test_context_parallelism_is_measured(runs):
    """One unit for real: two processes, an exact result, and as many bytes as the operation says."""
    row = runs.together(["context-32768", "context-65536"])[1]
    heads, size = 2, 16
    assert row["received_bytes"] == 4 * heads * size * (3 * size)
    assert all(error < 1e-2 for error in row["error"].values()) and all(row[f"forward{x}_ms"] > 0 for x in ("", "_one"))


def test_training_is_measured(runs):
    row = runs.unit("train-one")
    assert row["processes"] == 1 and len(row["losses"]) == gpu_parallel.STEPS and row["tokens_per_s"] > 0
