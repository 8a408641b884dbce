"""kernels/prologue.py: the fused kernels in Triton's interpreter and the composed form, both against float64.

What only a GPU shows is in `test_gpu_prologue.py`.
"""

import logging

import pytest
import torch
from oracle import assert_close, relative_errors
from prologue_cases import NAMES, Case, limits

from deltanet.kernels import prologue as module
from deltanet.kernels.prologue import delta_rule_prologue
from deltanet.kernels.short_conv import padding_order, short_convolution

CPU = torch.device("cpu")
PACKS = [
    ([0, 0, 1, 20, 22, 22, 35], 40),  # empty sequences, one token, two, a strip and a bit, an unused tail
    ([0, 3, 19], 19),
    ([0, 0], 5),  # no sequence holds a token
]


@pytest.fixture
def small(monkeypatch, nan_in_fresh_memory):
    """Tiles and strips that a few tokens and channels fill and overflow."""
    launch = pytest.importorskip("deltanet.kernels.prologue_launch")
    for key, value in launch.LAUNCHES.items():
        monkeypatch.setitem(launch.LAUNCHES, key, value._replace(channels=32, unroll=4, strip=16, short_strip=16))


def interpreted(test):
    return pytest.mark.interpreter(pytest.mark.usefixtures("small")(test))


def run(case):
    actual = case.actual()
    assert [x.dtype for x in actual[:3]] == [x.dtype for x in case.streams]
    assert_close(actual, case.expected(), limits(case.streams[0].dtype)[: len(actual)], NAMES)
    return actual


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("T, W", [(1, 2), (2, 4), (3, 3), (16, 4), (35, 2), (35, 3), (35, 4)])
def test_lengths_and_widths(dtype, T, W):
    run(Case(CPU, dtype, T, W=W, B=2))
