"""Gradient checkpointing with the delta rule's result kept: gradients, and what runs how often."""

import pytest
import torch
from models import KINDS, tiny_model, token_ids

from deltanet.kernels import delta_rule
from deltanet.train.checkpointing import KEEP_MIXING


@pytest.fixture
def runs(monkeypatch):
    """A list that grows by one whenever the delta rule runs forward."""
    counted, forward = [], delta_rule._TORCH.forward
    replaced = delta_rule._TORCH._replace(forward=lambda *a: (counted.append(1), forward(*a))[1])
    monkeypatch.setattr(delta_rule, "_TORCH", replaced)
    return counted


def gradients(kind, runs, arguments, **fields):
    model, ids = tiny_model(kind, **fields).train(), token_ids(2, 70)
    if arguments:
        model.gradient_checkpointing_enable(arguments)
    runs.clear()
    model(ids, labels=ids).loss.backward()
    return len(runs), [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fuse", [False, True])
def test_the_delta_rule_runs_once(kind, fuse, runs):
    once, expected = gradients(kind, runs, None, fuse_linear_cross_entropy=fuse)
    twice, _ = gradients(kind, runs, {"use_reentrant": False}, fuse_linear_cross_entropy=fuse)
    kept, actual = gradients(kind, runs, KEEP_MIXING, fuse_linear_cross_entropy=fuse)
    assert (once, twice, kept) == (2, 4, 2)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected))
