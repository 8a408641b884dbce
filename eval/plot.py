"""One picture a run."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from .metrics import numbers  # noqa: E402


def plot_results(path: Path, results: dict, comparison: dict | None, model: str) -> None:
    """Beside the paper's rows where there are any; needle tasks over the length; else metrics between 0 and 1 as bars."""
    needles = {task: result for task, result in results.items() if task.startswith("niah_")}
    if comparison:
        figure = _beside_paper(comparison)
    elif needles:
        figure = _over_length(needles)
    else:
        figure = _bars(results)
    figure.suptitle(model, fontsize=10, y=1.03)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def _beside_paper(comparison: dict):
    """A column each: the paper's rows as dots, its DeltaNet rows darker, this model as a line across."""
    names = comparison["columns"]
    figure, axes = plt.subplots(1, len(names), figsize=(1.5 * len(names) + 1, 4), squeeze=False)
    sizes = sorted({row["size"] for row in comparison["rows"]}, reverse=True)
    for axis, name in zip(axes[0], names):
        for row in comparison["rows"]:
            ours = row["model"].startswith("DeltaNet")
            style = {"color": "tab:blue" if ours else "0.6", "marker": "o" if ours else "x", "s": 18}
            axis.scatter(sizes.index(row["size"]), row["values"][name], **style)
        axis.axhline(comparison["model"][name], color="tab:red")
        values = [row["values"][name] for row in comparison["rows"]]
        if comparison["model"][name] > 4 * max(values):
            axis.set_yscale("log")
        axis.set_title(name, fontsize=9)
        axis.set_xticks(range(len(sizes)), [size.split(" /")[0] for size in sizes], fontsize=8)
        axis.set_xlim(-0.5, len(sizes) - 0.5)
        axis.tick_params(axis="y", labelsize=7)
    figure.supxlabel("red line: this model; blue dots: the paper's DeltaNet rows; grey crosses: its other rows", fontsize=8)
    figure.tight_layout()
    return figure


def _over_length(needles: dict):
    figure, axis = plt.subplots(figsize=(5, 3.5))
    for task, result in needles.items():
        scores = {int(key.split(",")[0]): value for key, value in result["metrics"].items() if key.split(",")[0].isdigit()}
        lengths = sorted(length for length, value in scores.items() if value >= 0)
        axis.plot(lengths, [100 * scores[length] for length in lengths], marker="o", label=task)
    axis.set_xscale("log", base=2)
    axis.set(xlabel="prompt length in tokens", ylabel="accuracy, %", ylim=(-3, 103))
    axis.legend(fontsize=8)
    return figure


def _bars(results: dict):
    shown = [(f"{task} {metric}", value, error or 0) for task, metric, value, error in numbers(results) if 0 <= value <= 1]
    figure, axis = plt.subplots(figsize=(6, 0.35 * len(shown) + 1))
    labels, values, errors = zip(*shown) if shown else ((), (), ())
    axis.barh(labels, values, xerr=errors, color="tab:blue")
    axis.set_xlim(0, 1)
    axis.invert_yaxis()
    return figure
