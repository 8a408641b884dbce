"""The parts of benchmarks/gpu_prologue.py that need no GPU."""

import os
import sys

from deltanet.benchmarks import gpu_prologue

SHAPE = {"B": 1, "T": 8, "H": 2, "D": 4}


def figures(ms):
    return {which: {"device_ms": ms, "wall_ms": 2 * ms, "launches": 1.0} for which in ("forward", "backward")}


def test_table_compares_with_ours_and_with_the_bytes():
    rows = [{"peer": "ours", **SHAPE, **figures(2e-6)}, {"peer": "fla", **SHAPE, **figures(6e-6)}]
    lines = gpu_prologue.table([*rows, {"peer": "torch", **SHAPE, "error": "none"}]).splitlines()
    # 8 tokens x 24 channels x 4 bytes in 2 ns are 0.384 TB/s; backward moves half as much again.
    assert [line.split()[-1] for line in lines[1:5]] == ["0.38", "0.13", "0.58", "0.19"]
    assert [line.split()[4] for line in lines[1:5]] == ["1.00x", "3.00x", "1.00x", "3.00x"]
    assert lines[5].split() == ["B1_T8_H2_D4", "torch", "error:", "none"]


def test_a_peer_that_is_missing_is_an_error_of_its_own_and_leaves_the_environment(monkeypatch):
    monkeypatch.setitem(sys.modules, "fla.modules", None)
    monkeypatch.setenv("DELTANET_BACKEND", "recurrent")
    monkeypatch.delenv("FLA_CONV_GLUON", raising=False)
    assert "fla" in gpu_prologue.measure_peer("fla-gluon", SHAPE, "cpu")["error"]
    assert set(gpu_prologue.measure_peer("torch", SHAPE, "cpu")) == {"forward", "backward"}
    assert os.environ["DELTANET_BACKEND"] == "recurrent" and "FLA_CONV_GLUON" not in os.environ
