"""What a model does between its matrix products and the delta rule, on a GPU in bfloat16, beside what others fused.

    python -m deltanet.benchmarks.gpu_glue [--work norm ...] [--peers ours pytorch ...] [--seconds 200] [--output FILE]

    norm          RMSNorm of the residual stream, 16,384 tokens of width 2,048
    head norm     RMSNorm of the delta rule's result, 16,384 tokens of 16 heads of 128
    sum and norm  the residual sum before it, both results used
    q, k, v, b    these projections of one input, from 2,048 to 2,048 (b: to 16)
    gate, up      SwiGLU's, from 2,048 to 5,632
    swiglu        silu(gate) * up and the projection behind it, from 5,632 to 2,048
    loss          head and cross-entropy of 16,384 tokens over 32,000 ids

`pytorch` is what PyTorch fused, `unfused` its composition, `fla` what flash-linear-attention's DeltaNet runs by default,
`fla linear` its loss without all logits, `liger` the same of Liger-Kernel. Times are medians of what the device is busy,
memory the peak of forward and backward over what was there. Bytes bound the norms: 2 passes forward and 3 backward over 64
MiB, with the sum 4 and 4, at 3.0 TB/s 22 us each. --device cpu --tiny tries every step without a GPU.
"""

import argparse
import json
import pathlib
import time

import torch
import torch.nn.functional as F
from torch import nn

from ..fused_deltanet import linear_cross_entropy, project, swiglu_linear
from ..mixer_deltanet import DeltaNetRMSNorm
from .gpu_delta_rule import rounded
from .timing import device_ms, environment, peak_mib

RESULT = pathlib.Path(__file__).parent / "results" / "gpu_glue.json"
SIZES = {"tokens": 16384, "width": 2048, "heads": 16, "inner": 5632, "vocabulary": 32000}
TINY = {"tokens": 64, "width": 32, "heads": 2, "inner": 48, "vocabulary": 50}


def norms(x):
    """RMSNorm over the last dimension of x, by name."""
    ours = DeltaNetRMSNorm(x.shape[-1], 1e-6).to(x.device, x.dtype)

    def fla():
        from fla.modules import RMSNorm

        return RMSNorm(x.shape[-1], eps=1e-6, device=x.device, dtype=x.dtype)

    def liger():
        from liger_kernel.transformers.functional import liger_rms_norm

        return lambda x: liger_rms_norm(x, ours.weight, 1e-6, in_place=False)

    def unfused():
        return lambda x: F.rms_norm(x.float(), ours.weight.shape, ours.weight.float(), 1e-6).to(x.dtype)

    def pytorch():
        return lambda x: F.rms_norm(x, ours.weight.shape, ours.weight, 1e-6)

    return {"ours": lambda: ours, "pytorch": pytorch, "unfused": unfused, "fla": fla, "liger": liger}


def sums_and_norms(x):
    """RMSNorm of x plus an update, and the sum, both with a gradient."""
    ours = DeltaNetRMSNorm(x.shape[-1], 1e-6).to(x.device, x.dtype)

    def pytorch():
        def run(x, update):
            total = x + update
            return F.rms_norm(total, ours.weight.shape, ours.weight, 1e-6), total

        return run

    def fla():
        from fla.modules import RMSNorm

        norm = RMSNorm(x.shape[-1], eps=1e-6, device=x.device, dtype=x.dtype)
        return lambda x, update: norm(update, x, True)

    def liger():
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

        return lambda x, update: LigerFusedAddRMSNormFunction.apply(x, update, ours.weight, 1e-6, 0.0, "gemma", False)

    return {"ours": lambda: lambda x, update: ours(x, update, True), "pytorch": pytorch, "fla": fla, "liger": liger}


def shared_inputs(layers):
    return {
        "ours": lambda: lambda x: project(x, *layers),
        "pytorch": lambda: lambda x: [layer(x) for layer in layers],
    }


def swiglus(down):
    def fla():
        from fla.modules.activations import swiglu_linear

        return lambda gate, up: swiglu_linear(gate, up, down.weight, None)

    def liger():
        from liger_kernel.transformers.functional import liger_swiglu

        return lambda gate, up: down(liger_swiglu(gate, up))

    return {
        "ours": lambda: lambda gate, up: swiglu_linear(gate, up, down),
        "unfused": lambda: lambda gate, up: down(F.silu(gate) * up),
        "fla": fla,
        "liger": liger,
    }


def losses(head, labels):
    def fla():
        from fla.modules import FusedCrossEntropyLoss

        loss = FusedCrossEntropyLoss(inplace_backward=True)
        return lambda x: loss(head(x), labels)

    def fla_linear():
        from fla.modules import FusedLinearCrossEntropyLoss

        loss = FusedLinearCrossEntropyLoss()
        return lambda x: loss(x, labels, head.weight, None)

    def liger():
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        return lambda x: liger_fused_linear_cross_entropy(x, head.weight, labels)

    return {
        "ours": lambda: lambda x: linear_cross_entropy(head, x, labels),
        "unfused": lambda: lambda x: F.cross_entropy(head(x).float(), labels),
        "fla": fla,
        "fla linear": fla_linear,
        "liger": liger,
    }


def works(sizes, device):
    """(name, functions by peer, inputs)."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape):
        return torch.randn(shape, device=device, dtype=torch.bfloat16, generator=generator).requires_grad_()

    def linear(inputs, outputs):
        return nn.Linear(inputs, outputs, bias=False, device=device, dtype=torch.bfloat16)

    N, D, heads, inner, V = sizes.values()
    yield "norm", norms(x := random(1, N, D)), [x]
    yield "head norm", norms(x := random(1, N, heads, D // heads)), [x]
    yield "sum and norm", sums_and_norms(x := random(1, N, D)), [x, random(1, N, D)]
    for name, widths in (("q, k, v, b", (D, D, D, heads)), ("gate, up", (inner, inner))):
        yield name, shared_inputs([linear(D, width) for width in widths]), [random(1, N, D)]
    yield "swiglu", swiglus(linear(inner, D)), [random(1, N, inner), random(1, N, inner)]
    labels = torch.randint(V, (N,), device=device, generator=generator)
    yield "loss", losses(linear(D, V), labels), [random(N, D)]


def several(result):
    """Results of a function that has one, or more."""
    return [result] if isinstance(result, torch.Tensor) else result


def measure(make, inputs, device) -> dict:
    """Forward without gradients, and forward with backward."""
    try:
        function = make()
        gradients = [torch.ones_like(y) for y in several(function(*inputs))]

        def both():
            torch.autograd.backward(several(function(*inputs)), gradients)
            for x in inputs:
                x.grad = None

        def forward():
            with torch.no_grad():
                function(*inputs)

        before = torch.cuda.memory_allocated(device) / 2**20 if torch.device(device).type == "cuda" else 0.0
        return {
            "forward_ms": device_ms(forward, device)[0],
            "forward_backward_ms": device_ms(both, device)[0],
            "extra_mib": peak_mib(both, device) - before,
        }
    except Exception as error:  # whatever a peer raises is a result
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, default=RESULT)
    parser.add_argument("--work", nargs="+", help="only these; a name of several words in quotes")
    parser.add_argument("--peers", nargs="+", help="only these")
    parser.add_argument("--seconds", type=float, default=200, help="begin nothing after this time")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try the benchmark itself")
    arguments = parser.parse_args()
    rows, deadline = [], time.monotonic() + arguments.seconds
    for work, functions, inputs in works(TINY if arguments.tiny else SIZES, arguments.device):
        for peer, make in functions.items():
            left_out = work not in (arguments.work or [work]) or peer not in (arguments.peers or [peer])
            if left_out or time.monotonic() > deadline:
                continue
            rows.append({"work": work, "peer": peer, **rounded(measure(make, inputs, arguments.device))})
            print(*rows[-1].values(), sep="  ", flush=True)
            result = {"environment": environment(arguments.device, dtype="bfloat16"), "rows": rows}
            arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
