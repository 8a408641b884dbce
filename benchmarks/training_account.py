"""Where the time of a training step goes on a GPU, by what its kernels do."""

import collections
import re

import torch
from torch.profiler import ProfilerActivity, profile

from .timing import busy_us, device_events, synchronize, wall_ms

GROUPS = {
    "mixing": r"flash|fmha|sdpa|l2norm|^chunk|wy_|solve_tril|^(hopper_)?(inverse|output|scan|gradient|join|span\w*)_kernel",
    "products": r"gemm|nvjet|cutlass|xmma|cublas|splitk|gemv",
    "norms": r"norm|gammabeta",
    "swiglu": r"swiglu|silu",
    "convolution": r"conv|^(forward|backward|sum)_kernel",
    "loss": r"cross_entropy|softmax|nll_loss",
    "sums_and_copies": r"elementwise|memcpy|memset|reduce|copy|fill|cat",
}
"""The first that is found in the lower-case name of a kernel; `other` is the rest. Mixing is the delta rule or attention."""
MOST = 30


def account(work, device, seconds: float, steps: int = 3) -> dict:
    """Milliseconds of a call of `work`: on the wall, for so many seconds, busy, by group and by kernel with its launches."""
    figures = {"wall_ms": wall_ms(work, device, seconds)}
    if torch.device(device).type != "cuda":
        return figures
    for repeats in (1, steps):  # the first trace of a process loses events while it sets itself up
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            for _ in range(repeats):
                work()
            synchronize(device)
    events = [(e.name, e.time_range.start, e.time_range.end) for e in device_events(trace)]
    figures["busy_ms"] = busy_us(sorted(event[1:] for event in events)) / steps / 1e3
    figures["launches"] = len(events) / steps
    return {**figures, **by_group(events, steps)}


def by_group(events: list[tuple[str, float, float]], steps: int) -> dict:
    """{group_ms: milliseconds} and `kernels`: {name: [milliseconds, launches]} of a step.

    `events` are (name, start, end) in microseconds of so many steps.
    """
    groups, kernels = collections.Counter(), collections.defaultdict(lambda: [0.0, 0.0])
    for name, start, end in events:
        groups[f"{group_of(name)}_ms"] += (end - start) / steps / 1e3
        kernels[name[:100]][0] += (end - start) / steps / 1e3
        kernels[name[:100]][1] += 1 / steps
    longest = sorted(kernels, key=lambda name: -kernels[name][0])[:MOST]
    return {**groups, "kernels": {name: [round(x, 3) for x in kernels[name]] for name in longest}}


def group_of(kernel: str) -> str:
    return next((group for group, names in GROUPS.items() if re.search(names, kernel.lower())), "other")
