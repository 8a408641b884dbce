"""The prologue on a GPU, forward and backward apart: ours, composed out of PyTorch, flash-linear-attention; bfloat16.

    python -m deltanet.benchmarks.gpu_prologue [--peers ours torch fla fla-gluon] [--output FILE]

What runs for q, k and v of 2,048 channels and b of 16 heads:

    ours        one kernel each way, and one that sums dweight; the L2 norm of q and k is inside the delta rule
    torch       the same composed out of PyTorch's operations, also without the norm
    fla         three convolutions, two L2 norms and a sigmoid of flash-linear-attention (PyPI fla-core)
    fla-gluon   the same with the convolutions that fla does not use unless asked to (FLA_CONV_GLUON=1)
    norm        what the norm costs inside the delta rule: its forward, and its backward, with the norm and without

Predicted from bytes at 3 TB/s, forward 4 and backward 6.3 a token and channel: 0.27 and 0.42 ms at B8 T4096, half of it
at 16,384 tokens. `device_ms` is the median time the device is busy with a call, `wall_ms` includes the host. fla tunes
itself at the first call of a shape, which takes minutes. --device cpu --tiny tries every step without a GPU.
"""

import argparse
import os
import pathlib

import torch
import torch.nn.functional as F

from ..kernels.delta_rule import chunk_delta_rule
from ..kernels.prologue import delta_rule_prologue
from . import peers
from .gpu_delta_rule import Results, name
from .timing import ceilings, device_ms, environment, wall_ms

RESULT = pathlib.Path(__file__).parent / "results" / "gpu_prologue.json"
NAMES = ("ours", "torch", "fla", "fla-gluon", "norm")
SHAPES = tuple({"B": B, "T": T, "H": 16, "D": 128} for B, T in ((8, 4096), (8, 2048), (1, 16384), (1, 2048)))
WIDTH = 4


def setup(device, B, T, H, D, **_):
    """Projections q, k, v and b, and the three weights, all of which need gradients."""
    generator = torch.Generator(device).manual_seed(0)
    draw = lambda *shape: torch.randn(shape, device=device, dtype=torch.bfloat16, generator=generator)  # noqa: E731
    inputs = [*(draw(B, T, H * D) for _ in range(3)), draw(B, T, H), *(draw(H * D, 1, WIDTH) * 0.3 for _ in range(3))]
    return [x.requires_grad_() for x in inputs]


def ours(q, k, v, b, *weights):
    return delta_rule_prologue(q, k, v, b, weights)[:4]


def load_fla(shape, inputs):
    """fla's layer up to the delta rule, and its inputs: the convolutions are modules, which own their weights."""
    from fla.modules import ShortConvolution
    from fla.modules.l2norm import l2norm

    options = {"activation": "silu", "device": inputs[0].device, "dtype": inputs[0].dtype}
    modules = [ShortConvolution(weight.shape[0], WIDTH, **options) for weight in inputs[4:]]
    for module, weight in zip(modules, inputs[4:]):
        module.weight.data.copy_(weight)

    def prologue(q, k, v, b, *_):
        q, k, v = (module(x)[0] for module, x in zip(modules, (q, k, v)))
        return *(l2norm(x.unflatten(-1, (-1, shape["D"]))) for x in (q, k)), v, b.sigmoid()

    return prologue, [*inputs[:4], *(module.weight for module in modules)]


def calls(peer, shape, device):
    """{"forward": ..., "backward": ...} of a peer, functions without arguments; the backward repeats on one graph."""
    inputs = setup(device, **shape)
    return passes(*(load_fla(shape, inputs) if peer.startswith("fla") else (ours, inputs)))


def passes(run, inputs):
    results = run(*inputs)
    gradients = [torch.randn_like(x) for x in results]

    def forward():
        with torch.no_grad():
            run(*inputs)

    return {"forward": forward, "backward": lambda: torch.autograd.grad(results, inputs, gradients, retain_graph=True)}


def measure(work, device) -> dict:
    figures = {}
    for which, call in work.items():
        busy, launches = device_ms(call, device)
        figures[which] = {"device_ms": busy, "wall_ms": wall_ms(call, device), "launches": launches}
    return figures


def measure_norm(shape, device) -> dict:
    """The delta rule's time with the norm less its time without."""
    *streams, b, _, _, _ = setup(device, **shape)
    q, k, v = (F.silu(x.detach()).unflatten(-1, (-1, shape["D"])).requires_grad_() for x in streams)
    q, k = (F.normalize(x.detach().float(), dim=-1).to(x.dtype).requires_grad_() for x in (q, k))
    inputs, figures = [q, k, v, b.detach().float().sigmoid().requires_grad_()], []
    for norm in (True, False):
        run = lambda *x: chunk_delta_rule(*x, use_qk_l2norm_in_kernel=norm)[:1]  # noqa: B023, E731
        figures.append(measure(passes(run, inputs), device))
    return {
        which: {"device_ms": figures[0][which]["device_ms"] - figures[1][which]["device_ms"]} for which in figures[0]
    }


def measure_peer(peer, shape, device) -> dict:
    """The figures, or `error`; the environment chooses the implementation, for this call alone."""
    choice = {"torch": ("DELTANET_BACKEND", "torch"), "fla-gluon": ("FLA_CONV_GLUON", "1")}.get(peer)
    before = choice and os.environ.get(choice[0])
    try:
        if choice:
            os.environ[choice[0]] = choice[1]
        return measure_norm(shape, device) if peer == "norm" else measure(calls(peer, shape, device), device)
    except Exception as error:  # whatever a peer raises is a result
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
    finally:
        if choice and before is None:
            del os.environ[choice[0]]
        elif choice:
            os.environ[choice[0]] = before


def table(rows: list[dict]) -> str:
    """Milliseconds, launches, the peers as multiples of ours, and the rate of the bytes that must move."""
    titles = f"{'device ms':>10}{'of ours':>9}{'wall ms':>9}{'launches':>10}{'TB/s':>7}"
    lines = [f"{'shape':<22}{'pass':<10}{'peer':<11}{titles}"]
    for shape in dict.fromkeys(name(row) for row in rows):
        for which in ("forward", "backward"):
            mine = [row for row in rows if name(row) == shape and "error" not in row]
            base = next((row[which]["device_ms"] for row in mine if row["peer"] == "ours"), None)
            for row in mine:
                figures = row[which]
                ms, B, T, H, D = figures["device_ms"], row["B"], row["T"], row["H"], row["D"]
                moved = B * T * 3 * H * D * (4 if which == "forward" else 6)
                cells = [f"{ms:10.3f}", f"{ms / base:8.2f}x" if base else " " * 9]
                if "wall_ms" in figures:
                    cells += [f"{figures['wall_ms']:9.3f}", f"{figures['launches']:10.1f}", f"{moved / ms / 1e9:7.2f}"]
                lines.append(f"{shape:<22}{which:<10}{row['peer']:<11}" + "".join(cells))
    lines += [f"{name(row):<22}{row['peer']:<11}error: {row['error']}" for row in rows if "error" in row]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--output", type=pathlib.Path, default=RESULT)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try the benchmark itself")
    arguments = parser.parse_args()
    if any(peer.startswith("fla") for peer in arguments.peers):
        peers.shorten_tuning(warmup_ms=10, repeat_ms=40)
    results = Results(arguments.output, environment(arguments.device, dtype="bfloat16"))
    results.data["ceilings"] = ceilings(arguments.device)
    print(results.data["environment"], results.data["ceilings"], flush=True)
    for shape in SHAPES:
        shape = {**shape, "T": shape["T"] // 64, "H": 2, "D": 32} if arguments.tiny else shape
        for peer in arguments.peers:
            results.add({"part": "prologue", "peer": peer, **shape, **measure_peer(peer, shape, arguments.device)})
            if arguments.device == "cuda":
                torch.cuda.empty_cache()
    print(table(results.data["rows"]))


if __name__ == "__main__":
    main()
