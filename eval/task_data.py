"""From the names of tasks to lm-eval's task objects, with data from the Hub, from a local directory or from the package.

Local data (`--data DIR`) is one folder a task, one file a split: `DIR/piqa/validation.jsonl`. The layout of every task is in
`eval/README.md`. The split that a task scores is required, its training split only for examples in the prompt.
"""

import difflib
import json
import os
import random
from pathlib import Path

import lm_eval.tasks
import numpy as np
import yaml
from lm_eval.tasks import TaskManager

from .errors import EvaluationError
from .smoke import held_out_text, smoke_documents
from .suites import RECALL, SUITES, TASKS

_STOCK = Path(lm_eval.tasks.__file__).parent
_SPLITS = ("training_split", "validation_split", "test_split")
# Version 1 of the recall tasks is a Python class that takes no configuration: from local data it is a change of version 0.
_STRIPPED = {
    "doc_to_text": "{{text.strip()}}",
    "doc_to_target": "{{value.strip()}}",
    "metadata": {"version": 1},
}
_STRIPPED_METRIC = "process_results: !function deltanet.eval.recall.contains_stripped\n"


def task_manager(names: list[str], include_path: Path | None = None, metadata: dict | None = None) -> TaskManager:
    """
    The index that knows all `names`: our tasks and the user's, and lm-eval's 14,000 (some seconds) only where needed.

    Raises:
        EvaluationError: a name is unknown; the message offers similar ones.
    """
    folders = [TASKS, *([include_path] if include_path else [])]
    for with_defaults in (False, True):
        manager = TaskManager(include_path=folders, include_defaults=with_defaults, metadata=metadata)
        unknown = [name for name in names if name not in manager.task_index]
        if not unknown:
            return manager
    similar = difflib.get_close_matches(unknown[0], manager.all_tasks, n=5) or sorted(SUITES["paper"].tasks)
    raise EvaluationError(f"unknown task {unknown[0]!r}; similar: {', '.join(similar)} (`lm_eval ls tasks` lists all)")


def task_files(manager: TaskManager, names: list[str], data: Path | None, folder: Path, fewshot: bool) -> dict[str, str]:
    """
    Write to `folder` a task file for every task that lm-eval does not have as it stands (ours, and all with local data),
    so that `lm_eval --include_path folder` runs the same tasks; return what `TaskManager.load` loads, by name.

    Raises:
        EvaluationError: files are missing under `data`, all of them named, or a task cannot read local files.
    """
    specs, missing = {}, []
    smoke = [name for name in names if name in SUITES["smoke"].tasks]
    documents = smoke_documents(held_out_text(data)) if smoke else {}
    for name in names:
        source = manager.task_index[name].yaml_path
        if name in documents:
            file = _write(folder / "data" / f"{name}.jsonl", "".join(json.dumps(doc) + "\n" for doc in documents[name]))
            specs[name] = _write_task(folder, name, {"include": str(source), **_reading({"test": file}, folder)})
        elif data is None or "custom_dataset" in (manager.task_index[name].cfg or {}):
            stock = source is None or source.is_relative_to(_STOCK)
            specs[name] = name if stock else _write_task(folder, name, {"include": str(source)})
        else:
            specs[name] = _local_task(manager.task_index, name, data, folder, fewshot, missing)
    if missing:
        layout = "(.jsonl or .parquet); eval/README.md has the layout"
        raise EvaluationError(f"--data lacks {', '.join(missing)} {layout}")
    return specs


def load_tasks(manager: TaskManager, specs: dict[str, str], seeds: list[int]) -> dict:
    """
    Task objects by name, a group's and a tag's one by one. Their data are read here, before the model.

    The random generators are seeded, and all tasks loaded by one call, as lm-eval does: RULER's prompts come from them.

    Raises:
        EvaluationError: a task's data cannot be had; the cause is in the message.
    """
    random.seed(seeds[0])
    np.random.seed(seeds[1])
    try:
        return manager.load(list(specs.values()))["tasks"]
    except Exception as error:
        name = next((name for name in specs if not _loads(manager, specs[name])), ", ".join(specs))
        hint = "; it needs the Hub once, or a local copy by --data DIR" if isinstance(error, OSError) else ""
        raise EvaluationError(f"task {name!r} cannot load its data: {type(error).__name__}: {error}{hint}") from error


def _loads(manager: TaskManager, spec: str) -> bool:
    """Whether the task loads alone; used to name the one whose error is about to be reported."""
    try:
        manager.load([spec])
    except Exception:
        return False
    return True


def _local_task(index: dict, name: str, data: Path, folder: Path, fewshot: bool, missing: list[str]) -> str:
    """Write the task file that reads `data/<task>/<split>`; note what is missing there."""
    base = name.removesuffix("_v0")
    stripped = base in RECALL and base == name
    entry = index[f"{name}_v0" if stripped else name]
    if entry.kind.name != "TASK":
        raise EvaluationError(f"task {name!r} cannot read --data: a group, a tag or a Python class; name single tasks")
    config = entry.cfg
    scored = config.get("test_split") or config["validation_split"]
    wanted = {scored, config.get("training_split")} - {None} if fewshot else {scored}
    files = _data_files(data / base, wanted)
    missing += [f"{base}/{split}" for split, file in files.items() if not file.is_file()]
    unused = {key: None for key in _SPLITS if config.get(key) and config[key] not in wanted}
    override = {"include": str(entry.yaml_path), **_reading(files, folder), **unused, **(_STRIPPED if stripped else {})}
    return _write_task(folder, name, override, _STRIPPED_METRIC if stripped else "")


def _data_files(folder: Path, splits: set[str]) -> dict[str, Path]:
    """The files of all splits in the one format that has them, or as JSON lines where none has."""
    formats = [{split: folder / f"{split}.{end}" for split in sorted(splits)} for end in ("jsonl", "parquet")]
    return next((files for files in formats if all(file.is_file() for file in files.values())), formats[0])


def _reading(files: dict[str, Path], folder: Path) -> dict:
    """The configuration of a task that reads `files`, by split; the cache is beside the task files."""
    kind = "parquet" if any(file.suffix == ".parquet" for file in files.values()) else "json"
    data_files = {split: str(file.resolve()) for split, file in files.items()}
    cache = str((folder / "cache").resolve())
    return {"dataset_path": kind, "dataset_name": None, "dataset_kwargs": {"data_files": data_files, "cache_dir": cache}}


def _write_task(folder: Path, name: str, config: dict, more: str = "") -> str:
    return str(_write(folder / f"{name}.yaml", yaml.safe_dump({"task": name, **config}, sort_keys=False) + more))


def _write(path: Path, text: str) -> Path:
    """Write a file in one step and only where it changes: several processes of one evaluation do the same at once."""
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    return path
