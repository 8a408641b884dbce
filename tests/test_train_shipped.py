"""The checkpoint in the package: its files, what it writes, that its card is true, and the command that shows it."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from deltanet import DeltaNetForCausalLM
from deltanet.eval.smoke import held_out_text, smoke_documents
from deltanet.train import card, shipped
from deltanet.train.bits_per_byte import bits_per_byte
from deltanet.train.quiet import quiet_children
from deltanet.train.report import PROMPT, continuation

FILES = {
    "README.md", "config.json", "curve.png", "generation_config.json", "model.safetensors", "recipe.yaml", "results.json",
    "tokenizer.json", "tokenizer_config.json",
}  # fmt: skip
RESULTS = json.loads((shipped.checkpoint() / "results.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def loaded():
    return shipped.load()


class TestFiles:
    def test_size(self):
        files = list(shipped.checkpoint().iterdir())
        assert {path.name for path in files} == FILES
        assert sum(path.stat().st_size for path in files) <= 16 * 2**20

    def test_weights_are_bfloat16_and_tied(self):
        with safe_open(shipped.checkpoint() / "model.safetensors", "pt") as weights:
            assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"BF16"}
            assert "model.embeddings.weight" in weights.keys() and "lm_head.weight" not in weights.keys()
        model = AutoModelForCausalLM.from_pretrained(shipped.checkpoint())
        assert isinstance(model, DeltaNetForCausalLM) and model.dtype == torch.bfloat16
        assert model.lm_head.weight is model.get_input_embeddings().weight
        assert model.num_parameters() == RESULTS["parameters"]

    def test_the_tokenizer_fits(self):
        config, tokenizer = (auto.from_pretrained(shipped.checkpoint()) for auto in (AutoConfig, AutoTokenizer))
        assert len(tokenizer) == config.vocab_size == 8192
        assert tokenizer.bos_token_id == config.bos_token_id and tokenizer.eos_token_id == config.eos_token_id
        text = "Mr. Darcy: “£5, naïve”\n\n\tSELECT * FROM t; 漢字"
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


class TestCard:
    def test_it_states_the_results(self):
        text = (shipped.checkpoint() / card.CARD).read_text(encoding="utf-8")
        assert text == card.render(shipped.checkpoint())
        assert ModelCard(text).data.license == "apache-2.0"
        assert f"**{RESULTS['test']['float32']:.4f}**" in text

    def test_bits_per_byte_are_those_of_lm_eval(self, loaded):
        passages = [document["passage"] for document in smoke_documents(held_out_text(None))["smoke_perplexity"]]
        stated = RESULTS["smoke"][0]
        assert (stated["task"], stated["metric"]) == ("smoke_perplexity", "bits_per_byte")
        assert bits_per_byte(*loaded, passages, 1024, batch=8) == pytest.approx(stated["value"], abs=1e-3)

    @pytest.mark.parametrize("row", RESULTS["samples"][1:3], ids=lambda row: f"{row['prompt'][:12]}-{row['seed']}")
    def test_samples_are_reproduced(self, loaded, row):
        assert continuation(*loaded, row["prompt"], seed=row["seed"]) == row["text"]


def test_greedy_text_is_that_of_whole_forwards(loaded):
    model, tokenizer = loaded
    ids = tokenizer("The people of the United States", return_tensors="pt")["input_ids"]
    found = model.generate(ids, max_new_tokens=20, do_sample=False)
    for _ in range(20):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(found, ids)


def test_it_loads_without_the_extras(tmp_path):
    """In another directory, as the command's last lines say."""
    lines = shipped.NEXT_STEPS.split("\n\n")[-1]
    missing = ("accelerate", "datasets", "lm_eval", "matplotlib", "peft")
    blocked = f"import sys\nfor name in {missing}: sys.modules[name] = None\n"
    code = blocked + "\n".join(line.strip() for line in lines.splitlines())
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("The people")


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["shipped", *map(str, arguments)])
    return shipped.main()


@pytest.fixture
def evaluated(monkeypatch):
    """Arguments of the evaluation, which finds what the card has."""
    cli = pytest.importorskip("deltanet.eval.cli")
    found = {row["task"]: {"metrics": {f"{row['metric']},none": row["value"]}} for row in RESULTS["smoke"]}
    calls = []
    monkeypatch.setattr(cli, "main", lambda arguments: calls.append(arguments) or {"results": found})
    return calls


@pytest.fixture
def quiet(monkeypatch):
    """`quiet` and `set_num_threads` act on the whole process."""
    monkeypatch.setattr(shipped, "quiet", lambda: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)


@pytest.mark.usefixtures("quiet")
class TestCommand:
    def test_text_scores_and_what_next(self, monkeypatch, tmp_path, capsys, evaluated):
        monkeypatch.chdir(tmp_path)
        assert command(monkeypatch) == 0
        printed, _ = capsys.readouterr()
        sample = RESULTS["samples"][0]
        assert (sample["prompt"], sample["seed"]) == (PROMPT, 0)
        text, scores = printed.split("\nScoring it")
        assert text.rstrip("\n").endswith(sample["text"])
        assert "7.7 million parameters" in text and "1.152 bits per byte" in text
        for row in RESULTS["smoke"]:
            assert f"{shipped.ROWS[row['task']]:44}{row['value']:10.4f}{row['value']:10.4f}" in scores
        for module in ("train.first_run", "train.corpus", "train 7m-corpus"):
            assert f"-m deltanet.{module}" in scores
        assert evaluated[0][0] == str(shipped.checkpoint()) and "runs/shipped" in evaluated[0]

    def test_the_evaluation_itself(self, monkeypatch, tmp_path, capfd):
        """One document a task, without a network and outside a repository."""
        cli = pytest.importorskip("deltanet.eval.cli")
        evaluate = cli.main
        monkeypatch.setattr(cli, "main", lambda arguments: evaluate([*arguments, "--limit", "1"]))
        monkeypatch.setattr(socket.socket, "connect", lambda *a: pytest.fail("a connection was opened"))
        monkeypatch.chdir(tmp_path)
        assert command(monkeypatch, "--tokens", 1, "--output", tmp_path / "scores") == 0
        printed, errors = capfd.readouterr()
        assert all(words in printed for words in shipped.ROWS.values()) and "lm_eval --model" not in printed
        assert "Running loglikelihood requests" in errors and "fatal" not in errors and "Traceback" not in errors
        assert (tmp_path / "scores" / "results.json").is_file()

    def test_without_lm_eval(self, monkeypatch, capsys):
        monkeypatch.setattr(shipped.importlib.util, "find_spec", lambda name: None)
        assert command(monkeypatch, "--tokens", 1) == 0
        printed, _ = capsys.readouterr()
        assert "Not scored: lm-eval is missing (pip install 'deltanet[eval]')" in printed and "first_run" in printed

    def test_interrupted(self, monkeypatch, capsys):
        def interrupt(*arguments):
            raise KeyboardInterrupt

        monkeypatch.setattr(shipped, "continuation", interrupt)
        assert command(monkeypatch) == 130
        assert "The same command goes on" in capsys.readouterr().err

    def test_nowhere_to_write(self, monkeypatch, tmp_path, capfd):
        pytest.importorskip("lm_eval")
        (tmp_path / "file").write_text("")
        assert command(monkeypatch, "--tokens", 1, "--output", tmp_path / "file" / "scores") == 2
        errors = capfd.readouterr().err
        assert "Not scored: " in errors and f"--output names another directory than {tmp_path / 'file' / 'scores'}" in errors

    @pytest.mark.parametrize("arguments", [("--prompt", " "), ("--tokens", "0"), ("--seed", "-1")])
    def test_refused_arguments(self, monkeypatch, capsys, arguments):
        with pytest.raises(SystemExit, match="2"):
            command(monkeypatch, *arguments)
        assert f"{arguments[0]} is" in capsys.readouterr().err


def test_children_are_silenced_alone(capfd):
    loud = [sys.executable, "-c", "import sys; sys.stderr.write('child')"]
    with pytest.raises(ValueError), quiet_children():
        subprocess.run(loud)
        sys.stderr.write("parent")
        raise ValueError
    subprocess.run(loud)
    assert capfd.readouterr().err == "parentchild"


def test_every_task_has_words():
    assert list(shipped.ROWS) == [row["task"] for row in RESULTS["smoke"]]
