"""Publishing: whole journeys through a Hub in memory, with this package and without it."""

import json
import re

import hub_visitor
import pytest
import torch
import yaml
from hub_server import TOKEN, MemoryHub, Repository
from huggingface_hub import EvalResultEntry, ModelCard, parse_eval_result_entries
from models import tiny_model, token_ids
from publishing import copy_package, edit, run, tiny_tokenizer, write_checkpoint
from transformers import AutoModelForCausalLM

from deltanet.publish import Statement, publish
from deltanet.publish.flatten import AUTO_MAP, flattened_code

IDS = token_ids(2, 9).tolist()
PUBLIC = "me/tiny"
MISSING = ("deltanet", "triton")
RESULTS = [
    {"task": "lambada_openai", "dataset": "EleutherAI/lambada_openai", "metric": "acc", "value": 0.25, "stderr": 0.01,
     "settings": {"num_fewshot": 0}},
    {"task": "lambada_openai", "dataset": "EleutherAI/lambada_openai", "metric": "perplexity", "value": 12},
    {"task": "recall", "metric": "contains", "value": 0.5},
]  # fmt: skip


def run_with_token(token: str, *arguments) -> tuple[int | str, str, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", token)
        return run(*arguments)


def answers_with_package(repo: str, **arguments):
    """What `hub_visitor.answers` gives, with the imported package, and the class's module."""
    model = AutoModelForCausalLM.from_pretrained(repo, **arguments).eval()
    return hub_visitor.answers_of(model, IDS), type(model).__module__


def push(repo: str, **arguments) -> None:
    """The calls of Transformers, without anything of `deltanet.publish`."""
    tiny_model("global").push_to_hub(repo, **arguments)
    tiny_tokenizer().push_to_hub(repo, revision=arguments.get("revision"))


def publish_from_memory(repo: str) -> str:
    """A tied model and its tokenizer, by the call and not the command."""
    model = tiny_model("pure", tie_word_embeddings=True)
    return publish(model, repo, statement=Statement(license="mit"), tokenizer=tiny_tokenizer())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("publish")


@pytest.fixture(scope="module")
def hub():
    with MemoryHub() as hub:
        yield hub


@pytest.fixture(scope="module")
def clients(hub, folder):
    """The processes of `publisher` and `visitor`; they start side by side."""
    with hub.client(folder / "publisher", TOKEN) as publisher, hub.client(folder / "visitor", missing=MISSING) as visitor:
        visitor.submit(hub_visitor.importable)
        yield publisher, visitor


@pytest.fixture(scope="module")
def publisher(clients):
    """A process with this package and a token."""
    return lambda function, *arguments, **named: clients[0].submit(function, *arguments, **named).result()


@pytest.fixture(scope="module")
def visitor(clients):
    """A process without token, where neither this package nor Triton exists."""
    return lambda function, *arguments: clients[1].submit(function, *arguments).result()


@pytest.fixture(scope="module")
def checkpoint(folder):
    return write_checkpoint(folder / "checkpoint")


@pytest.fixture(scope="module")
def published(publisher, checkpoint, folder):
    """The output of publishing `checkpoint` as `PUBLIC`, in shards and with all that a card may hold."""
    (folder / "results.json").write_text(json.dumps(RESULTS))
    (folder / "training.md").write_text("By hand, on nothing.")
    card = ["--license", "mit", "--language", "en", "--dataset", "me/text", "--tag", "tiny"]
    files = ["--results", folder / "results.json", "--training", folder / "training.md"]
    status, out, err = publisher(run, checkpoint, PUBLIC, *card, *files, "--max-shard-size", "40KB")
    assert status == 0, err
    return out + err


@pytest.fixture(scope="module")
def expected(published, publisher):
    """Logits and continuation of the published model with this package."""
    return publisher(answers_with_package, PUBLIC)[0]


def test_published_in_one_commit_with_everything(hub, published):
    repository, files = hub.repositories[PUBLIC], hub.files(PUBLIC)
    assert len(repository.messages) == 2  # the creation and one commit
    assert sum(name.endswith(".safetensors") for name in files) > 2
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "README.md"} < set(files)
    assert set(flattened_code().files) < set(files)
    assert json.loads(files["config.json"])["auto_map"] == AUTO_MAP
    listed = re.findall(r"^ *([\d,]+)  (\S+)$", published, re.MULTILINE)
    sizes = {name: len(content) for name, content in files.items()}
    assert {name: int(size.replace(",", "")) for size, name in listed} == sizes


def test_card_and_results(hub, published):
    files = hub.files(PUBLIC)
    card = ModelCard(files["README.md"].decode())
    data = card.data.to_dict()
    assert (data["license"], data["library_name"], data["pipeline_tag"]) == ("mit", "transformers", "text-generation")
    assert {"delta_net", "tiny"} < set(data["tags"]) and data["datasets"] == ["me/text"]
    assert [(x.dataset_name, x.metric_type, x.metric_value) for x in card.data.eval_results] == [
        ("lambada_openai", "acc", 0.25),
        ("lambada_openai", "perplexity", 12),
        ("recall", "contains", 0.5),
    ]
    assert "By hand, on nothing." in card.text and "| lambada_openai | acc | 0.25 ± 0.01 | num_fewshot 0 |" in card.text
    benchmark = {"dataset_id": "EleutherAI/lambada_openai", "task_id": "lambada_openai"}
    entries = parse_eval_result_entries(yaml.safe_load(files[".eval_results/deltanet.yaml"]))
    assert entries == [EvalResultEntry(**benchmark, value=0.25, notes="acc, num_fewshot 0")]


def test_stranger_gets_the_same_bits(visitor, expected):
    assert visitor(hub_visitor.importable, *MISSING, "torch") == ["torch"]
    assert visitor(hub_visitor.answers, PUBLIC, IDS) == expected


def test_stranger_saves_it_again(visitor, expected, folder):
    names, answers = visitor(hub_visitor.save_again, PUBLIC, str(folder / "again"), IDS)
    assert set(flattened_code().files) <= set(names)
    assert answers == expected


def test_stranger_fine_tunes(visitor, published):
    losses, without_gradient = visitor(hub_visitor.fine_tune, PUBLIC, IDS)
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.01
    assert without_gradient == []


def test_every_class_is_found(visitor, published):
    named = [reference.split(".")[1] for reference in AUTO_MAP.values()]
    assert sorted(visitor(hub_visitor.classes, PUBLIC)) == sorted(named)


def test_pipeline_and_the_example_of_the_card(visitor, published):
    piped, printed = visitor(hub_visitor.complete, PUBLIC, "The delta rule", 40)
    assert len(piped) > len("The delta rule") and printed == piped


def test_lm_eval_on_the_repository(visitor, published, folder):
    pytest.importorskip("lm_eval")
    texts = ["A rule of one line, corrected.", "What was written may be written again!"]
    tasks = folder / "tasks"
    tasks.mkdir()
    (tasks / "texts.jsonl").write_text("".join(json.dumps({"page": text}) + "\n" for text in texts))
    task = {
        "task": "tiny_texts",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tasks / "texts.jsonl")}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{page}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    (tasks / "tiny_texts.yaml").write_text(yaml.safe_dump(task))
    evaluated, by_hand = visitor(hub_visitor.bits_per_byte, PUBLIC, str(tasks), "tiny_texts", texts)
    assert evaluated == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.parametrize("arguments", [{}, {"trust_remote_code": True}])
def test_imported_package_takes_precedence(hub, publisher, expected, arguments):
    seen = len(hub.requests)
    assert publisher(answers_with_package, PUBLIC, **arguments) == (expected, "deltanet.modeling_deltanet")
    assert not [request for request in hub.requests[seen:] if request.endswith("_deltanet.py")]


@pytest.mark.parametrize(
    ("device", "environment"),
    [
        ("cpu", {"TRITON_INTERPRET": "1", "DELTANET_BACKEND": "triton"}),
        pytest.param("cuda", {}, marks=pytest.mark.gpu),
    ],
)
def test_kernels_of_the_repository(hub, expected, folder, device, environment):
    """With Triton, in its interpreter or on a GPU, and without this package."""
    pytest.importorskip("triton")
    with hub.client(folder / device, missing=("deltanet",), **environment) as client:
        logits, log = client.submit(hub_visitor.logits_and_log, PUBLIC, IDS, device).result()
    assert f"delta rule on {device}: triton implementation" in log
    torch.testing.assert_close(torch.tensor(logits), torch.tensor(expected[0]), rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module")
def changed_revision(hub, published, folder):
    """A branch of `PUBLIC` whose code has other maths in its operators and another cache layer."""
    package = copy_package(folder / "changed")
    edit(package / "kernels/reference.py", "L2_EPS = 1e-6", "L2_EPS = 0.5")
    edit(package / "cache_deltanet.py", "def read(", "def recall(")
    edit(package / "mixer_deltanet.py", "cache.read(", "cache.recall(")
    files = {name: text.encode() for name, text in flattened_code(package).files.items()}
    hub.repositories[PUBLIC].commit("changed", {**hub.files(PUBLIC), **files}, "other maths")
    return "changed"


def test_two_revisions_in_one_process(visitor, expected, changed_revision):
    alone = visitor(hub_visitor.answers, PUBLIC, IDS, changed_revision)
    assert alone != expected
    both = [(PUBLIC, None), (PUBLIC, changed_revision)]
    assert visitor(hub_visitor.answers_side_by_side, both, IDS)[0] == [expected, alone]
    assert visitor(hub_visitor.answers_side_by_side, both[::-1], IDS)[0] == [alone, expected]
    namespaces = visitor(hub_visitor.operators)
    assert len(namespaces) == 2 and flattened_code().revision in " ".join(namespaces)


def test_equal_code_in_two_repositories(hub, visitor, expected):
    """Transformers keeps one cache layer a name: the second copy's serves the first one's models, too."""
    copy = hub.repositories["me/copy"] = Repository(private=False)
    copy.commit("main", hub.files(PUBLIC), "copy")
    answers, modules = visitor(hub_visitor.answers_side_by_side, [(PUBLIC, None), ("me/copy", None)], IDS)
    assert modules[0] != modules[1]
    assert answers == [expected, expected]


def test_checkpoint_of_the_reference_in_one_command(hub, publisher, visitor, checkpoint, folder, expected):
    """A published checkpoint as fla writes it: its keys, its card, no generation configuration."""
    config = json.loads((checkpoint / "config.json").read_text())
    keys = {"expand_k": 1, "expand_v": 1, "fuse_norm": True, "fuse_cross_entropy": True, "torch_dtype": "float32"}
    config = {key: value for key, value in config.items() if key not in ("dtype", "attn_mode")} | keys
    files = {path.name: path.read_bytes() for path in checkpoint.iterdir() if path.name != "generation_config.json"}
    files["config.json"] = json.dumps(config).encode()
    files["README.md"] = b"---\nlicense: apache-2.0\nlanguage: en\ndatasets:\n- a/b\ntags:\n- fla\n---\nA card."
    source = hub.repositories["fla-hub/tiny"] = Repository(private=False)
    commit = source.commit("main", files, "as published")

    status, out, err = publisher(run, "fla-hub/tiny", "me/converted")
    assert status == 0, err
    converted = hub.files("me/converted")
    assert converted["model.safetensors"] == files["model.safetensors"]
    assert json.loads(converted["config.json"])["fuse_norm"] is True
    card = ModelCard(converted["README.md"].decode())
    assert (card.data.license, card.data.base_model, card.data.datasets) == ("apache-2.0", "fla-hub/tiny", ["a/b"])
    combined = re.search("combined SHA-256 ([0-9a-f]{64})", out)[1]
    assert commit in card.text and combined in card.text
    assert visitor(hub_visitor.answers, "me/converted", IDS) == expected


def test_model_in_memory(hub, publisher, visitor):
    address = publisher(publish_from_memory, "me/memory")
    assert address.endswith(hub.repositories["me/memory"].branches["main"])
    assert visitor(hub_visitor.answers, "me/memory", IDS) == publisher(answers_with_package, "me/memory")[0]


def test_private_repository(hub, publisher, visitor, checkpoint):
    status, _, err = publisher(run, checkpoint, "me/private", "--license", "mit", "--private")
    assert status == 0, err
    assert hub.repositories["me/private"].private
    assert publisher(answers_with_package, "me/private")
    message = visitor(hub_visitor.refusal, "me/private")
    assert "me/private" in message and "private" in message and "token" in message


def test_private_is_not_asked_of_a_public_repository(hub, publisher, checkpoint, published):
    before = list(hub.repositories[PUBLIC].messages)
    status, _, _ = publisher(run, checkpoint, PUBLIC, "--license", "mit", "--private")
    assert "PermissionError" in status and "is public" in status
    assert hub.repositories[PUBLIC].messages == before


def test_interrupted_upload_goes_on(hub, publisher, folder):
    checkpoint = write_checkpoint(folder / "interrupted", seed=5)
    command = (checkpoint, "me/interrupted", "--license", "mit", "--max-shard-size", "40KB")
    hub.uploads_allowed = 1
    try:
        status, _, err = publisher(run, *command)
    finally:
        hub.uploads_allowed = None
    assert "model-00002-of" in status and re.search(r"\[2/\d\] model-00002-of-\d+.safetensors, [\d,]+ bytes", err)
    repository, first = hub.repositories["me/interrupted"], hub.uploaded_blobs()
    assert hub.files("me/interrupted") == {}
    status, _, err = publisher(run, *command)
    assert status == 0, err
    second = hub.uploaded_blobs()[len(first) :]
    assert len(second) >= 2 and first[-1] not in second
    assert len(repository.messages) == 2
    commit = dict(repository.branches)
    assert publisher(run, *command)[0] == 0
    assert repository.branches == commit and hub.uploaded_blobs() == first + second


def test_branch_and_stale_files(hub, publisher, checkpoint, published):
    before = dict(hub.files(PUBLIC))
    old = {**before, "notes.txt": b"kept", "chat_template.jinja": b"of another tokenizer"}
    hub.repositories[PUBLIC].commit("whole", old, "an old state")
    status, _, err = publisher(run, checkpoint, PUBLIC, "--license", "mit", "--revision", "whole")
    assert status == 0, err
    assert hub.files(PUBLIC) == before
    whole = hub.files(PUBLIC, "whole")
    assert [name for name in whole if "safetensors" in name] == ["model.safetensors"]
    assert ".eval_results/deltanet.yaml" not in whole and "chat_template.jinja" not in whole
    assert whole["notes.txt"] == b"kept"


def test_dry_run_sends_nothing(hub, publisher, checkpoint):
    seen = len(hub.requests)
    status, out, err = publisher(run, checkpoint, "me/dry", "--license", "mit", "--dry-run", "--hashes")
    assert status == 0, err
    assert hub.requests[seen:] == []
    size = (checkpoint / "model.safetensors").stat().st_size
    assert re.search(rf"^ *{size:,}  model.safetensors$", out, re.MULTILINE)
    assert re.search(r"^[0-9a-f]{64}  model.embeddings.weight$", out, re.MULTILINE)


def test_output_directory(visitor, publisher, hub, checkpoint, folder, expected):
    target = folder / "written"
    status, out, _ = publisher(run, checkpoint, "me/written", "--license", "mit", "--output", target)
    assert status == 0 and "Nothing was sent" in out and "me/written" not in hub.repositories
    assert visitor(hub_visitor.answers, str(target), IDS) == expected


@pytest.mark.parametrize("arguments", [{}, {"max_shard_size": "40KB"}, {"revision": "branch"}, {"private": True}])
def test_push_to_hub_as_in_transformers(hub, publisher, expected, arguments):
    repo = f"me/pushed-{len(hub.repositories)}"
    publisher(push, repo, **arguments)
    branch = arguments.get("revision", "main")
    weights = [name for name in hub.files(repo, branch) if name.endswith(".safetensors")]
    assert (len(weights) > 1) == ("max_shard_size" in arguments)
    assert hub.repositories[repo].private == arguments.get("private", False)
    hub.repositories[repo].branches["main"] = hub.repositories[repo].branches[branch]
    assert publisher(answers_with_package, repo)[0] == expected


@pytest.mark.parametrize(("token", "message"), [("", "There is no Hub token"), ("hf_wrong", "The Hub refuses the token")])
def test_without_a_valid_token_nothing_is_made(hub, publisher, checkpoint, token, message):
    status, out, err = publisher(run_with_token, token, checkpoint, "me/none", "--license", "mit")
    assert message in status and "hf auth login" in status
    assert "hf_wrong" not in f"{status}{out}{err}" and "me/none" not in hub.repositories


def test_the_token_is_nowhere(hub, publisher, published, folder):
    assert TOKEN not in published
    status, out, err = publisher(run, folder / "nothing", PUBLIC, "--license", "mit")
    assert TOKEN not in f"{status}{out}{err}"
    holding = [path for path in folder.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert holding == []
    commits = [files for repository in hub.repositories.values() for files in repository.commits.values()]
    assert not any(TOKEN.encode() in content for files in commits for content in files.values())
