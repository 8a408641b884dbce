"""Training on two processes with gloo: exact continuation, at the end of an epoch too, and another number of processes."""

import dataclasses
import json

import pytest
import torch
from launching import launch
from test_train import DOCUMENTS, history, make_recipe
from train_worker import EPOCH, STEPS, interrupted_at
from transformers import AutoModelForCausalLM

from deltanet.train import prepare, run
from deltanet.train.shards import ShardBlocks, TokenShards
from deltanet.train.sources import ShippedSource
from deltanet.train.tokenization import train_tokenizer

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
NUMBERS = ("step", "epoch", "loss", "grad_norm", "learning_rate")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def recipe(folder):
    source = ShippedSource()
    source.chapters = DOCUMENTS[:13]
    prepare.prepare(folder / "shards", source, train_tokenizer(DOCUMENTS, 300), shard_tokens=200)
    recipe = dataclasses.replace(make_recipe(folder / "shards", folder / "one"), save_every=1, keep_checkpoints=20)
    assert len(ShardBlocks(TokenShards(folder / "shards"), 16)) // recipe.blocks_per_step == EPOCH
    return recipe


@pytest.fixture(scope="module")
def one(recipe, folder):
    """An uninterrupted run of one process."""
    run.train(recipe)
    return folder / "one"


@pytest.fixture(scope="module")
def found(folder, recipe):
    interrupted_at(EPOCH, dataclasses.replace(recipe, output=str(folder / "one-to-two")))
    recipe.write(folder / "recipe.yaml")
    return launch("train_worker", 2, folder)


def numbers(output):
    return [{name: entry[name] for name in NUMBERS if name in entry} for entry in history(output)]


def weights(output):
    return (output / "model/model.safetensors").read_bytes()


def assert_close(output, expected):
    """Up to what ten steps make of another order of roundings, which gradients show first: they agree to 1e-6 in the first
    step. Other data or another scale differ in the first digit."""
    for a, b in zip(numbers(output), numbers(expected), strict=True):
        norms = [entry.pop("grad_norm", 0.0) for entry in (a, b)]
        assert a == pytest.approx(b, rel=1e-3)
        assert norms[0] == pytest.approx(norms[1], rel=1e-4 if a.get("step", 0) <= 3 else 2e-2)


@pytest.mark.parametrize("step", STEPS)
def test_one_process_continues_exactly(recipe, one, tmp_path, step):
    """Behind every kind of step: the first, the last of an epoch, and those beside it."""
    recipe = dataclasses.replace(recipe, output=str(tmp_path / "run"))
    interrupted_at(step, recipe)
    run.train(recipe)
    assert numbers(tmp_path / "run") == numbers(one)
    assert weights(tmp_path / "run") == weights(one)


def test_two_processes_train_as_one(found, folder, one):
    assert_close(folder / "whole", one)


@pytest.mark.parametrize("name", [*(f"at-{step}" for step in STEPS), "inside"])
def test_two_processes_continue_exactly(found, folder, name):
    assert numbers(folder / name) == numbers(folder / "whole")
    assert weights(folder / name) == weights(folder / "whole")


def test_another_number_of_processes_continues(found, folder, recipe, one):
    """Batches and their order stay; sums of gradients are rounded in another order."""
    run.train(dataclasses.replace(recipe, output=str(folder / "two-to-one")))
    for name in ("two-to-one", "one-to-two"):
        assert_close(folder / name, one)


def test_packed_documents(found, folder, recipe, tmp_path):
    """Processes hold different numbers of tokens, and the loss is the mean over all of them."""
    changes = {"packing": True, "block_length": 64, "batch_tokens": 256, "tokens": 1280, "output": str(tmp_path / "run")}
    run.train(dataclasses.replace(recipe, **changes))
    assert_close(folder / "packed", tmp_path / "run")


def test_an_odd_batch_is_refused(found):
    expected = "1 forwards of `device_batch` x `block_length` = 4 x 16 tokens; allowed: a multiple of 2, the number of"
    assert all(expected in one["odd"] for one in found)


def test_only_one_process_speaks(found):
    speaking, silent = (one["log"] for one in found)
    assert "step 10/10 100.00% | loss" in speaking and "going on from checkpoint-4" in speaking
    assert "step" not in silent and "going on" not in silent


def test_the_checkpoint_is_a_model(found, folder):
    state = json.loads((folder / "whole/checkpoint-10/trainer_state.json").read_text())
    assert state["global_step"] == 10
    model = AutoModelForCausalLM.from_pretrained(folder / "whole/checkpoint-10")
    final = AutoModelForCausalLM.from_pretrained(folder / "whole/model")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), final.parameters()))


class TestFSDP:
    """accelerate's FSDP2 by the shipped configuration, against one process and mixed with it."""

    @pytest.fixture(scope="class")
    def divided(self, folder, recipe):
        interrupted_at(3, dataclasses.replace(recipe, output=str(folder / "one-to-divided")))
        recipe.write(folder / "recipe.yaml")
        return launch("fsdp_worker", 2, folder)

    def test_the_model_is_divided(self, divided):
        assert all(found["divided"] == [True] * 5 for found in divided)

    def test_trains_as_one_process(self, divided, folder, one):
        assert_close(folder / "divided", one)

    def test_continues_exactly(self, divided, folder):
        assert numbers(folder / "divided-at-3") == numbers(folder / "divided")
        assert weights(folder / "divided-at-3") == weights(folder / "divided")

    def test_goes_on_without_division_and_back(self, divided, folder, recipe, one):
        run.train(dataclasses.replace(recipe, output=str(folder / "divided-to-one")))
        for name in ("divided-to-one", "one-to-divided"):
            assert_close(folder / name, one)

    def test_the_checkpoint_is_a_model(self, divided, folder):
        names = {path.name for path in (folder / "divided/checkpoint-10").iterdir()}
        assert {"model.safetensors", "optimizer.pt", "scheduler.pt"} <= names
        assert not {name for name in names if name.startswith("pytorch_model")}
        model = AutoModelForCausalLM.from_pretrained(folder / "divided/checkpoint-10")
        final = AutoModelForCausalLM.from_pretrained(folder / "divided/model")
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), final.parameters()))
