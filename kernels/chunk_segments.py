"""What context parallelism asks of the Triton kernels: the affine map of a whole row, and the gradient that enters it.

Both are scans alone, without outputs: one launch of `scan_kernel` over spans, whose maps are then joined. A span goes to
every program that the card has to spare, so that a long row of few heads fills it.
"""

import torch
from torch import Tensor

from .chunk import _forward, _invert, _maps, _Plan, _rows, _scan, _shared_unit
from .devices import on_device
from .reference import CHUNK


def segment_map(k: Tensor, v: Tensor, beta: Tensor, use_l2: bool) -> Tensor:
    """[N | M] of every row of [B, T, H, K] keys and [B, T, H, V] values, [B, H, K, V + K] float32."""
    with on_device(k):
        plan, x = _Plan(k, v, None, backward=False), [_rows(z) for z in (k, v)]
        unit = _shared_unit(*x)
        tau, factors = plan.new(*k.shape[:3], CHUNK), plan.new(3, len(k), k.shape[2], k.shape[1], dtype=torch.float32)
        # Without packed sequences nothing is written to the place of the output.
        _invert(plan, x[0], unit, beta, tau, factors, v, use_l2)
        maps, offsets = _maps(plan)
        _scan(plan, [x[0], x[0], x[1], x[1]], unit, tau, factors, (None, None, None, maps, offsets), store=False)
        M, N = _by_row(plan, maps), _by_row(plan, offsets)
        state = torch.cat([N[:, 0], M[:, 0]], -1)
        for i in range(1, plan.spans_per_row):
            state = M[:, i] @ state
            state[..., : plan.V] += N[:, i]
        return state


def entering_gradient(do, q, k, v, beta, tau, factors, scale: float, use_l2: bool) -> Tensor:
    """The gradient [B, H, K, V] float32 of a state of zero that enters every row; `tau` and `factors` are what the forward
    saved, or empty."""
    with on_device(q):
        if not tau.numel():
            *_, tau, factors = _forward(q, k, v, beta, scale, None, False, use_l2, None)
        # The spans of a forward: a backward runs its two scans over whole rows unless the card were all but idle.
        plan, x = _Plan(q, v, None, backward=False), [_rows(z) for z in (q, k, v, do)]
        unit = _shared_unit(*x)
        maps, offsets = _maps(plan)
        gradients = torch.empty_like(offsets)
        forward = (None, None, None, maps, offsets) if plan.split else None
        _scan(plan, x, unit, tau, factors, forward, (None, None, None, gradients), store=False)
        M, D = _by_row(plan, maps), _by_row(plan, gradients)
        gradient = D[:, -1]
        for i in reversed(range(plan.spans_per_row - 1)):
            gradient = D[:, i] + M[:, i].mT @ gradient
        return gradient


def _by_row(plan: _Plan, of_spans: Tensor) -> Tensor:
    """[spans, H, K, columns] -> [B, spans of a row, H, K, columns]."""
    return of_spans.unflatten(0, (plan.batch, plan.spans_per_row))
