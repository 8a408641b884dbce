"""What may be published and what is refused, and the form of results."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from deltanet.publish import Statement, read_results
from deltanet.publish.contents import checkpoint_files

TOKEN = "hf_" + "a1B2" * 9


def refuse(directory: Path, name: str, content: bytes = b"x") -> str:
    """The message of `checkpoint_files` for a checkpoint with one more file."""
    (directory / "config.json").write_text("{}")
    (directory / name).parent.mkdir(parents=True, exist_ok=True)
    (directory / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(name)) as caught:
        checkpoint_files(directory)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (".env", "secret"),
        (".netrc", "secret"),
        ("key.pem", "secret"),
        ("id_ed25519", "secret"),
        ("token", "secret"),
        ("aws_credentials.json", "secret"),
        ("optimizer.pt", "optimizer"),
        ("optimizer.safetensors", "optimizer"),
        ("global_step10/zero.pt", "optimizer"),
        ("training_args.bin", "training run"),
        ("rng_state_0.pth", "training run"),
        ("trainer_state.json", "training run"),
        ("pytorch_model.bin", "pickle"),
        ("vectors.npy", "pickle"),
        ("notes.txt", "not part"),
        ("helper.py", "not part"),
        ("checkpoint-10/model.safetensors", "not part"),
    ],
)
def test_what_is_no_checkpoint_is_refused(tmp_path, name, reason):
    assert reason in refuse(tmp_path, name)
    assert checkpoint_files(tmp_path, leave_out=True) == ["config.json"]


def test_all_that_is_refused_is_named_at_once(tmp_path):
    (tmp_path / "optimizer.pt").write_bytes(b"x")
    message = refuse(tmp_path, "notes.txt")
    assert "optimizer.pt" in message and "--leave-out" in message


@pytest.mark.parametrize(
    "secret",
    [
        TOKEN,
        "-----BEGIN RSA PRIVATE KEY-----",
        "-----BEGIN OPENSSH PRIVATE KEY-----",
        "AKIA" + "A1" * 8,
        "ghp_" + "a1B2" * 9,
        "github_pat_" + "a1B2_" * 6,
        "sk-proj-" + "a1B2" * 12,
    ],
)
def test_a_secret_inside_a_file_is_refused_and_not_shown(tmp_path, secret):
    message = refuse(tmp_path, "README.md", f"login with {secret} please".encode())
    assert secret not in message
    with pytest.raises(ValueError, match="README.md"):
        checkpoint_files(tmp_path, leave_out=True)


def test_a_secret_in_the_header_of_weights_is_refused(tmp_path):
    tensors = {"x": torch.tensor(list(TOKEN.encode()), dtype=torch.uint8)}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert checkpoint_files(tmp_path) == ["model.safetensors"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt", "command": f"train --token {TOKEN}"})
    with pytest.raises(ValueError, match="model.safetensors: it holds what looks like a Hub token"):
        checkpoint_files(tmp_path)


def test_a_link_out_of_the_checkpoint_is_refused(tmp_path):
    (tmp_path / "elsewhere").write_text("{}")
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint/config.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="config.json.*outside"):
        checkpoint_files(tmp_path / "checkpoint")


def test_a_linked_folder_is_not_entered(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/other.yaml").write_text("a: 1")
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint/.eval_results").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=".eval_results: not part"):
        checkpoint_files(tmp_path / "checkpoint")


def test_the_cache_of_the_hub_is_a_checkpoint(tmp_path):
    snapshot = tmp_path / "snapshots/0123"
    for folder in (snapshot, tmp_path / "blobs"):
        folder.mkdir(parents=True)
    (tmp_path / "blobs/abc").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    assert checkpoint_files(snapshot) == ["config.json"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({}, "keys must be"),
        ({"value": 1, "more": 2}, "keys must be"),
        ({"value": float("nan")}, "`value` is nan"),
        ({"value": True}, "`value` is True"),
        ({"value": None}, "`value` is None"),
        ({"value": 1, "stderr": "0.1"}, "`stderr` is '0.1'"),
        ({"value": 1, "dataset": 5}, "`dataset` is 5"),
        ({"value": 1, "settings": ["a"]}, "`settings` is"),
    ],
)
def test_results_of_another_form_are_refused(tmp_path, entry, message):
    results = [{"task": "a", "metric": "acc", "value": 1}, {"task": "a", "metric": "acc", **entry}]
    (tmp_path / "results.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match=f"results.json, entry 1: .*{message}"):
        read_results(tmp_path / "results.json")
    with pytest.raises(ValueError, match=f"Statement, entry 1: .*{message}"):
        Statement(results=results)


def test_results_are_a_list(tmp_path):
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ValueError, match="a list of objects"):
        read_results(tmp_path / "results.json")
