"""What benchmarks share: the environment, times on a device and on the wall, peak memory, and what the card can do."""

import datetime
import importlib.metadata
import pathlib
import platform
import statistics
import time

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

PACKAGES = ("torch", "triton", "transformers", "fla-core", "flash-qla", "tilelang", "numpy")
NOT_WORK = (" Sync", " Wait Event")
"""Endings of the names under which the profiler shows waiting as an event of the device."""


def cpu_name() -> str:
    path = pathlib.Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def environment(device="cpu", **settings) -> dict:
    """The device's name, the versions of what is installed, today's date, and `settings`."""
    cuda = torch.device(device).type == "cuda"
    result = {"device": torch.cuda.get_device_name(device) if cuda else cpu_name(), **settings}
    for package in PACKAGES:
        try:
            result[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    cuda = {"cuda": torch.version.cuda} if cuda else {}
    return {**result, **cuda, "python": platform.python_version(), "date": datetime.date.today().isoformat()}


def synchronize(device) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def repeats_for(work, device, seconds: float, least: int = 3, most: int = 50) -> int:
    """How many calls of `work` fill `seconds`, from one call after a warm-up."""
    work()
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return max(least, min(most, int(seconds / max(time.perf_counter() - start, 1e-6))))


def wall_ms(work, device, seconds: float = 0.2) -> float:
    """Milliseconds a call, launches included: the median of five runs of calls queued back to back."""
    calls, times = repeats_for(work, device, seconds / 5, least=1), []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(calls):
            work()
        synchronize(device)
        times.append((time.perf_counter() - start) * 1e3 / calls)
    return statistics.median(times)


def device_ms(work, device, seconds: float = 0.3) -> tuple[float, float]:
    """(median milliseconds a CUDA device is busy with a call of `work`, launches a call).

    Busy is the union of the intervals of kernels, copies and fills that the profiler saw: what runs on two streams at
    once counts once, and waiting for the host does not count. On a CPU, the wall time and no launches.

    Raises:
        RuntimeError: the profiler saw nothing.
    """
    if torch.device(device).type != "cuda":
        return wall_ms(work, device, seconds), 0.0
    repeats = repeats_for(work, device, seconds, least=5)
    _trace(work, device, 1)  # the first trace of a process loses events while it sets itself up
    spans = _trace(work, device, repeats)
    if not spans:
        raise RuntimeError("the profiler saw no work on the device")
    launches = len(spans) / repeats
    if len(spans) % repeats:  # calls differ in their launches: only the mean has a meaning
        return busy_us(spans) / repeats / 1e3, launches
    calls = [spans[i : i + int(launches)] for i in range(0, len(spans), int(launches))]
    return statistics.median(map(busy_us, calls)) / 1e3, launches


def _trace(work, device, repeats: int) -> list[tuple[float, float]]:
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(repeats):
            work()
        synchronize(device)
    return sorted((e.time_range.start, e.time_range.end) for e in device_events(trace))


def device_events(trace: profile) -> list:
    """The kernels, copies and fills of a trace."""
    return [e for e in trace.events() if e.device_type == DeviceType.CUDA and not e.name.endswith(NOT_WORK)]


def busy_us(spans: list[tuple[float, float]]) -> float:
    """The length of the union of intervals sorted by their start."""
    total, reached = 0.0, float("-inf")
    for start, end in spans:
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def peak_mib(work, device) -> float:
    """The most memory allocated during a call of `work`, with what was allocated before it; zero on a CPU."""
    work()
    if torch.device(device).type != "cuda":
        return 0.0
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) / 2**20


def ceilings(device) -> dict:
    """Copy bandwidth, bytes read plus bytes written, and the rate of a large bfloat16 product of random matrices."""
    cuda = torch.device(device).type == "cuda"
    size, edge = (2**30, 8192) if cuda else (2**24, 256)
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    copy, _ = device_ms(lambda: target.copy_(source), device)
    a, b = (torch.randn(edge, edge, device=device, dtype=torch.bfloat16) for _ in range(2))
    product, _ = device_ms(lambda: a @ b, device)
    return {
        "copy_TB_per_s": round(2 * size / copy / 1e9, 3),
        "matmul_TFLOP_per_s": round(2 * edge**3 / product / 1e9, 1),
    }
