"""The prologue's kernels compiled for a Hopper GPU without one: registers, spills, specialisations."""

import importlib.util

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton", allow_module_level=True)

from compiling import PROCESSORS, recording, resources, specialisations

from deltanet.kernels import prologue_launch

# Registers of a thread: from 168 on fewer than twelve warps fit a multiprocessor, too few to hide the latency of memory.
BOUNDS = {
    (torch.bfloat16, False): {"forward_kernel": 80, "backward_kernel": 144, "sum_kernel": 80},
    (torch.bfloat16, True): {"forward_kernel": 112, "backward_kernel": 168, "sum_kernel": 80},
    (torch.float32, False): {"forward_kernel": 80, "backward_kernel": 96, "sum_kernel": 80},
}


def launches(dtype, B=8, T=4096, N=0, heads=16, W=4, D=2048):
    """Both passes; a pack of N sequences has states."""
    with recording(prologue_launch, processors=PROCESSORS) as found:
        streams, weights = ([torch.empty(shape, dtype=dtype) for _ in range(3)] for shape in ((B, T, D), (D, 1, W)))
        b, bounds = torch.empty(B, T, heads, dtype=dtype), torch.empty(N + 1, dtype=torch.int64) if N else None
        states = [torch.empty(N, D, W - 1, dtype=dtype) if N else None for _ in range(3)]
        results, beta, finals = prologue_launch.prologue_forward(streams, weights, b, states, 1.0, bool(N), bounds)
        prologue_launch.prologue_backward(results, beta, finals, streams, weights, b, states, 1.0, bounds)
    return found


@pytest.mark.parametrize("dtype, packed", BOUNDS, ids=lambda x: str(x).removeprefix("torch."))
def test_resources(monkeypatch, tmp_path, dtype, packed):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found = launches(dtype, 1 if packed else 8, N=4 if packed else 0)
    bounds = BOUNDS[dtype, packed]
    assert {x.kernel.__name__ for x in found} == {*bounds, *(["span_table_kernel"] if packed else [])}
    for launch in found:
        if launch.kernel.__name__ in bounds:
            used = resources(launch)
            assert used.stack == 0 and used.registers <= bounds[launch.kernel.__name__], f"{launch.kernel.__name__}: {used}"


@pytest.mark.parametrize("N", [0, 4], ids=["dense", "packed"])
def test_other_lengths_and_batches_need_no_other_code(N):
    keys = []
    for B, T, heads, more in ((8, 4096, 16, 0), (16, 1000, 5, 1)):
        found = launches(torch.bfloat16, 1 if N else B, T, N and N + more, heads)
        assert not any(map(specialisations, found)), {x.kernel.__name__: specialisations(x) for x in found}
        keys.append([x.key for x in found])
    assert keys[0] == keys[1]
