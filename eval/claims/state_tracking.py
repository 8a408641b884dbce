"""
Claim: with transitions whose eigenvalues may be negative (β up to 2) DeltaNet tracks states that it cannot with β up to 1.

`python -m deltanet.eval.claims.state_tracking` trains on parity (Grazzi et al., 2024), on permutations of three things made
of swaps, and on all permutations (S3; Siems et al., 2025), tests on sequences longer than those trained on, and writes
`synthetic_state_tracking.json`, its plot and its table.
"""

from ..synthetic.tasks import TASKS
from .markdown import table
from .synthetic import Results, Unit, best_runs, command, footing

MODELS = {"β ≤ 1": "deltanet", "β ≤ 2": "deltanet:allow_neg_eigval=true"}
WIDTH, RATE = 128, 1e-3
_WORDS = {"epochs": 12, "batch_size": 512, "test_batch_size": 512, "examples": 100_000, "test_examples": 1024}
# Published are 20,000 steps for parity and 100 epochs of batches of 2,048 for S3.
SIZES = {
    "parity": {"examples": 256 * 5000, "test_examples": 4096, "test_batch_size": 1024},
    "s3_swaps": _WORDS,
    "s3": _WORDS,
}
_TITLES = {"parity": "parity", "s3_swaps": "S3, swaps only", "s3": "S3, all permutations"}


def units(seeds: list[int], tasks=None) -> list[Unit]:
    """Parity first; β up to 2 before β up to 1, which is expected to take all its steps."""
    tasks = tasks or {name: TASKS[name].resized(**sizes) for name, sizes in SIZES.items()}
    return [
        Unit(name, task_name, task, MODELS[name], WIDTH, RATE, task.training["weight_decays"][0], seed)
        for seed in seeds
        for task_name, task in tasks.items()
        for name in reversed(MODELS)
    ]


def section(results: Results) -> str:
    """The part of RESULTS.md: a row for each task."""
    runs = results.runs
    rows = []
    for task, seed in dict.fromkeys((run["task"], run["seed"]) for run in runs):
        found = [run for run in runs if (run["task"], run["seed"]) == (task, seed)]
        by_name = {run["name"]: run for run in found}
        cells = [_cell(by_name[name]) if name in by_name else "" for name in MODELS]
        rows.append([_TITLES[task], str(seed), str(found[0]["shape"]["layers"]), *_lengths(found[0]), *cells])
    lines = [
        "### State tracking",
        "",
        table(["task", "seed", "layers", "trained on", "tested on", *MODELS], rows),
        "",
        "Accuracy on the longer sequences in %, with guessing at 0, and the steps it took; training ends above 99 % right. "
        f"Width {WIDTH}, 4 heads, learning rate {RATE:g}. " + footing(results),
        "",
    ]
    return "\n".join(lines)


def _cell(run: dict) -> str:
    return f"{100 * run['scaled']:.1f} ({run['steps']:,}{'' if run['complete'] else ', cut off'})"


def _lengths(run: dict) -> tuple[str, str]:
    """Lengths in training and in testing; parity counts its answer."""
    sizes, tested = run["sizes"], {**run["sizes"], **run["test_sizes"]}
    if "longest" in sizes:
        return tuple(f"{each['shortest']}–{each['longest']}" for each in (sizes, tested))
    return str(sizes["length"]), str(tested["length"])


def plot(results: Results, panels):
    """Accuracy over the position in the test sequences, a panel a task; a line where training ends."""
    tasks = list(dict.fromkeys(run["task"] for run in results.runs))
    figure, axes = panels(len(tasks))
    for axis, task in zip(axes, tasks):
        runs = [run for key, run in best_runs(results.runs).items() if key[0] == task]
        for run in runs:
            positions, accuracies = zip(*run["by_position"])
            label = run["name"] if run["seed"] == runs[0]["seed"] else None
            color = f"C{list(MODELS).index(run['name'])}"
            axis.plot(positions, [100 * value for value in accuracies], marker=".", color=color, label=label)
        axis.axvline(runs[0]["sizes"].get("longest") or runs[0]["sizes"]["length"], color="0.6", linestyle=":")
        axis.set(xlabel="position in the sequence", title=_TITLES[task], ylim=(-3, 103))
        axis.legend(fontsize=8)
    axes[0].set_ylabel("accuracy, % (dotted: end of training lengths)")
    return figure


def main(argv: list[str] | None = None) -> Results:
    return command("synthetic_state_tracking", units, section, plot, argv)


if __name__ == "__main__":
    main()
