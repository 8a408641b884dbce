"""Worker processes of the GPU benchmarks: one that measures, and many that compile for it."""

import json
import os
import pathlib
import queue
import subprocess
import sys
import threading
import time
from typing import Callable

TASK_SECONDS = 280
"""The longest a worker may be silent: a peer's first call takes minutes."""
WORKER = "gpu_worker"


def start(peer: str, tasks: list[dict], device: str, cache: pathlib.Path, *options: str, worker: str = WORKER):
    """A process of the module `worker` for the tasks; compiled kernels go to a folder of the peer, which outlives it."""
    home = cache / peer
    home.mkdir(parents=True, exist_ok=True)
    folders = {f"{name}_CACHE_DIR": str(home / name.lower()) for name in ("TRITON", "TILELANG", "TORCHINDUCTOR")}
    # A choice among variants made while the device is shared must not outlive the process that made it.
    kept = {"TRITON_CACHE_AUTOTUNING": "0"} if "--compile-only" in options else {}
    environment = {**os.environ, **folders, **kept, "FLA_CACHE_RESULTS": "0"}
    module = f"{__package__}.{worker}"
    with open(home / "log", "a") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", module, peer, "--device", device, *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            text=True,
        )
    with process.stdin as pipe:
        pipe.writelines(json.dumps(task) + "\n" for task in tasks)
    return process


def run_worker(peer, tasks, device, cache, deadline: float, report: Callable[[dict], None], worker=WORKER) -> None:
    """Run tasks in order and report every row. After a crash or a hang the next process goes on with the next task."""
    waiting = list(tasks)
    while waiting and time.monotonic() < deadline:
        process = start(peer, waiting, device, cache, worker=worker)
        lines = queue.Queue()
        threading.Thread(target=_forward, args=(process, lines), daemon=True).start()
        waiting, reason = _collect(process, lines, waiting, deadline, report)
        if waiting:
            report({**waiting.pop(0), "error": reason})
    for task in waiting:
        report({**task, "error": "not run: out of time"})


def _forward(process: subprocess.Popen, lines: queue.Queue) -> None:
    for line in process.stdout:
        lines.put(line)
    lines.put(None)


def _collect(process, lines, waiting, deadline, report) -> tuple[list[dict], str]:
    """Report rows until the worker ends or must: (tasks without a row, why)."""
    waiting = list(waiting)
    while True:
        try:
            line = lines.get(timeout=max(0.0, min(TASK_SECONDS, deadline - time.monotonic())))
        except queue.Empty:
            process.kill()
            process.wait()
            return waiting, "stopped: out of time"
        if line is None:
            code = process.wait()
            return waiting, f"the process ended with {code}"
        report(json.loads(line))
        waiting.pop(0)


def compile_together(tasks: list[dict], cache: pathlib.Path, deadline: float, worker: str = WORKER) -> None:
    """Fill the peers' caches of compiled kernels: many processes take the tasks in different orders until one is done."""
    small = [task for task in tasks if task["B"] * task["T"] <= 40_000]  # many processes share the device's memory
    cores, workers = os.cpu_count() or 1, []
    for peer, share in (("fla", 0.7), ("flashqla", 0.2)):
        mine = [task for task in small if task["peer"] == peer]
        what = lambda task: [task.get(key) for key in ("H", "D", "sequences", "size")]  # noqa: E731
        unique = {(*what(task), task["B"] * task["T"]): task for task in mine}
        for seed in range(max(1, int(share * cores)) if unique else 0):
            process = start(peer, list(unique.values()), "cuda", cache, "--compile-only", str(seed), worker=worker)
            workers.append((peer, process))
            threading.Thread(target=process.stdout.read, daemon=True).start()
    done = set()
    while workers and time.monotonic() < deadline:
        done |= {peer for peer, process in workers if process.poll() == 0}
        for peer, process in workers:
            if peer in done and process.poll() is None:
                process.kill()
        workers = [(peer, process) for peer, process in workers if process.poll() is None]
        time.sleep(0.2)
    for _, process in workers:
        process.kill()
        process.wait()
