"""Tables of `language.json` for `eval/RESULTS.md`."""

from pathlib import Path

from ..paper import load_paper
from .language_models import CONFIGURATIONS, LABELS
from .language_runs import average, failed, generating, load, trained
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
    million = chosen["steps"] * batch * length / 1e6
    versions = [f"{name} {environment[name]}" for name in ("torch", "triton", "transformers") if name in environment]
    rows = [
        ("data", f"{corpus['train']['tokens']:,} tokens to train on, a vocabulary of {corpus['vocabulary']:,}"),
        ("model", f"width {size['width']}, {size['layers']} layers, SwiGLU of {size['intermediate']:,}, tied embeddings"),
        ("training", f"{chosen['steps']:,} steps of {batch} × {length:,} tokens, {million:.1f} million together"),
        ("facts", f"hidden in {chosen['needle_rows']} of {batch} sequences, 1 to {chosen['most_facts']} each"),
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
        means = [average(runs, lambda run: run[key]) for key in ("validation", "test", "step_ms", "train_s")]  # noqa: B023
        each = ", ".join(f"{run['test']:.2f}" for run in runs)
        size = f"{runs[0]['parameters'] / 1e6:.2f} M"
        figures = ("{:.2f} | {:.2f} | {each} | {:.1f} | {:.1f}").format(*means, each=each)
        rows.append((LABELS[name], size, figures, paper.get(IN_PAPER.get(name), "")))
    heads = ["model", "parameters", "validation", "test", "test, each seed", "ms a step", "training, s", "paper, 340M: Wiki"]
    errors = failed(folder)
    missing = [f"{LABELS[name]}: {error}." for name, error in errors.items()]
    missing += [f"{LABELS[name]}: not run." for name in CONFIGURATIONS if rows and name not in {*trained(folder), *errors}]
    picture = image(folder / "language_curves.png", "Validation perplexity against tokens seen")
    return _joined(table(heads, rows), " ".join(missing), picture)


def recall(folder: Path) -> str:
    """Shares of right answers by number of facts and length of the passage."""
    rows, heads = [], []
    for name, runs in trained(folder).items():
        heads = [f"{cell['facts']} in {cell['length']:,}" for cell in runs[0]["needles"]]
        shares = [average(runs, lambda run: run["needles"][cell]["right"]) for cell in range(len(heads))]  # noqa: B023
        rows.append((LABELS[name], *(f"{share:.0%}" for share in shares)))
    picture = image(folder / "language_recall.png", "Facts recalled, by their number and by distance")
    return _joined(table(["facts in tokens", *heads], rows), picture)


def length(folder: Path) -> str:
    """Perplexities of the same text in windows of each length."""
    rows, heads = [], []
    for name, runs in trained(folder).items():
        heads = [f"{tokens:,}" for tokens, _ in runs[0]["lengths"]]
        means = [average(runs, lambda run: run["lengths"][cell][1]) for cell in range(len(heads))]  # noqa: B023
        rows.append((LABELS[name], *(f"{value:.2f}" for value in means)))
    picture = image(folder / "language_length.png", "Perplexity by length and by position")
    return _joined(table(["tokens in a window", *heads], rows), picture)


def generation(folder: Path) -> str:
    """Tokens a second and memory behind each context."""
    rows = []
    for run in generating(folder):
        for cell in run["cells"]:
            memory = (f"{cell[key]:,.1f}" for key in ("cache_mib", "peak_over_weights_mib"))
            rows.append((LABELS[run["model"]], run["batch"], f"{cell['T']:,}", f"{cell['tokens_per_s']:,.0f}", *memory))
    heads = ["model", "batch", "context", "tokens/s", "state or keys and values, MiB", "peak beside the weights, MiB"]
    return _joined(table(heads, rows), image(folder / "language_generation.png", "Speed and memory behind a context"))


def _joined(first: str, *more: str) -> str:
    """The table and what belongs to it, or that nothing has run."""
    return "\n\n".join(filter(None, [first, *more])) if first else not_run(COMMAND)
