"""The chunk kernels compiled for a Hopper GPU without one: registers, spills, shared memory, and what they specialise on."""

import importlib.util
import itertools

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton", allow_module_level=True)

from compiling import SHARED_MEMORY, Plan, compile_plans, launches, specialisations

HALF, FULL = torch.bfloat16, torch.float32
# Many heads, few heads, and one long sequence of few heads, which is cut into spans.
SHAPES = {"wide": (8, 4096, 32), "narrow": (1, 1024, 4), "split": (1, 65536, 4)}
PACKS = {"wide": (1, 4096, 40), "narrow": (1, 1024, 2), "split": (1, 65536, 1)}


def plan(dtype, size, shape, packed=False, hopper=True):
    return Plan(dtype, *(PACKS if packed else SHAPES)[shape], size, size, 4 if packed else 0, hopper)


PLANS = {
    **{f"bfloat16-{size}-{shape}": plan(HALF, size, shape) for size in (64, 128, 256) for shape in SHAPES},
    **{f"bfloat16-128-{shape}-packed": plan(HALF, 128, shape, True) for shape in PACKS},
    **{f"bfloat16-128-{shape}-plain": plan(HALF, 128, shape, hopper=False) for shape in SHAPES},
    "bfloat16-64-wide-plain": plan(HALF, 64, "wide", hopper=False),
    "bfloat16-256-wide-packed": plan(HALF, 256, "wide", True),
    "bfloat16-96-narrow-packed": plan(HALF, 96, "narrow", True),
    "float16-128-wide": plan(torch.float16, 128, "wide"),
    **{f"float32-{size}-wide": plan(FULL, size, "wide") for size in (64, 128)},
}

# Bytes of stack that a thread may have: what ptxas 12.8 needs today, a quarter more and rounded up to 64, since any edit
# moves the allocation by some ten bytes. A kernel that outgrows its registers needs hundreds, and a third more time.
STACK = {
    (HALF, 64): {"inverse": 128, "output": 64, "scan": 64, "gradient": 64},
    (HALF, 128): {"inverse": 128, "output": 128, "scan": 128, "gradient": 128},
    (HALF, 256): {"inverse": 128, "output": 576, "scan": 384, "gradient": 1344},
    (HALF, 96): {"inverse": 128, "output": 128, "scan": 128, "gradient": 128},
    (torch.float16, 128): {"inverse": 128, "output": 128, "scan": 128, "gradient": 128},
    (FULL, 64): {"inverse": 192, "output": 960, "scan": 1024, "gradient": 384},
    (FULL, 128): {"inverse": 256, "output": 3008, "scan": 3072, "gradient": 576},
}
OF_ANY_SIZE = {"join": 64, "span": 192}
# Of these kernels two programs run side by side, which takes half of the memory, less the 1 KiB that each costs besides.
SHARED = {(HALF, 256, "gradient"): SHARED_MEMORY // 2 - 1024}


@pytest.fixture(scope="module")
def compiled_plans(request, tmp_path_factory):
    """Everything that the chosen tests look at, compiled side by side, into a cache that holds nothing yet."""
    chosen = {item.callspec.params["name"] for item in request.session.items if "compiled_plans" in item.fixturenames}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        return compile_plans([PLANS[name] for name in sorted(chosen)])


@pytest.mark.parametrize("name", PLANS)
def test_resources(compiled_plans, name):
    of_plan = PLANS[name]
    bounds = STACK[of_plan.dtype, of_plan.K] | OF_ANY_SIZE
    for kernel, used in compiled_plans[of_plan].items():
        assert used.registers <= 255, f"{kernel}: {used}"
        kind = kernel.removeprefix("hopper_").split("_")[0]
        assert used.shared <= SHARED.get((of_plan.dtype, of_plan.K, kind), SHARED_MEMORY), f"{kernel}: {used}"
        assert used.stack <= bounds[kind], f"{kernel}: {used}"


@pytest.mark.parametrize("shape", SHAPES)
def test_plans_are_what_they_are_called(shape):
    """Otherwise the tests above would compile something else."""
    for packed, hopper in itertools.product((False, True), (False, True)):
        found = {x.kernel.__name__: x for x in launches(plan(HALF, 128, shape, packed, hopper))}
        assert ("join_kernel" in found) == (shape == "split")
        output = "hopper_output_kernel" if hopper else "output_kernel"
        assert found[output].values["BV"] == (32 if shape == "narrow" else 64)
        assert ("span_table_kernel" in found) == packed


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_other_lengths_and_batches_need_no_other_code(packed):
    """Equal keys, no scalar whose value (1, a multiple of 16) and no tensor whose address makes Triton compile again."""
    keys = []
    for B, T, H, N in ((8, 4096, 32, 4), (16, 1000, 40, 5)):
        found = launches(Plan(HALF, 1 if packed else B, T, H * 4, 128, 128, N if packed else 0))
        keys.append([x.key for x in found])
        assert not any(map(specialisations, found)), {x.name: specialisations(x) for x in found}
    assert keys[0] == keys[1]
