"""Training runs: losses, learning rates, exact continuation, the guard, the status line and what is refused beforehand."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerControl, TrainerState

from deltanet.train import __main__ as command
from deltanet.train import finished, monitor, prepare, run
from deltanet.train.monitor import GuardedTrainer, NotFinite, StatusLine
from deltanet.train.recipe import Recipe, load_recipe
from deltanet.train.shards import PackedDocuments, ShardBlocks, TokenShards
from deltanet.train.sources import ShippedSource
from deltanet.train.text import shipped_chapters
from deltanet.train.tokenization import train_tokenizer

DOCUMENTS = [f"Chapter {i}\n\nIt was a fine day; {'nobody said so. ' * (i % 5)}£{i}." for i in range(30)]
MODEL = {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2, "intermediate_size": 48, "initializer_range": 0.2}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    source = ShippedSource()
    source.chapters = DOCUMENTS
    prepare.prepare(folder / "shards", source, train_tokenizer(DOCUMENTS, 300), shard_tokens=200)
    return folder / "shards"


def make_recipe(data, output):
    """Ten steps of two times two blocks, which is one epoch of `data`."""
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


@pytest.fixture
def recipe(data, tmp_path):
    return make_recipe(data, tmp_path / "run")


def history(output):
    checkpoint = max(output.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    return json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """An uninterrupted run."""
    output = tmp_path_factory.mktemp("whole") / "run"
    run.train(make_recipe(data, output))
    return output


class TestRun:
    def test_the_result_is_a_model_that_loads(self, whole, data):
        model = AutoModelForCausalLM.from_pretrained(whole / "model")
        checkpoint = AutoModelForCausalLM.from_pretrained(whole / "checkpoint-10")
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), checkpoint.parameters()))
        assert len(AutoTokenizer.from_pretrained(whole / "model")) == 300
        assert sorted(path.name for path in whole.iterdir()) == ["checkpoint-10", "checkpoint-8", "model", "recipe.yaml"]
        resolved = load_recipe(str(whole / "recipe.yaml"), {})
        assert resolved == dataclasses.replace(make_recipe(data, whole), data_checksum=TokenShards(data).checksum)

    def test_learning_rates(self, whole):
        def rate(step):
            if step < 3:
                return 1e-3 + (1e-2 - 1e-3) * step / 2
            return 2e-3 + (1e-2 - 2e-3) * (1 + math.cos(math.pi * (step - 3 + 1) / 7)) / 2

        found = [entry["learning_rate"] for entry in history(whole) if "loss" in entry]
        assert found == pytest.approx([rate(step) for step in range(10)])

    def test_accumulation_changes_nothing(self, recipe, whole):
        run.train(dataclasses.replace(recipe, device_batch=4))
        for a, b in zip(history(whole), history(Path(recipe.output)), strict=True):
            assert a.get("loss") == pytest.approx(b.get("loss"), rel=1e-4)

    def test_gradient_checkpointing_changes_nothing(self, recipe, whole):
        run.train(dataclasses.replace(recipe, gradient_checkpointing=True))
        for a, b in zip(history(whole), history(Path(recipe.output)), strict=True):
            assert a.get("loss") == pytest.approx(b.get("loss"), rel=1e-4)

    def test_bfloat16_keeps_float32_weights(self, recipe, whole):
        run.train(dataclasses.replace(recipe, precision="bfloat16"))
        found, expected = history(Path(recipe.output))[0]["loss"], history(whole)[0]["loss"]
        assert found == pytest.approx(expected, rel=2e-2) and found != expected
        model = AutoModelForCausalLM.from_pretrained(Path(recipe.output) / "model", dtype="auto")
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())

    @pytest.mark.parametrize("packing", [False, True])
    @pytest.mark.parametrize("hybrid", [None, "global_attention"])
    def test_first_loss_is_the_mean_over_the_tokens(self, recipe, data, packing, hybrid):
        """All data are one step, accumulated item by item; packs have different numbers of tokens."""
        shards = TokenShards(data)
        items = (PackedDocuments if packing else ShardBlocks)(shards, 60)
        tokens = 60 * len(items)
        changes = {"packing": packing, "hybrid": hybrid, "block_length": 60, "device_batch": 1, "warmup_tokens": 0}
        recipe = dataclasses.replace(recipe, tokens=tokens, batch_tokens=tokens, **changes)
        if packing:
            rows = [document["input_ids"] for i in range(len(items)) for document in items[i]["documents"]]
        else:
            rows = [items[i]["input_ids"] for i in range(len(items))]
        model, losses = run._model(recipe, shards.tokenizer).eval(), []
        for row in rows:
            logits = model(row[None]).logits[0, :-1].detach().log_softmax(-1)
            losses.append(-logits.gather(1, row[1:, None]))
        run.train(recipe)
        assert history(Path(recipe.output))[0]["loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)

    def test_fine_tuning_begins_with_the_weights_of_the_model(self, recipe, whole, data):
        """One block, so that its loss under the trained model is known."""
        fields = {"model": {}, "pretrained": str(whole / "model"), "warmup_tokens": 0, "device_batch": 1}
        items = ShardBlocks(TokenShards(data), 600)
        recipe = dataclasses.replace(recipe, **fields, tokens=600, batch_tokens=600, block_length=600)
        run.train(recipe)
        model = AutoModelForCausalLM.from_pretrained(whole / "model")
        expected = model(items[0]["input_ids"][None], labels=items[0]["labels"][None]).loss.item()
        assert history(Path(recipe.output))[0]["loss"] == pytest.approx(expected, rel=1e-5)


class TestContinuation:
    @pytest.mark.parametrize("step", [1, 4, 7])
    def test_an_interruption_at_a_step_changes_no_loss(self, recipe, whole, monkeypatch, step):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == step:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(StatusLine, "on_step_end", on_step_end)
            with pytest.raises(KeyboardInterrupt):
                run.train(recipe)
        self._continue(recipe, whole)

    @pytest.mark.parametrize("file", ["training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
    def test_an_interruption_inside_a_checkpoint_changes_no_loss(self, recipe, whole, monkeypatch, file, capsys):
        save, target = torch.save, Path(recipe.output) / "checkpoint-4" / file

        def broken_save(content, path, *arguments, **keywords):
            if Path(path) == target:
                target.write_bytes(b"PK")
                raise KeyboardInterrupt
            save(content, path, *arguments, **keywords)

        with monkeypatch.context() as patch:
            patch.setattr(torch, "save", broken_save)
            with pytest.raises(KeyboardInterrupt):
                run.train(recipe)
        assert target.exists() and (target.parent / "model.safetensors").exists()
        self._continue(recipe, whole)
        assert "going on from checkpoint-2" in capsys.readouterr().out

    def test_an_interruption_while_the_model_is_written(self, recipe, whole, monkeypatch):
        with monkeypatch.context() as patch:
            patch.setattr(Recipe, "write", _interrupt_in("model.partial", Recipe.write))
            with pytest.raises(KeyboardInterrupt):
                run.train(recipe)
        assert not (Path(recipe.output) / "model").exists()
        self._continue(recipe, whole)

    @staticmethod
    def _continue(recipe, whole):
        output = Path(recipe.output)
        run.train(recipe)
        for a, b in zip(history(whole), history(output), strict=True):
            assert {key: a[key] for key in ("step", "loss", "grad_norm", "learning_rate") if key in a} == {
                key: b[key] for key in ("step", "loss", "grad_norm", "learning_rate") if key in b
            }
        model = "model/model.safetensors"
        assert (output / model).read_bytes() == (whole / model).read_bytes()


def _interrupt_in(name, write):
    def broken_write(self, path):
        if path.parent.name == name:
            raise KeyboardInterrupt
        write(self, path)

    return broken_write


class TestGuard:
    @pytest.mark.parametrize(("kind", "message"), [("loss", "loss is nan"), ("gradient", "norm of the gradients is nan")])
    def test_the_run_stops_before_the_weights_change(self, recipe, data, monkeypatch, kind, message):
        compute_loss, batches = GuardedTrainer.compute_loss, []

        def poisoned(self, model, inputs, *arguments, **keywords):
            loss = compute_loss(self, model, inputs, *arguments, **keywords)
            if self.state.global_step != 5:
                return loss
            batches.append(inputs["input_ids"])
            if kind == "gradient":
                loss.register_hook(lambda gradient: gradient * float("nan"))
                return loss
            return loss * float("nan") if len(batches) == 2 else loss

        steps = []
        monkeypatch.setattr(GuardedTrainer, "compute_loss", poisoned)
        step = torch.optim.AdamW.step
        monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a, **k: (steps.append(1), step(self, *a, **k))[1])
        with pytest.raises(
            NotFinite, match=f"Stopped at step 6: the {message}.*checkpoint-4. The weights were not changed"
        ) as error:
            run.train(recipe)
        assert len(steps) == 5
        named = torch.tensor(json.loads(str(error.value).partition("blocks ")[2].partition(";")[0]))
        blocks = ShardBlocks(TokenShards(data), 16)
        expected = batches[1] if kind == "loss" else torch.cat(batches)
        assert torch.equal(torch.stack([blocks[i]["input_ids"] for i in named]), expected)

    def test_status_line(self, monkeypatch, capsys):
        clock = iter([100.0, 110.0, 130.0])
        monkeypatch.setattr(monitor.time, "perf_counter", lambda: next(clock))
        line, state = StatusLine(), TrainerState(global_step=20, max_steps=100)
        line.on_train_begin(None, state, TrainerControl())
        for step, loss in ((30, 2.5), (60, 2.25)):
            state.global_step, line.tokens = step, 1000 * (step - 20)
            line.on_log(None, state, TrainerControl(), logs={"loss": loss, "learning_rate": 3e-4})
        line.on_log(None, state, TrainerControl(), logs={"train_runtime": 1})
        assert capsys.readouterr().out.splitlines() == [
            "step  30/100  30.00% | loss 2.5000 | lr 3.00e-04 | 1,000 tokens/s | 0:00:10 gone, 0:01:10 left",
            "step  60/100  60.00% | loss 2.2500 | lr 3.00e-04 | 1,500 tokens/s | 0:00:30 gone, 0:00:30 left",
        ]


class TestRefusedBeforehand:
    @pytest.fixture(autouse=True)
    def no_training(self, monkeypatch):
        monkeypatch.setattr(GuardedTrainer, "train", lambda *a, **k: pytest.fail("training began"))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"data": "nowhere"}, "nowhere has no readable index.json"),
            ({"model": {**MODEL, "vocab_size": 299}}, "`model.vocab_size` is 299; allowed: at least 300"),
            ({"batch_tokens": 6400, "tokens": 6400}, "`data` has .* blocks; allowed: at least 400, which is one step"),
            ({"packing": True}, "Document .* allowed with packing: at most `block_length` = 16"),
            ({"data_checksum": "0" * 64}, "has an index of checksum .*; allowed: 0000"),
        ],
    )
    def test_recipe_and_data(self, recipe, changes, message):
        with pytest.raises(ValueError, match=message):
            run.train(dataclasses.replace(recipe, **changes))
        assert not Path(recipe.output).exists()

    def test_a_model_with_another_tokenizer(self, recipe, tmp_path):
        train_tokenizer(DOCUMENTS, 290).save_pretrained(tmp_path / "other")
        with pytest.raises(ValueError, match="`pretrained` .*other has a tokenizer of the checksum"):
            run.train(dataclasses.replace(recipe, model={}, pretrained=str(tmp_path / "other")))

    def test_no_room_for_checkpoints(self, recipe, monkeypatch):
        usage = shutil.disk_usage(".")
        monkeypatch.setattr(finished.shutil, "disk_usage", lambda path: usage._replace(free=10**5))
        with pytest.raises(OSError, match="0.0 GB free; about 0.0 GB are needed"):
            run.train(recipe)

    def test_a_run_of_another_recipe_is_not_continued(self, recipe, whole):
        recipe = dataclasses.replace(recipe, output=str(whole))
        with pytest.raises(ValueError, match="was begun with `learning_rate` = 0.01 \\(now 0.02\\), `seed` = 0 \\(now 1\\)"):
            run.train(dataclasses.replace(recipe, learning_rate=2e-2, seed=1))
        assert run.train(dataclasses.replace(recipe, keep_checkpoints=1)) == whole / "model"

    def test_a_run_on_other_data_is_not_continued(self, recipe, tmp_path):
        output = Path(recipe.output)
        output.mkdir()
        dataclasses.replace(recipe, data_checksum="0" * 64).write(output / "recipe.yaml")
        with pytest.raises(ValueError, match="has an index of checksum .*; allowed: 0000.*, as the run began"):
            run.train(recipe)

    def test_a_foreign_directory_is_left_alone(self, recipe):
        output = Path(recipe.output)
        output.mkdir()
        (output / "thesis").write_text("")
        with pytest.raises(ValueError, match="holds thesis and no recipe.yaml; allowed: a new directory"):
            run.train(recipe)


class TestCommand:
    @pytest.mark.parametrize(
        ("error", "status", "message"),
        [
            (NotFinite("Stopped at step 3"), 3, "Stopped at step 3"),
            (OSError("no room"), 2, "no room"),
            (KeyboardInterrupt(), 130, "goes on from the last checkpoint"),
        ],
    )
    def test_ends_in_words(self, monkeypatch, capsys, error, status, message):
        def fail(recipe):
            raise error

        monkeypatch.setattr(command, "quiet", lambda: None)
        monkeypatch.setattr(command, "train", fail)
        monkeypatch.setattr("sys.argv", ["train", "tiny", "--seed", "3"])
        assert command.main() == status
        assert message in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["seed", "3"], "`seed` is no flag"),
            (["--seed"], "`--seed` is no flag with a value"),
            (["--sed=3"], "`fields` is sed"),
        ],
    )
    def test_bad_flags(self, monkeypatch, capsys, arguments, message):
        monkeypatch.setattr(command, "quiet", lambda: None)
        monkeypatch.setattr("sys.argv", ["train", "tiny", *arguments])
        assert command.main() == 2
        assert message in capsys.readouterr().err

    def test_shipped_text(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr("deltanet.train.sources.shipped_chapters", lambda split: shipped_chapters(split)[:2])
        monkeypatch.setattr(command, "quiet", lambda: None)
        flags = {"output": tmp_path / "run", "tokens": 2048, "warmup_tokens": 0, "model.vocab_size": 300, "log_every": 1}
        small = {"model.hidden_size": 32, "model.num_hidden_layers": 1, "model.intermediate_size": 32}
        arguments = [f"--{name}={value}" for name, value in {**flags, **small}.items()]
        monkeypatch.setattr("sys.argv", ["train", "tiny", *arguments])
        assert command.main() == 0
        printed = capsys.readouterr().out
        assert "step 2/2 100.00% | loss" in printed and f"python -m deltanet.train.report {tmp_path}" in printed
        assert len(AutoTokenizer.from_pretrained(tmp_path / "run" / "model")) == 300
