"""Two GPUs against one: context, tensor and data parallelism, in bfloat16 unless said.

    python -m deltanet.benchmarks.gpu_parallel [--units context-32768 model-131072 tensor train-one ...] [--seconds 560]
        [--output FILE] [--scratch FOLDER]

Each unit is a run of processes of its own, and its row is written to FILE when it ends: what fails or runs out of time
loses nothing of the others, and the next call goes on with the units that FILE lacks. --device cpu --tiny tries every
step on two processes without a GPU. NVLink multicast stays off.

Predictions for two GPUs. The delta rule of one layer (16 heads of 128) receives 2.1 MB in the forward and 1.0 MB in the
backward, whatever the length: some ten microseconds of NVLink. At T = 131072 one GPU takes 3.6 ms forward and 10.2 with
backward (`gpu_delta_rule.json`); half of each, 0.1 ms for the products of the spans' maps, and 0.4 ms for the scan of the
gradient that enters make 1.9 ms and 5.7 ms: ratios of 1.9 and 1.8. At T = 32768 launches and exchanges of fixed cost leave
1.3 to 1.5. DDP sends 5.5 GB of gradients a step of the 1.3B model, 20 ms at 300 GB/s and mostly behind the last backward
of some 2 s: 1.95. FSDP2 gathers 2.7 GB of weights twice a forward and backward, 20 ms beside 250 ms: 1.85.

Measured: 1.93 for DDP, 2.06 for FSDP2, which was not counted on to save the casts of autocast. The delta rule alone fell
short at every length but the longest: 2.40 and 6.71 ms at 131,072, and 0.76 of one GPU's speed at 32,768. A forward takes
1.9 ms there, hardly less than at 65,536: on the wall it waits for the host, which in a model runs ahead of the device, and
nothing of that is left there: 1.82.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from ..train.prepare import prepare_shipped
from .gpu_delta_rule import rounded
from .timing import environment

RESULT = pathlib.Path(__file__).parent / "results" / "gpu_parallel.json"
CONFIGURATIONS = pathlib.Path(__file__).parents[1] / "train" / "accelerate"
PACKAGE = __package__.partition(".")[0]
LENGTHS = (32768, 65536, 131072, 262144)
UNITS = (
    *(f"context-{T}" for T in LENGTHS),
    "model-131072",
    "tensor",
    *(f"train-{how}" for how in ("one", "ddp", "fsdp2")),
    *(f"resume-{how}" for how in ("ddp", "fsdp2")),
)
LEAST_SECONDS = 45
"""No unit is begun with less time than this."""

STEPS, RESUMED = 8, 3
TINY = {
    "model.hidden_size": 32,
    "model.num_hidden_layers": 2,
    "model.num_heads": 2,
    "model.intermediate_size": 32,
    "block_length": 64,
    "batch_tokens": 512,
    "device_batch": 2,
    "precision": "float32",
}


class Runs:
    """Starts the processes of units, and ends them when the time is up."""

    def __init__(self, device: str, tiny: bool, scratch: pathlib.Path, deadline: float):
        self.device, self.tiny, self.scratch, self.deadline = device, tiny, scratch, deadline
        scratch.mkdir(parents=True, exist_ok=True)
        self.data = scratch / "shards"
        prepare_shipped(self.data, 300 if tiny else 4096)

    def rows(self, command: list[str], processes: int) -> list[dict]:
        """The lines of JSON that `command` prints; where it fails or its time is up, a last one says so."""
        visible = {} if self.device == "cpu" or processes > 1 else {"CUDA_VISIBLE_DEVICES": "0"}
        settings = {"NCCL_NVLS_ENABLE": "0", "TOKENIZERS_PARALLELISM": "false", **visible}
        process = subprocess.Popen(
            [sys.executable, "-m", *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, **settings}, cwd=self.scratch, start_new_session=True,
        )  # fmt: skip
        failure = None
        try:
            output, _ = process.communicate(timeout=max(1.0, self.deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            # Launchers leave their children alone when they are killed.
            os.killpg(process.pid, signal.SIGKILL)
            output, failure = process.communicate()[0], "out of time"
        rows = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
        if process.returncode and failure is None:
            # What the launcher says about it comes last and does not help.
            failure = f"ended with {process.returncode}: {output[max(0, output.find('Traceback')) :][:9000]}"
        return rows if failure is None else [*rows, {"failed": failure}]

    def together(self, units: list[str]) -> list[dict]:
        options = ["--device", self.device, "--scratch", str(self.scratch), *(["--tiny"] if self.tiny else [])]
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        return self.rows([*launcher, "-m", f"{PACKAGE}.benchmarks.parallel_worker", *units, *options], 2)

    def training(self, recipe: str, how: str, stop: int, output: str, **flags) -> dict:
        """A run of `parallel_training`.

        Raises:
            RuntimeError: it failed, or the time was up.
        """
        flags = {"data": self.data, "output": self.scratch / output, "verify_data": "false", "log_every": 1, **flags}
        flags |= {"keep_checkpoints": 1}
        flags |= TINY if self.tiny else {}
        module = [f"{PACKAGE}.benchmarks.parallel_training", recipe, "--stop", str(stop)]
        command = [*module, *(f"--{name}={value}" for name, value in flags.items())]
        if how == "one":
            row = self.rows(command, 1)[-1]
        else:
            launcher = ["accelerate.commands.launch", "--config_file", str(CONFIGURATIONS / f"{how}.yaml")]
            row = self.rows([*launcher, "--num_processes", "2", "--main_process_port", "0", "-m", *command], 2)[-1]
        if "failed" in row:
            raise RuntimeError(row["failed"])
        return row

    def train(self, how: str) -> dict:
        """1.3B at 8 x 2048 a forward, eight forwards a step, shared among the processes."""
        shutil.rmtree(self.scratch / "train", ignore_errors=True)
        flags = {"batch_tokens": 131072, "device_batch": 8, "model.vocab_size": 32000, "warmup_tokens": 0}
        return self.training("1.3b-100b", how, STEPS, "train", **flags)

    def resume(self, how: str) -> dict:
        """340M: a whole run of two processes, and one that ends at a checkpoint and goes on on two and on one. Runs that do
        not wait for each other share the GPUs; nothing of them is timed."""
        flags = {"batch_tokens": 65536, "device_batch": 4, "model.vocab_size": 32000, "warmup_tokens": 0}
        flags |= {"tokens": 2 * RESUMED * (TINY["batch_tokens"] if self.tiny else flags["batch_tokens"])}
        flags |= {"save_every": RESUMED}
        for name in ("whole", "two", "single"):
            shutil.rmtree(self.scratch / name, ignore_errors=True)
        with concurrent.futures.ThreadPoolExecutor() as pool:
            run = lambda *arguments: pool.submit(self.training, "340m-15b", *arguments, **flags)  # noqa: E731
            whole, begun = run(how, 2 * RESUMED, "whole"), run(how, RESUMED, "two")
            row = {"begun": begun.result()["losses"]}
            shutil.copytree(self.scratch / "two", self.scratch / "single")
            continued = {"two": run(how, 2 * RESUMED, "two"), "one": run("one", 2 * RESUMED, "single")}
            row["whole"] = whole.result()["losses"]
            for name, one in continued.items():
                row[name] = one.result()["losses"]
                worst = max(abs(loss / row["whole"][step] - 1) for step, loss in row[name].items())
                row[f"{name}_difference"] = worst
        return row

    def unit(self, name: str) -> dict:
        """`train-HOW` or `resume-HOW`."""
        kind, _, how = name.partition("-")
        try:
            return getattr(self, kind)(how)
        except RuntimeError as error:
            return {"failed": str(error)}


def load(path: pathlib.Path, settings: dict) -> dict:
    """The rows of an earlier call on the same device and versions, by unit; none of other ones."""
    data = json.loads(path.read_text()) if path.exists() else {}
    same = lambda x: {key: value for key, value in x.items() if key != "date"}  # noqa: E731
    return data["rows"] if same(data.get("environment", {})) == same(settings) else {}


def write(path: pathlib.Path, settings: dict, rows: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": settings, "rows": rows}, indent=1) + "\n")


def table(rows: dict) -> str:
    """One line a unit: two devices, one device, and the ratio."""
    lines = [f"{'unit':<18}{'two':>14}{'one':>14}{'ratio':>8}"]
    one = rows.get("train-one", {}).get("tokens_per_s")
    for name, row in rows.items():
        pairs = [("forward_ms", "forward_one_ms"), ("forward_backward_ms", "forward_backward_one_ms"), ("ms", "one_ms")]
        for two_key, one_key in pairs:
            if two_key in row:
                lines.append(line(f"{name} ms", row[two_key], row.get(one_key)))
        if "tokens_per_s" in row:
            lines.append(line(f"{name} tokens/s", row["tokens_per_s"], one, faster_is_more=True))
        for key in ("float32_logits_error", "two_difference", "one_difference", "error"):
            if key in row:
                lines.append(f"{name} {key}: {row[key]}")
    return "\n".join(lines)


def line(name: str, two, one, faster_is_more: bool = False) -> str:
    ratio = "-" if one is None else f"{two / one if faster_is_more else one / two:.2f}"
    return f"{name:<26}{two:>14,.1f}{'-' if one is None else f'{one:,.1f}':>14}{ratio:>8}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--units", nargs="+", choices=UNITS, default=UNITS)
    parser.add_argument("--output", type=pathlib.Path, default=RESULT)
    parser.add_argument("--scratch", type=pathlib.Path, default=pathlib.Path(tempfile.gettempdir(), "deltanet-parallel"))
    parser.add_argument("--seconds", type=float, default=560, help="end after this time")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="small models, to try the benchmark itself")
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    settings = environment(arguments.device, backend=os.environ.get("DELTANET_BACKEND", ""), tiny=arguments.tiny)
    rows = load(arguments.output, settings)
    runs = Runs(arguments.device, arguments.tiny, arguments.scratch, deadline)
    pending = [name for name in arguments.units if name not in rows or "failed" in rows[name]]
    while pending:
        if time.monotonic() > deadline - LEAST_SECONDS:
            print(f"{' '.join(pending)}: no time left; the same command goes on", flush=True)
            break
        # Starting the processes takes longer than most of what they do together.
        names = [name for name in pending if name.startswith("context")] if pending[0].startswith("context") else pending[:1]
        pending = [name for name in pending if name not in names]
        start = time.monotonic()
        found = [runs.unit(names[0])] if names[0].startswith(("train", "resume")) else runs.together(names)
        # A failure is that of all units behind it.
        for name, row in zip(names, found + found[-1:] * (len(names) - len(found))):
            rows[name] = rounded({**row, "seconds": time.monotonic() - start})
            print(name, json.dumps(rows[name]), flush=True)
        write(arguments.output, settings, rows)
    print(table(rows))


if __name__ == "__main__":
    main()
