"""What a forward costs the host: the time until it returns, and whose it is, class of module by class of module."""

import contextlib
import importlib
import statistics
import time
import warnings
from collections import Counter
from typing import Callable

import torch
from torch import nn

from .timing import synchronize

REPEATS = 20
WATCHED = (
    ("kernels.launching", "Prepared.__call__", "launches of Triton kernels"),
    ("kernels.prompt", "_Plan.prepare", "convolutions and beta"),
    ("kernels.prompt", "_Plan.apply_rule", "delta rule"),
    ("mixer_deltanet", "delta_rule_prologue", "convolutions and beta"),
    ("cache_deltanet", "DeltaNetCacheLayer.read", "cache"),
    ("cache_deltanet", "DeltaNetCacheLayer.write", "cache"),
    ("fused_deltanet", "swiglu", "SwiGLU"),
)
"""Parts of this package that are no modules: file, name in it, name in the table. Another version may lack some."""


class OwnTimes:
    """Seconds and calls of what is watched, less the time of what is watched inside of it."""

    def __init__(self):
        self.seconds, self.calls, self.inner = Counter(), Counter(), []

    def watched(self, function: Callable, name: str) -> Callable:
        def timed(*arguments, **keywords):
            self.inner.append(0.0)
            start = time.perf_counter()
            try:
                return function(*arguments, **keywords)
            finally:
                took = time.perf_counter() - start
                self.seconds[name] += took - self.inner.pop()
                self.calls[name] += 1
                if self.inner:
                    self.inner[-1] += took

        timed.__wrapped__ = function
        return timed

    @contextlib.contextmanager
    def watching(self, model: nn.Module, package: str):
        """Watch the `forward` of every class of module, and what `WATCHED` names of `package`."""
        with contextlib.ExitStack() as stack:
            for kind in {type(module) for module in model.modules()}:
                stack.enter_context(self._replaced(kind, "forward", kind.__name__))
            for file, path, name in WATCHED:
                with contextlib.suppress(ImportError, AttributeError):
                    owner = importlib.import_module(f"{package}.{file}")
                    *outer, attribute = path.split(".")
                    for part in outer:
                        owner = getattr(owner, part)
                    stack.enter_context(self._replaced(owner, attribute, name))
            yield

    @contextlib.contextmanager
    def _replaced(self, owner, attribute: str, name: str):
        inherited, original = attribute not in vars(owner), getattr(owner, attribute)
        setattr(owner, attribute, self.watched(original, name))
        try:
            yield
        finally:
            delattr(owner, attribute) if inherited else setattr(owner, attribute, original)


def host_account(model: nn.Module, work: Callable[[], object], layers: int, device) -> dict:
    """
    `host_ms` is the time from a call of `work` to its return, the device idle before and not waited for, the median of
    several; `synchronizations` how often a call waits for the device. `own_us` has the microseconds a layer that each class
    of module takes for itself, the largest first, and `calls` how often a forward calls it; the stopwatches are part of
    these, half a microsecond a call and more on a slow CPU.
    """
    work()
    figures = {"host_ms": statistics.median(_until_return(work, device) for _ in range(REPEATS)) * 1e3}
    figures["synchronizations"] = _synchronizations(work, device)
    times = OwnTimes()
    with times.watching(model, __package__.rpartition(".")[0]):
        for _ in range(REPEATS):
            _until_return(work, device)
    own = {name: seconds / REPEATS / layers * 1e6 for name, seconds in times.seconds.most_common()}
    return {**figures, "own_us": own, "calls": {name: times.calls[name] / REPEATS for name in own}}


def _until_return(work, device) -> float:
    synchronize(device)
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _synchronizations(work, device) -> int:
    if torch.device(device).type != "cuda":
        return 0
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)
