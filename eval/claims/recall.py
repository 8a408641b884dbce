"""
Claim: DeltaNet recalls what other recurrent models of its size forget (the paper's Figure 4).

`python -m deltanet.eval.claims.recall` trains DeltaNet, a Transformer (Llama's blocks) and Mamba2 on MQAR in the paper's
setting and writes `synthetic_recall.json`, its plot and its table. Mamba2's state is as large as DeltaNet's.
"""

from ..synthetic.tasks import TASKS
from .markdown import table
from .synthetic import Results, Unit, best_runs, command, footing

WIDTHS = (64, 128, 256)
# Two for each model. On a small MQAR (length 32, 4 pairs) DeltaNet without convolution was quickest at 5e-3; there the
# Transformer learned nothing, and the others were quick at 2e-3.
RATES = {
    "DeltaNet": (5e-3, 2e-3),
    "DeltaNet, convolution": (2e-3, 1e-3),
    "Transformer": (2e-3, 1e-3),
    "Mamba2": (2e-3, 1e-3),
}
# Zoology: 64 epochs of batches of 128, four learning rates from 1e-4 to 1e-2, 3,000 test examples.
TASK = TASKS["mqar"].resized(epochs=6, batch_size=64, evaluate_every=250, test_examples=1000, test_batch_size=500)


def specification(name: str, width: int) -> str:
    """DeltaNet has two heads and, as in the paper, no convolution: a state of width²/2 numbers a layer, so Mamba2's too."""
    return {
        "DeltaNet": "deltanet:num_heads=2,use_short_conv=false",
        "DeltaNet, convolution": "deltanet:num_heads=2,use_short_conv=true",
        "Transformer": "llama",
        "Mamba2": f"mamba2:state_size={width // 4},head_dim=64,num_heads={width // 32}",
    }[name]


def units(seeds: list[int], task=TASK, widths=WIDTHS) -> list[Unit]:
    """The first learning rate of everything before the second, which runs where the first did not solve the task."""
    order = [(name, width) for width in widths for name in ("DeltaNet", "Transformer", "DeltaNet, convolution")]
    order += [("Mamba2", width) for width in widths]
    return [
        Unit(name, "mqar", task, specification(name, width), width, RATES[name][attempt], 0.1, seed)
        for seed in seeds
        for attempt in (0, 1)
        for name, width in order
    ]


def section(results: Results) -> str:
    """The part of RESULTS.md: a table with a row for each model and a column for each width."""
    best = best_runs(results.runs)
    widths = sorted({run["width"] for run in results.runs})
    rows = []
    for name, seed in dict.fromkeys((run["name"], run["seed"]) for run in results.runs):
        found = [best.get(("mqar", name, width, seed)) for width in widths]
        rows.append([name, str(seed), *("" if run is None else _cell(run) for run in found)])
    first = results.runs[0]
    lines = [
        "### Recall (MQAR)",
        "",
        table(["model", "seed", *(f"width {width}" for width in widths)], rows),
        "",
        f"Test accuracy in %, with the epoch of {first['epochs']} and the learning rate. Length {first['sizes']['length']}, "
        f"{first['sizes']['pairs']} pairs, {first['examples']:,} examples, batch {first['batch_size']}; training ends above "
        "99 %. A second learning rate was tried where the first did not solve the task. " + footing(results),
        "",
    ]
    return "\n".join(lines)


def _cell(run: dict) -> str:
    epoch = max(run["curve"], key=lambda point: point[1])[0]
    return f"{100 * run['best']:.1f} ({epoch:.1f}, {run['rate']:g}{'' if run['complete'] else ', cut off'})"


def plot(results: Results, panels):
    """Accuracy over the width as in the paper's Figure 4, and the learning curves."""
    best = best_runs(results.runs)
    names = list(dict.fromkeys(run["name"] for run in results.runs))
    widths = sorted({run["width"] for run in results.runs})
    figure, axes = panels(1 + len(widths))
    for name in names:
        color = f"C{names.index(name)}"
        points = [(run["width"], 100 * run["best"]) for (_, other, *_), run in best.items() if other == name]
        axes[0].plot(*zip(*sorted(points)), marker="o", color=color, label=name)
        for axis, width in zip(axes[1:], widths):
            for run in (run for (_, other, at, _), run in best.items() if (other, at) == (name, width)):
                epochs, accuracies = zip(*run["curve"])
                axis.plot(epochs, [100 * value for value in accuracies], marker=".", color=color)
            axis.set(xlabel="epoch", title=f"width {width}")
    axes[0].set(xlabel="width", ylabel="test accuracy, %", ylim=(-3, 103), title="MQAR", xscale="log")
    axes[0].set_xticks(widths, widths)
    axes[0].minorticks_off()
    axes[0].legend(fontsize=8)
    return figure


def main(argv: list[str] | None = None) -> Results:
    return command("synthetic_recall", units, section, plot, argv)


if __name__ == "__main__":
    main()
