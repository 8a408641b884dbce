"""Checkpoints on this machine written as repositories, those of the reference converted: no network, no number changed."""

import hashlib
import json
import re
import shlex
import shutil
import socket

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HTTPError
from models import tiny_config, tiny_model, token_ids
from publishing import edit, run, tiny_tokenizer, write_checkpoint
from safetensors.torch import load_file, save_file

from deltanet import DeltaNetForCausalLM, DeltaNetForSequenceClassification
from deltanet.publish import Statement, publish

IDS = token_ids(2, 9)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("a conversion needs no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("convert") / "checkpoint")


@pytest.fixture
def source(checkpoint, tmp_path):
    """A copy to be spoilt."""
    return shutil.copytree(checkpoint, tmp_path / "source")


def in_layout_of_2024(tensors, fused, inner_norms):
    """The reference's names before February 2025."""
    old = {}
    for name, tensor in tensors.items():
        if fused and "gate_proj" in name:
            tensor = torch.cat([tensor, tensors[name.replace("gate_proj", "up_proj")]])
        if not (fused and "up_proj" in name):
            old[re.sub(r"(attn|mlp)_norm", r"\1.norm", name) if inner_norms else name] = tensor
    return old


def write_2024(directory, fused=True, inner_norms=True, shards=1, **overrides):
    """A model in a layout of 2024 in `directory`; returns its state in today's."""
    tiny_model(**overrides).save_pretrained(directory)
    state = load_file(directory / "model.safetensors")
    old = sorted(in_layout_of_2024(state, fused, inner_norms).items())
    config = {**json.loads((directory / "config.json").read_text()), "norm_first": inner_norms, "use_elu": False}
    (directory / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(dict(old), directory / "model.safetensors", {"format": "pt"})
        return state
    (directory / "model.safetensors").unlink()
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    for i, name in enumerate(names):
        save_file(dict(old[i::shards]), directory / name, {"format": "pt"})
    weight_map = {key: names[i % shards] for i, (key, _) in enumerate(old)}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return state


def combined_hash(tensors):
    """As documented: SHA-256 over the names and over the SHA-256 of dtype, shape and bytes."""
    dtypes, lines = {torch.float32: "F32", torch.bfloat16: "BF16"}, []
    for name, tensor in sorted(tensors.items()):
        content = f"{dtypes[tensor.dtype]} {list(tensor.shape)}".encode(), bytes(tensor.flatten().view(torch.uint8).tolist())
        lines.append(f"{name} {hashlib.sha256(b''.join(content)).hexdigest()}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        ({"fused": True, "inner_norms": False}, ["2 gate_proj of twice the width were split"]),
        ({"fused": False, "inner_norms": True}, ["4 norms were renamed"]),
        ({"fused": True, "inner_norms": True, "dtype": "bfloat16"}, ["4 norms", "2 gate_proj"]),
        ({"fused": True, "inner_norms": True, "shards": 3}, ["4 norms", "2 gate_proj"]),
    ],
)
def test_layouts_of_2024(tmp_path, layout, changes):
    state = write_2024(tmp_path / "old", **layout)
    status, out, _ = run(tmp_path / "old", "--output", tmp_path / "new")
    assert status == 0 and all(change in out for change in changes)
    written = load_file(tmp_path / "new/model.safetensors")
    assert written.keys() == state.keys()
    assert all(torch.equal(written[name], state[name]) and written[name].dtype == state[name].dtype for name in state)
    shown = re.findall("combined SHA-256 ([0-9a-f]{64})", out)
    old = in_layout_of_2024(state, layout["fused"], layout["inner_norms"])
    assert shown == [combined_hash(old), combined_hash(state)]
    with torch.no_grad():
        logits = DeltaNetForCausalLM.from_pretrained(tmp_path / "new").eval()(IDS).logits
        expected = tiny_model(dtype=layout.get("dtype"))(IDS).logits
    assert torch.equal(logits, expected)


def test_gate_rows_come_first(tmp_path):
    write_2024(tmp_path / "old")
    tensors = load_file(tmp_path / "old/model.safetensors")
    gate_proj, down_proj = (tensors[f"model.layers.1.mlp.{name}_proj.weight"] for name in ("gate", "down"))
    x = torch.randn(5, gate_proj.shape[1], generator=torch.Generator().manual_seed(3))
    gate, y = (x @ gate_proj.T).chunk(2, -1)  # the reference's forward of the time
    expected = (F.silu(gate) * y) @ down_proj.T
    run(tmp_path / "old", "--output", tmp_path / "new")
    with torch.no_grad():
        actual = DeltaNetForCausalLM.from_pretrained(tmp_path / "new").model.layers[1].mlp(x)
    torch.testing.assert_close(actual, expected)


def test_command_that_loading_names(tmp_path, monkeypatch):
    """What `from_pretrained` says of a layout of 2024 is a command that works."""
    write_2024(tmp_path / "old", inner_norms=False)
    with pytest.raises(ValueError, match="layout of 2024") as caught:
        DeltaNetForCausalLM.from_pretrained(tmp_path / "old")
    command = shlex.split(re.search("`(python .+?)`", str(caught.value))[1])
    assert command[:3] == ["python", "-m", "deltanet.publish"]
    monkeypatch.chdir(tmp_path)
    assert run(*command[3:])[0] == 0
    DeltaNetForCausalLM.from_pretrained(tmp_path / command[-1])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda tensors: {**tensors, "model.layers.0.mlp.gate_proj.weight": torch.ones(95, 32)}, "95 rows"),
        (lambda tensors: {**tensors, "model.layers.0.mlp.gate_proj.weight": torch.ones(94, 32)}, "another shape"),
        (lambda tensors: {k: v for k, v in tensors.items() if k != "model.layers.0.mlp.norm.weight"}, "missing"),
    ],
)
def test_what_is_no_layout_is_refused(tmp_path, spoil, message):
    write_2024(tmp_path / "old")
    tensors = load_file(tmp_path / "old/model.safetensors")
    save_file(spoil(tensors), tmp_path / "old/model.safetensors", {"format": "pt"})
    assert message in run(tmp_path / "old", "--output", tmp_path / "new")[0]
    assert not (tmp_path / "new").exists()


def test_norm_first_with_todays_names_is_refused(source, tmp_path):
    edit(source / "config.json", '"norm_eps"', '"norm_first": true, "norm_eps"')
    assert "`norm_first` is True" in run(source, "--output", tmp_path / "new")[0]


def test_local_conversion_needs_neither_licence_nor_tokenizer(source, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).unlink()
    status, out, _ = run(source, "--output", tmp_path / "new")
    assert status == 0 and "Nothing was sent." in out
    assert (tmp_path / "new/model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    card = ModelCard.load(tmp_path / "new/README.md")
    assert card.data.license is None and card.data.library_name == "transformers"
    assert "is not empty" in run(source, "--output", tmp_path / "new")[0]


def test_a_repository_needs_both(source):
    assert "--license" in run(source, "me/tiny", "--dry-run")[0]
    (source / "tokenizer_config.json").unlink()
    assert "--tokenizer" in run(source, "me/tiny", "--license", "mit", "--dry-run")[0]


def test_destination_must_be_named(checkpoint):
    status, _, err = run(checkpoint)
    assert status == 2 and "REPOSITORY, or --output DIRECTORY" in err
    with pytest.raises(ValueError, match="`repo_id` and `output` are None"):
        publish(checkpoint)


def test_unreachable_hub_is_one_message(checkpoint, monkeypatch):
    """What httpx raises is no OSError."""

    def fail(self):
        raise HTTPError("connection refused")

    monkeypatch.setattr(HfApi, "whoami", fail)
    assert run(checkpoint, "me/x", "--license", "mit")[0] == "HTTPError: connection refused"


def test_card_is_kept_when_published_again(checkpoint, tmp_path):
    results = [
        {"task": "lambada", "dataset": "a/b", "metric": "acc", "value": 0.5, "stderr": 0.1, "settings": {"shots": 0}},
        {"task": "recall", "dataset": None, "metric": "acc", "value": 1, "stderr": None, "settings": None},
    ]
    (tmp_path / "results.json").write_text(json.dumps(results))
    card = ["--license", "mit", "--language", "en", "--dataset", "a/text", "--tag", "tiny", "--base-model", "a/base"]
    first = run(checkpoint, "me/x", *card, "--results", tmp_path / "results.json", "--output", tmp_path / "first")
    assert first[0] == 0
    assert run(tmp_path / "first", "me/x", "--output", tmp_path / "second")[0] == 0
    for name in ("README.md", ".eval_results/deltanet.yaml"):
        assert (tmp_path / "second" / name).read_text() == (tmp_path / "first" / name).read_text()


def test_results_of_a_foreign_card(source, tmp_path):
    """Numbers are taken over, other texts are not."""
    index = [{"task": {"type": "x"}, "dataset": {"name": "mmlu", "type": "cais/mmlu"}, "metrics": metrics} for metrics in
             ([{"type": "acc", "value": 0.25}], [{"type": "acc", "value": "20.0 ± 1.2"}])]  # fmt: skip
    card = ModelCard(f"---\nlicense: mit\nmodel-index: {json.dumps([{'name': 'a', 'results': index}])}\n---\nBy others.")
    card.save(source / "README.md")
    assert run(source, "me/x", "--output", tmp_path / "new")[0] == 0
    results = ModelCard.load(tmp_path / "new/README.md").data.eval_results
    assert [(x.dataset_name, x.dataset_type, x.metric_value) for x in results] == [("mmlu", "cais/mmlu", 0.25)]


def test_training_of_a_trainer_checkpoint_is_described(source, tmp_path):
    state = {"global_step": 1200, "num_input_tokens_seen": 5000, "log_history": [{"loss": 3.0}, {"loss": 2.5}, {}]}
    (source / "trainer_state.json").write_text(json.dumps(state))
    (source / "optimizer.pt").write_bytes(b"x")
    assert "optimizer.pt: state of the optimizer" in run(source, "--output", tmp_path / "new")[0]
    assert run(source, "--output", tmp_path / "new", "--leave-out")[0] == 0
    assert "1,200 optimizer steps, 5,000 tokens; last loss 2.5." in (tmp_path / "new/README.md").read_text()
    assert not {"trainer_state.json", "optimizer.pt"} & {path.name for path in (tmp_path / "new").iterdir()}


def test_paths_of_this_machine_stay_here(source, tmp_path):
    fields = json.loads((source / "tokenizer_config.json").read_text())
    fields |= {"name_or_path": str(source), "tokenizer_file": f"{source}/tokenizer.json"}
    (source / "tokenizer_config.json").write_text(json.dumps(fields))
    edit(source / "config.json", "{", f'{{"_name_or_path": "{source}",')
    assert run(source, "me/tiny", "--license", "mit", "--output", tmp_path / "new")[0] == 0
    texts = [path.read_bytes() for path in (tmp_path / "new").rglob("*") if path.is_file()]
    assert len(texts) > 10 and not any(str(tmp_path).encode() in text for text in texts)


def test_classifier_in_memory(tmp_path):
    model = tiny_model("sliding", DeltaNetForSequenceClassification, num_labels=3)
    publish(model, "me/x", output=tmp_path / "new", tokenizer=tiny_tokenizer(), statement=Statement(license="mit"))
    card = ModelCard.load(tmp_path / "new/README.md")
    assert card.data.pipeline_tag == "text-classification"
    assert "AutoModelForSequenceClassification.from_pretrained" in card.text
    assert "1 with softmax attention over a window of 5 tokens (1, counted from 0)" in card.text
    loaded = DeltaNetForSequenceClassification.from_pretrained(tmp_path / "new").eval()
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def spoil_json(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: (path / "config.json").unlink(), "no config.json"),
        (lambda path: (path / "model.safetensors").unlink(), "safetensors and nothing else"),
        (lambda path: (path / "model.safetensors").rename(path / "pytorch_model.bin"), "safetensors and nothing else"),
        (lambda path: (path / "model.safetensors").write_bytes(b"\x80\x04pickled"), "not a safetensors file"),
        (lambda path: (path / "model.safetensors.index.json").write_text("{}"), "holds both"),
        (lambda path: spoil_json(path / "config.json", num_hidden_layers=4), "missing: model.layers.3"),
        (lambda path: spoil_json(path / "config.json", num_hidden_layers=2), "unexpected: model.layers.2"),
        (lambda path: spoil_json(path / "config.json", vocab_size=60), "another shape: lm_head.*embeddings"),
        (lambda path: spoil_json(path / "config.json", vocab_size="many"), "vocab_size"),
        (lambda path: spoil_json(path / "config.json", model_type="llama"), "model_type is 'llama'"),
        (lambda path: spoil_json(path / "config.json", architectures=["OtherForCausalLM"]), "OtherForCausalLM"),
        (lambda path: spoil_json(path / "tokenizer_config.json", auto_map={"AutoTokenizer": ["x.X", None]}), "auto_map"),
    ],
)
def test_what_does_not_fit_is_refused(source, tmp_path, spoil, message):
    spoil(source)
    status = run(source, "--output", tmp_path / "new", "--leave-out")[0]
    assert re.search(message, str(status))
    assert not (tmp_path / "new").exists()


def test_index_that_points_outside_is_refused(source, tmp_path):
    (source / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    weight_map = {"lm_head.weight": "../elsewhere.safetensors"}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "elsewhere" in run(source, "--output", tmp_path / "new")[0]


def test_tokenizer_with_more_ids_than_the_model(tmp_path):
    tiny_model(vocab_size=40).save_pretrained(tmp_path / "source")
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    status = run(tmp_path / "source", "--tokenizer", tmp_path / "tokenizer", "--output", tmp_path / "new")[0]
    assert "61 ids" in status and "vocab_size 40" in status


def test_shards_of_another_size(source, tmp_path):
    assert run(source, "--output", tmp_path / "new", "--max-shard-size", "20KB")[0] == 0
    shards = sorted((tmp_path / "new").glob("model-*.safetensors"))
    assert len(shards) > 3 and all(path.stat().st_size < 25_000 for path in shards)
    assert list((tmp_path / "new").glob("model.safetensors")) == []
    status, out, _ = run(tmp_path / "new", "--output", tmp_path / "whole")
    expected = combined_hash(load_file(source / "model.safetensors"))
    assert status == 0 and f"combined SHA-256 {expected}" in out
    assert sorted(path.name for path in (tmp_path / "whole").glob("model-*.safetensors")) == [path.name for path in shards]


def test_what_is_no_source(tmp_path):
    assert "neither a directory nor an id" in run(tmp_path / "missing", "--output", tmp_path / "new")[0]
    with pytest.raises(TypeError, match="DeltaNetConfig"):
        publish(tiny_config(), output=tmp_path / "new")
