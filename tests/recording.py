"""Decoding by captured steps in tests: recorders that count, with a stand-in for a CPU, and generation both ways."""

import time

import torch
from models import tiny_model
from transformers import LogitsProcessor

from deltanet.graphs_deltanet import RecordedOnCuda


class Repeated:
    """Records nothing: `replay` calls the function again, on the same tensors and into the same result."""

    def __init__(self, function, device):
        function()
        self.function, self.result = function, function()

    def replay(self):
        with torch.no_grad():
            return self.result.copy_(self.function())


def counting(kind):
    """A subclass of a recorder with the number of recordings and of replays, and the seconds each recording took."""

    class Counting({"cpu": Repeated, "cuda": RecordedOnCuda}[kind]):
        recorded, replayed, seconds = 0, 0, []

        def __init__(self, function, device):
            start = time.perf_counter()
            super().__init__(function, device)
            Counting.recorded += 1
            Counting.seconds.append(time.perf_counter() - start)

        def replay(self):
            Counting.replayed += 1
            return super().replay()

    return Counting


def generator(**overrides):
    """A tiny model that never ends a sequence by itself."""
    return tiny_model("pure", **{"bos_token_id": None, "eos_token_id": None, **overrides})


def generate(model, ids, tokens=8, **options):
    """Without end and padding: every id of the vocabulary is a token."""
    options = {"do_sample": False, "attention_mask": torch.ones_like(ids), **options}
    return model.generate(ids, max_new_tokens=tokens, **options)


def eagerly(model, ids, tokens=8, **options):
    model.decode_graphs.enabled = False
    try:
        return generate(model, ids, tokens, **options)
    finally:
        model.decode_graphs.enabled = True


class Meanwhile(LogitsProcessor):
    """Does something else in the middle of a generation: before the tokens numbered in `steps`, or before every one."""

    def __init__(self, work, steps=None):
        self.work, self.steps, self.calls, self.results = work, steps, 0, []

    def __call__(self, input_ids, scores):
        self.calls += 1
        if self.steps is None or self.calls in self.steps:
            self.results.append(self.work())
        return scores
