"""The plumbing of the benchmark of launches, on a CPU."""

import pytest

from deltanet.benchmarks import gpu_launches
from deltanet.kernels import chunk_configurations

SHAPE = {"B": 1, "T": 70, "H": 2, "D": 64}


def test_a_launch_is_used_and_forgotten():
    ask = lambda size: chunk_configurations.launch("gradient", size, size, 2, False, 227 * 1024)  # noqa: E731
    before = ask(256), ask(128)
    with gpu_launches.using(256, "32,8,3"):
        assert ask(256)[:3] == (32, 8, 3) and ask(128) == before[1]
    with gpu_launches.using(256, "table"):
        assert (ask(256), ask(128)) == before
    assert (ask(256), ask(128)) == before


@pytest.mark.parametrize("launch", ["table", "16,8,4"])
def test_errors_are_measured(launch):
    row = gpu_launches.measure(launch, SHAPE, "cpu")
    assert row["launch"] == launch and 0 < row["error"] < 1e-2


def test_what_does_not_fit_is_a_result(monkeypatch):
    monkeypatch.setattr(gpu_launches.peers, "load", lambda peer: 1 / 0)
    assert gpu_launches.measure("table", SHAPE, "cpu")["error"] == "ZeroDivisionError: division by zero"
