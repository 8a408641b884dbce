"""What context parallelism asks of the Triton kernels: the affine map of a whole row, and the gradient that enters it.

Both come from scans over spans that write no outputs. The forward behind the exchange uses what the map was made of, so
that a row that is cut into spans anyway is mapped at no cost but the product of its spans' maps.
"""

import torch
from torch import Tensor

from .chunk import Mapped, _batch, _map, _maps, _Plan, _scan, outputs
from .devices import on_device


def segment_map(k: Tensor, v: Tensor, beta: Tensor, use_l2: bool) -> tuple[Tensor, Mapped]:
    """[N | M] of every row of [B, T, H, K] keys and [B, T, H, V] values, [B, H, K, V + K] float32, and what a forward over
    the same rows need not compute again."""
    with on_device(k):
        batch = _batch((k, k, v), None)
        plan = batch.plan
        # Without packed sequences nothing is written to the place of the output.
        mapped = _map(batch, beta, v, use_l2, spans=True)
        M, N = _by_row(plan, mapped.maps), _by_row(plan, mapped.offsets)
        state = torch.cat([N[:, 0], M[:, 0]], -1)
        for i in range(1, plan.spans_per_row):
            state = M[:, i] @ state
            state[..., : plan.V] += N[:, i]
        return state, mapped


def mapped_forward(q, k, v, beta, scale: float, initial_state, output_final_state: bool, use_l2: bool, mapped: Mapped):
    """`chunk.chunk_forward` of rows that `segment_map` has mapped."""
    with on_device(q):
        batch = _batch((q, k, v), None)
        results = outputs(batch, beta, scale, initial_state, output_final_state, use_l2, mapped=mapped)
        return *results, batch.plan.new(0), batch.plan.new(0)


def entering_gradient(do, q, k, v, beta, tau, factors, maps, scale: float, use_l2: bool) -> Tensor:
    """The gradient [B, H, K, V] float32 of a state of zero that enters every row; `tau`, `factors` and `maps` are what the
    forward had, or empty."""
    with on_device(q):
        if not maps.numel():
            _, mapped = segment_map(k, v, beta, use_l2)
            tau, factors = mapped_forward(q, k, v, beta, scale, None, False, use_l2, mapped)[2:4]
            maps = mapped.maps
        # The spans of the forward: a backward runs its two scans over whole rows unless the card were all but idle.
        batch = _batch((q, k, v, do), None)
        plan = batch.plan
        gradients = _maps(plan)[1]
        reverse = (None, None, None, gradients)
        _scan(batch, tau, factors, None, reverse, store=False)
        M, D = _by_row(plan, maps), _by_row(plan, gradients)
        gradient = D[:, -1]
        for i in reversed(range(plan.spans_per_row - 1)):
            gradient = D[:, i] + M[:, i].mT @ gradient
        return gradient


def _by_row(plan: _Plan, of_spans: Tensor) -> Tensor:
    """[spans, H, K, columns] -> [B, spans of a row, H, K, columns]."""
    return of_spans.unflatten(0, (plan.batch, plan.spans_per_row))
