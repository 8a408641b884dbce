"""Tiny checkpoints to publish, the command, and changed copies of the model's code, for the tests of publishing."""

import contextlib
import io
import shutil
from pathlib import Path

from models import tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from deltanet.publish.__main__ import main
from deltanet.publish.flatten import PACKAGE


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A token a character; as many ids as `tiny_config` has."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .,-!"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def write_checkpoint(directory: Path, kind: str = "global", **overrides) -> Path:
    tiny_model(kind, **overrides).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def run(*arguments) -> tuple[int | str, str, str]:
    """`python -m deltanet.publish`: (0 or the message it ends with, stdout, stderr)."""
    status, out, err = 0, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as stop:
            status = stop.code
    return status, out.getvalue(), err.getvalue()


def copy_package(directory: Path) -> Path:
    """The package's files that are flattened, to be changed."""
    (directory / "kernels").mkdir(parents=True)
    for path in [*PACKAGE.glob("*_deltanet.py"), *PACKAGE.glob("kernels/*.py")]:
        shutil.copyfile(path, directory / path.relative_to(PACKAGE))
    return directory


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
