"""The delta rule on a CPU against the fallback that Transformers has for its gated form, with the gate at one.

    python -m deltanet.benchmarks.cpu_delta_rule [--threads 2] [--repeats 15] [--output FILE]

Both run in one process and in turn, in float32 with the L2 norm inside. Times are medians in milliseconds.
"""

import argparse
import json
import pathlib
import statistics
import time

import torch
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from ..kernels.delta_rule import chunk_delta_rule
from .timing import environment

SHAPES = ((1, 2048, 8, 128), (1, 2048, 16, 64), (8, 256, 8, 128), (1, 2048, 4, 256), (1, 64, 8, 128), (1, 8192, 8, 128))
RESULT = pathlib.Path(__file__).parent / "results" / "cpu_delta_rule.json"


def ours(q, k, v, beta):
    return chunk_delta_rule(q, k, v, beta, use_qk_l2norm_in_kernel=True)[0]


def theirs(q, k, v, beta):
    gate = torch.zeros_like(beta)
    return torch_chunk_gated_delta_rule(q, k, v, gate, beta, use_qk_l2norm_in_kernel=True)[0]


def setup(B, T, H, D):
    """The inputs of one shape and the gradient of the output."""
    torch.manual_seed(0)
    q, k, v, do = (torch.randn(B, T, H, D) for _ in range(4))
    return [x.requires_grad_() for x in (q, k, v, torch.rand(B, T, H))], do


def forward(rule, inputs, do):
    with torch.no_grad():
        rule(*inputs)


def forward_backward(rule, inputs, do):
    torch.autograd.grad(rule(*inputs), inputs, do)


def medians(work, inputs, do, repeats):
    """Median milliseconds of both rules, measured in turn so that a busy moment hits both."""
    times = {ours: [], theirs: []}
    for i in range(repeats + 2):
        for rule, taken in times.items():
            start = time.perf_counter()
            work(rule, inputs, do)
            if i >= 2:
                taken.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[ours]), statistics.median(times[theirs])


def measure(shape, repeats):
    inputs, do = setup(*shape)
    with torch.no_grad():
        expected = theirs(*inputs)
        difference = ((ours(*inputs) - expected).norm() / expected.norm()).item()
    row = dict(zip("BTHD", shape), relative_difference=difference)
    for work in (forward, forward_backward):
        mine, peer = medians(work, inputs, do, repeats)
        figures = {"ours_ms": mine, "transformers_ms": peer, "ratio": peer / mine}
        row[work.__name__] = {name: round(value, 2) for name, value in figures.items()}
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output", type=pathlib.Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    settings = environment(threads=arguments.threads, dtype="float32")
    result = {"environment": settings, "repeats": arguments.repeats, "rows": []}
    print(result["environment"])
    print("  B     T   H    D   " + f"{'forward, ms: ours, Transformers':>34}   {'forward + backward, ms':>34}")
    for shape in SHAPES:
        row = measure(shape, arguments.repeats)
        result["rows"].append(row)
        cell = "{ours_ms:>12.2f}{transformers_ms:>12.2f}{ratio:>9.2f}x"
        cells = [cell.format(**row[work.__name__]) for work in (forward, forward_backward)]
        print("{:>3}{:>6}{:>4}{:>5}   ".format(*shape) + "   ".join(cells), flush=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
