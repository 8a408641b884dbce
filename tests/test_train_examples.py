"""The fine-tuning examples: their losses are those of samples one by one, and what they save loads and has learnt."""

import json

import pytest
import torch
from launching import launch
from models import tiny_model
from oracle import relative_error
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltanet.train import prepare
from deltanet.train.shards import ShardBlocks, TokenShards
from deltanet.train.sources import ShippedSource
from deltanet.train.tokenization import train_tokenizer

SAMPLES = [
    {"prompt": f"{i} and {j} make", "completion": f" {i + j}, as is {'well ' * (i % 3)}known."}
    for i in range(4)
    for j in (1, 7)
]


@pytest.fixture(scope="module")
def model_name(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer([sample["prompt"] + sample["completion"] for sample in SAMPLES], 280)
    tiny_model(vocab_size=280, bos_token_id=0, eos_token_id=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def mean_loss(model_name, samples):
    """The mean over the predicted tokens of (prompt, completion), each sample alone; an empty prompt predicts no first."""
    tokenizer, model = AutoTokenizer.from_pretrained(model_name), AutoModelForCausalLM.from_pretrained(model_name)
    losses = []
    for prompt, completion in samples:
        start = max(1, len(tokenizer(prompt)["input_ids"]))
        ids = torch.tensor([tokenizer(prompt + completion + tokenizer.eos_token)["input_ids"]])
        with torch.no_grad():
            logits = model(ids).logits[0, start - 1 : -1].log_softmax(-1)
        losses.append(-logits.gather(1, ids[0, start:, None]))
    return torch.cat(losses).mean().item()


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


SETTINGS = {"logging_steps": 1, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "warmup_steps": 0, "use_cpu": True}


def test_packed_sft(model_name, tmp_path):
    pytest.importorskip("trl")
    from deltanet.train.examples import packed_sft

    data = write(tmp_path / "data.jsonl", SAMPLES)
    settings = {"max_length": 80, "gradient_accumulation_steps": 4, "max_steps": 4, **SETTINGS}
    trainer = packed_sft.fine_tune(model_name, data, str(tmp_path / "out"), **settings)
    rows = [len(row["input_ids"]) for row in trainer.train_dataset]
    assert len(rows) < len(SAMPLES) and max(rows) > 40
    expected = mean_loss(model_name, [(sample["prompt"], sample["completion"]) for sample in SAMPLES])
    assert losses(trainer)[0] == pytest.approx(expected, rel=1e-4)
    assert losses(trainer)[-1] < 0.9 * expected
    saved = mean_loss(str(tmp_path / "out"), [(sample["prompt"], sample["completion"]) for sample in SAMPLES])
    assert saved < 0.9 * expected


def test_lora(model_name, tmp_path):
    peft = pytest.importorskip("peft")
    pytest.importorskip("datasets")
    from deltanet.train.examples import lora

    texts = [sample["prompt"] + sample["completion"] for sample in SAMPLES]
    data = write(tmp_path / "data.jsonl", [{"text": text} for text in texts])
    trainer = lora.fine_tune(model_name, data, str(tmp_path / "out"), max_steps=4, **SETTINGS)
    before = mean_loss(model_name, [("", text) for text in texts])
    assert losses(trainer)[0] == pytest.approx(before, rel=1e-4)
    model = AutoModelForCausalLM.from_pretrained(model_name)
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "out").merge_and_unload()
    adapted.save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(model_name).save_pretrained(tmp_path / "merged")
    assert mean_loss(str(tmp_path / "merged"), [("", text) for text in texts]) < 0.9 * before
    assert sum(file.stat().st_size for file in (tmp_path / "out").glob("adapter_model*")) > 0


def test_long_context(tmp_path):
    """Two processes that share every row and the weights, against a loop in one."""
    source = ShippedSource()
    source.chapters = [" ".join([f"{i} and {i + 1} make {2 * i + 1}."] * 9) for i in range(9)]
    tokenizer = train_tokenizer(source.chapters, 280)
    prepare.prepare(tmp_path / "shards", source, tokenizer)
    model = tiny_model(vocab_size=280, bos_token_id=0, eos_token_id=0)
    model.save_pretrained(tmp_path / "model")
    found = launch("long_context_worker", 2, tmp_path)

    rows, expected = ShardBlocks(TokenShards(tmp_path / "shards"), 96), []
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.01)
    for step in range(4):
        ids = rows[step % len(rows)]["input_ids"][None]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    assert all(one["losses"] == pytest.approx(expected, rel=1e-4) for one in found)
    assert expected[-1] < expected[0]
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    assert relative_error(trained.lm_head.weight.detach(), model.lm_head.weight.detach()) <= 1e-2
    assert len(AutoTokenizer.from_pretrained(tmp_path / "trained")) == len(tokenizer)
