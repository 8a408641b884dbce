"""The chunked delta rule on a GPU: ours, flash-linear-attention, FlashQLA and softmax attention, in bfloat16.

    python -m deltanet.benchmarks.gpu_delta_rule [--part ops small memory error first_call figure1]
        [--peers ours fla flashqla sdpa] [--shapes B8_T4096_H16_D128 ...] [--seconds 560] [--output FILE]
    python -m deltanet.benchmarks.gpu_delta_rule --plot [--output FILE]

Every peer runs in a process of its own on the same inputs, with the L2 norm of q and k inside. The figures are written as
they come, so that a peer that fails or runs out of time loses nothing of the others, and replace those of the same
device and versions in FILE. `device_ms` is the median time the device is busy with a call, `wall_ms` includes the host.
--device cpu --tiny tries every step without a GPU.
"""

import argparse
import collections
import json
import os
import pathlib
import shutil
import tempfile
import threading
import time

import torch

from . import peers
from .processes import compile_together, run_worker
from .timing import ceilings, environment

RESULT = pathlib.Path(__file__).parent / "results" / "gpu_delta_rule.json"
PARTS = ("first_call", "ops", "small", "memory", "error", "figure1")
MAIN = {"B": 8, "T": 4096, "H": 16, "D": 128}
SHAPES = (
    MAIN,
    {"B": 1, "T": 16384, "H": 16, "D": 128},
    {"B": 1, "T": 131072, "H": 16, "D": 128},
    {"B": 8, "T": 4096, "H": 32, "D": 64},
    {"B": 8, "T": 4096, "H": 8, "D": 256},
    {"B": 8, "T": 2048, "H": 16, "D": 128},
    {"B": 32, "T": 2048, "H": 8, "D": 128},
    {"B": 2, "T": 16384, "H": 16, "D": 128},
    {"B": 1, "T": 32768, "H": 16, "D": 128, "sequences": 16},
)
SMALL = ({"B": 1, "T": 2048, "H": 8, "D": 128}, {"B": 1, "T": 256, "H": 8, "D": 128})
# B and T apart from the shapes of the speed tests, H and D as there: the peers compile for H and D.
ACCURACY = tuple(
    {"B": 1, "T": 1000, "H": 2048 // D, "D": D, "keys": keys} for D in (64, 128, 256) for keys in ("silu", "correlated")
)
TOKENS, WIDTH = 16384, 2048
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)


def figure_tasks(chosen: list[str]) -> list[dict]:
    """The paper's Figure 1, tokens and width of the batch fixed: chunked against recurrent, and all peers by length."""
    rows = []
    for T in LENGTHS:
        for D in (64, 128, 256):
            shape = {"B": TOKENS // T, "T": T, "H": WIDTH // D, "D": D, "forward_only": True}
            rows += [{"peer": peer, **shape} for peer in ("ours", "recurrent") if "ours" in chosen]
        rows += [{"peer": peer, "B": TOKENS // T, "T": T, "H": WIDTH // 128, "D": 128} for peer in chosen]
    return rows


def plan(part: str, chosen: list[str]) -> list[dict]:
    """The tasks of a part, see `gpu_worker`."""
    shapes = {"ops": SHAPES, "small": SMALL, "memory": (MAIN,), "error": ACCURACY, "first_call": (MAIN,)}
    kind = part if part in ("memory", "error", "first_call") else "time"
    if part == "figure1":
        tasks = figure_tasks(chosen)
    else:
        skipped = {"sdpa"} if part in ("error", "first_call") else set()
        tasks = [{"peer": peer, **shape} for peer in chosen if peer not in skipped for shape in shapes[part]]
    return [{"part": part, "kind": kind, **task} for task in tasks]


def name(task: dict) -> str:
    packed = f"_N{task['sequences']}" if task.get("sequences") else ""
    keys = f"_{task['keys']}" if task.get("keys") else ""
    return f"B{task['B']}_T{task['T']}_H{task['H']}_D{task['D']}{packed}{keys}"


def tiny(task: dict) -> dict:
    """A shape that a CPU computes in no time; the lengths of a part stay apart."""
    T = 20 + task["T"] // 400
    return {**task, "B": min(task["B"], 2), "T": T, "H": min(task["H"], 2), "D": task["D"] // 4}


class Results:
    """Rows in a file, written again after each."""

    name = staticmethod(name)

    def __init__(self, path: pathlib.Path, settings: dict):
        self.path, self.lock = path, threading.Lock()
        self.started = time.strftime("%Y-%m-%dT%H:%M:%S")
        self.data = {"environment": settings, "ceilings": {}, "rows": []}
        if path.exists():
            old = json.loads(path.read_text())
            same = lambda x: {key: value for key, value in x["environment"].items() if key != "date"}  # noqa: E731
            if same(old) == same(self.data):
                self.data = {**old, "environment": settings}

    @staticmethod
    def key(row: dict) -> tuple:
        return row["part"], row["peer"], name(row), row.get("forward_only", False)

    def add(self, row: dict) -> None:
        with self.lock:
            kept = [old for old in self.data["rows"] if self.key(old) != self.key(row)]
            self.data["rows"] = [*kept, rounded({**row, "run": self.started})]
            self.write()
        print(f"  {row['part']:<11}{row['peer']:<10}{self.name(row):<32}{summary(row)}", flush=True)

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = ",\n  ".join(json.dumps(row) for row in self.data["rows"])
        head = {key: value for key, value in self.data.items() if key != "rows"}
        self.path.write_text(json.dumps(head, indent=1)[:-2] + f',\n "rows": [\n  {rows}\n ]\n}}\n')


def rounded(value):
    """Four significant digits are more than the clock has."""
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(entry) for entry in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def summary(row: dict) -> str:
    if "error" in row:
        return f"error: {row['error'][:90]}"
    figures = [f"{key} {value:.4g}" for key, value in row.items() if isinstance(value, float)]
    for work in ("forward", "forward_backward"):
        figures += [f"{work} {unit} {value:.4g}" for unit, value in row.get(work, {}).items()]
    return "  ".join(figures)


def table(rows: list[dict]) -> str:
    """Times side by side, the peers' also as multiples of ours; then what was measured once."""
    shapes = collections.defaultdict(dict)
    for row in rows:
        if row["part"] in ("ops", "small") and "error" not in row:
            shapes[row["part"], name(row)][row["peer"]] = row
    lines = [f"{'median ms':<36}{'pass':<17}" + "".join(f"{peer:>18}" for peer in peers.NAMES)]
    for (part, shape), row in shapes.items():
        unit = "wall_ms" if part == "small" else "device_ms"
        for work in ("forward", "forward_backward"):
            mine = row.get("ours", {}).get(work, {}).get(unit)
            values = [(peer, row.get(peer, {}).get(work, {}).get(unit)) for peer in peers.NAMES]
            cells = [cell(value, mine if peer != "ours" else None) for peer, value in values]
            lines.append(f"{shape + ' ' + unit[:-3]:<36}{work:<17}" + "".join(f"{text:>18}" for text in cells))
    once = [row for row in rows if row["part"] in ("memory", "error", "first_call")]
    lines += [f"{row['part']:<11}{row['peer']:<10}{name(row):<32}{summary(row)}" for row in once]
    return "\n".join(lines)


def cell(value, mine) -> str:
    if value is None:
        return "-"
    return f"{value:.3f} ({value / mine:5.2f}x)" if mine else f"{value:.3f}"


def measure(tasks, arguments, results, cache, deadline):
    """Run the tasks, one process a peer, one after the other."""

    def go(chosen):
        for peer in dict.fromkeys(task["peer"] for task in chosen):
            mine = [task for task in chosen if task["peer"] == peer]
            run_worker(peer, mine, arguments.device, cache, deadline, results.add)

    first = [task for task in tasks if task["kind"] == "first_call"]
    for peer in {task["peer"] for task in first}:
        shutil.rmtree(cache / peer, ignore_errors=True)
    # Ours alone, then the peers side by side: they compile for minutes on one core each.
    go([task for task in first if task["peer"] not in peers.TUNES_ITSELF])
    slow = [threading.Thread(target=go, args=([task],)) for task in first if task["peer"] in peers.TUNES_ITSELF]
    for thread in slow:
        thread.start()
    for thread in slow:
        thread.join()
    rest = [task for task in tasks if task["kind"] != "first_call"]
    slow = [task for task in rest if task["peer"] in peers.TUNES_ITSELF]
    # Before the minutes of compilation that the peers need, and that may use up the time.
    go([task for task in rest if task not in slow])
    if arguments.device == "cuda":
        compile_together(slow, cache, deadline)
    go(slow)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--peers", nargs="+", choices=peers.NAMES, default=peers.NAMES)
    parser.add_argument("--shapes", nargs="+", metavar="B_T_H_D", help="only shapes whose name contains one of these")
    parser.add_argument("--output", type=pathlib.Path, default=RESULT)
    parser.add_argument("--seconds", type=float, default=560, help="stop measuring after this time")
    parser.add_argument("--cache", type=pathlib.Path, default=pathlib.Path(tempfile.gettempdir(), "deltanet-benchmarks"))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try the benchmark itself")
    parser.add_argument("--plot", action="store_true", help="only draw FILE")
    arguments = parser.parse_args()
    if arguments.plot:
        from .gpu_plots import draw

        print(draw(arguments.output))
        return
    deadline = time.monotonic() + arguments.seconds
    backend = os.environ.get("DELTANET_BACKEND", "")
    results = Results(arguments.output, environment(arguments.device, dtype="bfloat16", backend=backend))
    print(results.data["environment"], flush=True)
    results.data["ceilings"] = ceilings(arguments.device)
    print(results.data["ceilings"], flush=True)
    if arguments.device == "cuda":
        torch.cuda.empty_cache()
    tasks = [task for part in arguments.part for task in plan(part, list(arguments.peers))]
    if arguments.shapes:
        tasks = [task for task in tasks if any(shape in name(task) for shape in arguments.shapes)]
    measure([tiny(task) if arguments.tiny else task for task in tasks], arguments, results, arguments.cache, deadline)
    results.write()
    print(table(results.data["rows"]))


if __name__ == "__main__":
    main()
