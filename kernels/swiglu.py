"""SwiGLU's product silu(gate) * up, and its gradient together with the product itself.

Both are bound by memory: PyTorch's own operations pass over it 5 times forward and 9 times backward, one kernel each 3 and
5 times (6 with the product). Arithmetic is float32 (float64 for float64), rounded once.
"""

import functools
import os
from typing import Optional

import torch
from torch import Tensor

from .devices import fused_kernels_refuse, on_device
from .reference import compute_dtype

GRANULE = 16
"""The fused kernels take multiples of this many elements, so that loads stay vectors."""


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up for tensors of one shape and dtype; not differentiable, see `swiglu_backward`."""
    kernels = _fused(gate)
    if kernels is None:
        dtype = compute_dtype(gate.dtype)
        return (torch.nn.functional.silu(gate.to(dtype)) * up.to(dtype)).to(gate.dtype)
    gate, up = gate.contiguous(), up.contiguous()
    z = torch.empty_like(gate)
    with on_device(gate):
        kernels.product(gate, up, z)
    return z


def swiglu_backward(gate: Tensor, up: Tensor, dz: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `gate` and `up` for the gradient dz of their product, and the product."""
    kernels = _fused(gate)
    if kernels is None:
        return _backward(gate, up, dz)
    gate, up, dz = gate.contiguous(), up.contiguous(), dz.contiguous()
    results = tuple(torch.empty_like(gate) for _ in range(3))
    with on_device(gate):
        kernels.gradient(gate, up, dz, *results)
    return results


def _backward(gate: Tensor, up: Tensor, dz: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(gate.dtype)
    g, u, d = gate.to(dtype), up.to(dtype), dz.to(dtype)
    s = g.sigmoid()
    results = (d * u * s * (1 + g * (1 - s)), d * g * s, g * s * u)
    return tuple(x.to(gate.dtype) for x in results)


def _fused(gate: Tensor):
    """The Triton kernels, or `None` where they cannot run or DELTANET_BACKEND asks for another implementation."""
    forced = os.environ.get("DELTANET_BACKEND", "") in ("torch", "recurrent")
    if forced or gate.numel() % GRANULE or gate.numel() == 0 or fused_kernels_refuse(gate.device, gate.dtype, K=1):
        return None
    return _kernels()


@functools.cache
def _kernels() -> Optional[object]:
    try:
        from .swiglu_kernels import Kernels
    except ImportError:
        return None
    return Kernels
