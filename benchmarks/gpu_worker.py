"""Measures one peer in a process of its own, so that a fault on the device ends this process alone.

    python -m deltanet.benchmarks.gpu_worker PEER [--device cuda] [--compile-only SEED]

Reads tasks from standard input, a JSON object a line, and prints each with its figures, or with its error, the same
way. A task has `kind` (time, memory, error, first_call) and a shape: B, T, H, D and, for packed sequences, `sequences`.
"""

import argparse
import functools
import json
import os
import random
import sys
import time

import torch

from ..kernels.reference import recurrent_delta_rule_reference
from . import peers
from .timing import device_ms, peak_mib, synchronize, wall_ms

GRADIENTS = ("dq", "dk", "dv", "dbeta")


def bounds(T: int, sequences: int, seed: int = 0) -> list[int]:
    """0, seeded bounds of `sequences` packed sequences, T."""
    return [0, *sorted(random.Random(seed).sample(range(1, T), sequences - 1)), T]


def setup(device, B, T, H, D, sequences=None, seed=0, keys="silu", **_):
    """q, k, v, beta that need gradients, cu_seqlens or None, and the gradient of the output."""
    generator = torch.Generator(device).manual_seed(seed)
    q, k, v, do = (torch.randn(B, T, H, D, device=device, dtype=torch.bfloat16, generator=generator) for _ in range(4))
    if keys == "correlated":
        k = (0.9**0.5 * k[:1, :1] + 0.1**0.5 * k).contiguous()
    else:
        q, k = torch.nn.functional.silu(q), torch.nn.functional.silu(k)
    beta = torch.rand(B, T, H, device=device, generator=generator)
    cu_seqlens = torch.tensor(bounds(T, sequences), device=device) if sequences else None
    return [x.requires_grad_() for x in (q, k, v, beta)], cu_seqlens, do


def calls(rule, inputs, cu_seqlens, do, forward_only=False):
    """{"forward": ..., "forward_backward": ...}, functions without arguments."""
    # Softmax attention does not use beta.
    used = lambda: torch.autograd.grad(rule(*inputs, cu_seqlens), inputs, do, allow_unused=True)  # noqa: E731

    def forward():
        with torch.no_grad():
            rule(*inputs, cu_seqlens)

    return {"forward": forward} if forward_only else {"forward": forward, "forward_backward": used}


def measure_time(rule, device, task) -> dict:
    work, figures = calls(rule, *setup(device, **task), forward_only=task.get("forward_only", False)), {}
    for name, call in work.items():
        # A loop in Python launches too many kernels to be traced.
        busy, launches = (None, None) if task["peer"] == "recurrent" else device_ms(call, device)
        figures[name] = {"wall_ms": wall_ms(call, device)}
        if busy is not None:
            figures[name].update(device_ms=busy, launches=launches)
    return figures


def measure_memory(rule, device, task) -> dict:
    work = calls(rule, *setup(device, **task))
    inputs = torch.cuda.memory_allocated(device) / 2**20 if torch.device(device).type == "cuda" else 0.0
    return {"inputs_mib": inputs, **{f"{name}_mib": peak_mib(call, device) for name, call in work.items()}}


def measure_error(rule, device, task) -> dict:
    """Relative L2 errors against the float64 recurrence and its autograd on the same inputs."""
    inputs, cu_seqlens, do = setup(device, **task)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    reference, _ = recurrent_delta_rule_reference(*exact, use_qk_l2norm_in_kernel=True, cu_seqlens=cu_seqlens)
    expected = [reference.detach(), *torch.autograd.grad(reference, exact, do.double())]
    o = rule(*inputs, cu_seqlens)
    actual = [o.detach(), *torch.autograd.grad(o, inputs, do)]
    pairs = zip(("o", *GRADIENTS), actual, expected)
    return {name: ((a.double() - e).norm() / e.norm()).item() for name, a, e in pairs}


def measure_first_call(rule, device, task) -> dict:
    """Seconds of the first forward and backward of this process, then with another T, B and (ours) H."""
    shape = {name: task[name] for name in ("B", "T", "H", "D")}
    changes = {"first": {}, "again": {}, "other_T": {"T": 3 * shape["T"] // 4 + 5}, "other_B": {"B": shape["B"] + 1}}
    if task["peer"] not in peers.TUNES_ITSELF:  # others compile everything anew for another H
        changes["other_H"] = {"H": shape["H"] // 2 + 1}
    figures = {}
    for name, change in changes.items():
        call = calls(rule, *setup(device, **{**shape, **change}))["forward_backward"]
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        figures[f"{name}_s"] = time.perf_counter() - start
    return figures


KINDS = {
    "time": measure_time,
    "memory": measure_memory,
    "error": measure_error,
    "first_call": measure_first_call,
}


def run(task, load, device, compile_only=False) -> dict:
    """The task with its figures, or with `error` and what went wrong."""
    reason = peers.unsupported(task["peer"], task["D"], task.get("sequences"))
    if reason:
        return {**task, "error": reason}
    try:
        rule = load()
        if not compile_only:
            return {**task, **KINDS[task["kind"]](rule, device, task)}
        calls(rule, *setup(device, **task))["forward_backward"]()
        synchronize(device)
        return task
    except Exception as error:  # whatever a peer raises is a result
        return {**task, "error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}


def loader(peer, tasks, seed):
    """A function that imports the peer once, its autotuner set for what the tasks are."""

    @functools.cache
    def load():
        if peer in peers.TUNES_ITSELF and seed is not None:
            peers.compile_only(seed)
        elif peer in peers.TUNES_ITSELF and all(task["kind"] != "first_call" for task in tasks):
            peers.shorten_tuning(warmup_ms=10, repeat_ms=40)
        return peers.load(peer)

    return load


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("peer")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--compile-only", type=int, metavar="SEED")
    arguments = parser.parse_args()
    seed, device = arguments.compile_only, arguments.device
    # Results have the standard output to themselves: what a peer prints goes to standard error.
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    tasks = [json.loads(line) for line in sys.stdin]
    if seed is not None:
        random.Random(seed).shuffle(tasks)
    load = loader(arguments.peer, tasks, seed)
    for task in tasks:
        row = run(task, load, device, seed is not None)
        print(json.dumps(row), file=results, flush=True)
        if "error" in row:
            synchronize(device)  # raises after a fault of the device, which ends the process: nothing works from then on
        if device != "cpu":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
