"""Short runs of training for the tests: data, a recipe, what was logged, and how an interrupted run compares."""

import json
from pathlib import Path

from deltanet.train import prepare, run
from deltanet.train.recipe import Recipe
from deltanet.train.sources import ShippedSource
from deltanet.train.tokenization import train_tokenizer

DOCUMENTS = [f"Chapter {i}\n\nIt was a fine day; {'nobody said so. ' * (i % 5)}£{i}." for i in range(30)]
MODEL = {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2, "intermediate_size": 48, "initializer_range": 0.2}


def prepared(folder: Path) -> Path:
    """Shards of `DOCUMENTS` in `folder`."""
    source = ShippedSource()
    source.chapters = DOCUMENTS
    prepare.prepare(folder / "shards", source, train_tokenizer(DOCUMENTS, 300), shard_tokens=200)
    return folder / "shards"


def make_recipe(data, output) -> Recipe:
    """Ten steps of two times two blocks: more than one epoch, so that the order changes on the way."""
    return Recipe(
        data=str(data),
        output=str(output),
        model=MODEL,
        tokens=10 * 64,
        batch_tokens=64,
        block_length=16,
        device_batch=2,
        warmup_tokens=3 * 64,
        learning_rate=1e-2,
        initial_learning_rate=1e-3,
        final_learning_rate=2e-3,
        precision="float32",
        log_every=1,
        save_every=2,
    )


def history(output: Path) -> list[dict]:
    """What the run in `output` has logged."""
    checkpoint = max(output.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    return json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]


def continue_and_compare(recipe: Recipe, whole: Path) -> None:
    """Go on with the interrupted run of `recipe`, which must end like the uninterrupted one in `whole`."""
    output = Path(recipe.output)
    run.train(recipe)
    for a, b in zip(history(whole), history(output), strict=True):
        assert {key: a[key] for key in ("step", "loss", "grad_norm", "learning_rate") if key in a} == {
            key: b[key] for key in ("step", "loss", "grad_norm", "learning_rate") if key in b
        }
    model = "model/model.safetensors"
    assert (output / model).read_bytes() == (whole / model).read_bytes()
