"""Drawings of the figures that `gpu_delta_rule` wrote. Needs matplotlib and no GPU."""

import json
import pathlib

WORK = ("forward", "forward_backward")
LABELS = {"ours": "this package", "fla": "flash-linear-attention", "flashqla": "FlashQLA", "sdpa": "softmax attention"}


def draw(path: pathlib.Path) -> pathlib.Path:
    """What FILE has figures for: times by shape, the chunked form over the recurrent one, and time against length.

    Returns the PNG beside FILE. Raises ValueError where FILE has none of them.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    data = json.loads(path.read_text())
    parts = {part: [r for r in data["rows"] if r["part"] == part and "error" not in r] for part in ("ops", "figure1")}
    panels = [(shapes, parts["ops"], work) for work in WORK if parts["ops"]]
    if parts["figure1"]:
        panels += [(speedup, parts["figure1"]), *((lengths, parts["figure1"], work) for work in WORK)]
    if not panels:
        raise ValueError(f"{path} has no times to draw; run the parts ops or figure1 first")
    figure, axes = plt.subplots(1, len(panels), figsize=(4.4 * len(panels) + 1, 4.2), layout="constrained", squeeze=False)
    for axis, (panel, *arguments) in zip(axes[0], panels):
        panel(axis, *arguments)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle(f"{data['environment']['device']}, bfloat16", fontsize=10)
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=90)
    plt.close(figure)
    return target


def shapes(axis, rows, work) -> None:
    """Device time by shape, the peers side by side where they were measured."""
    names = list(dict.fromkeys(shape(row) for row in rows))
    present = [peer for peer in LABELS if any(row["peer"] == peer for row in rows)]
    for i, peer in enumerate(present):
        times = {shape(row): row[work]["device_ms"] for row in rows if row["peer"] == peer and work in row}
        places = [names.index(name) + (i - (len(present) - 1) / 2) * 0.8 / len(present) for name in times]
        axis.barh(places, list(times.values()), 0.8 / len(present), label=LABELS[peer])
    axis.set_yticks(range(len(names)), names, fontsize=7)
    axis.invert_yaxis()
    axis.set_title(work.replace("_", " + "), fontsize=10)
    axis.set_xlabel("ms")


def shape(row) -> str:
    packed = f", {row['sequences']} packed" if row.get("sequences") else ""
    return f"B{row['B']} T{row['T']} H{row['H']} D{row['D']}{packed}"


def by_length(axis) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xlabel("length, 16,384 tokens of width 2048 in the batch", fontsize=8)


def speedup(axis, rows) -> None:
    """The paper's Figure 1."""
    times = {(row["peer"], row["D"], row["T"]): row["forward"]["wall_ms"] for row in rows if row.get("forward_only")}
    for D in sorted({D for _, D, _ in times}):
        T = sorted(T for peer, size, T in times if (peer, size) == ("ours", D) and ("recurrent", D, T) in times)
        axis.plot(T, [times["recurrent", D, t] / times["ours", D, t] for t in T], marker="o", label=f"head size {D}")
    by_length(axis)
    axis.set_yscale("log")
    axis.set_title("chunked over recurrent, forward", fontsize=10)
    axis.set_ylabel("times faster")


def lengths(axis, rows, work) -> None:
    for peer, label in LABELS.items():
        points = sorted((r["T"], r[work]["device_ms"]) for r in rows if r["peer"] == peer and not r.get("forward_only"))
        if points:
            axis.plot(*zip(*points), marker="o", label=label)
    by_length(axis)
    axis.set_ylim(bottom=0)
    axis.set_title(f"{work.replace('_', ' + ')}, head size 128", fontsize=10)
    axis.set_ylabel("ms")
