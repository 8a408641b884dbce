"""Table and plots of a sweep."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def best_runs(results: list[dict]) -> dict[tuple, dict]:
    """The best run of each (task, model, width) over learning rates, weight decays and seeds, as the papers report."""
    best = {}
    for run in results:
        key = (run["task"], run["model"], run["width"])
        if key not in best or run["best"] > best[key]["best"]:
            best[key] = run
    return best


def write_report(output: Path, results: list[dict]) -> None:
    """Write table.md and, a task each, TASK.png with the learning curves and, for several widths, the accuracy over them."""
    best = best_runs(results)
    lines = [
        "| task | model | width | parameters | accuracy, % | guessing at 0 | learning rate | weight decay | runs |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (task, model, width), run in best.items():
        runs = sum((other["task"], other["model"], other["width"]) == (task, model, width) for other in results)
        numbers = f"{100 * run['best']:.1f} | {100 * run['scaled']:.1f} | {run['rate']:.1e} | {run['decay']} | {runs}"
        lines.append(f"| {task} | {model} | {width} | {run['parameters']:,} | {numbers} |")
    table = "\n".join(lines) + "\n"
    output.mkdir(parents=True, exist_ok=True)
    (output / "table.md").write_text(table, encoding="utf-8")
    for task in dict.fromkeys(run["task"] for run in results):
        _plot(output / f"{task}.png", task, {key[1:]: run for key, run in best.items() if key[0] == task})
    print(f"{table}\nWritten to {output}")


def _plot(path: Path, task: str, runs: dict[tuple, dict]) -> None:
    widths = sorted({width for _, width in runs})
    figure, axes = plt.subplots(1, 2 if len(widths) > 1 else 1, figsize=(5 * min(2, len(widths)), 3.5), squeeze=False)
    for (model, width), run in runs.items():
        epochs, accuracies = zip(*run["curve"])
        label = f"{model}, {width}" if len(widths) > 1 else model
        axes[0, 0].plot(epochs, [100 * value for value in accuracies], marker=".", label=label)
    axes[0, 0].set(xlabel="epoch", ylabel="test accuracy, %", ylim=(-3, 103), title=task)
    axes[0, 0].legend(fontsize=7)
    for model in dict.fromkeys(model for model, _ in runs) if len(widths) > 1 else ():
        points = sorted((width, 100 * run["best"]) for (name, width), run in runs.items() if name == model)
        axes[0, 1].plot(*zip(*points), marker="o", label=model)
        axes[0, 1].set(xlabel="width", ylim=(-3, 103), xscale="log")
        axes[0, 1].set_xticks(widths, widths)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)
