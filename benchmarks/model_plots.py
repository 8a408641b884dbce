"""Drawings of the figures that `gpu_model` wrote. Needs matplotlib and no GPU."""

import json
import pathlib

LABELS = {"ours": "this package", "fla": "flash-linear-attention", "llama": "Llama of the same size (Transformers)"}
SIZE = "1.3B"


def draw(path: pathlib.Path) -> list[pathlib.Path]:
    """The PNGs beside FILE, of what it has figures for: a token against its context, and training against the length.

    Raises ValueError where FILE has neither.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    data = json.loads(path.read_text())
    rows = [row for row in data["rows"] if "error" not in row and row["size"] == SIZE]
    decode, train = ([row for row in rows if row["part"] == part] for part in ("decode", "train"))
    drawings = []
    if decode:
        drawings.append(("context", [(speed, decode), (memory, decode)]))
    if train:
        drawings.append(("training", [(throughput, train), (training_memory, train)]))
    if not drawings:
        raise ValueError(f"{path} has nothing to draw; run the parts decode or train first")
    targets = []
    for title, panels in drawings:
        figure, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 4), layout="constrained")
        for axis, (panel, cells) in zip(axes, panels):
            panel(axis, cells)
            axis.grid(alpha=0.3)
            axis.set_ylim(bottom=0)
            axis.set_xscale("log", base=2)
        axes[0].legend(fontsize=8)
        figure.suptitle(f"{SIZE}, bfloat16, {data['environment']['device']}", fontsize=10)
        targets.append(path.with_name(f"{path.stem}_{title}.png"))
        figure.savefig(targets[-1], dpi=90)
        plt.close(figure)
    return targets


def lines(axis, rows, value, **choice) -> None:
    """A line for each peer through its cells of the choice, by length."""
    for peer, label in LABELS.items():
        mine = [row for row in rows if row["peer"] == peer and all(row.get(key, "") == v for key, v in choice.items())]
        points = sorted((row["T"], value(row)) for row in mine)
        if points:
            axis.plot(*zip(*points), marker="o", label=label)


def speed(axis, rows) -> None:
    lines(axis, rows, lambda row: row["tokens_per_s"], B=1)
    axis.set_title("generate, batch 1: speed behind a context", fontsize=10)
    axis.set_xlabel("tokens of context")
    axis.set_ylabel("tokens/s")


def memory(axis, rows) -> None:
    """State, or keys and values."""
    lines(axis, rows, lambda row: row["cache_mib"] / 1024, B=1)
    axis.set_title("memory of that context: state, or keys and values", fontsize=10)
    axis.set_xlabel("tokens of context")
    axis.set_ylabel("GiB")


def throughput(axis, rows) -> None:
    """As the paper's figure of training throughput: 16,384 tokens in a batch, at growing length."""
    lines(axis, rows, lambda row: row["tokens_per_s"] / 1e3, variant="")
    axis.set_title("training, forward and backward", fontsize=10)
    axis.set_xlabel("length, 16,384 tokens in the batch")
    axis.set_ylabel("thousand tokens/s")


def training_memory(axis, rows) -> None:
    lines(axis, rows, lambda row: row["peak_mib"] / 1024, variant="")
    axis.set_title("peak memory, weights and gradients in bfloat16, no optimizer", fontsize=10)
    axis.set_xlabel("length, 16,384 tokens in the batch")
    axis.set_ylabel("GiB")
