"""Runs a worker module of this folder in several processes with gloo, once, and gives back what each of them found."""

import contextlib
import os
import pathlib
import subprocess
import sys
import tempfile

import torch

HERE = pathlib.Path(__file__).parent


def launch(worker: str, processes: int, folder: pathlib.Path) -> list[dict]:
    """What the processes of `worker`.py, started together in `folder`, gave to `report`, in the order of ranks; under
    "log" what each of them printed.

    Raises:
        AssertionError: a process failed, with the end of what all of them printed.
    """
    own = pathlib.Path(tempfile.mkdtemp(dir=folder))
    shared = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "OMP_NUM_THREADS": 1, "RESULTS": own}
    children = []
    for rank in range(processes):
        settings = {**shared, "RANK": rank, "LOCAL_RANK": rank}
        environment = {**os.environ, **{name: str(value) for name, value in settings.items()}}
        with open(own / f"log-{rank}", "w") as log:
            command = [sys.executable, str(HERE / f"{worker}.py")]
            children.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder))
    try:
        wait(children)
    finally:
        for child in children:
            child.kill()
            child.wait()
    logs = [(own / f"log-{rank}").read_text() for rank in range(processes)]
    ends = "\n".join(f"rank {rank}: {log[-3000:]}" for rank, log in enumerate(logs))
    assert not any(child.returncode for child in children), ends
    found = [torch.load(own / f"rank-{rank}.pt", weights_only=False) for rank in range(processes)]
    return [{**one, "log": log} for one, log in zip(found, logs)]


def wait(children: list[subprocess.Popen]) -> None:
    """Until all have ended, or one has failed, for which the others would wait."""
    while running := [child for child in children if child.poll() is None]:
        if any(child.returncode for child in children):
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            running[0].wait(timeout=0.2)


def join() -> tuple[int, int]:
    """In a worker: enter the process group; (rank, number of processes)."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = f"file://{os.environ['RESULTS']}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    return rank, size


def report(found: dict) -> None:
    """In a worker: hand `found` to the test, and leave."""
    torch.save(found, f"{os.environ['RESULTS']}/rank-{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()
