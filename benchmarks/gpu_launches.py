"""Launches of the chunk kernel of gradients that are not in its table, timed and compared with float64.

    python -m deltanet.benchmarks.gpu_launches [--size 256] [--launches 16,4,4 16,8,4 ...] [--output FILE]

A launch is columns of V a program takes, warps and stages, as in `kernels/chunk_configurations.py`; the first is the
table's own. All are compiled at once in processes of their own, then the kernel is timed at B8 T4096 with 2,048 channels in
bfloat16, the others around it launched as ever, and `error` is the largest relative error of a gradient at 200 tokens.
--device cpu --tiny tries every step without a GPU.
"""

import argparse
import contextlib
import json
import multiprocessing
import pathlib
import statistics
from concurrent.futures import ProcessPoolExecutor
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile

from ..kernels import chunk_configurations
from ..kernels.reference import recurrent_delta_rule_reference
from . import peers
from .gpu_delta_rule import rounded
from .gpu_worker import calls, setup
from .timing import device_events, environment

RESULT = pathlib.Path(__file__).parent / "results" / "gpu_launches.json"
KERNEL = "gradient"
LAUNCHES = ("16,4,3", "16,4,2", "16,8,4", "16,8,3", "32,8,3", "32,8,2")
"""At K = 256 those that spill least, or of which two programs fit a multiprocessor."""
REPEATS = 10


def work(shape: dict, device):
    return calls(peers.load("ours"), *setup(device, **shape))["forward_backward"]


@contextlib.contextmanager
def using(size: int, launch: str):
    """The table with this launch in it; "table" leaves it as it is."""
    table = chunk_configurations._HALF
    if launch == "table":
        yield
        return
    chosen = chunk_configurations._same(*map(int, launch.split(",")))
    _forget_plans()
    with mock.patch.dict(table, {KERNEL: {**table[KERNEL], size: chosen}}):
        yield
    _forget_plans()


def _forget_plans() -> None:
    """Those that are kept hold launches from the table as it was."""
    with contextlib.suppress(ImportError):
        from ..kernels.chunk import keep_plan

        keep_plan.cache_clear()


def error(shape: dict, device) -> float:
    """The largest relative L2 error of a gradient against the recurrence in float64."""
    inputs, _, do = setup(device, **shape)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    o, _ = recurrent_delta_rule_reference(*exact, use_qk_l2norm_in_kernel=True)
    expected = torch.autograd.grad(o, exact, do.double())
    found = torch.autograd.grad(peers.load("ours")(*inputs, None), inputs, do)
    return max(((a.double() - e).norm() / e.norm()).item() for a, e in zip(found, expected))


def kernel_ms(call) -> float:
    """The median of the kernel's launches."""
    for repeats in (1, REPEATS):
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            for _ in range(repeats):
                call()
            torch.cuda.synchronize()
    events = [e for e in device_events(trace) if e.name.startswith(f"{KERNEL}_kernel")]
    return statistics.median(e.time_range.end - e.time_range.start for e in events) / 1e3


def measure(launch: str, shape: dict, device: str) -> dict:
    row = {"launch": launch}
    try:
        with using(shape["D"], launch):
            row["error"] = error({**shape, **short(shape)}, device)
            if torch.device(device).type == "cuda":
                row["kernel_ms"] = kernel_ms(work(shape, device))
    except Exception as problem:  # a launch that does not fit is a result
        row["error"] = f"{type(problem).__name__}: {problem}".splitlines()[0][:200]
    return row


def short(shape: dict) -> dict:
    return {"B": 1, "T": min(shape["T"], 200), "H": 2}


def compile_launch(launch: str, shape: dict, device: str) -> None:
    """In a process of its own: the kernels go to the cache on disk."""
    with using(shape["D"], launch):
        work({**shape, **short(shape)}, device)()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=256, choices=(64, 128, 256))
    parser.add_argument("--launches", nargs="+", default=LAUNCHES)
    parser.add_argument("--output", type=pathlib.Path, default=RESULT)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="a small shape, to try the benchmark itself")
    arguments = parser.parse_args()
    shape = {"B": 8, "T": 4096, "H": 2048 // arguments.size, "D": arguments.size}
    shape = {**shape, "B": 1, "T": 70, "H": 2} if arguments.tiny else shape
    tasks = [(launch, shape, arguments.device) for launch in ("table", *arguments.launches)]
    with ProcessPoolExecutor(len(tasks), mp_context=multiprocessing.get_context("spawn")) as pool:
        for future in [pool.submit(compile_launch, *task) for task in tasks]:
            future.exception()  # which comes again below
    rows = []
    for task in tasks:
        rows.append(rounded(measure(*task)))
        print(*rows[-1].values(), sep="  ", flush=True)
        result = {"environment": environment(arguments.device, dtype="bfloat16"), "shape": shape, "rows": rows}
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
