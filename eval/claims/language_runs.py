"""Reads `language.json`: the runs by model."""

import json
from pathlib import Path

from .language import FILE
from .language_models import CONFIGURATIONS


def load(folder: Path) -> dict | None:
    """The whole file, or `None` where there is none."""
    path = folder / FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def trained(folder: Path) -> dict[str, list[dict]]:
    """The finished runs of each model, in the order of `CONFIGURATIONS` and of the seeds."""
    runs = sorted(_runs(folder, "train"), key=lambda run: run["seed"])
    found = {name: [run for run in runs if run["model"] == name and "error" not in run] for name in CONFIGURATIONS}
    return {name: mine for name, mine in found.items() if mine}


def failed(folder: Path) -> dict[str, str]:
    """The error of each model none of whose runs finished."""
    finished = trained(folder)
    return {run["model"]: run["error"] for run in _runs(folder, "train") if run["model"] not in finished}


def generating(folder: Path) -> list[dict]:
    return [run for run in _runs(folder, "generation") if "error" not in run]


def _runs(folder: Path, kind: str) -> list[dict]:
    return [run for run in (load(folder) or {"runs": []})["runs"] if run["kind"] == kind]
