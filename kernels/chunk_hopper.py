"""What the Gluon kernels for Hopper GPUs share: layouts, tiles that the copy engine brings, and their descriptors.

They compute what `output_kernel` and `scan_kernel` compute, with the schedule written out: products run while threads
prepare the operands of the next one, and the tensor memory accelerator fetches the next chunk, which costs no registers.
Rows behind the end of a batch row read as zeros; in packed sequences the last chunk of each is cleared by hand.
"""

import functools

import torch
from torch import Tensor

try:  # Transformers wants every package that custom code imports outside of a `try`
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
except ImportError as error:
    raise ImportError("the kernels for Hopper need Gluon, a part of Triton") from error

from .reference import CHUNK

_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


class _Layout(gl.NVMMASharedLayout):
    """Its text, by which every launch looks for the compiled kernel, made once."""

    def __repr__(self) -> str:
        return _text(gl.NVMMASharedLayout(self.swizzle_byte_width, self.element_bitwidth, self.rank))


@functools.cache
def _text(layout: gl.NVMMASharedLayout) -> str:
    return repr(layout)


@functools.cache
def _layout(columns: int, dtype: torch.dtype) -> _Layout:
    usual = gl.NVMMASharedLayout.get_default_for([1, CHUNK, 1, columns], _DTYPES[dtype])
    return _Layout(usual.swizzle_byte_width, usual.element_bitwidth, usual.rank)


def descriptor(x: Tensor, columns: int) -> TensorDescriptor:
    """x [B, T, H, D], strides multiples of 16 bytes, to be read in tiles of a chunk's tokens and `columns` columns."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, CHUNK, 1, columns], _layout(columns, x.dtype))


@gluon.constexpr_function
def accumulator(columns):
    """Of a product with `columns` columns, the rows dealt out to the four warps that compute it."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])


@gluon.constexpr_function
def lines(columns):
    """16 bytes a thread, whole rows of memory together."""
    return gl.BlockedLayout([1, 8], [256 // columns, columns // 8], [4, 1], [1, 0])


@gluon.constexpr_function
def matrix(rows, columns, dtype):
    return gl.NVMMASharedLayout.get_default_for([rows, columns], dtype)


@gluon.jit
def allocate_stages(x):
    """Two tiles of a descriptor: one is computed with while the other arrives."""
    return gl.allocate_shared_memory(x.dtype, [2, 1, x.block_shape[1], 1, x.block_shape[3]], x.layout)


@gluon.jit
def allocate_barriers():
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(ready.index(0), count=1)
    mbarrier.init(ready.index(1), count=1)
    return ready


@gluon.jit
def fetch(x, tiles, ready, stage, b, token, h, column, pred):
    tma.async_copy_global_to_shared(x, [b, token, h, column], ready.index(stage), tiles.index(stage), pred=pred)


@gluon.jit
def take(tiles, stage):
    """A tile that has arrived, as a matrix."""
    return tiles.index(stage).reshape([tiles.shape[2], tiles.shape[4]])


@gluon.jit
def clear_rows(tile, left):
    """Zeros in the rows from `left` on, which are another sequence's."""
    layout: gl.constexpr = lines(tile.shape[1])
    rows = gl.arange(0, tile.shape[0], layout=gl.SliceLayout(1, layout))
    tile.store(gl.where((rows < left)[:, None], tile.load(layout), 0.0))


@gluon.jit
def store_lines(p, tile, stop, stride, column, WIDTH: gl.constexpr):
    """The first `stop` rows of a tile in shared memory, to memory from column `column` on, up to WIDTH."""
    BV: gl.constexpr = tile.shape[1]
    layout: gl.constexpr = lines(BV)
    rows = gl.arange(0, tile.shape[0], layout=gl.SliceLayout(1, layout))
    columns = column + gl.arange(0, BV, layout=gl.SliceLayout(0, layout))
    mask = (rows < stop)[:, None]
    if WIDTH % BV != 0:
        mask = mask & (columns < WIDTH)[None, :]
    gl.store(p + rows[:, None] * stride + columns[None, :], tile.load(layout), mask=mask)
