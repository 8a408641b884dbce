"""Measures one whole model in a process of its own, see `gpu_model`.

    python -m deltanet.benchmarks.model_worker PEER [--device cuda] [--compile-only SEED]

Reads tasks from standard input, a JSON object a line, and prints each with its figures, or with its error, the same
way. A task has `kind` (generate, prefill, train, step, decode, account, host, compile), `size`, `variant`, B and T.
"""

import argparse
import functools
import gc
import json
import os
import statistics
import sys
import time

import torch
from transformers import StoppingCriteria

from ..train.flops import peak_flops, product_parameters, training_flops
from . import model_peers, peers
from .generation_account import account
from .host_account import host_account
from .timing import device_ms, peak_mib, synchronize, wall_ms
from .training_account import account as training_account

NEW = 128
"""Tokens that `generate` adds."""
STEPS_SECONDS = 4.0
"""Seconds of training steps in five runs."""
SLOW_MS = 1500
"""Calls that take longer are not traced as well: the trace repeats them ten times."""


def random_ids(B: int, T: int, device, vocabulary: int = model_peers.VOCABULARY) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.randint(vocabulary, (B, T), device=device, generator=generator)


def seconds(work, device) -> float:
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def generate(model, ids, new, **arguments):
    """Greedy text of exactly `new` tokens."""
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, **arguments)


def measure_generate(model, device, task) -> dict:
    """Tokens a second of `generate` from its call to its return, prompt and all; `first_s` is a first, short call."""
    ids, new = random_ids(task["B"], task["T"], device), task.get("new", NEW)
    first = seconds(lambda: generate(model, ids, 8), device)
    times = [seconds(lambda: generate(model, ids, new), device)]
    times += [seconds(lambda: generate(model, ids, new), device) for _ in range(4 if times[0] < 3 else 0)]
    took = statistics.median(times)
    return {"tokens_per_s": task["B"] * new / took, "ms_a_step": took / new * 1e3, "first_s": first}


@torch.no_grad()
def measure_prefill(model, device, task) -> dict:
    """Milliseconds to read a prompt, keeping the last logits and the cache; memory beside that of the weights."""
    ids = random_ids(task["B"], task["T"], device)
    work = lambda: model(ids, use_cache=True, logits_to_keep=1)  # noqa: E731
    figures = {"first_s": seconds(work, device), "wall_ms": wall_ms(work, device)}
    if figures["wall_ms"] < SLOW_MS:
        figures["device_ms"], figures["launches"] = device_ms(work, device)
    return {**figures, "tokens_per_s": ids.numel() / figures["wall_ms"] * 1e3, **_memory(model, work, device)}


def training_step(model, device, task):
    """Ids, and a function that takes a step with them."""
    ids = random_ids(task["B"], task["T"], device)
    model.train()

    def work():
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=task.get("variant") == "autocast"):
            loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        model.zero_grad(set_to_none=True)

    return ids, work


def measure_step(model, device, task) -> dict:
    """Where the time of a training step goes, see `training_account`."""
    return training_account(training_step(model, device, task)[1], device, task.get("seconds", STEPS_SECONDS))


def measure_train(model, device, task) -> dict:
    """Forward with loss and backward without an optimizer: tokens a second, MFU, peak memory.

    Steps are queued back to back, three of 250 ms, as in a training loop that looks at its loss now and then.
    """
    ids, work = training_step(model, device, task)
    figures = {"first_s": seconds(work, device), "wall_ms": wall_ms(work, device, task.get("seconds", STEPS_SECONDS))}
    busy, launches = device_ms(work, device)
    rate = ids.numel() / figures["wall_ms"] * 1e3
    figures.update(device_ms=busy, launches=launches, tokens_per_s=rate, peak_mib=peak_mib(work, device))
    if torch.device(device).type == "cuda":
        config, peak = model_peers.flops_config(task["peer"], task["size"]), peak_flops(torch.cuda.get_device_name(device))
        flops = training_flops(config, product_parameters(model), task["T"])
        figures.update({"mfu": rate * flops / peak} if peak else {})
    return figures


def measure_compile(model, device, task) -> dict:
    """The first training step alone."""
    return {"first_s": seconds(training_step(model, device, task)[1], device)}


class Clock(StoppingCriteria):
    """Stops nothing and notes the time after every token; `generate` waits for the device in between."""

    def __init__(self):
        self.times = []

    def __call__(self, input_ids, scores, **kwargs):
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def measure_decode(model, device, task) -> dict:
    """Tokens a second of `generate` behind a context of T tokens, the reading of which is left out, and the memory."""
    ids = random_ids(task["B"], task["T"], device, model.config.vocab_size)
    new, clock = task.get("new", 66), Clock()
    generate(model, ids[:, :64], 4)
    before = _allocated(device, reset=True)
    output = generate(model, ids, new, stopping_criteria=[clock], return_dict_in_generate=True)
    peak = _allocated(device, peak=True) - before
    steps = sorted(b - a for a, b in zip(clock.times[1:], clock.times[2:]))
    step = statistics.median(steps)
    cache = getattr(output, "past_key_values", None) or getattr(output, "cache", None)
    return {
        "tokens_per_s": task["B"] / step,
        "ms_a_step": step * 1e3,
        "cache_mib": tensor_bytes(cache) / 2**20,
        "peak_over_weights_mib": peak / 2**20,
    }


def measure_account(model, device, task) -> dict:
    """Where the time of a token goes, see `generation_account`."""
    ids = random_ids(task["B"], task["T"], device)
    return account(model, lambda new: generate(model, ids, new), device)


@torch.no_grad()
def measure_host(model, device, task) -> dict:
    """What reading a prompt costs the host beside the device, see `host_account`."""
    ids = random_ids(task["B"], task["T"], device)
    work = lambda: model(ids, use_cache=True, logits_to_keep=1)  # noqa: E731
    figures = {"first_s": seconds(work, device), "wall_ms": wall_ms(work, device)}
    figures["device_ms"], figures["launches"] = device_ms(work, device)
    return {**figures, **host_account(model, work, model.config.num_hidden_layers, device)}


def tensor_bytes(value, seen=None) -> int:
    """Bytes of the tensors that an object holds, however deep, each once."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return 0
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        parts = value.values()
    elif isinstance(value, (list, tuple)):
        parts = value
    else:
        parts = vars(value).values() if hasattr(value, "__dict__") and not isinstance(value, type) else ()
    return sum(tensor_bytes(part, seen) for part in parts)


def _memory(model, work, device) -> dict:
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    peak = peak_mib(work, device)
    return {"peak_over_weights_mib": peak - weights / 2**20} if peak else {}


def _allocated(device, peak: bool = False, reset: bool = False) -> int:
    if torch.device(device).type != "cuda":
        return 0
    synchronize(device)
    if reset:
        torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.max_memory_allocated(device) if peak else torch.cuda.memory_allocated(device)


KINDS = {
    "generate": measure_generate,
    "prefill": measure_prefill,
    "train": measure_train,
    "step": measure_step,
    "decode": measure_decode,
    "account": measure_account,
    "host": measure_host,
    "compile": measure_compile,
}


def run(task, load, device) -> dict:
    """The task with its figures, or with `error` and what went wrong."""
    try:
        model = load(task["peer"], task["size"], device, task.get("variant", "")).eval()
        return {**task, **KINDS[task["kind"]](model, device, task)}
    except Exception as error:  # whatever a peer raises is a result
        return {**task, "error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}


@functools.lru_cache(maxsize=1)
def load_model(peer, *what, seed=None):
    load_model.cache_clear()  # the last model makes room for this one
    gc.collect()
    if peer == "fla" and seed is not None:
        peers.compile_only(seed)
    elif peer == "fla":
        peers.shorten_tuning(warmup_ms=10, repeat_ms=40)
    return model_peers.build(peer, *what)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("peer")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--compile-only", type=int, metavar="SEED", help="an order of a peer's variants")
    arguments = parser.parse_args()
    load = functools.partial(load_model, seed=arguments.compile_only)
    # Results have the standard output to themselves: what a peer prints goes to standard error.
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        task = json.loads(line)
        row = run(task, load, arguments.device)
        print(json.dumps(row), file=results, flush=True)
        if "error" in row:
            synchronize(arguments.device)  # raises after a fault of the device, which ends the process
        gc.collect()
        if arguments.device != "cpu":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
