"""The parts of the GPU benchmarks that need no GPU: intervals, plans, the result file, workers that crash or hang."""

import json
import subprocess
import sys
import time

import pytest

from deltanet.benchmarks import gpu_delta_rule, gpu_worker, peers, processes, timing


@pytest.mark.parametrize(
    "spans, busy",
    [
        ([], 0),
        ([(0, 2), (3, 4)], 3),  # a gap
        ([(0, 5), (1, 2), (4, 7)], 7),  # one inside another, and an overlap
        ([(0, 1), (0, 4), (4, 5)], 5),
    ],
)
def test_busy_time_is_the_union(spans, busy):
    assert timing.busy_us(spans) == busy


@pytest.mark.parametrize(
    "spans, expected",
    [
        ([(0, 2), (3, 4), (10, 13), (12, 19), (20, 24), (25, 27)], (6e-3, 2)),  # busy 3, 9 and 6 us: the median
        ([(0, 2), (3, 4), (10, 13), (20, 24)], (10 / 3 * 1e-3, 4 / 3)),  # calls that differ: the mean
    ],
)
def test_device_time_of_a_trace(monkeypatch, spans, expected):
    monkeypatch.setattr(timing, "repeats_for", lambda *_, **__: 3)
    monkeypatch.setattr(timing, "_trace", lambda *_: spans)
    assert timing.device_ms(None, "cuda") == pytest.approx(expected)
    monkeypatch.setattr(timing, "_trace", lambda *_: [])
    with pytest.raises(RuntimeError, match="the profiler saw no work"):
        timing.device_ms(None, "cuda")


def test_bounds_of_a_pack():
    bounds = gpu_worker.bounds(32768, 16)
    assert len(bounds) == 17 and bounds[0] == 0 and bounds[-1] == 32768
    assert bounds == sorted(set(bounds)) == gpu_worker.bounds(32768, 16)


@pytest.mark.parametrize("part", gpu_delta_rule.PARTS)
def test_tasks_of_a_part_do_not_replace_each_other(part):
    tasks = gpu_delta_rule.plan(part, list(peers.NAMES))
    keys = [gpu_delta_rule.Results.key(task) for task in tasks]
    assert len(set(keys)) == len(keys) > 0
    assert {task["kind"] for task in tasks} <= set(gpu_worker.KINDS)


def task(T, peer="ours"):
    return {"part": "ops", "kind": "time", "peer": peer, "B": 1, "T": T, "H": 1, "D": 16}


def test_results_are_kept_for_the_same_device_and_replaced_by_key(tmp_path):
    path, settings = tmp_path / "x" / "figures.json", {"device": "a", "date": "1"}
    first = gpu_delta_rule.Results(path, settings)
    first.add({**task(1), "forward": {"device_ms": 1.23456, "wall_ms": 2.0}})
    first.add({**task(2), "error": "none"})
    second = gpu_delta_rule.Results(path, {**settings, "date": "2"})
    second.add({**task(2), "forward": {"device_ms": 3.0}})
    data = json.loads(path.read_text())
    assert data["environment"]["date"] == "2"
    assert [row.get("forward") for row in data["rows"]] == [{"device_ms": 1.235, "wall_ms": 2.0}, {"device_ms": 3.0}]
    third = gpu_delta_rule.Results(path, {"device": "b", "date": "2"})
    assert third.data["rows"] == []


def test_table_compares_with_ours():
    rows = [{**task(1, peer), "forward": {"device_ms": ms}} for peer, ms in (("ours", 2.0), ("fla", 5.0))]
    line = next(line for line in gpu_delta_rule.table(rows).splitlines() if line.startswith("B1_T1_H1_D16"))
    assert line.split() == ["B1_T1_H1_D16", "device", "forward", "2.000", "5.000", "(", "2.50x)", "-", "-"]


WORKER = """
import json, sys, time
for line in sys.stdin:
    task = json.loads(line)
    if task["T"] == 2: sys.exit(3)
    if task["T"] == 4: time.sleep(60)
    print(line, end="", flush=True)
"""


@pytest.fixture
def workers(monkeypatch):
    def start(peer, tasks, device, cache, *options, worker):
        process = subprocess.Popen([sys.executable, "-c", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        with process.stdin as pipe:
            pipe.writelines(json.dumps(task) + "\n" for task in tasks)
        return process

    monkeypatch.setattr(processes, "start", start)
    monkeypatch.setattr(processes, "TASK_SECONDS", 4)


def test_a_crash_or_a_hang_costs_one_task(workers, tmp_path):
    rows = []
    processes.run_worker("ours", [task(T) for T in (1, 2, 3, 4, 5)], "cpu", tmp_path, time.monotonic() + 60, rows.append)
    assert [row["T"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row.get("error") for row in rows] == [None, "the process ended with 3", None, "stopped: out of time", None]


def test_no_time_left(workers, tmp_path):
    rows = []
    processes.run_worker("ours", [task(1)], "cpu", tmp_path, time.monotonic() - 1, rows.append)
    assert [row["error"] for row in rows] == ["not run: out of time"]


def test_compiling_together_ends_with_the_first_to_finish(monkeypatch, tmp_path):
    processes_started = []

    def start(peer, tasks, device, cache, *options, worker):
        work = "pass" if options[-1] == "1" else "import time; time.sleep(60)"
        process = subprocess.Popen([sys.executable, "-c", work], stdout=subprocess.PIPE)
        processes_started.append((peer, tasks, process))
        return process

    monkeypatch.setattr(processes, "start", start)
    monkeypatch.setattr(processes.os, "cpu_count", lambda: 10)
    tasks = [task(T, peer) for peer in ("fla", "flashqla") for T in (64, 128, 131072)]
    processes.compile_together(tasks, tmp_path, time.monotonic() + 50)
    assert [peer for peer, _, _ in processes_started].count("fla") == 7
    assert all([one["T"] for one in tasks] == [64, 128] for _, tasks, _ in processes_started)
    assert all(process.poll() is not None for _, _, process in processes_started)


def test_worker_reports_what_a_peer_raises():
    def load():
        raise ImportError("no module named peer")

    assert gpu_worker.run(task(5), load, "cpu")["error"] == "ImportError: no module named peer"
    wide = gpu_worker.run({**task(5, "flashqla"), "D": 64}, load, "cpu")
    assert wide["error"] == "FlashQLA has head size 128 only"


@pytest.mark.parametrize("kind, figure", [("time", "forward"), ("memory", "forward_mib"), ("first_call", "first_s")])
def test_worker_measures(kind, figure):
    row = gpu_worker.run({**task(20), "kind": kind}, lambda: peers.load("ours"), "cpu")
    assert figure in row and "error" not in row


@pytest.mark.parametrize("sequences", [None, 3])
def test_worker_compares_with_float64(sequences):
    row = gpu_worker.run({**task(70), "kind": "error", "sequences": sequences}, lambda: peers.load("ours"), "cpu")
    assert 0 < row["o"] < 1e-2 and all(0 < row[name] < 1.5e-2 for name in ("dq", "dk", "dv"))


def test_the_plot_shows_what_was_measured(tmp_path):
    plt = pytest.importorskip("matplotlib.pyplot")
    from deltanet.benchmarks.gpu_plots import draw, shapes

    shape = {"part": "ops", "B": 1, "T": 64, "H": 2, "D": 128}
    times = {"ours": {"forward": {"device_ms": 2.0}}, "fla": {"forward": {"device_ms": 5.0}}}
    rows = [{**shape, "peer": peer, **figures, "forward_backward": {"device_ms": 9.0}} for peer, figures in times.items()]
    rows.append({**shape, "D": 64, "peer": "ours", "forward": {"device_ms": 3.0}})
    figure, axis = plt.subplots()
    shapes(axis, rows, "forward")
    assert {group.get_label(): [bar.get_width() for bar in group] for group in axis.containers} == {
        "this package": [2.0, 3.0],
        "flash-linear-attention": [5.0],
    }
    assert [label.get_text() for label in axis.get_yticklabels()] == ["B1 T64 H2 D128", "B1 T64 H2 D64"]
    plt.close(figure)
    path = tmp_path / "figures.json"
    path.write_text(json.dumps({"environment": {"device": "a card"}, "rows": rows}))
    assert draw(path).stat().st_size > 10_000
    path.write_text(json.dumps({"environment": {"device": "a card"}, "rows": [{"part": "ops", "error": "failed"}]}))
    with pytest.raises(ValueError, match="has no times to draw"):
        draw(path)
