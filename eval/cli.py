"""The command line: `python -m deltanet.eval MODEL --suite paper|recall|ruler|smoke`, or `--tasks` with lm-eval's names."""

import argparse
import json
import logging
import shlex
from pathlib import Path

import torch
from lm_eval.utils import simple_parse_args_string

from .errors import EvaluationError
from .preflight import check_tokenizer, find_batch_size, load_config_and_tokenizer, window_length
from .report import write_report
from .runner import fingerprint, model_arguments, model_identity, run_tasks
from .suites import SUITES
from .task_data import load_tasks, task_files, task_manager


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m deltanet.eval", description="Evaluate a checkpoint with lm-eval.")
    parser.add_argument("model", metavar="MODEL", help="directory or name on the Hub of any causal language model")
    what = parser.add_argument_group("what to run")
    what.add_argument("--suite", choices=sorted(SUITES), help="a fixed list of tasks")
    what.add_argument("--tasks", type=_names, default=[], help="lm-eval's task names, comma-separated")
    what.add_argument("--lengths", type=int, nargs="+", help="prompt lengths of the ruler suite (default 1024 ... 32768)")
    what.add_argument("--data", type=Path, help="directory of local data; the layout is in eval/README.md")
    what.add_argument("--include_path", type=Path, help="directory with task files of your own")
    what.add_argument("--output_path", type=Path, help="directory of results (default eval_results/MODEL/SUITE)")
    how = parser.add_argument_group("the model")
    how.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    dtypes = ("auto", "float32", "bfloat16", "float16")
    how.add_argument("--dtype", choices=dtypes, default="auto", help="of the weights; auto is the checkpoint's")
    how.add_argument("--softmax_dtype", default="float32", help="dtype of the log-softmax and of sums over it")
    how.add_argument("--batch_size", default="auto", help="a number, or auto: what fits in memory by the shapes")
    how.add_argument("--max_batch_size", type=int, default=64, help="limit for auto")
    how.add_argument("--max_length", type=int, help="tokens in a window; default: the longest of --lengths, else as trained")
    how.add_argument("--add_bos_token", action="store_true", help="prepend BOS to every text; the paper's numbers have none")
    how.add_argument("--tokenizer", help="another tokenizer than the model's")
    how.add_argument("--revision")
    how.add_argument("--trust_remote_code", action="store_true")
    how.add_argument("--model_args", type=_arguments, default={}, help="more of lm-eval's arguments, key=value,key=value")
    own = parser.add_argument_group("lm-eval's own, passed on")
    own.add_argument("--num_fewshot", type=int)
    own.add_argument("--limit", type=float, help="documents of each task, a number or a fraction: for trying out only")
    own.add_argument("--samples", type=json.loads, help='JSON of documents by task, {"task": [0, 1]}')
    own.add_argument("--gen_kwargs", type=_arguments, help="generation arguments, key=value,... or JSON")
    own.add_argument("--bootstrap_iters", type=int, default=1000, help="for standard errors; 0 for none")
    own.add_argument("--log_samples", action="store_true", help="keep every prompt and answer")
    own.add_argument("--write_out", action="store_true", help="print the first prompt of each task")
    own.add_argument("--predict_only", action="store_true")
    own.add_argument("--apply_chat_template", action="store_true")
    own.add_argument("--system_instruction")
    own.add_argument("--confirm_run_unsafe_code", action="store_true")
    own.add_argument("--seed", type=_seeds, default=[0, 1234, 1234, 1234], help="one number, or python,numpy,torch,fewshot")
    return parser


def main(argv: list[str] | None = None) -> dict | None:
    """Run the command; return the content of `results.json`, or `None` in every process but the first.

    Raises:
        EvaluationError: before the model is loaded, where a task, its data, the tokenizer or the sizes cannot work.
    """
    args = build_parser().parse_args(argv)
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    names, suite = _requested(args)
    args.lengths = args.lengths or (list(suite.lengths) if suite else [])
    args.gen_kwargs = args.gen_kwargs or (dict(suite.gen_kwargs) if suite else {}) or None
    model_name = args.model.rstrip("/").split("/")[-1] or "model"
    output = args.output_path or Path("eval_results") / model_name / (args.suite or "tasks")

    manager = task_manager(names, args.include_path, _metadata(args))
    specs = task_files(manager, names, args.data, output / "task_files", bool(args.num_fewshot))
    config, tokenizer = load_config_and_tokenizer(args)
    check_tokenizer(config, tokenizer, args.add_bos_token)
    max_length = window_length(config, args.max_length, args.lengths)
    batch_size = find_batch_size(args, config, max_length)
    tasks = load_tasks(manager, specs, args.seed)

    model_args = model_arguments(args, max_length)
    identity = model_identity(args.model, config)
    marks = {name: fingerprint(task, args, model_args, identity) for name, task in tasks.items()}
    results = run_tasks(tasks, marks, manager, output / "tasks", args, model_args, batch_size)
    if results is None:
        return None
    command = plain_command(args, specs, model_args, batch_size, output / "task_files")
    settings = {**vars(args), "max_length": max_length, "batch_size": batch_size, "output_path": output}
    return write_report(output, results, settings, command)


def plain_command(args, specs: dict[str, str], model_args: dict, batch_size: int, folder: Path) -> str:
    """lm-eval's own command line for the same numbers, for a checkpoint that carries its code."""
    pairs = ",".join(f"{key}={value}" for key, value in {**model_args, "trust_remote_code": True}.items())
    words = ["lm_eval", "--model", "hf", "--model_args", pairs, "--tasks", ",".join(specs), "--batch_size", str(batch_size)]
    words += ["--device", args.device, "--seed", ",".join(map(str, args.seed))]
    if any(name != spec for name, spec in specs.items()):
        words += ["--include_path", str(folder.resolve())]
    for name in ("num_fewshot", "limit", "system_instruction"):
        words += [f"--{name}", str(getattr(args, name))] if getattr(args, name) is not None else []
    for name, value in (("gen_kwargs", args.gen_kwargs), ("metadata", _metadata(args)), ("samples", args.samples)):
        words += [f"--{name}", json.dumps(value)] if value else []
    words += ["--apply_chat_template"] if args.apply_chat_template else []
    return shlex.join(words)


def _requested(args):
    """Task names in order without repetition, and the suite or `None`."""
    suite = SUITES.get(args.suite)
    names = list(dict.fromkeys([*(suite.tasks if suite else ()), *args.tasks]))
    if not names:
        raise EvaluationError(f"name --suite ({', '.join(sorted(SUITES))}) or --tasks")
    return names, suite


def _metadata(args) -> dict:
    """What tasks that make their own prompts need to know."""
    return {"max_seq_lengths": args.lengths, "tokenizer": args.tokenizer or args.model} if args.lengths else {}


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _arguments(text: str) -> dict:
    return json.loads(text) if text.startswith("{") else simple_parse_args_string(text)


def _seeds(text: str) -> list[int]:
    seeds = [int(seed) for seed in text.split(",")]
    if len(seeds) not in (1, 4):
        raise argparse.ArgumentTypeError(f"{text!r}: one number or four")
    return seeds * (4 // len(seeds))
