"""The first run: shipped text, tokenizer, blocks, atomic results, bits per byte, the lm-eval task and the command itself."""

import dataclasses
import hashlib
import json
import lzma
import math
import random
import re

import pytest
import torch
from models import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltanet.train import first_run
from deltanet.train.bits_per_byte import bits_per_byte, compressed_bits_per_byte
from deltanet.train.blocks import TokenBlocks, document_ids, token_stream
from deltanet.train.finished import finished_directory, last_checkpoint, remove_directory
from deltanet.train.first_run import Settings
from deltanet.train.progress import ProgressBar
from deltanet.train.text import DATA, shipped_chapters
from deltanet.train.tokenization import train_tokenizer

TINY = Settings(
    vocab_size=300,
    hidden_size=32,
    num_layers=1,
    num_heads=2,
    intermediate_size=48,
    block_length=32,
    batch_size=2,
    steps=5,
    save_steps=2,
)
DOCUMENTS = ["Chapter 1\n\nIt was a fine day, and nobody said so.", "Chapter 2\n\nHe was silent; £5 were owed."]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(shipped_chapters("train")[:4], 300)


@pytest.fixture
def short_text(monkeypatch):
    monkeypatch.setattr(first_run, "shipped_chapters", lambda split: shipped_chapters(split)[:2])


class TestText:
    def test_size_and_provenance(self):
        readme = (DATA / "README.md").read_text()
        files = sorted(DATA.glob("*.txt"))
        assert sum(path.stat().st_size for path in DATA.iterdir()) <= 1_500_000
        hashes = dict(reversed(line.split()) for line in re.findall(r"^    ([0-9a-f]{64}  \S+)$", readme, re.M))
        assert hashes == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
        for path in files:
            assert re.search(rf"`{path.name}` .* {path.stat().st_size:,} ", readme)
        assert "public domain" in readme

    def test_chapters(self):
        for split, count in (("train", 61 + 50), ("heldout", 10)):
            chapters = shipped_chapters(split)
            assert len(chapters) == count
            assert all(re.match(r"Chapter \d+\n\n\S", chapter) for chapter in chapters)
        with pytest.raises(ValueError, match="'test'.*'train', 'heldout'"):
            shipped_chapters("test")

    def test_nothing_held_out_is_in_the_training_text(self):
        def passages(split):
            for words in map(str.split, shipped_chapters(split)):
                yield from (tuple(words[i : i + 12]) for i in range(len(words) - 11))

        assert not set(passages("heldout")) & set(passages("train"))


class TestTokens:
    @pytest.mark.parametrize("text", [DOCUMENTS[1], " a  b\n\n\tc ", "Größe 漢字 🙂", ""])
    def test_tokenizer_returns_the_text(self, tokenizer, tmp_path, text):
        tokenizer.save_pretrained(tmp_path)
        loaded = AutoTokenizer.from_pretrained(tmp_path)
        assert len(loaded) == 300
        assert loaded.bos_token_id == loaded.eos_token_id == loaded.pad_token_id == 0
        assert loaded.decode(loaded(text)["input_ids"]) == text

    def test_vocabulary_without_room_for_bytes(self):
        with pytest.raises(ValueError, match="`vocab_size` is 256; allowed: more than 256"):
            train_tokenizer(["text"], 256)

    def test_blocks_are_the_documents_in_turn(self, tokenizer):
        ids = token_stream(DOCUMENTS, tokenizer)
        blocks = TokenBlocks(ids, 8)
        assert len(blocks) == len(ids) // 8
        stream = torch.cat([block["input_ids"] for block in blocks]).tolist()
        text, expected = tokenizer.decode(stream), "".join(f"<|endoftext|>{text}" for text in DOCUMENTS)
        assert len(expected) - len(text) < 60 and expected.startswith(text)
        assert all(torch.equal(block["input_ids"], block["labels"]) for block in blocks)
        with pytest.raises(ValueError, match=f"`ids` has {len(ids)} tokens; allowed: at least `length` = 1000"):
            TokenBlocks(ids, 1000)


class TestFinished:
    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    @pytest.mark.parametrize("before", [None, "old"])
    def test_an_interruption_leaves_what_was_there(self, tmp_path, error, before):
        path = tmp_path / "runs" / "model"
        if before:
            path.mkdir(parents=True)
            (path / "file").write_text(before)
        with pytest.raises(error):
            with finished_directory(path) as partial:
                (partial / "file").write_text("half")
                raise error
        assert (path / "file").read_text() == before if before else not path.exists()
        assert [p.name for p in path.parent.iterdir()] == (["model"] if before else [])

    def test_success_replaces_whole_directories_and_leftovers(self, tmp_path):
        path = tmp_path / "model"
        for stale in (path, tmp_path / "model.partial", tmp_path / "model.replaced"):
            stale.mkdir()
            (stale / "stale").write_text("")
        with finished_directory(path) as partial:
            (partial / "folder").mkdir()
            (partial / "folder" / "file").write_text("whole")
            assert (path / "stale").exists()
        assert [p.name for p in tmp_path.iterdir()] == ["model"]
        assert [p.relative_to(path).as_posix() for p in sorted(path.rglob("*"))] == ["folder", "folder/file"]

    def test_an_interrupted_removal_leaves_nothing_under_the_name(self, tmp_path, monkeypatch):
        path = tmp_path / "work"
        path.mkdir()
        with monkeypatch.context() as patch:
            patch.setattr("shutil.rmtree", lambda path, ignore_errors=False: None)
            remove_directory(path)
        assert not path.exists()
        with finished_directory(path):
            pass
        assert [p.name for p in tmp_path.iterdir()] == ["work"]

    def test_last_checkpoint_is_the_newest_whole_one(self, tmp_path):
        assert last_checkpoint(tmp_path / "missing") is None
        for step, state in ((9, '{"global_step": 9}'), (10, '{"global_step": 10}'), (11, '{"global_st'), (12, None)):
            (tmp_path / f"checkpoint-{step}").mkdir()
            if state:
                (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
        assert last_checkpoint(tmp_path).name == "checkpoint-10"


class TestBitsPerByte:
    @pytest.mark.parametrize(("window", "batch"), [(7, 1), (7, 5), (16, 3), (1000, 2)])
    def test_against_one_forward_per_token(self, tokenizer, window, batch):
        model = tiny_model(vocab_size=300)
        nats = 0.0
        for ids in (document_ids(text, tokenizer) for text in DOCUMENTS):
            for i in range(1, len(ids)):
                # The window that predicts token i ends at `end` and holds `window` tokens where there are so many.
                end = min(-(-i // window) * window + 1, len(ids))
                context = torch.tensor([ids[max(0, end - window - 1) : i]])
                nats -= model(context).logits[0, -1].double().log_softmax(-1)[ids[i]].item()
        expected = nats / math.log(2) / sum(len(text.encode()) for text in DOCUMENTS)
        assert bits_per_byte(model, tokenizer, DOCUMENTS, window, batch) == pytest.approx(expected, rel=1e-5)

    def test_is_the_number_of_lm_eval(self, tokenizer):
        huggingface = pytest.importorskip("lm_eval.models.huggingface")
        from lm_eval.api.instance import Instance

        model = tiny_model(vocab_size=300)
        harness = huggingface.HFLM(pretrained=model, tokenizer=tokenizer, max_length=16, add_bos_token=False)
        requests = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in DOCUMENTS]
        nats = -sum(harness.loglikelihood_rolling(requests, disable_tqdm=True))
        expected = nats / math.log(2) / sum(len(text.encode()) for text in DOCUMENTS)
        assert bits_per_byte(model, tokenizer, DOCUMENTS, 16) == pytest.approx(expected, rel=1e-5)

    def test_compressor(self):
        noise = random.Random(0).randbytes(4000).hex()
        assert 4.0 < compressed_bits_per_byte([noise]) < 4.6
        assert compressed_bits_per_byte([noise], [noise]) < 0.2
        heldout = shipped_chapters("heldout")[:1]
        alone = 8 * len(lzma.compress(heldout[0].encode(), preset=9 | lzma.PRESET_EXTREME)) / len(heldout[0].encode())
        assert compressed_bits_per_byte(heldout) == pytest.approx(alone, rel=0.01)


class TestContinuations:
    def test_lm_eval_scores_as_a_direct_computation(self, tokenizer, monkeypatch):
        pytest.importorskip("lm_eval")
        from deltanet.eval.smoke import smoke_documents
        from deltanet.train import continuations

        text, right = shipped_chapters("heldout")[0], 0
        monkeypatch.setattr(continuations, "held_out_text", lambda data: text)
        model, questions = tiny_model(vocab_size=300), smoke_documents(text)[continuations.TASK]
        for question in questions:
            scores = [_log_likelihood(model, tokenizer, question["context"], " " + choice) for choice in question["choices"]]
            right += scores.index(max(scores)) == question["label"]
        accuracy, error, count = continuations.right_continuations(model, tokenizer)
        assert (accuracy, count) == (pytest.approx(right / count), len(questions))
        assert error == pytest.approx(math.sqrt(accuracy * (1 - accuracy) / (count - 1)))


@torch.no_grad()
def _log_likelihood(model, tokenizer, context, continuation):
    ids = tokenizer(context + continuation)["input_ids"]
    start = len(tokenizer(context)["input_ids"])
    scores = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(scores[i - 1, ids[i]].item() for i in range(start, len(ids)))


def _interrupt_at(monkeypatch, step):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(ProgressBar, "on_step_end", on_step_end)


class TestRun:
    def test_interrupted_and_continued_gives_the_uninterrupted_weights(self, tmp_path, monkeypatch, short_text, capsys):
        whole, broken = tmp_path / "whole", tmp_path / "broken"
        first_run.train(whole, TINY)
        with monkeypatch.context() as patch:
            _interrupt_at(patch, 5)
            with pytest.raises(KeyboardInterrupt):
                first_run.train(broken, TINY)
        assert not broken.exists()
        state = tmp_path / "broken.training" / "checkpoint-4" / "trainer_state.json"
        state.write_text(state.read_text()[:20])  # as a kill in the middle of writing leaves it
        first_run.train(broken, TINY)
        assert "going on from checkpoint-2" in capsys.readouterr().out
        assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "whole"]
        for name in ("model.safetensors", "tokenizer.json", "config.json", "first_run.json"):
            assert (broken / name).read_bytes() == (whole / name).read_bytes(), name

    def test_checkpoints_of_other_settings_are_not_continued(self, tmp_path, monkeypatch, short_text, capsys):
        with monkeypatch.context() as patch:
            _interrupt_at(patch, 3)
            with pytest.raises(KeyboardInterrupt):
                first_run.train(tmp_path / "model", TINY)
        first_run.train(tmp_path / "model", dataclasses.replace(TINY, seed=1))
        assert "going on" not in capsys.readouterr().out

    def test_a_finished_model_is_used_again(self, tmp_path, monkeypatch, short_text, capsys):
        output = tmp_path / "model"
        calls = []
        monkeypatch.setattr(first_run, "train", lambda output, settings: calls.append(settings))
        first_run.train_or_reuse(output, TINY)
        assert calls == [TINY]
        output.mkdir()
        (output / "first_run.json").write_text(json.dumps(dataclasses.asdict(TINY)))
        first_run.train_or_reuse(output, TINY)
        assert calls == [TINY] and "used again" in capsys.readouterr().out
        with pytest.raises(FileExistsError, match="model of other settings; --retrain replaces it"):
            first_run.train_or_reuse(output, Settings())
        first_run.train_or_reuse(output, TINY, retrain=True)
        assert calls == [TINY, TINY]

    @pytest.mark.parametrize("name", ["model", "model.training"])
    def test_a_foreign_directory_is_left_alone(self, tmp_path, name):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis").write_text("")
        with pytest.raises(FileExistsError, match=f"{name} exists and was not made by a first run"):
            first_run.train_or_reuse(tmp_path / "model", TINY, retrain=True)
        assert (tmp_path / name / "thesis").exists()

    @pytest.mark.parametrize(
        ("error", "status", "message"),
        [(KeyboardInterrupt(), 130, "Nothing is half-written"), (OSError("No space left"), 2, "No space left")],
    )
    def test_the_command_ends_in_words(self, tmp_path, monkeypatch, capsys, error, status, message):
        def fail(*arguments):
            raise error

        monkeypatch.setattr(first_run, "quiet", lambda: None)
        monkeypatch.setattr(first_run, "train", fail)
        monkeypatch.setattr("sys.argv", ["first_run", "--output", str(tmp_path / "model")])
        assert first_run.main() == status
        assert message in capsys.readouterr().err

    def test_a_new_process_reloads_and_reports(self, tmp_path, short_text, capfd):
        pytest.importorskip("lm_eval")
        output = tmp_path / "model"
        settings = dataclasses.replace(TINY, vocab_size=1500, block_length=256)  # few and long windows: quick to score
        first_run.train(output, settings)
        assert first_run.report(output) == 0
        printed, errors = capfd.readouterr()
        model, tokenizer = AutoModelForCausalLM.from_pretrained(output), AutoTokenizer.from_pretrained(output)
        bits = bits_per_byte(model, tokenizer, shipped_chapters("heldout"), settings.block_length)
        assert float(re.search(r"bits per byte +([\d.]+)", printed).group(1)) == pytest.approx(bits, abs=1e-3)
        assert re.search(r"continuations +[\d.]+% right +chance: 25%", printed)
        assert "    She had not expected to see him there, and" in printed
        assert "Warning" not in errors + printed and "Traceback" not in errors
