"""What a token costs in `generate` outside of the model, on the host.

    python -m deltanet.benchmarks.generate_overhead [--tokens 200] [--output FILE]

The model's work is left out: a captured step, or the forward, returns fixed logits at once, and the vocabulary is small.
What remains is Python and small operators, which on a GPU are launches. Three ways are measured in turn: `transformers`,
the loop as it treats any model; `eager`, with this package's part in it; `replay`, with captured steps. Times are those of
the thread on the processor, so that other processes count little: the median over runs, and for each part the median over
its calls. The file keeps the rows of every version of Transformers that it was run with.
"""

import argparse
import contextlib
import json
import pathlib
import statistics
import time
from functools import wraps
from unittest import mock

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.generation import GenerationMixin, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.utils import StopCheck
from transformers.modeling_outputs import CausalLMOutputWithPast

from .. import DeltaNetConfig, DeltaNetForCausalLM
from ..cache_deltanet import CACHE_NAME
from ..graphs_deltanet import RECORDERS, survey
from .timing import environment

RESULT = pathlib.Path(__file__).parent / "results" / "generate_overhead.json"
MODES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 0},
    "top-k, top-p": {"do_sample": True, "top_k": 5, "top_p": 0.9, "temperature": 0.7},
    "beam 4": {"do_sample": False, "num_beams": 4},
}
BATCHES = (1, 32)
PARTS = {
    "inputs": "prepare_inputs_for_generation",
    "forward": "forward",
    "update": "_update_model_kwargs_for_generation",
    "processors": (LogitsProcessorList, "__call__"),
    "criteria": (StoppingCriteriaList, "__call__"),
    "stop": (StopCheck, "__call__"),
    "reorder": "_reorder_cache",
}
"""Methods whose time is told apart, of the model where no class is named; the rest is the choice of the token."""


class Replay(DeltaNetForCausalLM):
    """Decodes by steps that do nothing."""


class Eager(DeltaNetForCausalLM):
    """Its forward of one token does nothing."""

    @wraps(DeltaNetForCausalLM.forward)
    def forward(self, input_ids=None, **arguments):
        if input_ids.shape[1] > 1:
            return super().forward(input_ids, **arguments)
        logits = torch.zeros(len(input_ids), 1, self.config.vocab_size)
        return CausalLMOutputWithPast(logits=logits, **{CACHE_NAME: arguments[CACHE_NAME]})


class Bare(Eager):
    """Takes part in the loop as any model does."""

    generate = GenerationMixin.generate
    prepare_inputs_for_generation = GenerationMixin.prepare_inputs_for_generation


WAYS = {"transformers": Bare, "eager": Eager, "replay": Replay}


class Nothing:
    """A recorder whose replay returns the first result."""

    def __init__(self, function, device):
        self.result = function()

    def replay(self):
        return self.result


class Operators(TorchDispatchMode):
    """Counts the operators that run below it."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def make_models() -> dict:
    """A model for each way, of 24 layers."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 24, "num_heads": 2, "intermediate_size": 32, "vocab_size": 16}
    config = DeltaNetConfig(**sizes, pad_token_id=0, bos_token_id=None, eos_token_id=None)
    return {way: model_class(config).eval() for way, model_class in WAYS.items()}


def generate(model, batch, tokens, mode):
    ids = torch.arange(3, 13).repeat(batch, 1)
    # An end that is looked for and, outside of the vocabulary, never found.
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": tokens, "eos_token_id": model.config.vocab_size}
    return model.generate(ids, **options, **MODES[mode])


def us_a_token(model, batch, tokens, mode):
    """What `tokens` more tokens take."""
    taken = []
    for length in (10, 10 + tokens):
        start = time.thread_time()
        generate(model, batch, length, mode)
        taken.append(time.thread_time() - start)
    return (taken[1] - taken[0]) * 1e6 / tokens


def operators(model, batch, mode):
    """Operators a token."""
    counts = []
    for tokens in (10, 20):
        with Operators() as counter:
            generate(model, batch, tokens, mode)
        counts.append(counter.count)
    return (counts[1] - counts[0]) / 10


def parts(model, batch, tokens, mode):
    """Microseconds of a call of each part; all are called once a token."""
    spent = {part: [] for part in PARTS}
    with contextlib.ExitStack() as stack:
        for part, place in PARTS.items():
            owner, name = (type(model), place) if isinstance(place, str) else place
            stack.enter_context(mock.patch.object(owner, name, _timed(getattr(owner, name), spent[part])))
        generate(model, batch, tokens, mode)
    return {part: round(statistics.median(times) * 1e6, 1) for part, times in spent.items() if times}


def _timed(method, spent):
    @wraps(method)
    def wrapper(*args, **kwargs):
        start = time.thread_time()
        try:
            return method(*args, **kwargs)
        finally:
            spent.append(time.thread_time() - start)

    return wrapper


def measure(models, batch, mode, tokens, repeats):
    """Rows of all ways, measured in turn so that a busy moment hits all."""
    times = {way: [] for way in models}
    for _ in range(repeats):
        for way, model in models.items():
            times[way].append(us_a_token(model, batch, tokens, mode))
    for way, model in models.items():
        row = {"mode": mode, "batch": batch, "way": way, "us_a_token": round(statistics.median(times[way]), 1)}
        yield {**row, "operators_a_token": operators(model, batch, mode), "parts_us": parts(model, batch, tokens, mode)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=pathlib.Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    RECORDERS["cpu"] = Nothing
    models = make_models()
    rows = []
    for mode in MODES:
        for batch in BATCHES:
            for row in measure(models, batch, mode, arguments.tokens, arguments.repeats):
                print(*(f"{row[key]:<14}" for key in list(row)[:-1]), row["parts_us"], flush=True)
                rows.append(row)
    start = time.thread_time()
    for _ in range(20):
        survey(models["replay"])
    survey_ms = round((time.thread_time() - start) * 1e3 / 20, 2)
    result = {"environment": environment(threads=1, layers=24), "survey_ms_a_call": survey_ms, "rows": rows}
    runs = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    runs[transformers.__version__] = result
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(dict(sorted(runs.items())), indent=1) + "\n")


if __name__ == "__main__":
    main()
