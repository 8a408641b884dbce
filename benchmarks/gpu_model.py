"""Whole models on a GPU in bfloat16: ours, a Llama of the same size, flash-linear-attention's DeltaNet.

    python -m deltanet.benchmarks.gpu_model [--part generate train step prefill decode account host] [--peers ours llama fla]
        [--cells 1.3B_B8 ...] [--variants plain ...] [--seconds 560] [--output FILE]
    python -m deltanet.benchmarks.gpu_model --plot [--output FILE]     draws FILE, on any machine

    generate   tokens a second of `model.generate`, prompt of 128 tokens and 128 new ones, from call to return
    prefill    reading a prompt of 2,048 to 131,072 tokens, the last logits and the cache kept
    train      forward with loss and backward: tokens a second, MFU, peak memory
    step       where the time of such a step goes, by kind of kernel
    decode     tokens a second and memory of a generated token behind a context of up to 131,072 tokens
    account    where the time of a token in `generate` goes
    host       what a prompt costs the host: until the call returns, by class of module, and how often it waits

MFU is tokens/s x (6 N + 3 M) / the device's data sheet, 989 TFLOP/s for an H100; `train/flops.py` defines N and M. Every
peer runs in a process of its own, ours first. Cells are written to FILE as they come, and a cell that is there already,
of the same device, software and code, is not measured again: a run that was cut off goes on with the same command.
`first_s` is the first call of its kind, compilation included, and is part of no other figure.
--device cpu --tiny tries every step without a GPU.
"""

import argparse
import collections
import os
import pathlib
import re
import tempfile
import time

from . import model_peers
from .gpu_delta_rule import Results
from .processes import compile_together, run_worker
from .timing import environment
from .training_account import GROUPS

RESULTS = pathlib.Path(__file__).parent / "results"
PEER_PACKAGES = ("fla-core", "flash-qla", "tilelang")
"""Recorded in the rows of their peer, so that ours are kept where one of them comes or goes."""

BATCHES = (1, 8, 32, 128)
PROMPT = 128
HOST_PROMPTS = (64, 2048)
"""The first keeps the device busy for next to no time: its wall time is the host's."""
PREFILLS = (2048, 8192, 32768, 131072)
TRAINING = (("1.3B", 8, 2048), ("1.3B", 4, 4096), ("1.3B", 2, 8192), ("1.3B", 1, 16384), ("340M", 32, 2048))
CONTEXTS = {1: (512, 2048, 8192, 32768, 131072), 16: (512, 2048, 8192, 16384)}
"""Contexts of the decoding part by batch; 16 x 16,384 keys and values of the 1.3B Llama take 48 GiB."""


def plan(part: str, peer: str) -> list[dict]:
    """The cells of a part, see `model_worker`."""
    if part == "generate":
        cells = [{"size": size, "B": B, "T": PROMPT} for size in ("1.3B", "340M") for B in BATCHES]
        cells += [{"size": "1.3B", "B": B, "T": PROMPT, "variant": "int8"} for B in (1, 32) if peer == "ours"]
    elif part == "prefill":
        cells = [{"size": size, "B": 1, "T": T} for size in ("1.3B", "340M") for T in PREFILLS]
    elif part == "train":
        cells = [{"size": size, "B": B, "T": T, "variant": ""} for size, B, T in TRAINING]
        variants = model_peers.TRAINING_VARIANTS.get(peer, ())
        cells += [{"size": "1.3B", "B": B, "T": 16384 // B, "variant": variant} for variant in variants for B in (8, 1)]
    elif part == "step":
        cells = [{"size": "1.3B", "B": B, "T": 16384 // B} for B in (8, 1)]
    elif part == "decode":
        cells = [{"size": "1.3B", "B": B, "T": T} for B, contexts in CONTEXTS.items() for T in contexts]
    elif part == "host":
        cells = [{"size": "1.3B", "B": 1, "T": T} for T in HOST_PROMPTS]
    else:
        cells = [{"size": "1.3B", "B": B, "T": PROMPT} for B in (1, 32)]
    return [{"part": part, "kind": part, "peer": peer, **cell} for cell in cells]


def compilations(tasks: list[dict]) -> list[dict]:
    """What compiles the variants that a peer's autotuner tries in training: one step of one layer for each size."""
    models = sorted({(task["peer"], task["size"]) for task in tasks if task["kind"] in ("train", "step")})
    return [{"kind": "compile", "peer": peer, "size": f"{size} thin", "B": 8, "T": 2048} for peer, size in models]


PARTS = ("generate", "train", "step", "prefill", "decode", "account", "host")


def name(row: dict) -> str:
    return "_".join(filter(None, (row["size"], f"B{row['B']}", f"T{row['T']}", row.get("variant"))))


def tiny(task: dict) -> dict:
    """The same cell for a CPU: a small model, few tokens; the lengths of a part stay apart."""
    return {**task, "size": "tiny", "B": 1 + task["B"] % 5, "T": 70 + task["T"] // 2000, "new": 12, "seconds": 0.5}


class ModelResults(Results):
    """Rows by part, peer and cell, with the version of what was measured."""

    name = staticmethod(name)

    @staticmethod
    def key(row: dict) -> tuple:
        return row["part"], row["peer"], name(row)

    def add(self, row: dict) -> None:
        """What was not run for want of time leaves older figures as they are."""
        if row.get("error", "").endswith("out of time") and self.key(row) in map(self.key, self.data["rows"]):
            print(f"  {self.key(row)}: {row['error']}", flush=True)
            return
        super().add({**row, "version": model_peers.version(row["peer"])})

    def missing(self, tasks: list[dict]) -> list[dict]:
        """The tasks of which no figures of the same version are here."""
        done = {(self.key(row), row["version"]) for row in self.data["rows"] if "error" not in row}
        return [task for task in tasks if (self.key(task), model_peers.version(task["peer"])) not in done]


FIGURES = {
    "generate": (("tokens_per_s", "tokens/s", "{:,.0f}"), ("ms_a_step", "ms a token", "{:.2f}")),
    "prefill": (("wall_ms", "ms", "{:.1f}"), ("device_ms", "device ms", "{:.1f}")),
    "train": (("tokens_per_s", "tokens/s", "{:,.0f}"), ("mfu", "MFU", "{:.1%}"), ("peak_mib", "peak MiB", "{:,.0f}")),
    "step": tuple((f"{key}_ms", f"{key.replace('_', ' ')} ms", "{:.1f}") for key in ("wall", "busy", *GROUPS, "other")),
    "decode": (("tokens_per_s", "tokens/s", "{:,.1f}"), ("cache_mib", "cache MiB", "{:,.0f}")),
    "host": (
        ("wall_ms", "ms", "{:.2f}"), ("device_ms", "device ms", "{:.2f}"), ("host_ms", "ms until return", "{:.2f}"),
        ("synchronizations", "waits", "{:.0f}"), ("launches", "launches", "{:.0f}"),
    ),  # fmt: skip
    "account": tuple(
        (f"{key}_us", f"{key.replace('_', ' ')} us", "{:,.0f}")
        for key in ("wall", "model_call", "inputs", "bookkeeping", "stop_check", "sampling_and_rest", "device_busy")
    ),
}
"""(key, heading, format) of the figures in the table."""


def table(rows: list[dict]) -> str:
    """The figures of every cell, the peers side by side."""
    lines = []
    for part, figures in FIGURES.items():
        cells = collections.defaultdict(dict)
        for row in rows:
            if row["part"] == part:
                cells[name(row)][row["peer"]] = row
        if cells:
            lines.append(f"\n{part:<44}" + "".join(f"{peer:>14}" for peer in model_peers.NAMES))
        for cell, by_peer in cells.items():
            for key, heading, form in figures:
                values = [_figure(by_peer.get(peer, {}), key, form) for peer in model_peers.NAMES]
                lines.append(f"{cell:<26}{heading:<18}" + "".join(f"{value:>14}" for value in values))
    return "\n".join(lines)


def host_table(rows: list[dict]) -> str:
    """Whose the host's time is, of every prompt and peer: microseconds a layer, stopwatches included, and calls."""
    lines = []
    for row in rows:
        if row["part"] == "host" and "own_us" in row:
            lines.append(f"\n{row['peer']} {name(row):<40}{'own us a layer':>16}{'calls':>10}")
            lines += [f"{part:<44}{own:>14.1f}{row['calls'][part]:>12.0f}" for part, own in row["own_us"].items()]
    return "\n".join(lines)


def _figure(row: dict, key: str, form: str) -> str:
    if "error" in row:
        return "out of memory" if "out of memory" in row["error"].lower() else "error"
    return form.format(row[key]) if key in row else "-"


def default_output(device_name: str) -> pathlib.Path:
    """A file for each device, because figures of two do not compare."""
    model = re.search(r"[ABHL]\d+S?|cpu", device_name)
    return RESULTS / f"gpu_model_{model.group().lower() if model else 'other'}.json"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--peers", nargs="+", choices=model_peers.NAMES, default=model_peers.NAMES)
    parser.add_argument("--cells", nargs="+", metavar="SIZE_B_T", help="only cells whose name contains one of these")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="only these ways to train; `plain` is the usual one")
    parser.add_argument("--output", type=pathlib.Path, help="by default results/gpu_model_DEVICE.json")
    parser.add_argument("--seconds", type=float, default=560, help="stop measuring after this time")
    parser.add_argument("--cache", type=pathlib.Path, default=pathlib.Path(tempfile.gettempdir(), "deltanet-benchmarks"))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="small models, to try the benchmark itself")
    parser.add_argument("--plot", action="store_true", help="only draw FILE")
    arguments = parser.parse_args()
    if arguments.plot:
        from .model_plots import draw

        print(*draw(arguments.output or default_output("H100")), sep="\n")
        return
    deadline = time.monotonic() + arguments.seconds
    # Each peer is measured alone on the device, so what its autotuner chose serves its next process too.
    os.environ.setdefault("TRITON_CACHE_AUTOTUNING", "1")
    settings = environment(arguments.device, dtype="bfloat16", backend=os.environ.get("DELTANET_BACKEND", ""))
    settings = {key: value for key, value in settings.items() if key not in PEER_PACKAGES}
    output = arguments.output or default_output(settings["device"] if arguments.device == "cuda" else "cpu")
    results = ModelResults(output, settings)
    print(f"{settings}\nto {output}", flush=True)
    # Peer by peer within a part would start fla, and its compilation, once a part.
    for peer in [peer for peer in model_peers.NAMES if peer in arguments.peers]:
        tasks = [task for part in arguments.part for task in plan(part, peer)]
        if arguments.cells:
            tasks = [task for task in tasks if any(cell in name(task) for cell in arguments.cells)]
        if arguments.variants:
            tasks = [task for task in tasks if (task.get("variant") or "plain") in arguments.variants]
        tasks = results.missing([tiny(task) if arguments.tiny else task for task in tasks])
        if peer == "fla" and arguments.device == "cuda":
            compile_together(compilations(tasks), arguments.cache, deadline, worker="model_worker")
        run_worker(peer, tasks, arguments.device, arguments.cache, deadline, results.add, worker="model_worker")
    print(table(results.data["rows"]), host_table(results.data["rows"]), sep="\n")


if __name__ == "__main__":
    main()
