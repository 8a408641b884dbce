"""Every kernel of every configuration once, at sizes that compute-sanitizer gets through.

    compute-sanitizer --tool memcheck  --error-exitcode 9 python -m deltanet.benchmarks.sanitize
    compute-sanitizer --tool racecheck --error-exitcode 9 python -m deltanet.benchmarks.sanitize

PYTORCH_NO_CUDA_MEMORY_CACHING=1 makes every tensor an allocation of its own, so that memcheck sees accesses between
tensors. --share I/N runs every N-th case only: several processes get through faster. The exit code is 1 when a case
failed or gave a number that is not finite.
"""

import argparse
import itertools
import sys
from unittest import mock

import torch

from ..kernels import rms_norm
from ..kernels.decode_step import decode_step
from ..kernels.delta_rule import chunk_delta_rule, delta_rule_step, recurrent_delta_rule
from ..kernels.prologue import WIDTHS, delta_rule_prologue
from ..kernels.short_conv import padding_order

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SIZES = ((16, 16), (64, 64), (128, 128), (256, 256), (24, 100), (192, 64), (64, 256))
# A row of few heads may be split over the device, many rows may take other tiles; a pack ends in tokens of no sequence.
SHAPES = {
    "short": {"B": 1, "T": 1, "H": 1},
    "many": {"B": 20, "T": 70, "H": 8},
    "long": {"B": 1, "T": 8200, "H": 1},
    "packed": {"B": 1, "T": 140, "H": 2, "bounds": (0, 0, 1, 65, 130)},
    "packed many": {"B": 1, "T": 310, "H": 4, "bounds": tuple(range(0, 301, 5))},
    "packed long": {"B": 1, "T": 8200, "H": 1, "bounds": (0, 0, 1, 8190)},
}


def inputs(device, dtype, K, V, B, T, H, bounds=None):
    generator = torch.Generator(device).manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, device=device, generator=generator)  # noqa: E731
    q, k, v = (torch.nn.functional.normalize(draw(B, T, H, D), dim=-1).to(dtype) for D in (K, K, V))
    sequences = len(bounds) - 1 if bounds else B
    cu_seqlens = torch.tensor(bounds, device=device) if bounds else None
    return [q, k, v, draw(B, T, H).sigmoid(), draw(sequences, H, K, V)], cu_seqlens


def chunked(x, cu_seqlens, l2, states):
    """Forward and backward, with states in and out or without."""
    q, k, v, beta, h0 = (z.requires_grad_() for z in x)
    o, S = chunk_delta_rule(q, k, v, beta, None, h0 if states else None, states, l2, cu_seqlens)
    results, used = ((o, S), (q, k, v, beta, h0)) if states else ((o,), (q, k, v, beta))
    return [*results, *torch.autograd.grad(results, used, [torch.randn_like(result) for result in results])]


def stepwise(x, cu_seqlens):
    """The recurrence, and one token of decoding."""
    q, k, v, beta, h0 = x
    with torch.no_grad():
        results = recurrent_delta_rule(q, k, v, beta, None, h0, True, True, cu_seqlens)
        if cu_seqlens is not None:
            return results
        rows = torch.arange(len(q), device=q.device) - 1
        state = h0.clone()
        return [*results, delta_rule_step(q[:, 0], k[:, 0], v[:, 0], beta[:, 0], state, state_indices=rows), state]


def decoding(x, cu_seqlens, state_dtype, width):
    """A layer's decoding step, its first row without a state."""
    q, k, v, beta, h0 = x
    tokens, state = [z[:, 0].flatten(1) for z in (q, k, v)], h0.to(state_dtype)
    past = [torch.ones(len(z), z.shape[1], width - 1, device=z.device, dtype=z.dtype) for z in tokens]
    weights = [torch.ones(z.shape[1], 1, width, device=z.device, dtype=z.dtype) for z in tokens]
    rows, norm = torch.arange(len(q), device=q.device) - 1, torch.ones(v.shape[-1], device=v.device)
    with torch.no_grad():
        o = decode_step(*tokens, beta[:, 0], tokens[2], past, state, weights, norm, norm_eps=1e-6, state_indices=rows)
    return [o, state, *past]


def before(x, cu_seqlens, width, padded):
    """The prologue, forward and backward, on q, k, v and beta as its projections, with states in and out."""
    *streams, b, h0 = [*(z.flatten(2) for z in x[:3]), *x[3:]]
    weights = [torch.randn(z.shape[2], 1, width, device=b.device, dtype=z.dtype) for z in streams]
    states = [z.new_ones(len(h0), z.shape[2], width - 1) for z in streams]
    tensors = [z.requires_grad_() for z in (*streams, b, *weights, *states)]
    order = None
    if padded:
        B, T, _ = b.shape
        order = padding_order((torch.arange(B * T, device=b.device) % 5 > 1).view(B, T), width)
    *results, finals = delta_rule_prologue(
        *tensors[:4], tensors[4:7], initial_states=tensors[7:], output_final_state=True, cu_seqlens=cu_seqlens,
        padding_order=order,
    )  # fmt: skip
    results += finals
    return [*results, *torch.autograd.grad(results, tensors, [torch.randn_like(result) for result in results])]


def normed(x, cu_seqlens):
    """A sum and its norm, forward and backward, by the kernels however few numbers there are."""
    q, k = (z.requires_grad_() for z in x[:2])
    weight = torch.ones(q.shape[-1], device=q.device, dtype=q.dtype, requires_grad=True)
    with mock.patch.object(rms_norm, "LEAST", 0):
        results = rms_norm.rms_norm(q, weight, 1e-6, k)
    return [*results, *torch.autograd.grad(results, (q, k, weight), [torch.randn_like(result) for result in results])]


def cases(names):
    """(description, what to call, its arguments without the device)."""
    for dtype, (K, V), shape in itertools.product(names, SIZES, SHAPES):
        for l2, states in ((True, True), (True, False), (False, True)):
            options = f"{'l2 ' if l2 else ''}{'states' if states else ''}"
            yield f"chunked {dtype} {K}x{V} {shape} {options}", chunked, (dtype, K, V, shape), (l2, states)
        if shape in ("short", "many"):
            for state_dtype, width in itertools.product((torch.float32, torch.bfloat16), (2, 4)):
                name = f"decoding {dtype} {K}x{V} {shape} {state_dtype} {width}"
                yield name, decoding, (dtype, K, V, shape), (state_dtype, width)
        if shape in ("short", "many"):
            yield f"norm {dtype} {K}x{V} {shape}", normed, (dtype, K, V, shape), ()
        if "long" not in shape:
            yield f"stepwise {dtype} {K}x{V} {shape}", stepwise, (dtype, K, V, shape), ()
        for width, padded in itertools.product(WIDTHS, (False, True)) if (K, V) in ((24, 100), (128, 128)) else ():
            if not (padded and "packed" in shape):
                options = f"width {width}{' padded' if padded else ''}"
                yield f"prologue {dtype} {K}x{V} {shape} {options}", before, (dtype, K, V, shape), (width, padded)


def run(device, function, case, options) -> str:
    """What went wrong, or nothing."""
    dtype, K, V, shape = case
    try:
        x, cu_seqlens = inputs(device, DTYPES[dtype], K, V, **SHAPES[shape])
        results = function(x, cu_seqlens, *options)
        return "" if all(torch.isfinite(result).all() for result in results) else "not finite"
    except Exception as error:  # the next configuration counts too
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), default=tuple(DTYPES))
    parser.add_argument("--only", default="", help="cases whose description contains this")
    parser.add_argument("--share", default="0/1", metavar="I/N")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    arguments = parser.parse_args()
    first, step = map(int, arguments.share.split("/"))
    chosen = [case for case in cases(arguments.dtypes) if arguments.only in case[0]][first::step]
    failures = 0
    for description, *case in chosen:
        if failure := run(arguments.device, *case):
            failures += 1
            print(f"{description}: {failure}", flush=True)
    print(f"{len(chosen)} cases, {failures} failed")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
