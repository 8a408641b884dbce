"""A training run of `gpu_parallel`: `deltanet.train` by a shipped recipe, under accelerate or alone, with a clock.

    accelerate launch --config_file train/accelerate/ddp.yaml --num_processes 2 -m deltanet.benchmarks.parallel_training
        RECIPE --stop STEP [--FIELD VALUE ...]

The run ends behind step STEP, after a checkpoint that is due there. The first process prints a row as JSON: losses, the
time of the steps and the most memory that a process had.
"""

import argparse
import json
import statistics
import time

from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import TrainerCallback

from ..train import run
from ..train.__main__ import _flags
from ..train.quiet import quiet
from ..train.recipe import load_recipe
from .timing import synchronize

WARM_UP = 2
"""Steps that compile kernels, fill caches and are not counted."""


class Stopped(Exception):
    pass


class Clock(TrainerCallback):
    def __init__(self, stop: int):
        self.stop, self.ends, self.losses, self.peak_gib = stop, [], {}, 0.0

    def on_step_end(self, args, state, control, **kwargs):
        synchronize(args.device)
        self.ends.append(time.perf_counter())

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in (logs or {}):
            self.losses[state.global_step] = float(logs["loss"])
        # `Throughput` begins a new peak with each log.
        self.peak_gib = max(self.peak_gib, (logs or {}).get("memory_gib", 0.0))

    def on_save(self, args, state, control, **kwargs):
        self._stop_at(state.global_step)

    def on_step_begin(self, args, state, control, **kwargs):
        self._stop_at(state.global_step)

    def _stop_at(self, step: int) -> None:
        if step >= self.stop:
            raise Stopped


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("--stop", type=int, required=True)
    arguments, rest = parser.parse_known_args()
    quiet()
    recipe, clock, make = load_recipe(arguments.recipe, _flags(rest)), Clock(arguments.stop), run._trainer

    def with_clock(*parts):
        trainer = make(*parts)
        trainer.add_callback(clock)
        return trainer

    run._trainer = with_clock
    try:
        run.train(recipe)
    except Stopped:
        pass
    print_row(recipe, clock)


def print_row(recipe, clock):
    state = PartialState()
    peaks = gather_object([clock.peak_gib])
    times = [end - begin for begin, end in zip(clock.ends, clock.ends[1:])][WARM_UP - 1 :]
    seconds = statistics.median(times) if times else None
    if state.is_main_process:
        row = {
            "processes": state.num_processes,
            "losses": clock.losses,
            "step_s": seconds,
            "tokens_per_s": seconds and recipe.batch_tokens / seconds,
            "peak_gib": max(peaks),
        }
        print("\n" + json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
