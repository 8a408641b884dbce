"""What a recipe may choose: the optimizer, the schedule, compilation, and the held-out text."""

import copy
import dataclasses
import functools
import json
from pathlib import Path

import pytest
import torch
from training import DOCUMENTS, continue_and_compare, history, make_recipe, prepared
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from deltanet.train import run
from deltanet.train.bits_per_byte import bits_per_byte
from deltanet.train.monitor import StatusLine
from deltanet.train.optimizers import MuonFactory
from deltanet.train.recipe import load_recipe
from deltanet.train.shards import TokenShards


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("data"))


@pytest.fixture
def recipe(data, tmp_path):
    return make_recipe(data, tmp_path / "run")


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run without any of these."""
    output = tmp_path_factory.mktemp("whole") / "run"
    run.train(make_recipe(data, output))
    return output


def test_muon_updates_matrices(recipe, data):
    shards = TokenShards(data)
    model = run._model(recipe, shards.tokenizer)
    optimizer = MuonFactory()(model, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)
    names = {parameter: name.removesuffix(".weight") for name, parameter in model.named_parameters()}
    groups = [{names[parameter].rpartition(".")[2] for parameter in group["params"]} for group in optimizer.param_groups]
    assert groups == [
        {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
        {"embed_tokens", "lm_head", "b_proj", "q_conv1d", "k_conv1d", "v_conv1d"},
        {"attn_norm", "mlp_norm", "o_norm", "norm"},
    ]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.0]


def test_muon_and_adamw_step_as_by_themselves(recipe, data):
    model = run._model(recipe, TokenShards(data).tokenizer)
    optimizer = MuonFactory()(model, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)
    twins = {p: p.detach().clone().requires_grad_() for p in model.parameters()}
    groups = [[twins[p] for p in group["params"]] for group in optimizer.param_groups]
    alone = [torch.optim.Muon(groups[0], 1e-2, 0.1, adjust_lr_fn="match_rms_adamw")]
    alone += [torch.optim.AdamW(groups[i], 1e-2, (0.9, 0.95), 1e-8, decay) for i, decay in ((1, 0.1), (2, 0.0))]
    for step in range(3):
        for number, (parameter, twin) in enumerate(twins.items()):
            generator = torch.Generator().manual_seed(100 * step + number)
            parameter.grad = twin.grad = torch.randn(parameter.shape, generator=generator)
        if step == 1:  # through a checkpoint
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for one in (optimizer, *alone):
            one.step()
    assert all(torch.equal(parameter, twin) for parameter, twin in twins.items())


def test_muon_is_continued_exactly(recipe, tmp_path, monkeypatch):
    recipe = dataclasses.replace(recipe, optimizer="muon")
    whole = tmp_path / "whole"
    run.train(dataclasses.replace(recipe, output=str(whole)))

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 7:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StatusLine, "on_step_end", on_step_end)
        with pytest.raises(KeyboardInterrupt):
            run.train(recipe)
    continue_and_compare(recipe, whole)
    losses = [entry["loss"] for entry in history(whole) if "loss" in entry]
    assert losses[-1] < losses[0]


def test_warmup_stable_decay(recipe):
    changes = {"schedule": "warmup_stable_decay", "decay_tokens": 4 * 64, "initial_learning_rate": 2e-3}
    run.train(dataclasses.replace(recipe, **changes))
    found = [entry["learning_rate"] for entry in history(Path(recipe.output)) if "loss" in entry]
    warmup = [2e-3 + 8e-3 * step / 3 for step in range(3)]
    decay = [1e-2 - 8e-3 * step / 4 for step in range(4)]
    assert found == pytest.approx([*warmup, 1e-2, 1e-2, 1e-2, *decay])


def test_compilation_changes_nothing(recipe, whole, monkeypatch):
    eager = functools.partial(run.TrainingArguments, torch_compile_backend="aot_eager")
    monkeypatch.setattr(run, "TrainingArguments", eager)
    run.train(dataclasses.replace(recipe, torch_compile=True))
    for a, b in zip(history(whole), history(Path(recipe.output)), strict=True):
        assert a.get("loss") == pytest.approx(b.get("loss"), rel=1e-4)


def test_bits_per_byte_of_a_text(recipe, whole, tmp_path, capsys):
    """Every four steps and after the last, without touching the run."""
    (tmp_path / "text.txt").write_text(DOCUMENTS[7])
    run.train(dataclasses.replace(recipe, heldout=str(tmp_path / "text.txt"), evaluate_every=4))
    entries = history(Path(recipe.output))
    found = {entry["step"]: entry["bits_per_byte"] for entry in entries if "bits_per_byte" in entry}
    model = AutoModelForCausalLM.from_pretrained(Path(recipe.output) / "model")
    expected = bits_per_byte(model, AutoTokenizer.from_pretrained(Path(recipe.output) / "model"), [DOCUMENTS[7]], 16)
    assert list(found) == [4, 8, 10] and found[10] == pytest.approx(expected)
    assert f"step 10: {found[10]:.4f} bits per byte" in capsys.readouterr().out
    for a, b in zip(history(whole), (entry for entry in entries if "bits_per_byte" not in entry), strict=True):
        assert a.get("loss") == b.get("loss")


@pytest.fixture
def overtrained(recipe, tmp_path):
    """A recipe that learns for six steps, and is then thrown off course by a high learning rate that comes late."""
    (tmp_path / "text.txt").write_text(DOCUMENTS[7])
    changes = {"heldout": str(tmp_path / "text.txt"), "evaluate_every": 2, "keep_best": True}
    rates = {"learning_rate": 1.0, "initial_learning_rate": 1e-3, "warmup_tokens": 9 * 64}
    return dataclasses.replace(recipe, **changes, **rates)


def test_the_best_model_is_kept(overtrained):
    output = run.train(overtrained)
    bits = {entry["step"]: entry["bits_per_byte"] for entry in history(output.parent) if "bits_per_byte" in entry}
    best = min(bits, key=bits.get)
    assert best < 10
    assert json.loads((output / "heldout.json").read_text()) == {"step": best, "bits_per_byte": bits[best]}
    model, tokenizer = AutoModelForCausalLM.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    assert bits_per_byte(model, tokenizer, [DOCUMENTS[7]], 16) == pytest.approx(bits[best])
    log = json.loads((output / "training.json").read_text())
    assert [entry["bits_per_byte"] for entry in log if "bits_per_byte" in entry] == list(bits.values())


def test_an_error_at_the_end_loses_nothing(overtrained, tmp_path, monkeypatch):
    whole = run.train(dataclasses.replace(overtrained, output=str(tmp_path / "whole")))

    def save_pretrained(*arguments, **keywords):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedTokenizerBase, "save_pretrained", save_pretrained)
        with pytest.raises(OSError, match="disk full"):
            run.train(overtrained)
    assert not (Path(overtrained.output) / "model").exists()
    monkeypatch.setattr(run.PortableTrainer, "training_step", lambda *a: pytest.fail("trained again"))
    model = run.train(overtrained)
    assert (model / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"keep_best": "true"}, "`keep_best` is True; allowed: false without `heldout`"),
        ({"optimizer": "sgd"}, "`optimizer` is sgd; allowed: adamw, muon"),
        ({"schedule": "linear"}, "`schedule` is linear; allowed: cosine, warmup_stable_decay"),
        ({"decay_tokens": "1e9"}, "`decay_tokens` is 1000000000; allowed: 0, save with warmup_stable_decay"),
        ({"schedule": "warmup_stable_decay"}, "`decay_tokens` is 0; allowed: `batch_tokens` = 524288 to 14500000000"),
        (
            {"schedule": "warmup_stable_decay", "decay_tokens": "1e9", "initial_learning_rate": "0"},
            "`initial_learning_rate` is 0.0; allowed: `final_learning_rate` = 3e-05, with warmup_stable_decay",
        ),
        ({"evaluate_every": "0"}, "`evaluate_every` is 0; allowed: 1 and more"),
    ],
)
def test_refused_values(flags, message):
    with pytest.raises(ValueError, match=message):
        load_recipe("340m-15b", flags)


def test_refused_before_training(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(run.PortableTrainer, "train", lambda *a, **k: pytest.fail("training began"))
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="`heldout` is .*empty.txt, which has no text"):
        run.train(dataclasses.replace(recipe, heldout=str(tmp_path / "empty.txt")))
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ValueError, match="`optimizer` is muon; allowed with torch .*: adamw"):
        run.train(dataclasses.replace(recipe, optimizer="muon"))
