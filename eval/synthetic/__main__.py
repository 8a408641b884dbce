"""`python -m deltanet.eval.synthetic`: train small models on synthetic tasks and compare them."""

import argparse
import hashlib
import itertools
import json
import logging
import sys
from functools import lru_cache
from pathlib import Path

import torch

from .models import build_model
from .report import write_report
from .tasks import TASKS, check_sizes, make_data
from .training import train

_RESIZED = ("examples", "test_examples", "epochs", "batch_size")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m deltanet.eval.synthetic",
        description="Train small models on synthetic tasks. Sizes and training are the published ones unless changed here.",
    )
    parser.add_argument("--tasks", nargs="+", choices=sorted(TASKS), default=sorted(TASKS), metavar="TASK")
    parser.add_argument(
        "--models",
        nargs="+",
        default=["deltanet"],
        help="Transformers model types with fields: deltanet, deltanet:allow_neg_eigval=true, llama, mamba2:state_size=64",
    )
    parser.add_argument("--widths", type=int, nargs="+", help="widths of the model instead of the task's own")
    parser.add_argument("--learning_rates", type=float, nargs="+")
    parser.add_argument("--weight_decays", type=float, nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--examples", type=int)
    parser.add_argument("--test_examples", type=int)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--sizes", type=json.loads, default={}, help='JSON for the generators, {"length": 64, "pairs": 4}')
    parser.add_argument("--test_sizes", type=json.loads, default={}, help="the same for testing only")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output_path", type=Path, default=Path("synthetic_results"))
    parser.add_argument("--list", action="store_true", help="list the tasks with their sources and settings")
    return parser


def main(argv: list[str] | None = None) -> list[dict]:
    """Run the points of the sweep that have no result yet in the output directory; return all results of this sweep.

    Raises:
        ValueError: a model or size that cannot work, before the first run.
    """
    args = build_parser().parse_args(argv)
    if args.list:
        for name, task in TASKS.items():
            print(f"{name}: {task.source}\n    {task.sizes} {task.examples} examples, {task.model}, {task.training}")
        return []
    points = sweep(args)
    for name in args.tasks:
        check_sizes(name, _task(name, args))
    for task, model, width in {(task, model, width): None for task, model, width, *_ in points}:
        build_model(model, TASKS[task].vocab, **{**TASKS[task].model, "width": width})
    data = lru_cache(maxsize=1)(lambda name, seed: make_data(_task(name, args), seed))
    results = []
    for index, (name, model, width, rate, decay, seed) in enumerate(points):
        task = _task(name, args)
        settings = _settings(task, name, model, width, rate, decay, seed, args.device)
        file = args.output_path / "runs" / f"{name}-{_digest(settings)}.json"
        if not file.is_file():
            label = f"{index + 1}/{len(points)} {name} {model} width {width} rate {rate:.1e} decay {decay}"
            result = train(task, data(name, seed), model, width, rate, decay, seed, args.device, label)
            _save(file, {**settings, **result})
        results.append(json.loads(file.read_text(encoding="utf-8")))
    write_report(args.output_path, results)
    return results


def sweep(args) -> list[tuple]:
    """(task, model, width, learning rate, weight decay, seed) of every run; runs on the same data follow each other."""
    points = []
    for name in args.tasks:
        training = TASKS[name].training
        widths = args.widths or [TASKS[name].model["width"]]
        rates = args.learning_rates or training["learning_rates"]
        decays = args.weight_decays or training["weight_decays"]
        for seed, model, width in itertools.product(args.seeds, args.models, widths):
            points += [(name, model, width, rate, decay, seed) for rate in rates for decay in decays]
    return points


def _task(name: str, args):
    task = TASKS[name]
    resized = task.resized(**{field: getattr(args, field) for field in _RESIZED})
    vocab = args.sizes.get("vocab", task.vocab)
    return resized.resized(
        vocab=vocab, sizes={**task.sizes, **args.sizes}, test_sizes={**task.test_sizes, **args.test_sizes}
    )


def _settings(task, name, model, width, rate, decay, seed, device) -> dict:
    """All that a run depends on."""
    return {
        "task": name,
        "model": model,
        "width": width,
        "rate": rate,
        "decay": decay,
        "seed": seed,
        "device": device.split(":")[0],
        "sizes": task.sizes,
        "test_sizes": task.test_sizes,
        "examples": task.examples,
        "test_examples": task.test_examples,
        "model_options": task.model,
        "training": {key: value for key, value in task.training.items() if key not in ("learning_rates", "weight_decays")},
    }


def _digest(settings: dict) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def _save(file: Path, content: dict) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    part.replace(file)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
