"""Plots of `language.json`."""

from collections.abc import Callable
from pathlib import Path
from statistics import mean

from .language_models import LABELS
from .language_runs import generating, trained


def draw(folder: Path) -> list[Path]:
    """The plots beside `language.json`, of what it has."""
    plots = {"generation": ((_speed, _memory), generating(folder))}
    for name, panels in {"curves": (_curves,), "recall": (_facts, _distance), "length": (_lengths, _positions)}.items():
        plots[name] = (panels, trained(folder))
    return [_figure(folder / f"language_{name}.png", panels, runs) for name, (panels, runs) in plots.items() if runs]


def _figure(path: Path, panels: tuple[Callable, ...], runs) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(5.6 * len(panels), 4), layout="constrained", squeeze=False)
    for axis, panel in zip(axes[0], panels):
        panel(axis, runs)
        axis.grid(alpha=0.3)
    axes[0, -1].legend(fontsize=7)
    figure.savefig(path, dpi=90)
    plt.close(figure)
    return path


def _lines(axis, models: dict[str, list[dict]], points: Callable) -> None:
    """A line for each model, the mean over its seeds of `points(run)`: pairs, the first numbers the same in all runs."""
    for name, runs in models.items():
        places = [place for place, _ in points(runs[0])]
        values = zip(*([value for _, value in points(run)] for run in runs))
        axis.plot(places, [mean(value) for value in values], marker=".", label=LABELS[name])


def _curves(axis, models) -> None:
    _lines(axis, models, lambda run: [(tokens / 1e6, value) for tokens, value in run["curve"]])
    axis.set(xlabel="million tokens", ylabel="validation perplexity", yscale="log")


def _facts(axis, models) -> None:
    length = next(iter(models.values()))[0]["needles"][0]["length"]
    cells = lambda run: [cell for cell in run["needles"] if cell["length"] == length]  # noqa: E731
    _lines(axis, models, lambda run: [(cell["facts"], 100 * cell["right"]) for cell in cells(run)])
    axis.set(xlabel=f"facts in {length:,} tokens", ylabel="recalled, %", ylim=(-3, 103))
    axis.set_xscale("log", base=2)


def _distance(axis, models) -> None:
    _lines(axis, models, lambda run: [(cell["up_to"], 100 * cell["right"]) for cell in run["distances"]])
    axis.set(xlabel="tokens since the fact, up to", ylabel="recalled, %", ylim=(-3, 103))
    axis.set_xscale("log", base=2)


def _lengths(axis, models) -> None:
    _lines(axis, models, lambda run: run["lengths"])
    axis.set(xlabel="tokens in a window", ylabel="perplexity", yscale="log")
    axis.set_xscale("log", base=2)


def _positions(axis, models) -> None:
    _lines(axis, models, lambda run: run["positions"])
    axis.set(xlabel="position in the longest window, up to", ylabel="perplexity", yscale="log")
    axis.set_xscale("log", base=2)


def _speed(axis, runs) -> None:
    for run in (run for run in runs if not run["shared_gpu"]):
        axis.plot(*zip(*((c["T"], c["tokens_per_s"]) for c in run["cells"])), marker="o", label=LABELS[run["model"]])
    axis.set(xlabel="tokens of context", ylabel="tokens/s", ylim=(0, None))
    axis.set_xscale("log", base=2)


def _memory(axis, runs) -> None:
    for run in runs:
        axis.plot(*zip(*((c["T"], c["cache_mib"]) for c in run["cells"])), marker="o", label=LABELS[run["model"]])
    axis.set(xlabel="tokens of context", ylabel="MiB of state, or of keys and values", yscale="log")
    axis.set_xscale("log", base=2)
