"""What is given away of a finished run: bfloat16 weights, the tokenizer, and results that somebody else can measure."""

import dataclasses
import json
import sys

import pytest
import torch
from training import DOCUMENTS, make_recipe, prepared
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltanet.train import release, run
from deltanet.train.bits_per_byte import bits_per_byte


@pytest.fixture(scope="module")
def test_split(tmp_path_factory):
    path = tmp_path_factory.mktemp("test") / "test.jsonl"
    rows = [{"source": "ab"[i % 2], "name": str(i), "text": text} for i, text in enumerate(DOCUMENTS[:5])]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory, test_split):
    folder = tmp_path_factory.mktemp("run")
    recipe = dataclasses.replace(make_recipe(prepared(folder), folder / "run"), heldout=str(test_split), keep_best=True)
    run.train(recipe)
    return folder / "run"


def test_the_model_and_its_results(finished, test_split, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["release", str(finished), str(tmp_path / "out"), "--test", str(test_split)])
    assert release.main() == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    trained = AutoModelForCausalLM.from_pretrained(finished / "model")
    assert model.dtype == torch.bfloat16
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(model.parameters(), trained.parameters()))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    expected = bits_per_byte(model.float(), tokenizer, DOCUMENTS[:5], 16)
    assert results["test"]["float32"] == pytest.approx(expected, rel=1e-5)
    assert results["test"]["bfloat16"] == pytest.approx(expected, rel=0.02)
    part = results["test"]["by_source"]["b"]
    texts = [DOCUMENTS[1], DOCUMENTS[3]]
    assert part["bytes"] == sum(len(text.encode()) for text in texts)
    assert part["bits_per_byte"] == pytest.approx(bits_per_byte(model.float(), tokenizer, texts, 16), rel=1e-5)
    assert results["validation"] == json.loads((finished / "model" / "heldout.json").read_text())
    assert [point["step"] for point in results["curve"] if "loss" in point] == list(range(1, 11))


def test_the_model_is_whole_before_anything_is_measured(finished, test_split, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(release, "measure", lambda *a: (_ for _ in ()).throw(RuntimeError("out of memory")))
        with pytest.raises(RuntimeError, match="out of memory"):
            release.release(finished, tmp_path / "out", test_split)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    monkeypatch.setattr(release, "_write_model", lambda *a: pytest.fail("written again"))
    assert release.release(finished, tmp_path / "out", test_split)["test"]["documents"] == 5


def test_refused(finished, tmp_path):
    (tmp_path / "test.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match=r"line 1 has \['text'\]; allowed: rows with source and text"):
        release.release(finished, tmp_path / "out", tmp_path / "test.jsonl")
    with pytest.raises(ValueError, match="has no model/training.json; allowed: the `output` of a finished run"):
        release.release(tmp_path, tmp_path / "out", tmp_path / "test.jsonl")
