"""Tables of `language.json` for `eval/RESULTS.md`."""

from collections.abc import Callable
from pathlib import Path
from statistics import mean

from ..paper import load_paper
from .language_models import CONFIGURATIONS, LABELS
from .language_runs import failed, generating, load, trained
from .markdown import image, not_run, table

IN_PAPER = {
    "deltanet": "DeltaNet (conv)",
    "no-convolution": "DeltaNet (no conv)",
    "elu-sum": "DeltaNet (conv), L1 & 1+ELU",
    "sliding-window": "DeltaNet + sliding window",
    "global-attention": "DeltaNet + 2 global layers",
    "transformer": "Transformer++",
}
"""The rows of the paper's Table 1, at 340M parameters."""
COMMAND = "python -m deltanet.eval.claims.language --data DIR"


def settings(folder: Path) -> str:
    """What all models share: data, training, device, versions and the time used."""
    data = load(folder)
    if data is None:
        return not_run(COMMAND)
    chosen, corpus, environment = data["settings"], data["data"], data["environment"]
    batch, length, size, final = (chosen[key] for key in ("batch", "length", "size", "final_factor"))
    parts = zip(chosen["exercise_steps"], chosen["exercise_lengths"])
    exercises = ", then ".join(f"{steps:,} steps of {batch * length // own:,} × {own:,} tokens" for steps, own in parts)
    million = chosen["steps"] * batch * length / 1e6
    versions = [f"{name} {environment[name]}" for name in ("torch", "triton", "transformers") if name in environment]
    rows = [
        ("data", f"{corpus['train']['tokens']:,} tokens to train on, a vocabulary of {corpus['vocabulary']:,}"),
        ("model", f"width {size['width']}, {size['layers']} layers, SwiGLU of {size['intermediate']:,}, tied embeddings"),
        ("training", f"{chosen['steps']:,} steps of {batch} × {length:,} tokens, {million:.1f} million together"),
        ("recall", f"{exercises} more on facts, 1 to {chosen['most_facts']} in a sequence, at the same rates"),
        ("learning rate", f"{chosen['learning_rate']:g} after {chosen['warmup']:.0%}, then a cosine to {final:.0%} of it"),
        ("AdamW", f"betas {chosen['betas']}, weight decay {chosen['weight_decay']:g}, clipping at {chosen['clip']:g}"),
        ("precision", "bfloat16, with float32 master weights"),
        ("device", f"{environment['device']}, {', '.join(versions)}"),
        ("time", f"{sum(run['seconds'] for run in data['runs']):,.0f} s, measurements included"),
    ]
    return table(["", ""], rows)


def modelling(folder: Path) -> str:
    """Perplexities: the mean over the seeds, and each of them."""
    rows, paper = [], {row["model"]: row["values"]["Wiki"] for row in load_paper()["rows"] if row["size"].startswith("340M")}
    for name, runs in trained(folder).items():
        validation, test = (f"{mean(run[key] for run in runs):.2f}" for key in ("validation", "test"))
        each = ", ".join(f"{run['test']:.2f}" for run in runs)
        size = f"{runs[0]['parameters'] / 1e6:.2f} M"
        times = (_time(runs, key) for key in ("step_ms", "train_s"))
        rows.append((LABELS[name], size, validation, test, each, *times, paper.get(IN_PAPER.get(name), "")))
    heads = ["model", "parameters", "validation", "test", "test, each seed", "ms a step", "training, s", "paper, 340M: Wiki"]
    errors = failed(folder)
    missing = [f"{LABELS[name]}: {error}." for name, error in errors.items()]
    missing += [f"{LABELS[name]}: not run." for name in CONFIGURATIONS if rows and name not in {*trained(folder), *errors}]
    picture = image(folder / "language_curves.png", "Validation perplexity against tokens seen")
    return _joined(table(heads, rows), " ".join(missing), picture)


def _time(runs: list[dict], key: str) -> str:
    """The mean over the runs that had the GPU to themselves, or a dash."""
    alone = [run[key] for run in runs if not run["shared_gpu"]]
    return f"{mean(alone):.1f}" if alone else "–"


def recall(folder: Path) -> str:
    """Shares of right answers by number of facts and length of the passage."""
    named = lambda cell: f"{cell['facts']} in {cell['length']:,}"  # noqa: E731
    text = _by_cell(folder, "facts in tokens", lambda run: {named(cell): cell["right"] for cell in run["needles"]}, "{:.0%}")
    return _joined(text, image(folder / "language_recall.png", "Facts recalled, by their number and by distance"))


def length(folder: Path) -> str:
    """Perplexities of the same text in windows of each length."""
    text = _by_cell(folder, "tokens in a window", lambda run: {f"{at:,}": value for at, value in run["lengths"]}, "{:.2f}")
    return _joined(text, image(folder / "language_length.png", "Perplexity by length and by position"))


def _by_cell(folder: Path, heading: str, cells: Callable[[dict], dict[str, float]], form: str) -> str:
    """A row for each model with means over its seeds; a dash where a model has no such cell."""
    models = {name: [cells(run) for run in runs] for name, runs in trained(folder).items()}
    heads = list(dict.fromkeys(cell for runs in models.values() for cell in runs[0]))
    rows = []
    for name, runs in models.items():
        shown = (form.format(mean(run[cell] for run in runs)) if cell in runs[0] else "–" for cell in heads)
        rows.append((LABELS[name], *shown))
    return table([heading, *heads], rows)


def generation(folder: Path) -> str:
    """Tokens a second and memory behind each context."""
    rows = []
    for run in generating(folder):
        for cell in run["cells"]:
            memory = (f"{cell[key]:,.1f}" for key in ("cache_mib", "peak_over_weights_mib"))
            speed = "–" if run["shared_gpu"] else f"{cell['tokens_per_s']:,.0f}"
            rows.append((LABELS[run["model"]], run["batch"], f"{cell['T']:,}", speed, *memory))
    heads = ["model", "batch", "context", "tokens/s", "state or keys and values, MiB", "peak beside the weights, MiB"]
    return _joined(table(heads, rows), image(folder / "language_generation.png", "Speed and memory behind a context"))


def _joined(first: str, *more: str) -> str:
    """The table and what belongs to it, or that nothing has run."""
    return "\n\n".join(filter(None, [first, *more])) if first else not_run(COMMAND)
