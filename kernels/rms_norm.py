"""RMSNorm over the last dimension, with the residual sum before it where there is one.

    total = x + update                              (x itself without an update), rounded
    y     = weight total / sqrt(mean(total²) + eps)
    dx    = dupdate = (gradient of total through y) + dtotal

All of it is bound by memory. With an update the kernels pass over it four times each way, without 2 and 3 or 4 times;
PyTorch's operations, one by one, 5 and 8 times, and its kernels of the norm give 128 threads to a row, most of them idle in
rows of 128. Arithmetic is float32 (float64 for float64), rounded once; sums over rows have a fixed order.
"""

import functools
from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .devices import on_device, processors, runs_fused
from .reference import compute_dtype

LEAST = 2**20
"""Elements from which the kernels are faster: with fewer, PyTorch's take less time on the host."""
WIDEST = 8192
"""The longest rows that the registers of a program hold."""
_TILE = 2048
_WARPS = 20  # of the gradient's programs on a multiprocessor: with 16 numbers and 96 registers a thread they fit it

# Since torch 2.9; before, `F.rms_norm` rounded once more.
_PYTORCH_FUSES = hasattr(torch.ops.aten, "_fused_rms_norm")


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, update: Optional[Tensor] = None, dtype: Optional[torch.dtype] = None
) -> tuple[Tensor, Tensor]:
    """(y, total) for x and update [..., N] and weight [N]: y in `dtype`, by default that of total. Differentiable once."""
    if torch.compiler.is_compiling() or not _runs_fused(x, weight):
        total = x if update is None else x + update
        return _composed(total, weight, eps, dtype or total.dtype), total
    total_dtype = x.dtype if update is None else torch.promote_types(x.dtype, update.dtype)
    arguments = x, update, weight, eps, total_dtype, dtype or total_dtype
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, update, weight)):
        return _RMSNorm.apply(*arguments)
    return _forward(*arguments, keep=False)[:2]


def _composed(x: Tensor, weight: Tensor, eps: float, result: torch.dtype) -> Tensor:
    # PyTorch's fused kernels round once where all dtypes agree, and keep half as much for the backward.
    is_fused = x.is_cuda and _PYTORCH_FUSES and weight.dtype == x.dtype == result
    dtype = x.dtype if is_fused else compute_dtype(x.dtype)
    return F.rms_norm(x.to(dtype), weight.shape, weight.to(dtype), eps).to(result)


def _runs_fused(x: Tensor, weight: Tensor) -> bool:
    if type(x) not in _PLAIN or type(weight) not in _PLAIN or weight.device != x.device:
        return False
    return x.numel() >= LEAST and x.shape[-1] <= WIDEST and runs_fused(x)


_PLAIN = (Tensor, torch.nn.Parameter)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, update, weight, eps, total_dtype, dtype):
        y, total, scales = _forward(x, update, weight, eps, total_dtype, dtype, keep=True)
        ctx.save_for_backward(total, weight, scales)
        ctx.dtypes = x.dtype, None if update is None else update.dtype
        ctx.set_materialize_grads(False)
        return y, total

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dtotal):
        total, weight, scales = ctx.saved_tensors
        dy = torch.zeros_like(total) if dy is None else dy
        dx, dweight = _backward(dy, dtotal, total, weight, scales, ctx.needs_input_grad[2])
        return *(None if dtype is None else dx.to(dtype) for dtype in ctx.dtypes), dweight, None, None, None


def _forward(x, update, weight, eps, total_dtype, dtype, keep):
    """(y, total, 1 / sqrt(mean(total²) + eps) [rows] in float32 if they are to be kept)."""
    from .rms_norm_kernels import launch

    source, rows, N = x.contiguous(), x.numel() // x.shape[-1], x.shape[-1]
    y = torch.empty_like(source, dtype=dtype)
    total = None if update is None else torch.empty_like(source, dtype=total_dtype)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device) if keep else None
    update = None if update is None else update.contiguous()
    tile, warps = _tile(N)
    with on_device(x):
        run = launch("forward", -(-rows // tile.BR), (rows, eps), tile, warps, x.device)
        run(source, update, weight.contiguous(), y, total, scales)
    return y, x if total is None else total, scales


def _backward(dy, dtotal, total, weight, scales, wants_weight):
    """(gradient of x and of the update in the dtype of total, that of the weight or None)."""
    from .rms_norm_kernels import launch

    rows, N = len(scales), total.shape[-1]
    tile, warps = _tile(N)
    programs = min(-(-rows // tile.BR), processors(total.device) * _WARPS // warps)
    dx = torch.empty(total.shape, dtype=total.dtype, device=total.device)
    sums = torch.empty(programs, N, dtype=torch.float32, device=total.device) if wants_weight else None
    dweight = torch.empty_like(weight) if wants_weight else None
    dtotal = None if dtotal is None else dtotal.contiguous()
    with on_device(total):
        run = launch("gradient", programs, (rows,), tile, warps, total.device)
        run(dy.contiguous(), dtotal, total.contiguous(), weight.contiguous(), scales, dx, sums)
        if wants_weight:
            launch("sum", -(-N // 32), (programs,), Tile(N, 32, 128), 4, total.device)(sums, dweight)
    return dx, dweight


class Tile(NamedTuple):
    """What the kernels are compiled for: the length of a row, and columns and rows of a tile."""

    N: int
    BN: int
    BR: int


@functools.cache
def _tile(N: int) -> tuple[Tile, int]:
    """Rows of 16 numbers a thread, whole, and the warps of a program."""
    BN = 1 << (N - 1).bit_length()
    return Tile(N, BN, max(1, _TILE // BN)), 4 if BN <= _TILE else 8
