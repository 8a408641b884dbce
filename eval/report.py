"""What a run leaves behind: results.json, table.md, plot.png and card_results.json."""

import json
import math
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import deltanet

from .metrics import numbers
from .paper import compare, load_paper
from .plot import plot_results
from .suites import HUB_DATASETS

_PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "accelerate", "lm-eval", "triton", "numpy")


def write_report(output: Path, results: dict, settings: dict, command: str) -> dict:
    """
    Write the four files and print the table.

    Args:
        output: directory, made where it does not exist.
        results: what the runner stored, by task.
        settings: all arguments as they took effect.
        command: the equivalent line for plain lm-eval.

    Returns the content of `results.json`.
    """
    output.mkdir(parents=True, exist_ok=True)
    comparison = compare(results, load_paper())
    content = {
        "model": settings["model"],
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": torch.cuda.get_device_name() if settings["device"].startswith("cuda") else platform.processor() or "cpu",
        "versions": package_versions(),
        "commit": git_commit(),
        "settings": settings,
        "command": command,
        "tokens": next(iter(results.values()))["tokens"],
        "results": results,
        "paper": comparison,
    }
    text = json.dumps(content, indent=2, default=str, ensure_ascii=False)
    (output / "results.json").write_text(text + "\n", encoding="utf-8")
    card = json.dumps(card_results(results, settings), indent=2)
    (output / "card_results.json").write_text(card + "\n", encoding="utf-8")
    table = markdown(content)
    (output / "table.md").write_text(table, encoding="utf-8")
    plot_results(output / "plot.png", results, comparison, settings["model"])
    print(f"{table}\nWritten to {output}")
    return json.loads(text)


def package_versions() -> dict[str, str | None]:
    """Versions of Python, of this package and of those that numbers may depend on."""
    found = {"python": platform.python_version(), "deltanet": deltanet.__version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def git_commit() -> str | None:
    """The commit of the package's own checkout, with `+changes` where files differ; `None` where it is installed."""
    root = Path(deltanet.__file__).parent
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+changes" if changed.strip() else "")


def card_results(results: dict, settings: dict) -> list[dict]:
    """The finite results as `python -m deltanet.publish --results` writes them into a model card, one object a number."""
    card = []
    for task, metric, value, error in numbers(results):
        if not math.isfinite(value):
            continue
        result = results[task]
        entry = {"task": task, "metric": metric, "value": value}
        entry |= {"dataset": HUB_DATASETS[task]} if task in HUB_DATASETS else {}
        entry |= {"stderr": error} if error is not None else {}
        entry["settings"] = {
            "num_fewshot": result["n_shot"] or 0,
            "version": result["version"],
            "dtype": result["dtype"].removeprefix("torch."),
            "max_length": settings["max_length"],
            "add_bos_token": result["tokens"]["add_bos_token"],
        } | ({"limit": settings["limit"]} if settings["limit"] else {})
        card.append(entry)
    return card


def markdown(content: dict) -> str:
    """The paper's rows with differences where its columns were run, all numbers, token choices and the plain command."""
    parts = [f"# {content['model']}\n"]
    if content["paper"]:
        parts.append(_paper_table(content["paper"]))
    parts.append(_numbers_table(content["results"]))
    tokens = ", ".join(f"{key} {value!r}" for key, value in content["tokens"].items())
    parts.append(f"Tokens: {tokens}.\n")
    settings = content["settings"]
    if settings["limit"] or settings["samples"]:
        parts.append("Only a part of the documents was scored: these numbers compare with nothing.\n")
    versions = content["versions"]
    parts.append(
        f"lm-eval {versions['lm-eval']}, deltanet {content['commit'] or versions['deltanet']}, {content['device']}, "
        f"batch size {settings['batch_size']}, windows of {settings['max_length']} tokens.\n"
    )
    parts.append(f"The same with plain lm-eval (the checkpoint must carry its code):\n\n    {content['command']}\n")
    return "\n".join(parts)


def _paper_table(comparison: dict) -> str:
    names, decimals = comparison["columns"], comparison["decimals"]
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    own = (f"{comparison['model'][name]:.{decimals[name]}f}" for name in names)
    lines.append("| **this model** | " + " | ".join(own) + " |")
    for row in comparison["rows"]:
        pairs = ((row["values"][name], row["differences"][name], decimals[name]) for name in names)
        cells = (f"{value:.{digits}f} ({difference:+.{digits}f})" for value, difference, digits in pairs)
        lines.append(f"| {row['model']}, {row['size']} | " + " | ".join(cells) + " |")
    note = f"{comparison['source']}. In brackets: this model minus that row."
    return "\n".join([*lines, "", note, ""])


def _numbers_table(results: dict) -> str:
    lines = ["| task | version | n | metric | value | stderr |", "|---|---|---|---|---|---|"]
    for task, metric, value, error in numbers(results):
        result = results[task]
        count = (result["n_samples"] or {}).get("effective", "")
        shown = "" if error is None else f"{error:.4f}"
        lines.append(f"| {task} | {result['version']} | {count} | {metric} | {value:.4f} | {shown} |")
    return "\n".join([*lines, ""])
