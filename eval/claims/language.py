"""
Language modelling, recall and length: small models trained alike on one corpus, and what they can do after it.

    python -m deltanet.eval.claims.language --data DIR [--output_path DIR] [--seconds N] [--models NAME ...] [--seeds N ...]

DIR has shards of `deltanet.train.prepare` in `train`, `validation` and `test`. Each finished run goes into `language.json`
at once; the same command goes on behind them. `--tiny` tries every step on a CPU.
"""

import argparse
import dataclasses
import json
import logging
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ...benchmarks.gpu_delta_rule import rounded, summary
from ...benchmarks.model_worker import measure_decode
from ...benchmarks.timing import environment
from ...train.finished import write_whole
from ...train.quiet import quiet
from ...train.shards import TokenShards
from .language_models import CONFIGURATIONS, Size, build, parameters
from .language_training import OutOfTime, TooSlow, cast, recall_exercises, train, train_recall, training_tokens
from .needles import Words, recall
from .text_measures import context_perplexities, perplexity

RESULTS = Path(__file__).parents[1] / "results"
FILE = "language.json"
SPLITS = ("train", "validation", "test")
GENERATING = ("deltanet", "transformer")
LAST = ("mamba2",)
KINDS = ("train", "generation")
MEASURES_S = 10
"""Kept free for the measurements of a run when the time for its training is counted."""


@dataclass(frozen=True)
class Settings:
    """The same for all models. Lengths are in tokens."""

    size: Size = Size()
    steps: int = 1600
    batch: int = 16
    length: int = 1024
    learning_rate: float = 2e-3
    warmup: float = 0.1  # share of the steps
    final_factor: float = 0.1
    weight_decay: float = 0.1
    betas: tuple = (0.9, 0.95)
    clip: float = 1.0
    exercise_lengths: tuple = (128, 1024)  # after the text, and after all measurements but those of recall
    exercise_steps: tuple = (200, 600)
    most_facts: int = 64
    most_mentioned: float = 0.5  # of the tokens of an exercise
    evaluations: int = 8
    validation_tokens: int = 2**17
    test_tokens: int = 2**20
    length_tokens: int = 2**18
    lengths: tuple = (512, 1024, 2048, 4096, 8192, 16384)
    recall_facts: tuple = (1, 4, 16, 32, 64)  # in passages as long as in training
    recall_lengths: tuple = (512, 2048, 4096, 8192)
    length_facts: int = 16  # in passages of other lengths
    recall_sequences: int = 64
    tokens_at_once: int = 2**15
    contexts: tuple = (1024, 4096, 16384, 65536)
    generation_batch: int = 8
    new_tokens: int = 34
    longest_s: float = 200  # training of one model

    @classmethod
    def tiny(cls) -> "Settings":
        size = Size(width=32, layers=4, intermediate=64, heads=2, transformer_heads=2, window=16, mamba2_layers=2)
        lengths = {"lengths": (64, 128, 256), "recall_lengths": (256,), "contexts": (64, 128), "new_tokens": 6}
        amounts = {"validation_tokens": 1024, "test_tokens": 2048, "length_tokens": 512, "recall_sequences": 4}
        facts = {"recall_facts": (1, 4), "length_facts": 4, "most_facts": 4, "generation_batch": 2}
        facts |= {"exercise_lengths": (32, 128), "exercise_steps": (2, 4)}
        return cls(size, steps=12, batch=4, length=128, evaluations=2, tokens_at_once=512, **lengths, **amounts, **facts)


class Corpus:
    """The three streams of tokens, and what the needles are made of."""

    def __init__(self, path: Path):
        shards = {split: TokenShards(path / split) for split in SPLITS}
        self.streams = {split: part.read(0, len(part)).numpy() for split, part in shards.items()}
        self.vocab = len(shards["train"].tokenizer)
        self.words = Words.of(shards["train"].tokenizer, self.streams["train"])
        self.drawn = None, None, None
        self.identity = {
            "vocabulary": self.vocab,
            **{split: {"tokens": len(part), "checksum": part.checksum} for split, part in shards.items()},
        }

    def sequences(self, settings: Settings, seed: int) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
        """`training_tokens` and `recall_exercises` of a seed, which all models share."""
        if self.drawn[0] != (settings, seed):
            stream = self.streams["train"]
            exercises = recall_exercises(stream, self.words, settings, seed)
            self.drawn = (settings, seed), training_tokens(stream, settings, seed), exercises
        return self.drawn[1:]


class Results:
    """`language.json`, written again after each run.

    Raises:
        ValueError: the file is of other settings, data or versions.
    """

    def __init__(self, path: Path, device: str, settings: Settings, corpus: Corpus):
        self.path = path
        identity = {"environment": environment(device), "settings": dataclasses.asdict(settings), "data": corpus.identity}
        identity = json.loads(json.dumps(identity))
        date = identity["environment"].pop("date")
        self.data = {**identity, "runs": []}
        if path.exists():
            self.data = json.loads(path.read_text(encoding="utf-8"))
            changed = [key for key, value in identity.items() if self.data[key] != value]
            if changed:
                raise ValueError(f"{path} has runs of another {', '.join(changed)}; choose another --output_path.")
        self.date = date

    def has(self, unit: dict) -> bool:
        """Whether the unit ran to its end, or is too slow."""
        return any(unit.items() <= run.items() and ("error" not in run or "too_slow" in run) for run in self.data["runs"])

    def longest(self, kind: str) -> float:
        return max((run["seconds"] for run in self.data["runs"] if run["kind"] == kind and "error" not in run), default=0.0)

    def add(self, unit: dict, figures: dict) -> None:
        kept = [run for run in self.data["runs"] if not unit.items() <= run.items()]
        self.data["runs"] = [*kept, rounded({**unit, **figures, "date": self.date})]
        head = json.dumps({key: value for key, value in self.data.items() if key != "runs"}, indent=1)
        runs = ",\n  ".join(json.dumps(run) for run in self.data["runs"])
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, f'{head[:-2]},\n "runs": [\n  {runs}\n ]\n}}\n'.encode())


def units(models: list[str], seeds: list[int]) -> list[dict]:
    """All models with the first seed, generation, the other seeds; what is slow comes last."""
    runs = [{"kind": "train", "model": model, "seed": seed} for seed in seeds for model in models]
    runs.sort(key=lambda unit: (unit["model"] in LAST, unit["seed"] != seeds[0]))
    first = sum(unit["seed"] == seeds[0] and unit["model"] not in LAST for unit in runs)
    generation = [{"kind": "generation", "model": model} for model in GENERATING if model in models]
    return [*runs[:first], *generation, *runs[first:]]


def run_training(model_name: str, seed: int, corpus: Corpus, settings: Settings, device: str, deadline: float) -> dict:
    """Train a model on text and measure it, then train it to recall facts and measure that."""
    model = build(model_name, settings.size, corpus.vocab, seed).to(device)
    tokens, exercises = corpus.sequences(settings, seed)
    tokens = torch.from_numpy(tokens).to(device)
    validation = corpus.streams["validation"][: settings.validation_tokens]
    evaluate = lambda model: perplexity(model, validation, settings.length, settings.tokens_at_once)  # noqa: E731
    figures = train(model, tokens, settings, evaluate, deadline)
    model.eval()
    test = corpus.streams["test"]
    text = test[: settings.length_tokens]
    lengths, positions = context_perplexities(model, text, settings.lengths, settings.tokens_at_once)
    test_perplexity = perplexity(model, test[: settings.test_tokens], settings.length, settings.tokens_at_once)
    stages = [tuple(torch.from_numpy(part).to(device) for part in stage) for stage in exercises]
    exercise_s = train_recall(model, stages, settings, deadline)
    needles, distances = measure_recall(model.eval(), corpus, settings)
    return {
        "parameters": parameters(model),
        **figures,
        "validation": figures["curve"][-1][1],
        "test": test_perplexity,
        "exercise_s": exercise_s,
        "needles": needles,
        "distances": distances,
        "lengths": lengths,
        "positions": positions,
    }


def measure_recall(model, corpus: Corpus, settings: Settings) -> tuple[list[dict], list[dict]]:
    """Shares of right answers by number of facts and length, and, with `length_facts` facts, by distance."""
    cells = [(settings.length, count) for count in settings.recall_facts]
    cells += [(length, settings.length_facts) for length in settings.recall_lengths]
    needles, answers = [], []
    sizes = settings.recall_sequences, settings.tokens_at_once
    for length, count in cells:
        cell = recall(model, corpus.streams["test"], corpus.words, length, count, *sizes)
        needles.append({"length": length, "facts": count, "right": cell[0].mean().item(), "asked": cell[0].size})
        answers += [cell] if count == settings.length_facts else []
    right, distances = (np.concatenate(part) for part in zip(*answers))
    farthest = np.maximum(7, np.ceil(np.log2(distances))).astype(int)
    by_distance = [
        {"up_to": 2 ** int(power), "right": right[farthest == power].mean().item(), "asked": int((farthest == power).sum())}
        for power in np.unique(farthest)
    ]
    return needles, by_distance


def run_generation(model_name: str, settings: Settings, device: str) -> dict:
    """Tokens a second and memory behind growing contexts, random weights."""
    model = build(model_name, settings.size, 8192).to(device).eval()
    cast(model, torch.bfloat16)
    task = {"B": settings.generation_batch, "new": settings.new_tokens}
    cells = [{"T": T, **measure_decode(model, device, {**task, "T": T})} for T in settings.contexts]
    return {"batch": settings.generation_batch, "cells": cells}


def run(unit: dict, corpus: Corpus, settings: Settings, device: str, deadline: float) -> dict:
    """The figures of a unit, or `error` and what went wrong: one model that fails leaves the others."""
    began = time.monotonic()
    try:
        if unit["kind"] == "train":
            figures = run_training(unit["model"], unit["seed"], corpus, settings, device, deadline - MEASURES_S)
        else:
            figures = run_generation(unit["model"], settings, device)
    except TooSlow as slow:
        figures = {"error": str(slow), "too_slow": True, "step_ms": slow.step_ms}
    except OutOfTime:
        raise
    except Exception as error:
        traceback.print_exc()
        figures = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    return {**figures, "seconds": time.monotonic() - began}


def main(argv: list[str] | None = None) -> int:
    began = time.monotonic()
    arguments = _parser().parse_args(argv)
    quiet()
    logging.disable(logging.NOTSET)  # a step that cannot be recorded says why
    settings = Settings.tiny() if arguments.tiny else Settings()
    settings = dataclasses.replace(settings, steps=arguments.steps or settings.steps)
    deadline = began + arguments.seconds
    try:
        corpus = Corpus(arguments.data)
        results = Results(arguments.output_path / FILE, arguments.device, settings, corpus)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for unit in units(arguments.models, arguments.seeds):
        if unit["kind"] not in arguments.kinds:
            continue
        name = " ".join(map(str, unit.values()))
        if results.has(unit):
            print(f"{name}: kept", flush=True)
            continue
        try:
            if time.monotonic() + results.longest(unit["kind"]) > deadline:
                raise OutOfTime
            figures = run(unit, corpus, settings, arguments.device, deadline)
        except OutOfTime:
            print(f"{name}: no time is left. The same command goes on here.", flush=True)
            return 0
        results.add(unit, {**figures, "shared_gpu": arguments.shared_gpu})
        print(f"{name}: {summary(figures)}", flush=True)
        if arguments.device == "cuda":
            torch.cuda.empty_cache()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m deltanet.eval.claims.language", description=__doc__.split("\n\n")[0].strip())
    parser.add_argument("--data", type=Path, required=True, help="directory with train, validation and test")
    parser.add_argument("--output_path", type=Path, default=RESULTS, help="directory of language.json (%(default)s)")
    parser.add_argument("--seconds", type=float, default=420, help="stop after this time (%(default)s)")
    names = list(CONFIGURATIONS)
    parser.add_argument("--models", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="of units; all of them unless given")
    parser.add_argument("--steps", type=int, help="of the training of each model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shared_gpu", action="store_true", help="others use the GPU too: RESULTS.md leaves out the times")
    parser.add_argument("--tiny", action="store_true", help="tiny models and lengths, to try the command itself")
    return parser


if __name__ == "__main__":
    sys.exit(main())
