"""What a recurrent state in bfloat16 costs: 10,000 decoding steps beside the same steps in float64.

    python -m deltanet.benchmarks.state_precision [--device cpu] [--sizes 64 128] [--tokens 10000] [--output FILE]

The step is `decode_step` on float32 inputs, so that nothing but the state is rounded: on a CPU its composed form, on a GPU
the kernel. Errors are relative L2 norms of the state and, over the hundred tokens before, of the normalised output. FILE
keeps one entry a kind of device.
"""

import argparse
import itertools
import json
import pathlib

import torch

from ..kernels.decode_step import decode_step
from .timing import environment

RESULT = pathlib.Path(__file__).parent / "results" / "state_precision.json"
SIZES = (64, 128)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WINDOW = 100
B, H = 2, 2


def checkpoints(tokens: int) -> list[int]:
    """Powers of ten from 100 on, and the last token."""
    return sorted({t for t in (100, 1000, 10_000, 100_000) if t < tokens} | {tokens})


class Layer:
    """A layer's states in one dtype; its convolutions hand the last token through to the SiLU."""

    def __init__(self, device, dtype, state_dtype, D):
        self.state = torch.zeros(B, H, D, D, device=device, dtype=state_dtype)
        self.held = {
            "conv_states": [torch.zeros(B, H * D, 1, device=device, dtype=dtype) for _ in range(3)],
            "conv_weights": [torch.tensor([0.0, 1.0], device=device, dtype=dtype).repeat(H * D, 1, 1) for _ in range(3)],
            "norm_weight": torch.ones(D, device=device, dtype=dtype),
        }

    def step(self, q, k, v, beta, beta_scale):
        return decode_step(q, k, v, beta, None, state=self.state, norm_eps=1e-6, beta_scale=beta_scale, **self.held)


def run(device, state_dtype, tokens, D, keys, beta_scale) -> dict:
    """Errors at `checkpoints(tokens)`; correlated keys share most of their direction from token to token."""
    generator = torch.Generator(device).manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, device=device, generator=generator)  # noqa: E731
    layer, exact = Layer(device, torch.float32, state_dtype, D), Layer(device, torch.float64, torch.float64, D)
    common, output, state = draw(1, H * D), [], []
    squares = torch.zeros(2, device=device, dtype=torch.float64)
    for t in range(1, tokens + 1):
        x = [*(draw(B, H * D) for _ in range(3)), draw(B, H)]
        if keys == "correlated":
            x[1] = 0.9**0.5 * common + 0.1**0.5 * x[1]
        o, expected = layer.step(*x, beta_scale), exact.step(*(z.double() for z in x), beta_scale)
        squares += torch.stack([(o - expected).square().sum(), expected.square().sum()])
        if t in checkpoints(tokens):
            output.append((squares[0] / squares[1]).sqrt().item())
            state.append(((layer.state - exact.state).norm() / exact.state.norm()).item())
        if t % WINDOW == 0:
            squares.zero_()
    return {"tokens": checkpoints(tokens), "output_error": output, "state_error": state}


def measure(device, state_dtype, tokens: int, sizes=SIZES) -> list[dict]:
    """A row of errors for every size, kind of keys and range of beta."""
    rows = []
    with torch.no_grad():
        for D, keys, beta_scale in itertools.product(sizes, ("independent", "correlated"), (1.0, 2.0)):
            case = {"D": D, "keys": keys, "beta_scale": beta_scale}
            rows.append({**case, **run(device, state_dtype, tokens, **case)})
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, help="of keys and values")
    parser.add_argument("--tokens", type=int, default=10_000)
    parser.add_argument("--output", type=pathlib.Path, default=RESULT)
    arguments = parser.parse_args()
    rows = []
    for name, dtype in DTYPES.items():
        for row in measure(torch.device(arguments.device), dtype, arguments.tokens, arguments.sizes):
            rows.append({"state": name, **row})
            columns = zip(row["tokens"], row["output_error"], row["state_error"])
            errors = "  ".join(f"{t}: {output:.1e} {state:.1e}" for t, output, state in columns)
            print(f"{name:<9} D {row['D']:<4} {row['keys']:<12} x{row['beta_scale']:.0f}  {errors}", flush=True)
    data = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    data[arguments.device] = {"environment": environment(arguments.device), "rows": rows}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
