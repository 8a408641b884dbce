"""RMSNorm in Triton, one pass over memory each way; `rms_norm.py` says what it computes and when it runs."""

import functools

try:  # Transformers wants every package that custom code imports outside of a `try`
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the fused kernels need Triton") from error

from .launching import Prepared


@triton.jit(do_not_specialize=["rows", "eps"])
def rms_norm_kernel(
    x, update, weight, y, total, scales, rows, eps, N: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr
):  # fmt: skip
    """y = weight s r and scales = r = 1 / sqrt(mean(s²) + eps) of `rows` rows; s is x, or x + update, rounded into total."""
    first = tl.program_id(0).to(tl.int64) * BR
    i, j = tl.arange(0, BR), tl.arange(0, BN)
    exists = first + i < rows
    inside = exists[:, None] & (j < N)[None, :] if BN != N else exists[:, None]
    place = first * N + i[:, None] * N + j[None, :]
    s = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)  # [BR, BN]
    if update is not None:
        rounded = (s + tl.load(update + place, mask=inside, other=0.0).to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + place, rounded, mask=inside)
        s = rounded.to(tl.float32)
    r = tl.rsqrt(tl.sum(s * s, 1) / N + eps)
    if scales is not None:
        tl.store(scales + first + i, r, mask=exists)
    w = tl.load(weight + j, mask=j < N, other=0.0).to(tl.float32)
    tl.store(y + place, (s * r[:, None] * w[None, :]).to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def rms_norm_gradient_kernel(
    dy, dtotal, total, weight, scales, dx, sums, rows, N: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr
):  # fmt: skip
    """dx of every so many rows, dtotal added where given, and dweight summed over them: a row of sums [programs, N]."""
    i, j = tl.arange(0, BR), tl.arange(0, BN)
    w = tl.load(weight + j, mask=j < N, other=0.0).to(tl.float32)[None, :]
    dw = tl.zeros([BR, BN], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, BR), tl.num_programs(0)):
        first = tl.cast(tile, tl.int64) * BR
        exists = first + i < rows
        inside = exists[:, None] & (j < N)[None, :] if BN != N else exists[:, None]
        place = first * N + i[:, None] * N + j[None, :]
        g = tl.load(dy + place, mask=inside, other=0.0).to(tl.float32)  # [BR, BN]
        along = 0.0
        if dtotal is not None:  # here, so that it does not wait for the sum below
            along = tl.load(dtotal + place, mask=inside, other=0.0).to(tl.float32)
        r = tl.load(scales + first + i, mask=exists, other=0.0)[:, None]
        normed = tl.load(total + place, mask=inside, other=0.0).to(tl.float32) * r
        dw += g * normed
        g *= w
        d = (g - normed * (tl.sum(g * normed, 1) / N)[:, None]) * r + along
        tl.store(dx + place, d.to(dx.dtype.element_ty), mask=inside)
    if sums is not None:
        tl.store(sums + tl.program_id(0) * N + j, tl.sum(dw, 0), mask=j < N)


@triton.jit(do_not_specialize=["programs"])
def rms_norm_sum_kernel(sums, dweight, programs, N: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr):
    """sums [programs, N] -> dweight [N], for one tile of columns."""
    j = tl.program_id(0) * BN + tl.arange(0, BN)
    dw = tl.zeros([BR, BN], tl.float32)
    for first in range(0, programs, BR):
        i = first + tl.arange(0, BR)
        dw += tl.load(sums + i[:, None] * N + j[None, :], mask=(i < programs)[:, None] & (j < N)[None, :], other=0.0)
    tl.store(dweight + j, tl.sum(dw, 0).to(dweight.dtype.element_ty), mask=j < N)


@functools.lru_cache(maxsize=256)
def launch(name: str, programs: int, numbers: tuple, tile, warps: int, device) -> Prepared:
    """A launch of one of the kernels, kept for a device; `tile` names their constexpr parameters."""
    kernel = {"forward": rms_norm_kernel, "gradient": rms_norm_gradient_kernel, "sum": rms_norm_sum_kernel}[name]
    return Prepared(kernel, programs, numbers, tile._asdict(), {"num_warps": warps})
