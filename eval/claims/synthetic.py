"""What the claims on synthetic tasks share: runs that are kept one by one, a limit of time and the command."""

import argparse
import json
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch

from ...benchmarks.timing import environment
from ..synthetic.tasks import Task, make_data
from ..synthetic.training import SOLVED, train

RESULTS = Path(__file__).parents[1] / "results"


@dataclass(frozen=True)
class Unit:
    """
    One training run.

    Attributes:
        name: of the model, as tables show it.
        task_name, task: with the sizes and the training that hold.
        model: see `deltanet.eval.synthetic.models.parse_model`.
    """

    name: str
    task_name: str
    task: Task
    model: str
    width: int
    rate: float
    decay: float
    seed: int

    def settings(self) -> dict:
        """All that the run depends on, as it stands in a results file."""
        task = self.task
        training = {key: value for key, value in task.training.items() if key not in ("learning_rates", "weight_decays")}
        settings = {
            **{"name": self.name, "task": self.task_name, "model": self.model, "width": self.width},
            **{"rate": self.rate, "decay": self.decay, "seed": self.seed, "shape": task.model, **training},
            **{"vocab": task.vocab, "sizes": task.sizes, "test_sizes": task.test_sizes},
            **{"examples": task.examples, "test_examples": task.test_examples},
        }
        return json.loads(json.dumps(settings))


@dataclass
class Results:
    """The file of a claim: the environment and one record a run, written anew after each."""

    path: Path
    runs: list[dict] = field(default_factory=list)
    environment: dict = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "Results":
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return cls(path, content.get("runs", []), content.get("environment", {}))

    def like(self, unit: Unit, *but: str) -> list[dict]:
        """Runs with the unit's settings, `but` aside."""
        own = {key: value for key, value in unit.settings().items() if key not in but}
        return [run for run in self.runs if all(run.get(key) == value for key, value in own.items())]

    def add(self, unit: Unit, result: dict) -> None:
        """Keep the result, in place of an unfinished one."""
        earlier = self.like(unit)
        record = json.loads(json.dumps({**unit.settings(), **result}))
        self.runs = [run for run in self.runs if run not in earlier] + [record]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps({"environment": self.environment, "runs": self.runs}, indent=1) + "\n", encoding="utf-8")
        part.replace(self.path)


def run_units(units: list[Unit], results: Results, device: str, deadline: float) -> None:
    """
    Train what has no complete result yet, in order, until the deadline; a run that it cuts off is kept as incomplete. A unit
    is left out where another learning rate has solved the same before. One that fails is reported, and the next goes on.
    """
    data = lru_cache(maxsize=1)(lambda name, seed: make_data({unit.task_name: unit.task for unit in units}[name], seed))
    results.environment = results.environment or environment(device)
    for index, unit in enumerate(units):
        is_done = any(run["complete"] for run in results.like(unit))
        if is_done or any(run["best"] > SOLVED for run in results.like(unit, "rate")):
            continue
        if time.time() > deadline:
            print(f"out of time before run {index + 1} of {len(units)}; the same command goes on there", flush=True)
            return
        point = (unit.model, unit.width, unit.rate, unit.decay, unit.seed, device)
        try:
            result = train(unit.task, data(unit.task_name, unit.seed), *point, deadline=deadline)
        except (RuntimeError, ValueError):
            traceback.print_exc()
            continue
        results.add(unit, result)
        print(f"{index + 1}/{len(units)} {describe(results.runs[-1])}", flush=True)


def describe(run: dict) -> str:
    """One line for the terminal."""
    end = "" if run["complete"] else ", cut off"
    how = "" if run["recorded"] else ", launch by launch"
    name = f"{run['task']} {run['name']} width {run['width']} rate {run['rate']:g} seed {run['seed']}"
    work = f"{run['steps']} steps of {run['step_ms']:.2f} ms{how}, {run['seconds']:.1f} s{end}"
    return f"{name}: {100 * run['best']:.1f} % after {work}"


def best_runs(runs: list[dict]) -> dict[tuple, dict]:
    """The best run over learning rates of each (task, name, width, seed), in the order of the first."""
    best = {}
    for run in runs:
        key = (run["task"], run["name"], run["width"], run["seed"])
        if key not in best or run["best"] > best[key]["best"]:
            best[key] = run
    return best


def footing(results: Results) -> str:
    """Device, versions and time of all runs, one sentence."""
    facts = results.environment
    versions = ", ".join(f"{name} {facts[name]}" for name in ("torch", "triton", "transformers") if name in facts)
    seconds = sum(run["seconds"] for run in results.runs)
    return f"{facts['device']}, {versions}, {facts['date']}; {len(results.runs)} runs, {seconds:.0f} seconds."


def command(
    name: str,
    units: Callable[[list[int]], list[Unit]],
    section: Callable[[Results], str],
    plot: Callable,
    argv: list[str] | None = None,
) -> Results:
    """
    The command of a claim: run its units and write NAME.json, NAME.md, which `section` returns, and, where there is
    matplotlib, NAME.png.

    Args:
        units: the runs for a list of seeds, the most important first.
        plot: called as `plot(results, panels)`; `panels(count)` makes a figure and its axes.
    """
    parser = argparse.ArgumentParser(f"python -m deltanet.eval.claims.{name.removeprefix('synthetic_')}")
    parser.add_argument("--output_path", type=Path, default=RESULTS, help="directory of the results (%(default)s)")
    parser.add_argument("--seconds", type=float, default=240, help="stop after this time (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    deadline = time.time() + args.seconds
    results = Results.read(args.output_path / f"{name}.json")
    run_units(units(args.seeds), results, args.device, deadline)
    if results.runs:
        (args.output_path / f"{name}.md").write_text(section(results), encoding="utf-8")
        _save_plot(args.output_path / f"{name}.png", results, plot)
    return results


def _save_plot(path: Path, results: Results, plot: Callable) -> None:
    try:
        import matplotlib
    except ImportError:
        print(f"matplotlib is not installed: where it is, --seconds 0 draws {path.name}")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def panels(count: int):
        figure, axes = plt.subplots(1, count, figsize=(3.8 * count, 3.2), sharey=True, squeeze=False)
        return figure, axes[0]

    figure = plot(results, panels)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)
