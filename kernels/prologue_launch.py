"""The prologue on a GPU: how tokens and channels are cut, what is launched, and with which tile shapes."""

import functools
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from .chunk_tiles import span_table_kernel
from .devices import on_device, processors
from .launching import Prepared
from .prologue_kernels import backward_kernel, forward_kernel, sum_kernel
from .reference import CHUNK


class Launch(NamedTuple):
    """Channels of a program, tokens whose loads are in flight at once, Triton's warps; tokens of a strip where they are
    many and where they are few, multiples of `unroll`."""

    channels: int
    unroll: int
    warps: int
    strip: int
    short_strip: int


# By kernel and bytes of an element.
LAUNCHES = {
    ("forward", 2): Launch(128, 8, 1, 64, 16),
    ("backward", 2): Launch(128, 4, 1, 128, 32),
    ("forward", 4): Launch(128, 4, 1, 64, 16),
    ("backward", 4): Launch(64, 4, 1, 128, 32),
}
_BETA_BLOCK = 256


class _Plan:
    """How tokens and channels are cut, and the launches for streams (and gradients) that lie as `rows` say: shape, strides
    and address modulo 16 each. Plans are kept: layers and steps that have the same shapes share one."""

    def __init__(self, kernel: str, rows: tuple, b_rows: Optional[tuple], dtype, device, W, sequences, ordered, beta_scale):
        self.batch, self.T, _ = rows[0][0]
        self.device, self.W, self.widths = device, W, [shape[-1] for shape, *_ in rows[:3]]
        self.launch = LAUNCHES[kernel, dtype.itemsize]
        self.sequences = self.batch if sequences is None else sequences
        self.tiles = [-(-width // self.launch.channels) for width in self.widths]
        warps = self.batch * -(-self.T // self.launch.strip) * sum(self.tiles) * self.launch.warps
        self.strip = self.launch.strip if warps >= 16 * processors(device) else self.launch.short_strip
        self.all_have_tokens = sequences is None and not ordered
        # Of a row with padding, the strips of the padding and of the rest: together one more at most.
        self.strips_per_row = -(-self.T // self.strip) + ordered
        self.strips = self.batch * self.strips_per_row
        if sequences is not None:
            # An unused tail counts as one more sequence.
            self.strips = (self.T + (sequences + 1) * (self.strip - 1)) // self.strip
            self.blocks, self.width = -(-self.strips // 128), sequences + 1
            numbers = (self.T, sequences, 0, self.strips, self.strip, self.width, self.blocks)
            self.tabulation = Prepared(span_table_kernel, 2 * self.blocks, numbers, dict(C=CHUNK, BLOCK=128), {})
        self.run = self._prepare(kernel, rows, b_rows, dtype, beta_scale)
        numbers, blocks = (self.strips, *self.widths[:2], sum(self.widths)), -(-sum(self.widths) // 64)
        self.sum = Prepared(sum_kernel, blocks * W, numbers, {"W": W, "BD": 64, "ROWS": 32}, {"num_warps": 4})

    def _prepare(self, kernel: str, rows: tuple, b_rows: Optional[tuple], dtype, beta_scale: float) -> Prepared:
        unit, tiles = _unit(rows, dtype.itemsize), (self.tiles[0], self.tiles[1], sum(self.tiles))
        programs = self.strips * sum(self.tiles)
        sizes = (beta_scale, self.T, self.strips_per_row, self.strip, programs, *tiles, *(w // unit for w in self.widths))
        strides = [stride // unit for _, stride, _ in rows for stride in stride[:2]]
        blocks = 0 if b_rows is None else -(-self.T * b_rows[0][2] // _BETA_BLOCK)
        of_beta = (0,) * 5 if b_rows is None else (b_rows[0][2], blocks, *b_rows[1])
        channels, unroll, warps, *_ = self.launch
        constants = {"W": self.W, "BD": channels, "UNROLL": unroll, "UNIT": unit, "BLOCK": _BETA_BLOCK}
        run = {"forward": forward_kernel, "backward": backward_kernel}[kernel]
        grid = programs + self.batch * blocks
        return Prepared(run, grid, (*sizes, *strides, *of_beta), constants, {"num_warps": warps})

    def table(self, cu_seqlens: Optional[Tensor]) -> Optional[Tensor]:
        if cu_seqlens is None:
            return None
        table = torch.empty((self.strips, 3), dtype=torch.int32, device=self.device)
        first = torch.empty((2, self.width), dtype=torch.int32, device=self.device)
        self.tabulation(cu_seqlens, table, first)
        return table

    def states(self, given: list[Optional[Tensor]], like: list[Tensor]) -> list[Tensor]:
        """[N, D, W - 1] for a kernel to write; where sequences may have no tokens, those keep what is given, or zero."""
        shapes = [(self.sequences, width, self.W - 1) for width in self.widths]
        if self.all_have_tokens:
            return [x.new_empty(shape) for x, shape in zip(like, shapes)]
        return [x.new_zeros(shape) if y is None else y.to(x.dtype, copy=True) for x, y, shape in zip(like, given, shapes)]


keep_plan = functools.lru_cache(maxsize=256)(_Plan)


def _plan(kernel: str, strided: list[Tensor], weight: Tensor, b: Optional[Tensor], cu_seqlens, order, beta_scale) -> _Plan:
    x, sequences = strided[0], None if cu_seqlens is None else len(cu_seqlens) - 1
    rows = tuple([(x.shape, x.stride(), x.data_ptr() % 16) for x in strided])
    b_rows = None if b is None else (b.shape, b.stride())
    return keep_plan(kernel, rows, b_rows, x.dtype, x.device, weight.shape[-1], sequences, order is not None, beta_scale)


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _unit(rows: tuple, itemsize: int) -> int:
    """Elements of the widest load, up to 16 bytes, that no stride, start or number of channels breaks."""
    unit = 16 // itemsize
    numbers = [n for shape, stride, start in rows for n in (*stride[:2], shape[-1], start // itemsize)]
    while any(number % unit for number in numbers):
        unit //= 2
    return unit


def prologue_forward(streams, weights, b, states, beta_scale, output_final_state, cu_seqlens, order=None, padded=None):
    """y of q, k and v, beta or None, and their final states or Nones; `streams`, `weights` and `states` are lists of
    three, `order` and `padded` of a `PaddingOrder`."""
    streams, weights = [_dense(x) for x in streams], [w.contiguous() for w in weights]
    states = [None if state is None else state.contiguous() for state in states]
    with on_device(streams[0]):
        plan = _plan("forward", streams, weights[0], b, cu_seqlens, order, beta_scale)
        results = [x.new_empty(x.shape) for x in streams]
        finals = plan.states(states, streams) if output_final_state else [None] * 3
        beta = None if b is None else b.new_empty(b.shape, dtype=torch.float32)
        arguments = (*streams, *weights, *results, *states, *finals, b, beta)
        plan.run(*arguments, plan.table(cu_seqlens), cu_seqlens, order, padded)
    return results, beta, finals


def prologue_backward(
    gradients, dbeta, dfinals, streams, weights, b, states, beta_scale, cu_seqlens, order=None, padded=None
):
    """Gradients of streams, weights, b and states, the last as Nones where there are no states; `dfinals` may be Nones."""
    streams, weights = [_dense(x) for x in streams], [w.contiguous() for w in weights]
    gradients = [_dense(x) for x in gradients]
    states, dfinals = ([None if x is None else x.contiguous() for x in y] for y in (states, dfinals))
    with on_device(streams[0]):
        plan = _plan("backward", [*streams, *gradients], weights[0], b, cu_seqlens, order, beta_scale)
        results = [x.new_empty(x.shape) for x in streams]
        dstates = [None] * 3 if states[0] is None else plan.states(dfinals, states)
        db = None if b is None else b.new_empty(b.shape)
        sums = torch.empty((plan.strips, plan.W, sum(plan.widths)), dtype=torch.float32, device=plan.device)
        dbeta = None if dbeta is None else dbeta.contiguous()
        arguments = (*streams, *weights, *states, *gradients, *dfinals, *results, *dstates, sums, b, dbeta, db)
        plan.run(*arguments, plan.table(cu_seqlens), cu_seqlens, order, padded)
        dweights = [w.new_empty(w.shape) for w in weights]
        plan.sum(sums, *dweights)
    return results, dweights, db, dstates
