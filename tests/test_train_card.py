"""The model card of a released checkpoint states what results.json states."""

import dataclasses
import json
import re
import sys

import pytest
from training import DOCUMENTS, make_recipe, prepared
from transformers import AutoModelForCausalLM

from deltanet.train import card, release, run

SIZES = {"documents": 9, "bytes": 2_000_000}
CORPUS = {
    "packages": [{"name": "stories", "contents": "short stories", "licence": "MIT", "train": SIZES}],
    "splits": {name: {**SIZES, "tokens": 1234} for name in ("train", "validation", "test")},
}
SCORES = {
    "results": {
        "smoke_perplexity": {"metrics": {"bits_per_byte,none": 1.5, "bits_per_byte_stderr,none": "N/A"}},
        "smoke_choice": {"metrics": {"acc,none": 0.25, "acc_stderr,none": 0.03125, "acc_norm,none": 0.5}},
    }
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("card")
    rows = [{"source": "stories", "name": str(i), "text": text} for i, text in enumerate(DOCUMENTS[:4])]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, content in (("corpus", CORPUS), ("scores", SCORES)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    recipe = make_recipe(prepared(folder), folder / "run")
    run.train(dataclasses.replace(recipe, heldout=str(folder / "test.jsonl"), keep_best=True))
    release.release(folder / "run", folder / "released", folder / "test.jsonl")
    return folder / "released"


@pytest.fixture(scope="module")
def completed(checkpoint):
    folder = checkpoint.parent
    command = ["card", str(checkpoint), "--corpus", str(folder / "corpus.json"), "--scores", str(folder / "scores.json")]
    command += ["--remark", "It rained."]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", command)
        assert card.main() == 0
    return checkpoint


def test_numbers(completed):
    text, results = (completed / "README.md").read_text(), json.loads((completed / "results.json").read_text())
    assert f"**{results['test']['float32']:.4f}**" in text
    assert f"| stories | {results['test']['bytes']} | {results['test']['float32']:.4f} |" in text
    flowing = " ".join(text.split())
    assert "It rained. Kept: step" in flowing
    assert f"best validation, {results['validation']['bits_per_byte']:.4f} bits per byte." in flowing
    assert "| stories | short stories | MIT | 2.00 |" in text and "| validation | 9 | 2,000,000 | 1,234 |" in text
    assert re.findall(r"^\| smoke.*", text, re.MULTILINE) == [
        "| smoke_perplexity | bits_per_byte | 1.5000 |  |",
        "| smoke_choice | acc | 0.2500 | 0.0312 |",
    ]
    assert results["parameters"] == AutoModelForCausalLM.from_pretrained(completed).num_parameters()
    assert (completed / "curve.png").stat().st_size > 1000


def test_samples_are_the_first_seeds(completed):
    results = json.loads((completed / "results.json").read_text())
    expected = [(prompt, seed) for prompt in card.PROMPTS for seed in card.SEEDS]
    assert [(row["prompt"], row["seed"]) for row in results["samples"]] == expected
    assert all(row["text"].startswith(row["prompt"]) for row in results["samples"])
    assert len({row["text"] for row in results["samples"]}) == len(expected)


def test_the_same_again(completed):
    assert (completed / "README.md").read_text() == card.render(completed)


def test_missing_files_are_named(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["card", str(checkpoint), "--corpus", str(tmp_path / "no.json"), "--scores", "x"])
    assert card.main() == 2
    assert "no.json" in capsys.readouterr().err
