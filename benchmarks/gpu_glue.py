"""What a model does between its matrix products and the delta rule, on a GPU in bfloat16, beside what others fused.

    python -m deltanet.benchmarks.gpu_glue [--output FILE]

    norm          RMSNorm of the residual stream, 16,384 tokens of width 2,048
    head norm     RMSNorm of the delta rule's result, 16,384 tokens of 16 heads of 128
    swiglu        silu(gate) * up and the projection behind it, from 5,632 to 2,048
    loss          head and cross-entropy of 16,384 tokens over 32,000 ids

`unfused` is PyTorch's composition, `fla` what flash-linear-attention's DeltaNet runs by default, `fla linear` its loss
without all logits, `liger` the same of Liger-Kernel. Times are medians of what the device is busy, memory the peak of
forward and backward over what was there. Bytes bound the norms: 2 passes forward and 3 backward over 64 MiB, 42 and 63 us
at 3.2 TB/s. --device cpu --tiny tries every step without a GPU.
"""

import argparse
import json
import pathlib

import torch
import torch.nn.functional as F
from torch import nn

from ..fused_deltanet import linear_cross_entropy, swiglu_linear
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

    return {"ours": lambda: ours, "unfused": unfused, "fla": fla, "liger": liger}


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
    yield "swiglu", swiglus(linear(inner, D)), [random(1, N, inner), random(1, N, inner)]
    labels = torch.randint(V, (N,), device=device, generator=generator)
    yield "loss", losses(linear(D, V), labels), [random(N, D)]


def measure(make, inputs, device) -> dict:
    """Forward without gradients, and forward with backward."""
    try:
        function = make()
        gradient = torch.ones_like(function(*inputs))

        def both():
            function(*inputs).backward(gradient)
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
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try the benchmark itself")
    arguments = parser.parse_args()
    rows = []
    for work, functions, inputs in works(TINY if arguments.tiny else SIZES, arguments.device):
        for peer, make in functions.items():
            rows.append({"work": work, "peer": peer, **rounded(measure(make, inputs, arguments.device))})
            print(*rows[-1].values(), sep="  ", flush=True)
            result = {"environment": environment(arguments.device, dtype="bfloat16"), "rows": rows}
            arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
