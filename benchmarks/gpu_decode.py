"""The decoding step of a delta layer on a GPU beside its bytes: ours, the same in PyTorch operations, and fla's kernels.

    python -m deltanet.benchmarks.gpu_decode [--part steps tiles] [--peers ours composed fla] [--batches 1 8 64 256 512]
        [--shapes H16_D128 H32_D64 H8_D256] [--output FILE]
    python -m deltanet.benchmarks.gpu_decode --plot [--output FILE]

From the input projections, in bfloat16, to what the output projection reads. Calls take turns on states of 256 MB and more,
as the layers of a model do, so that nothing is found in the caches of the device. `device_us` is the median time the device
is busy with a call, `wall_us` a call's with the host, `floor_us` that of its bytes at the speed of a copy, and `error` the
relative L2 error of the output against float64. Part `tiles` tries other launches than the kernel's own.
--device cpu --tiny tries every step without a GPU.
"""

import argparse
import itertools
import json
import pathlib

import torch

from ..kernels.decode_step import composed
from ..kernels.delta_rule import NAMESPACE
from . import peers
from .timing import ceilings, device_ms, environment, wall_ms

RESULT = pathlib.Path(__file__).parent / "results" / "gpu_decode.json"
PARTS, PEERS, STATES = ("steps", "tiles"), ("ours", "composed", "fla"), ("float32", "bfloat16")
SHAPES = {"H16_D128": (16, 128), "H32_D64": (32, 64), "H8_D256": (8, 256)}
BATCHES = (1, 8, 64, 256, 512)
TILES = {
    64: ((64, 4, 1), (64, 8, 1), (64, 2, 1), (16, 4, 3)),
    128: ((128, 8, 1), (128, 4, 1), (128, 16, 1), (64, 8, 1), (32, 8, 1), (32, 8, 3)),
    256: ((32, 8, 1), (64, 8, 1), (16, 8, 1), (16, 8, 3), (16, 4, 3), (32, 8, 3)),
}
"""Columns of a tile, warps, and stages: tiles in flight, where there are several. The kernel's own first."""
WIDTH, EPS, MEMORY = 4, 1e-6, 2**28


class Layer:
    """One layer's states and weights, H heads of D, and a token for B rows."""

    def __init__(self, device, B, H, D, state_dtype, seed=0):
        generator = torch.Generator(device).manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, device=device, generator=generator)  # noqa: E731
        half = lambda *shape: draw(*shape).bfloat16()  # noqa: E731
        self.heads, self.tokens = (H, D), [half(B, H * D) for _ in range(3)]
        self.beta, self.norm_weight = half(B, H), half(D)
        self.past = [half(B, H * D, WIDTH - 1) for _ in range(3)]
        self.weights = [half(H * D, 1, WIDTH) for _ in range(3)]
        self.state = (draw(B, H, D, D) * D**-0.5).to(state_dtype)

    def arguments(self, dtype=None) -> list:
        """Those of `composed`; a dtype makes copies."""
        tensors = [*self.tokens, self.beta, None, *self.past, self.state, *self.weights, self.norm_weight]
        tensors = [x if x is None or dtype is None else x.to(dtype) for x in tensors]
        return [*tensors, EPS, 1.0, self.heads[1] ** -0.5, None]

    def bytes(self) -> int:
        """States in and out, everything else once."""
        once = [*self.tokens, self.tokens[2], self.beta, *self.weights, self.norm_weight]
        size = lambda tensors: sum(x.numel() * x.element_size() for x in tensors)  # noqa: E731
        return size(once) + 2 * size([self.state, *self.past])


def ours(layer: Layer):
    op, arguments = getattr(torch.ops, NAMESPACE).decode_step.default, layer.arguments()
    return lambda: op(*arguments)


def in_pytorch(layer: Layer):
    arguments = layer.arguments()
    return lambda: composed(*arguments)


def fla(layer: Layer):
    """fla's modules and operations in the order of its layer."""
    from fla.modules import RMSNorm, ShortConvolution
    from fla.ops.delta_rule import fused_recurrent_delta_rule

    (H, D), device = layer.heads, layer.state.device
    convolutions, caches = [], []
    for weight, past in zip(layer.weights, layer.past):
        convolution = ShortConvolution(H * D, WIDTH, activation="silu", device=device, dtype=torch.bfloat16)
        convolution.weight.data.copy_(weight)
        convolutions.append(convolution)
        caches.append(torch.nn.functional.pad(past, (1, 0)))  # one column more, the oldest
    norm = RMSNorm(D, eps=EPS, device=device, dtype=torch.bfloat16)
    norm.weight.data.copy_(layer.norm_weight)
    held = [layer.state]

    def step():
        q, k, v = (
            convolution(x[:, None], cache=cache, output_final_state=True)[0].unflatten(-1, (H, D))
            for convolution, x, cache in zip(convolutions, layer.tokens, caches)
        )
        options = {"initial_state": held[0], "output_final_state": True, "use_qk_l2norm_in_kernel": True}
        o, held[0] = fused_recurrent_delta_rule(q, k, v, layer.beta.sigmoid()[:, None], **options)
        return norm(o).flatten(1)

    return step


def tiled(tile):
    """Ours with another tile."""
    from ..kernels.chunk_configurations import Launch
    from ..kernels.decode_kernel import decode_forward

    def make(layer: Layer):
        arguments = layer.arguments()
        return lambda: decode_forward(*arguments, launch=Launch(*tile))

    return make


MAKERS = {"ours": ours, "composed": in_pytorch, "fla": fla}


def plan(part: str, chosen, shapes, batches) -> list[dict]:
    """The tasks of a part; fla keeps float32 states."""
    cases = [{"part": part, "shape": shape, "B": B} for shape, B in itertools.product(shapes, batches)]
    if part == "tiles":
        return [
            {**case, "peer": "ours", "state": state, "tile": list(tile)}
            for case in cases for state in STATES for tile in TILES[SHAPES[case["shape"]][1]]
        ]  # fmt: skip
    pairs = [(peer, state) for peer in chosen for state in STATES if (peer, state) != ("fla", "bfloat16")]
    return [{**case, "peer": peer, "state": state} for case in cases for peer, state in pairs]


def measure(task: dict, device, bandwidth: float, memory: int = MEMORY) -> dict:
    """The task with its figures, or with `failed` and what went wrong."""
    (H, D), make = SHAPES[task["shape"]], tiled(tuple(task["tile"])) if "tile" in task else MAKERS[task["peer"]]
    dtype = getattr(torch, task["state"])
    try:
        first = Layer(device, task["B"], H, D, dtype)
        error = relative_error(make(first)(), composed(*Layer(device, task["B"], H, D, dtype).arguments(torch.float64)))
        layers = [Layer(device, task["B"], H, D, dtype, seed) for seed in range(max(2, -(-memory // first.bytes())))]
        calls = itertools.cycle([make(layer) for layer in layers])
        busy, launches = device_ms(lambda: next(calls)(), device)
        figures = {"device_us": busy * 1e3, "wall_us": wall_ms(lambda: next(calls)(), device) * 1e3, "launches": launches}
        floor = first.bytes() / bandwidth / 1e6
        return {**task, **figures, "floor_us": floor, "over_floor": busy * 1e3 / floor, "error": error}
    except Exception as failure:  # whatever a peer raises is a result
        return {**task, "failed": f"{type(failure).__name__}: {failure}".splitlines()[0][:300]}


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


def key(row: dict) -> tuple:
    return row["part"], row["peer"], row["state"], row["shape"], row["B"], tuple(row.get("tile", ()))


def write(path: pathlib.Path, settings: dict, limits: dict, rows: list[dict]) -> None:
    """Figures of the same device and versions stay unless they were measured again."""
    same = lambda x: {name: value for name, value in x.items() if name != "date"}  # noqa: E731
    old = json.loads(path.read_text()) if path.exists() else {"environment": {}, "rows": []}
    new = {key(row) for row in rows}
    kept = [row for row in old["rows"] if key(row) not in new] if same(old["environment"]) == same(settings) else []
    head = json.dumps({"environment": settings, "ceilings": limits}, indent=1)[:-2]
    lines = ",\n  ".join(json.dumps(row) for row in [*kept, *rows])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{head},\n "rows": [\n  {lines}\n ]\n}}\n')


def line(row: dict) -> str:
    what = f"{row['shape']:<9} B {row['B']:<4} {row['state']:<9} {row['peer']:<9}{str(row.get('tile', '')):<13}"
    if "failed" in row:
        return f"{what} {row['failed'][:90]}"
    times = f"device {row['device_us']:9.2f} us  floor {row['floor_us']:8.2f} us  ratio {row['over_floor']:6.2f}"
    return f"{what} {times}  launches {row['launches']:4.1f}  wall {row['wall_us']:8.1f} us  error {row['error']:.1e}"


def draw(path: pathlib.Path) -> pathlib.Path:
    """Time of a step by batch size, a panel a shape, into a PNG beside FILE. Raises ValueError where there are no times."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    data = json.loads(path.read_text())
    rows = [row for row in data["rows"] if row["part"] == "steps" and "failed" not in row]
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    if not shapes:
        raise ValueError(f"{path} has no times to draw; run the part steps first")
    figure, axes = plt.subplots(1, len(shapes), figsize=(4.4 * len(shapes) + 1, 4.2), layout="constrained", squeeze=False)
    for axis, shape in zip(axes[0], shapes):
        for peer, state in dict.fromkeys((row["peer"], row["state"]) for row in rows):
            chosen = [row for row in rows if (row["peer"], row["state"], row["shape"]) == (peer, state, shape)]
            points = sorted((row["B"], row["device_us"], row["floor_us"]) for row in chosen)
            if points:
                axis.plot(*list(zip(*points))[:2], marker="o", label=f"{peer}, {state} state")
            if points and peer == "ours":
                axis.plot([B for B, *_ in points], [floor for *_, floor in points], ":", color="gray")
        axis.set(xscale="log", yscale="log", title=shape.replace("_", " "), xlabel="rows (dotted: bytes of ours)")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("us")
    axes[0][0].legend(fontsize=8)
    figure.suptitle(f"decoding step of one layer, {data['environment']['device']}", fontsize=10)
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=90)
    plt.close(figure)
    return target


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS[:1])
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=PEERS)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--output", type=pathlib.Path, default=RESULT)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="few rows and states, to try the benchmark itself")
    parser.add_argument("--plot", action="store_true", help="only draw FILE")
    arguments = parser.parse_args()
    if arguments.plot:
        print(draw(arguments.output))
        return
    settings, limits, rows = environment(arguments.device, dtype="bfloat16"), ceilings(arguments.device), []
    print(settings, limits, sep="\n", flush=True)
    if "fla" in arguments.peers:
        try:
            peers.shorten_tuning(warmup_ms=10, repeat_ms=40)
        except ImportError as error:
            print(f"fla cannot run: {error}")
    batches, memory = ((1, 2), 1) if arguments.tiny else (arguments.batches, MEMORY)
    with torch.no_grad():
        for part in arguments.part:
            for task in plan(part, arguments.peers, arguments.shapes, batches):
                rows.append(measure(task, arguments.device, limits["copy_TB_per_s"], memory))
                print(line(rows[-1]), flush=True)
                write(arguments.output, settings, limits, rows)


if __name__ == "__main__":
    main()
