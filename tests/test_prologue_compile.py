"""The prologue's kernels compiled for a Hopper GPU without one: registers, spills, specialisations."""

import importlib.util

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton", allow_module_level=True)

from compiling import PROCESSORS, compile_launch, recording, resources, specialisations

from deltanet.kernels import prologue_launch

# Registers of a thread: from 168 on fewer than twelve warps fit a multiprocessor, too few to hide the latency of memory.
BOUNDS = {
    (torch.bfloat16, "dense"): {"forward_kernel": 80, "backward_kernel": 144, "sum_kernel": 64},
    (torch.bfloat16, "packed"): {"forward_kernel": 96, "backward_kernel": 168, "sum_kernel": 64},
    (torch.bfloat16, "padded"): {"forward_kernel": 112, "backward_kernel": 168, "sum_kernel": 64},
    (torch.float32, "dense"): {"forward_kernel": 80, "backward_kernel": 96, "sum_kernel": 64},
}


def launches(dtype, kind, B=8, T=4096, N=4, heads=16, W=4, D=2048):
    """Both passes; a pack of N sequences, and a batch with padding, have states."""
    B, N = (1, N) if kind == "packed" else (B, B)
    with recording(prologue_launch, processors=PROCESSORS) as found:
        streams, weights = ([torch.empty(shape, dtype=dtype) for _ in range(3)] for shape in ((B, T, D), (D, 1, W)))
        b, bounds = torch.empty(B, T, heads, dtype=dtype), torch.empty(N + 1, dtype=torch.int64)
        order = torch.empty(B * (W - 1 + T), dtype=torch.int64), torch.empty(B, dtype=torch.int64)
        layout = {"dense": [None] * 3, "packed": [bounds, None, None], "padded": [None, *order]}[kind]
        states = [None if kind == "dense" else torch.empty(N, D, W - 1, dtype=dtype) for _ in range(3)]
        results, beta, finals = prologue_launch.prologue_forward(streams, weights, b, states, 1.0, kind != "dense", *layout)
        prologue_launch.prologue_backward(results, beta, finals, streams, weights, b, states, 1.0, *layout)
    return found


@pytest.mark.parametrize("dtype, kind", BOUNDS, ids=lambda x: str(x).removeprefix("torch."))
def test_resources(monkeypatch, tmp_path, dtype, kind):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found, bounds = launches(dtype, kind), BOUNDS[dtype, kind]
    assert {x.kernel.__name__ for x in found} == {*bounds, *(["span_table_kernel"] if kind == "packed" else [])}
    for launch in found:
        if launch.kernel.__name__ in bounds:
            used = resources(compile_launch(launch))
            assert used.stack == 0 and used.registers <= bounds[launch.kernel.__name__], f"{launch.kernel.__name__}: {used}"


@pytest.mark.parametrize("kind", ["dense", "packed", "padded"])
def test_other_lengths_and_batches_need_no_other_code(kind):
    keys = []
    for B, T, N, heads in ((8, 4096, 4, 16), (16, 1000, 5, 5)):
        found = launches(torch.bfloat16, kind, B, T, N, heads)
        assert not any(map(specialisations, found)), {x.kernel.__name__: specialisations(x) for x in found}
        keys.append([x.key for x in found])
    assert keys[0] == keys[1]
