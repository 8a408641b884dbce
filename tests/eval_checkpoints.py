"""Tiny checkpoints with a tokenizer, and a text, for the tests of the evaluation."""

import argparse
import random
import shlex
from pathlib import Path

import pytest
from lm_eval._cli.run import Run
from lm_eval.config.evaluate_config import EvaluatorConfig
from models import tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

_WORDS = (
    "the a one old young garden river house captain letter morning evening walked spoke answered quiet kind window road "
    "friend sister brother carriage weather sudden gentle little great never always under above before after happy tired"
).split()


@pytest.fixture(autouse=True, scope="module")
def no_environment_report():
    """lm-eval lists the machine's packages and drivers after every task, in subprocesses that take seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
        yield


def english_like_text(sentences: int = 400, seed: int = 0) -> str:
    """Sentences of random words; the same for the same seed."""
    generator = random.Random(seed)
    made = (" ".join(generator.choices(_WORDS, k=generator.randint(5, 14))).capitalize() + "." for _ in range(sentences))
    return "\n".join(made)


def tiny_tokenizer(bos: str | None = "<s>", eos: str | None = "</s>", adds_bos: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 300 tokens that prepends BOS by itself, as the paper's tokenizer does."""
    special = ["<unk>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([english_like_text()], trainer)
    if adds_bos and bos:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token=bos, eos_token=eos)


def save_checkpoint(folder: Path, kind: str = "pure", tokenizer=None, **overrides) -> str:
    """A seeded tiny model and its tokenizer in `folder`; returns the path as text."""
    fields = {"vocab_size": 304, "pad_token_id": None, "max_position_embeddings": 256, **overrides}
    tiny_model(kind, **fields).save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return str(folder)


def read_command(command: str) -> EvaluatorConfig:
    """What lm-eval's own command line makes of a printed command."""
    parser = argparse.ArgumentParser()
    Run(parser.add_subparsers())
    program, *words = shlex.split(command)
    assert program == "lm_eval"
    return EvaluatorConfig.from_cli(parser.parse_args(["run", *words]))
