"""Where the time of a generated token goes: on the device, in the model's forward, and in `generate` around it."""

import collections
import contextlib
import statistics
import time
from typing import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel
from transformers.generation import utils

from .timing import NOT_WORK, busy_us, synchronize

SHORT, LONG = 16, 80
"""Two lengths; the difference of what they cost is that of LONG - SHORT tokens, without the prompt's."""


def account(model: PreTrainedModel, generate: Callable[[int], None], device) -> dict:
    """Microseconds a token, from runs of two lengths of `generate(new tokens)`.

    `wall_us` is the whole, and the sum of `model_call_us` (the host inside the model: launching its kernels, or replaying
    a graph), `inputs_us` (preparing its inputs), `bookkeeping_us`, `stop_check_us` (asking whether to stop, which waits
    for the device) and `sampling_and_rest_us`. `device_busy_us` runs beside these; `kernels_us` has the largest of it.
    """
    generate(SHORT)
    runs = [[_timed(model, generate, new, device) for new in (SHORT, LONG)] for _ in range(3)]
    times = {name: statistics.median(long[name] - short[name] for short, long in runs) for name in runs[0][0]}
    figures = {f"{name}_us": value / (LONG - SHORT) * 1e6 for name, value in times.items()}
    figures["sampling_and_rest_us"] = 2 * figures["wall_us"] - sum(figures.values())
    if torch.device(device).type == "cuda":
        figures.update(_on_device(generate, device))
    return figures


def _timed(model, generate, new: int, device) -> dict[str, float]:
    seconds = dict.fromkeys(("model_call", "inputs", "bookkeeping", "stop_check"), 0.0)
    with contextlib.ExitStack() as stack:
        patched = [
            (type(model), "__call__", "model_call"),
            (type(model), "prepare_inputs_for_generation", "inputs"),
            (type(model), "_update_model_kwargs_for_generation", "bookkeeping"),
            (utils.StopCheck, "__call__", "stop_check"),
        ]
        for owner, method, name in patched:
            stack.enter_context(_stopwatch(owner, method, seconds, name))
        synchronize(device)
        start = time.perf_counter()
        generate(new)
        synchronize(device)
        return {"wall": time.perf_counter() - start, **seconds}


@contextlib.contextmanager
def _stopwatch(owner: type, method: str, seconds: dict, name: str):
    """Add the time spent in a method of a class to `seconds[name]`."""
    inherited, original = method not in vars(owner), getattr(owner, method)

    def timed(*arguments, **keywords):
        start = time.perf_counter()
        try:
            return original(*arguments, **keywords)
        finally:
            seconds[name] += time.perf_counter() - start

    # `generate` reads the signature of these to learn what the model takes.
    timed.__wrapped__ = original
    setattr(owner, method, timed)
    try:
        yield
    finally:
        delattr(owner, method) if inherited else setattr(owner, method, original)


def _on_device(generate, device) -> dict:
    """Microseconds the device is busy a token, launches a token, and the kernels that take most."""
    short, long = (_trace(generate, new, device) for new in (SHORT, LONG))
    tokens, busy = LONG - SHORT, [busy_us([span[:2] for span in spans]) for spans in (short, long)]
    kernels = collections.Counter()
    for sign, spans in ((-1, short), (1, long)):
        for start, end, name in spans:
            kernels[name[:70]] += sign * (end - start) / tokens
    return {
        "device_busy_us": (busy[1] - busy[0]) / tokens,
        "launches": (len(long) - len(short)) / tokens,
        "kernels_us": dict(kernels.most_common(8)),
    }


def _trace(generate, new: int, device) -> list[tuple[float, float, str]]:
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        generate(new)
        synchronize(device)
    work = [e for e in trace.events() if e.device_type == DeviceType.CUDA and not e.name.endswith(NOT_WORK)]
    return sorted((e.time_range.start, e.time_range.end, e.name) for e in work)
