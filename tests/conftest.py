"""Tests marked `gpu`: where they run, and the errors they measured.

DELTANET_TEST_DEVICE=cpu runs them on a CPU, without the parts that are about CUDA: to try the tests themselves, or, with
DELTANET_BACKEND=triton and TRITON_INTERPRET=1, the kernels in Triton's interpreter. DELTANET_TEST_ERRORS=FILE writes the
error of every case as JSON; `-s` prints the worst ones.
"""

import importlib.util
import json
import os
import pathlib

import interpreted
import pytest
import torch
from oracle import NAMES, assert_within, relative_errors

DEVICE = torch.device(os.environ.get("DELTANET_TEST_DEVICE", "cuda"))


def missing() -> str:
    if DEVICE.type == "cpu":
        return ""
    if not torch.cuda.is_available():
        return "needs an NVIDIA GPU"
    return "" if importlib.util.find_spec("triton") else "needs Triton"


def pytest_collection_modifyitems(items):
    if reason := missing():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_configure(config):
    config.addinivalue_line("markers", "interpreter: runs in Triton's interpreter, in a process of its own")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    if interpreted.ACTIVE or not pyfuncitem.get_closest_marker("interpreter"):
        return None
    interpreted.take_over(pyfuncitem)
    return True


@pytest.fixture
def device():
    return DEVICE


@pytest.fixture
def cuda():
    """The device, of tests that mean nothing on another kind."""
    if DEVICE.type != "cuda":
        pytest.skip("about CUDA")
    return DEVICE


@pytest.fixture
def nan_in_fresh_memory():
    """What torch.empty and its kin return is NaN, or the largest integer: an element that nothing writes shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def check(record_property):
    """Like `oracle.assert_close`, and the errors are reported at the end of the session."""

    def check(actual, expected, limit, names=NAMES):
        errors = relative_errors(actual, expected, names)
        record_property("errors", errors)
        assert_within(errors, limit)

    return check


def pytest_terminal_summary(terminalreporter, config):
    reports = [report for group in terminalreporter.stats.values() for report in group]
    cases = [(r.nodeid, p[1]) for r in reports for p in getattr(r, "user_properties", ()) if p[0] == "errors"]
    if path := os.environ.get("DELTANET_TEST_ERRORS"):
        pathlib.Path(path).write_text(json.dumps(dict(cases), indent=1) + "\n")
    if cases and config.option.capture == "no":
        terminalreporter.section("worst relative errors")
        for name, errors in worst(cases).items():
            terminalreporter.line(f"{name:<64}" + " ".join(f"{key} {value:.0e}" for key, value in errors.items()))


def worst(cases):
    """The largest error of each tensor over the cases of a test that share a dtype."""
    rows = {}
    for name, errors in cases:
        test, _, parameters = name.rpartition("::")[2].partition("[")
        dtype = [part for part in parameters.strip("]").split("-") if part in ("float32", "float16", "bfloat16")]
        row = rows.setdefault(" ".join([test, *dtype]), {})
        for key, error in errors.items():
            row[key] = max(error, row.get(key, 0.0))
    return rows
