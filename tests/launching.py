"""Runs a worker module of this folder in several processes with gloo, once, and gives back what each of them found."""

import os
import pathlib
import subprocess
import sys

import torch

HERE = pathlib.Path(__file__).parent


def launch(worker: str, processes: int, folder: pathlib.Path, *arguments: str) -> list[dict]:
    """The dictionaries that the processes of `worker`.py, started together, gave to `report`, in the order of ranks; their
    working directory is `folder`.

    Raises:
        AssertionError: a process failed, with the end of what all of them printed.
    """
    script, children = HERE / f"{worker}.py", []
    shared = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "OMP_NUM_THREADS": 1, "RESULTS": folder}
    for rank in range(processes):
        own = {**shared, "RANK": rank, "LOCAL_RANK": rank}
        environment = {**os.environ, **{name: str(value) for name, value in own.items()}}
        with open(folder / f"log-{rank}", "w") as log:
            command = [sys.executable, str(script), *arguments]
            children.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder))
    try:
        # In turn: what fails first leaves the others waiting for it.
        while running := [child for child in children if child.poll() is None]:
            if any(child.returncode for child in children):
                break
            try:
                running[0].wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                continue
    finally:
        for child in children:
            child.kill()
            child.wait()
    logs = "\n".join(f"rank {rank}: {(folder / f'log-{rank}').read_text()[-3000:]}" for rank in range(processes))
    assert not any(child.returncode for child in children), logs
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(processes)]


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
