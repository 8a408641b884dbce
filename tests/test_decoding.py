"""Decoding by replaying a captured step; here a recording is a stand-in that runs the captured function again."""

import copy
import gc
import logging
import pickle
import threading
import weakref

import pytest
import torch
from models import tiny_model, token_ids
from transformers import DynamicCache, LogitsProcessor, StaticCache

from deltanet import decoding_deltanet, graphs_deltanet
from deltanet.benchmarks.generation_matrix import BATCHES, CELLS, compare
from deltanet.cache_deltanet import CACHE_NAME
from deltanet.graphs_deltanet import cache_slots


class Repeated:
    """Records nothing: `replay` calls the function again, on the same tensors and into the same result."""

    recorded = 0
    replayed = 0

    def __init__(self, function, device):
        Repeated.recorded += 1
        function()
        self.function, self.result = function, function()

    def replay(self):
        Repeated.replayed += 1
        with torch.no_grad():
            return self.result.copy_(self.function())


@pytest.fixture
def graphs(monkeypatch):
    """CPU models decode by replaying; the class counts."""
    monkeypatch.setitem(graphs_deltanet.RECORDERS, "cpu", Repeated)
    Repeated.recorded = Repeated.replayed = 0
    return Repeated


def generator(**overrides):
    return tiny_model("pure", **{"bos_token_id": None, "eos_token_id": None, **overrides})


def generate(model, ids, tokens=8, **options):
    return model.generate(ids, max_new_tokens=tokens, **{"do_sample": False, **options})


def eagerly(model, ids, tokens=8, **options):
    model.decode_graphs.enabled = False
    try:
        return generate(model, ids, tokens, **options)
    finally:
        model.decode_graphs.enabled = True


# The matrix of ways to generate


# Where the ordinary forward decodes: a cache that moves, and a loop that calls the model itself.
EAGER = {"offloaded", "batch_selection"}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", [name for name, cell in CELLS.items() if "pure" in cell.kinds])
def test_every_way_to_generate(graphs, name, batch):
    deviation, tokens_are_equal = compare(generator(), name, batch)
    assert tokens_are_equal
    assert deviation <= 1e-4
    assert (graphs.replayed == 0) == (name in EAGER)
