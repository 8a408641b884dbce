"""The decoding kernel compiled for a Hopper GPU without one: registers, spills, vector loads, and what it specialises on."""

import importlib.util
import re

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton", allow_module_level=True)

from compiling import compile_launch, recording, resources

HALF, FULL = torch.bfloat16, torch.float32

# (H, K, V), width, dtype, dtype of the states, whether gate, beta and rows are given
VARIANTS = {
    "bfloat16-128": ((16, 128, 128), 4, HALF, FULL, True),
    "bfloat16-128-plain": ((16, 128, 128), 4, HALF, FULL, False),
    "bfloat16-128-state": ((16, 128, 128), 4, HALF, HALF, True),
    "bfloat16-64": ((32, 64, 64), 4, HALF, FULL, True),
    "bfloat16-256": ((8, 256, 256), 4, HALF, FULL, True),
    "bfloat16-256-state": ((8, 256, 256), 4, HALF, HALF, True),
    "float16-192-100": ((4, 192, 100), 3, torch.float16, FULL, True),
    "float32-128": ((16, 128, 128), 2, FULL, FULL, True),
    "float32-16-2048": ((1, 16, 2048), 4, FULL, FULL, True),
}

# With 128, two programs of 8 warps fit a multiprocessor: one computes while the other waits for memory.
REGISTERS = {"bfloat16-256-state": 168, "float32-16-2048": 192}


def launch(shape, width, dtype, state_dtype, is_full, B=2):
    from deltanet.kernels import decode_kernel

    H, K, V = shape
    channels = (H * K, H * K, H * V)
    with recording(decode_kernel) as found:
        empty = lambda *size, dtype=dtype: torch.empty(size, dtype=dtype)  # noqa: E731
        optional = (empty(B, H), empty(B, H * V)) if is_full else (None, None)
        decode_kernel.decode_forward(
            *(empty(B, D) for D in channels), *optional, *(empty(B, D, width - 1) for D in channels),
            empty(B, H, K, V, dtype=state_dtype), *(empty(D, 1, width) for D in channels), empty(V), 1e-6, 1.0, 0.1,
            empty(B, dtype=torch.int32) if is_full else None,
        )  # fmt: skip
    return found[0]


@pytest.fixture(autouse=True, scope="module")
def empty_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.mark.parametrize("name", VARIANTS)
def test_resources(name):
    V = VARIANTS[name][0][2]
    compiled = compile_launch(launch(*VARIANTS[name]))
    used = resources(compiled)
    assert used.stack == 0 and used.shared <= 16 * 1024, used
    assert used.registers <= REGISTERS.get(name, 128), used
    if V % 16 == 0:
        wide = re.findall(r"(ld|st)\.global\S*\.v4\.b32", compiled.asm["ptx"])
        assert {"ld", "st"} <= set(wide), "the state is not moved in 16 bytes a thread"


def test_another_batch_needs_no_other_code():
    """Equal keys, and no scalar that Triton specialises on depends on the batch."""
    found = [launch(*VARIANTS["bfloat16-128"], B=B) for B in (1, 2, 33)]
    assert len({x.key for x in found}) == 1
    special = [p.name for p in found[0].kernel.params if not p.is_constexpr and not p.do_not_specialize]
    scalars = [name for name in special if not isinstance(found[0].values[name], torch.Tensor)]
    assert scalars == ["s_n"] and len({x.values["s_n"] for x in found}) == 1
