"""
Shows the trained checkpoint that is shipped: it continues a text at once, then is scored on a novel it has not read.

    python -m deltanet.train.shipped [--prompt TEXT] [--seed N] [--tokens N] [--output DIR]

The scores stand beside those of the checkpoint's card. An interrupted scoring goes on with the task it was at.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import os
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from .quiet import quiet, quiet_children
from .report import PROMPT, RESULTS, TOKENS, continuation

CHECKPOINT = Path(__file__).parent / "checkpoint"
BATCH = 16
ROWS = {
    "smoke_perplexity": "bits per byte; less is better",
    "smoke_last_word": "last words that occurred before, guessed",
    "smoke_choice": "endings chosen out of four; chance is 0.25",
    "smoke_needle": "numbers told earlier, repeated",
}

NEXT_STEPS = """
Next:
    {python} -m deltanet.train.shipped --prompt "My fellow citizens," --seed 1
    {python} -m deltanet.train.first_run            # train a smaller one yourself: two minutes on a CPU
    {python} -m deltanet.train.corpus runs/corpus   # rebuild what this one was trained on; then, on a GPU:
    {python} -m deltanet.train 7m-corpus

    from deltanet.train.shipped import load
    model, tokenizer = load()
    ids = model.generate(**tokenizer("The people", return_tensors="pt"), max_new_tokens=40)
    print(tokenizer.decode(ids[0]))
"""


def checkpoint() -> Path:
    """The directory of the shipped checkpoint: weights in bfloat16, tokenizer, results and model card."""
    return CHECKPOINT


def load() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The shipped model, in float32, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint(), dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(checkpoint())


def main() -> int:
    arguments = _parse_arguments()
    sys.stdout.reconfigure(line_buffering=True)
    quiet()
    # The model is small: further threads bring little on free cores, and cost minutes on shared ones.
    torch.set_num_threads(1)
    try:
        _show(arguments.prompt, arguments.tokens, arguments.seed)
        status = _score(arguments.output)
    except KeyboardInterrupt:
        print("\n\nStopped. The same command goes on with the task it was at.", file=sys.stderr)
        return 130
    if status == 0:
        print(NEXT_STEPS.format(python=min(sys.executable, os.path.relpath(sys.executable), key=len)))
    return status


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m deltanet.train.shipped", description=__doc__.split("\n\n")[0].strip())
    parser.add_argument("--prompt", default=PROMPT, help="text to continue (%(default)r)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (%(default)s)")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="most tokens of the continuation (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/shipped"), help="directory of the scores (%(default)s)")
    arguments = parser.parse_args()
    if not arguments.prompt.strip():
        parser.error("--prompt is empty; allowed: at least one word.")
    if arguments.tokens < 1:
        parser.error(f"--tokens is {arguments.tokens}; allowed: 1 and more.")
    if not 0 <= arguments.seed < 2**32:
        parser.error(f"--seed is {arguments.seed}; allowed: 0 to {2**32 - 1}.")
    return arguments


def _show(prompt: str, tokens: int, seed: int) -> None:
    """Say what the model is, and print a continuation while it grows."""
    model, tokenizer = load()
    results = _results()
    minutes, bits = sum(results["seconds"]) / 60, results["test"]
    print(f"The shipped DeltaNet: {model.num_parameters() / 1e6:.1f} million parameters,", end=" ")
    print(f"trained for {minutes:.0f} minutes on one {results['device']}.")
    print(f"{bits['float32']:.3f} bits per byte of text it has not read (xz: {bits['xz']:.3f}).", end=" ")
    print(f"Its card: {checkpoint() / 'README.md'}\n")
    continuation(model, tokenizer, prompt, tokens, seed, TextStreamer(tokenizer, skip_special_tokens=True))


def _score(output: Path) -> int:
    """Run the smoke suite and print its scores beside the card's; returns the exit status."""
    if importlib.util.find_spec("lm_eval") is None:
        print("\nNot scored: lm-eval is missing (pip install 'deltanet[eval]').")
        return 0
    print("\nScoring it on chapters of a novel it has not read: about a minute. Ctrl-C stops it;", end=" ")
    print(f"scores that {output} holds are used again.\n")
    from datasets import disable_progress_bars

    from ..eval.cli import main as evaluate
    from ..eval.errors import EvaluationError

    disable_progress_bars()
    command = [str(checkpoint()), "--suite", "smoke", "--dtype", "float32", "--device", "cpu", "--batch_size", str(BATCH)]
    try:
        # lm-eval asks git about the working directory, which need not be a repository.
        with contextlib.redirect_stdout(io.StringIO()), quiet_children():
            found = evaluate([*command, "--output_path", str(output), "--bootstrap_iters", "0"])
    except OSError as error:
        print(f"Not scored: {error}; --output names another directory than {output}.", file=sys.stderr)
        return 2
    except EvaluationError as error:
        print(f"Not scored: {error}.", file=sys.stderr)
        return 2
    print(_comparison(found["results"]))
    print(f"\nAll of it: {output / 'table.md'}")
    return 0


def _comparison(found: dict) -> str:
    """Every score of the card beside the one just measured."""
    lines = [f"{'':48}{'here':>10}{'card':>10}"]
    for row in _results()["smoke"]:
        here = found[row["task"]]["metrics"][f"{row['metric']},none"]
        lines.append(f"    {ROWS[row['task']]:44}{here:10.4f}{row['value']:10.4f}")
    return "\n".join(lines)


def _results() -> dict:
    return json.loads((checkpoint() / RESULTS).read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(main())
