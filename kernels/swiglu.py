"""SwiGLU's product silu(gate) * up, and its gradient together with the product itself.

Both are bound by memory: PyTorch's own operations pass over it 5 times forward and 9 times backward, one kernel each 3 and
5 times (6 with the product). Arithmetic is float32 (float64 for float64), rounded once.
"""

import torch
from torch import Tensor

from .devices import on_device, runs_fused
from .reference import compute_dtype

GRANULE = 16
"""The fused kernels take multiples of this many elements, so that loads stay vectors."""


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up for tensors of one shape and dtype; not differentiable, see `swiglu_backward`."""
    if not _runs_fused(gate):
        dtype = compute_dtype(gate.dtype)
        return (torch.nn.functional.silu(gate.to(dtype)) * up.to(dtype)).to(gate.dtype)
    from .swiglu_kernels import product

    gate, up = gate.contiguous(), up.contiguous()
    z = torch.empty_like(gate)
    with on_device(gate):
        product(gate, up, z)
    return z


def swiglu_backward(gate: Tensor, up: Tensor, dz: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `gate` and `up` for the gradient dz of their product, and the product."""
    if not _runs_fused(gate):
        return _backward(gate, up, dz)
    from .swiglu_kernels import gradient

    gate, up, dz = gate.contiguous(), up.contiguous(), dz.contiguous()
    results = tuple(torch.empty_like(gate) for _ in range(3))
    with on_device(gate):
        gradient(gate, up, dz, *results)
    return results


def _backward(gate: Tensor, up: Tensor, dz: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(gate.dtype)
    g, u, d = gate.to(dtype), up.to(dtype), dz.to(dtype)
    s = g.sigmoid()
    results = (d * u * s * (1 + g * (1 - s)), d * g * s, g * s * u)
    return tuple(x.to(gate.dtype) for x in results)


def _runs_fused(gate: Tensor) -> bool:
    return gate.numel() % GRANULE == 0 and runs_fused(gate)
