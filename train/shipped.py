"""
Shows the trained checkpoint that is shipped: it continues a text at once, and then is scored on held-out prose.

    python -m deltanet.train.shipped [--prompt TEXT] [--seed N] [--tokens N] [--output DIR]
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from .quiet import quiet
from .release import RESULTS
from .report import PROMPT, continuation

CHECKPOINT = Path(__file__).parent / "checkpoint"
MOST_THREADS = 4
"""The matrices are small: more threads wait for each other."""

NEXT_STEPS = """
Next:
    {python} -m deltanet.train.shipped --prompt "My fellow citizens," --seed 1
    {python} -m deltanet.train.first_run          # trains a smaller model on the shipped text: minutes on a CPU
    {python} -m deltanet.train.corpus runs/corpus # rebuilds what this one was trained on

    import deltanet
    from deltanet.train.shipped import checkpoint
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model, tokenizer = (auto.from_pretrained(checkpoint()) for auto in (AutoModelForCausalLM, AutoTokenizer))
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
    torch.set_num_threads(min(torch.get_num_threads(), MOST_THREADS))
    model, tokenizer = load()
    _describe(model)
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    continuation(model, tokenizer, arguments.prompt, arguments.tokens, arguments.seed, streamer)
    print("\nScoring it on a novel that it has not read: about a minute (Ctrl-C stops) ...\n")
    try:
        status = _score(arguments.output)
    except KeyboardInterrupt:
        print("\nStopped; the same command goes on with the task it was at.", file=sys.stderr)
        return 130
    if status == 0:
        print(NEXT_STEPS.format(python=min(sys.executable, os.path.relpath(sys.executable), key=len)))
    return status


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m deltanet.train.shipped", description=__doc__.split("\n\n")[0].strip())
    parser.add_argument("--prompt", default=PROMPT, help="text to continue (%(default)r)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (%(default)s)")
    parser.add_argument("--tokens", type=int, default=120, help="most tokens of the continuation (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/shipped"), help="directory of the scores (%(default)s)")
    arguments = parser.parse_args()
    if not arguments.prompt.strip():
        parser.error("--prompt is empty; allowed: at least one word.")
    if arguments.tokens < 1:
        parser.error(f"--tokens is {arguments.tokens}; allowed: 1 and more.")
    return arguments


def _describe(model: PreTrainedModel) -> None:
    results = json.loads((checkpoint() / RESULTS).read_text(encoding="utf-8"))
    print(f"The shipped DeltaNet: {model.num_parameters() / 1e6:.1f} million parameters, trained on a corpus of English in")
    print(f"{sum(results['seconds']) / 60:.0f} minutes of one {results['device']}. On text it has not seen it needs")
    print(f"{results['test']['float32']:.3f} bits per byte (xz: {results['test']['xz']:.3f}). {checkpoint()}\n")


def _score(output: Path) -> int:
    command = [sys.executable, "-m", "deltanet.eval", str(checkpoint()), "--suite", "smoke", "--dtype", "float32"]
    return subprocess.run([*command, "--output_path", str(output)], env={**os.environ, "HF_HUB_OFFLINE": "1"}).returncode


if __name__ == "__main__":
    sys.exit(main())
