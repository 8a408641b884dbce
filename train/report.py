"""
What a small model has learnt: a continuation, held-out bits per byte and a zero-shot task on held-out text.

    python -m deltanet.train.report MODEL [--prompt TEXT]
"""

import argparse
import importlib.util
import sys
import textwrap

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextStreamer,
    set_seed,
)

from .bits_per_byte import bits_per_byte, compressed_bits_per_byte
from .quiet import quiet
from .text import shipped_chapters

RESULTS = "results.json"
"""What is known of a released model, beside its weights."""
PROMPT = "She had not expected to see him there, and"
TOKENS = 100


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m deltanet.train.report", description=__doc__.split("\n\n")[0].strip())
    parser.add_argument("model", help="directory of a model and its tokenizer")
    parser.add_argument("--prompt", default=PROMPT, help="text to continue (%(default)r)")
    arguments = parser.parse_args()
    if not arguments.prompt.strip():
        parser.error("--prompt is empty; allowed: at least one word.")
    quiet()
    # The model is small: further threads bring little on free cores, and cost minutes on shared ones.
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(arguments.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)

    print("\nA continuation, sampled:\n")
    text = continuation(model, tokenizer, arguments.prompt)
    print(textwrap.indent("\n".join(map(textwrap.fill, text.splitlines())), "    "))

    heldout, known = shipped_chapters("heldout"), shipped_chapters("train")
    print(f"\nOn {len(heldout)} chapters of another novel, which it has not seen:\n", flush=True)
    bits = bits_per_byte(model, tokenizer, heldout, model.config.max_position_embeddings)
    print(f"    bits per byte     {bits:.3f}    xz: {compressed_bits_per_byte(heldout):.3f}; ", end="")
    print(f"xz that has read the training text: {compressed_bits_per_byte(heldout, known):.3f}; less is better", flush=True)
    print(f"    continuations     {_continuations(model, tokenizer)}")


def continuation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    tokens: int = TOKENS,
    seed: int = 0,
    streamer: TextStreamer | None = None,
) -> str:
    """The prompt and a sampled continuation of it, the same at every call; a `streamer` gets it while it grows."""
    set_seed(seed)
    inputs = tokenizer(prompt, return_tensors="pt")
    sampling = {"do_sample": True, "temperature": 0.7, "top_p": 0.9}
    ids = model.generate(**inputs, max_new_tokens=tokens, streamer=streamer, **sampling)[0]
    return tokenizer.decode(ids, skip_special_tokens=True)


def _continuations(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    if importlib.util.find_spec("lm_eval") is None:
        return "not scored: lm-eval is missing (extra `eval`)"
    from .continuations import CHANCE, right_continuations

    accuracy, error, questions = right_continuations(model, tokenizer)
    return f"{accuracy:.1%} right    chance: {CHANCE:.0%} (± {error:.1%}; lm-eval, zero-shot, {questions} passages of 4)"


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
