"""The maps and gradients of segments in Triton's interpreter, against the recurrence in float64 and its autograd."""

import pytest
import segments
import torch
from cases import DTYPES, limits
from oracle import assert_close

pytest.importorskip("triton")
pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("nan_in_fresh_memory")]
CPU = torch.device("cpu")


@pytest.fixture(params=[64, None])
def span(request, monkeypatch):
    from deltanet.kernels import chunk

    if request.param:
        monkeypatch.setattr(chunk, "choose_span", lambda plan: request.param)
        monkeypatch.setattr(chunk, "keep_plan", chunk._Plan)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("T", [40, 150])
def test_maps(span, dtype, T):
    """With spans of 64: one, and two whole ones before one that is not full."""
    actual, expected = segments.maps(CPU, DTYPES[dtype], 2, T, 1, 24, 40)
    assert_close(actual, expected, limits(DTYPES[dtype])[0], segments.MAPS)


@pytest.mark.parametrize("bounds", [None, [0, 5, 70, 150, 180]])
def test_two_halves_are_the_whole(monkeypatch, bounds):
    actual, expected = segments.halves(monkeypatch, CPU, torch.float32, bounds, 1, 180, 1, 24, 40)
    assert_close(actual, expected, 1e-5, segments.HALVES)
