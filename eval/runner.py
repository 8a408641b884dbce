"""Runs the tasks one by one, each with its own file of results, so that a run that was cut off goes on where it was."""

import hashlib
import json
import logging
import os
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate.utils.memory import should_reduce_batch_size
from lm_eval import simple_evaluate
from lm_eval.utils import handle_non_serializable

from .errors import EvaluationError
from .model import DeltaNetLM

logger = logging.getLogger(__name__)
# Arguments of lm_eval.simple_evaluate that are passed on under their own names.
PASSED_ON = (
    "num_fewshot",
    "limit",
    "samples",
    "gen_kwargs",
    "bootstrap_iters",
    "log_samples",
    "write_out",
    "predict_only",
    "system_instruction",
    "apply_chat_template",
    "confirm_run_unsafe_code",
)
SEEDS = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")


def model_arguments(args, max_length: int) -> dict:
    """Arguments of lm-eval's `hf` model that give the same numbers; those of `--model_args` come last."""
    given = {"revision": args.revision, "tokenizer": args.tokenizer}
    return {
        "pretrained": args.model,
        "dtype": args.dtype,
        "softmax_dtype": args.softmax_dtype,
        "add_bos_token": args.add_bos_token,
        "max_length": max_length,
        **{key: value for key, value in given.items() if value is not None},
        **args.model_args,
    }


def fingerprint(task, args, model_args: dict, identity: str) -> str:
    """Hash of all that the scores of a task depend on: model, arguments, lm-eval's own, the task and its documents."""
    digest = hashlib.sha256()
    settings = {name: getattr(args, name) for name in PASSED_ON if name not in ("write_out", "log_samples")}
    parts = [settings, model_args, args.seed, identity, version("lm-eval"), task.VERSION, task.config.generation_kwargs]
    digest.update(json.dumps(parts, sort_keys=True, default=str).encode())
    for document in task.eval_docs:
        digest.update(json.dumps(document, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def model_identity(model: str, config) -> str:
    """The commit of a model on the Hub; for a local directory the sizes and times of its files."""
    if not Path(model).is_dir():
        return str(getattr(config, "_commit_hash", None))
    files = sorted(path for path in Path(model).iterdir() if path.is_file())
    return str([(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files])


def stored_result(folder: Path, name: str, mark: str, samples: bool) -> dict | None:
    """The result of an earlier run of the same task with the same settings (and its samples if wanted), or `None`."""
    if samples and not (folder / f"{name}.samples.jsonl").is_file():
        return None
    try:
        stored = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None
    return stored["result"] if stored["fingerprint"] == mark else None


def run_tasks(
    tasks: dict, marks: dict[str, str], manager, folder: Path, args, model_args: dict, batch_size: int
) -> dict | None:
    """
    Evaluate the tasks that have no stored result in `folder` and store each as it ends.

    Returns lm-eval's results by task, or `None` in every process but the first.
    """
    results = {name: stored_result(folder, name, marks[name], args.log_samples) for name in tasks}
    pending = [name for name in tasks if results[name] is None]
    if done := [name for name in tasks if name not in pending]:
        logger.warning("kept from an earlier run with the same settings: %s", ", ".join(done))
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if not pending and not several:
        return results
    options = {**model_args, "trust_remote_code": args.trust_remote_code}
    lm = DeltaNetLM(**options, batch_size=batch_size, device=args.device)
    if several:
        pending = _agree(pending)
    for name in pending:
        result = _evaluate(lm, tasks[name], manager, args)
        if result is not None:
            result |= {"tokens": lm.token_choices(), "processes": lm.world_size}
            results[name] = _store(folder, name, marks[name], result)
    return results if lm.rank == 0 else None


def _agree(pending: list[str]) -> list[str]:
    """The first process's list, in all of them."""
    shared = [pending]
    torch.distributed.broadcast_object_list(shared)
    return shared[0]


def _evaluate(lm, task, manager, args) -> dict | None:
    """One task; where memory runs out although the estimate fitted, again with half the batch (in a single process)."""
    options = {name: getattr(args, name) for name in PASSED_ON}
    # Without a manager lm-eval indexes its 14,000 task files at every call.
    options |= {"task_manager": manager, **dict(zip(SEEDS, args.seed))}
    while True:
        try:
            return simple_evaluate(lm, tasks=[task], **options)
        except Exception as error:
            if not should_reduce_batch_size(error) or lm.world_size > 1:
                raise
            if lm.batch_size_per_gpu == 1:
                message = f"{task.task_name}: memory ran out at batch size 1; choose a smaller --max_length"
                raise EvaluationError(message) from error
            lm.batch_size_per_gpu //= 2
            logger.warning("%s: memory ran out, again with batch size %d", task.task_name, lm.batch_size_per_gpu)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _store(folder: Path, name: str, mark: str, result: dict) -> dict:
    """Write a task's result, and its samples beside it, and return what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    samples = result.pop("samples", {}).get(name)
    if samples is not None:
        lines = (json.dumps(sample, default=handle_non_serializable, ensure_ascii=False) + "\n" for sample in samples)
        (folder / f"{name}.samples.jsonl").write_text("".join(lines), encoding="utf-8")
    kept = {
        "metrics": result["results"][name],
        "version": result["versions"].get(name),
        "n_samples": result["n-samples"].get(name),
        "n_shot": result["n-shot"].get(name),
        "higher_is_better": result["higher_is_better"].get(name),
        "parameters": result["config"].get("model_num_parameters"),
        "dtype": str(result["config"].get("model_dtype")),
        "tokens": result["tokens"],
        "processes": result["processes"],
    }
    text = json.dumps({"fingerprint": mark, "result": kept}, indent=2, default=handle_non_serializable)
    part = folder / f"{name}.json.part"
    part.write_text(text, encoding="utf-8")
    part.replace(folder / f"{name}.json")
    return json.loads(text)["result"]
