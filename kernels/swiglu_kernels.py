"""SwiGLU in Triton, one pass over memory each way; `swiglu.py` says when."""

import functools

try:  # Transformers wants every package that custom code imports outside of a `try`
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the fused kernels need Triton") from error

from .launching import Prepared

BLOCK = 2048


@triton.jit(do_not_specialize=["granules"])
def swiglu_kernel(gate, up, z, granules, BLOCK: tl.constexpr):
    """z = silu(gate) up over 16 * `granules` elements, a bound that lets the loads be vectors."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < granules.to(tl.int64) * 16
    g = tl.load(gate + i, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(z + i, (g * tl.sigmoid(g) * u).to(z.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["granules"])
def swiglu_gradient_kernel(gate, up, dz, dgate, dup, z, granules, BLOCK: tl.constexpr):
    """dgate = dz up silu'(gate), dup = dz silu(gate), z = silu(gate) up over 16 * `granules` elements."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < granules.to(tl.int64) * 16
    g = tl.load(gate + i, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + i, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(dz + i, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    tl.store(dgate + i, (d * u * s * (1 + g * (1 - s))).to(z.dtype.element_ty), mask=inside)
    tl.store(dup + i, (d * g * s).to(z.dtype.element_ty), mask=inside)
    tl.store(z + i, (g * s * u).to(z.dtype.element_ty), mask=inside)


def product(*tensors) -> None:
    """`swiglu_kernel` over contiguous tensors of one shape."""
    _launch("product", tensors[0].numel(), tensors[0].device)(*tensors)


def gradient(*tensors) -> None:
    """`swiglu_gradient_kernel` over contiguous tensors of one shape."""
    _launch("gradient", tensors[0].numel(), tensors[0].device)(*tensors)


@functools.lru_cache(maxsize=64)
def _launch(name: str, size: int, device) -> Prepared:
    """Kept for a device, as `Prepared` asks for."""
    kernel = {"product": swiglu_kernel, "gradient": swiglu_gradient_kernel}[name]
    return Prepared(kernel, triton.cdiv(size, BLOCK), (size // 16,), {"BLOCK": BLOCK}, {})
