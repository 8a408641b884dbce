"""Drawings of the figures that `gpu_delta_rule` wrote. Needs matplotlib and no GPU."""

import json
import pathlib

LABELS = {"ours": "this package", "fla": "flash-linear-attention", "flashqla": "FlashQLA", "sdpa": "softmax attention"}


def draw(path: pathlib.Path) -> pathlib.Path:
    """Speed-up of the chunked form over the recurrent one, and time against length of all peers; returns the PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    data = json.loads(path.read_text())
    rows = [row for row in data["rows"] if row["part"] == "figure1" and "error" not in row]
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    speedup(left, rows)
    for axis, work in ((middle, "forward"), (right, "forward_backward")):
        lengths(axis, rows, work)
    for axis in (left, middle, right):
        axis.set_xscale("log", base=2)
        axis.set_xlabel("length, 16,384 tokens in the batch")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle(f"{data['environment']['device']}, bfloat16, width 2048", fontsize=10)
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=90)
    plt.close(figure)
    return target


def speedup(axis, rows) -> None:
    """The paper's Figure 1."""
    times = {(row["peer"], row["D"], row["T"]): row["forward"]["wall_ms"] for row in rows if row.get("forward_only")}
    for D in sorted({D for _, D, _ in times}):
        T = sorted(T for peer, size, T in times if (peer, size) == ("ours", D) and ("recurrent", D, T) in times)
        axis.plot(T, [times["recurrent", D, t] / times["ours", D, t] for t in T], marker="o", label=f"head size {D}")
    axis.set_yscale("log")
    axis.set_title("chunked over recurrent, forward", fontsize=10)
    axis.set_ylabel("times faster")


def lengths(axis, rows, work) -> None:
    for peer, label in LABELS.items():
        points = sorted((r["T"], r[work]["device_ms"]) for r in rows if r["peer"] == peer and not r.get("forward_only"))
        if points:
            axis.plot(*zip(*points), marker="o", label=label)
    axis.set_ylim(bottom=0)
    axis.set_title(f"{work.replace('_', ' + ')}, head size 128", fontsize=10)
    axis.set_ylabel("ms")
