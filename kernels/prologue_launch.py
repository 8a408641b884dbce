"""The prologue on a GPU: how tokens and channels are cut, what is launched, and with which tile shapes."""

from typing import NamedTuple, Optional

import torch
from torch import Tensor

from .chunk_tiles import span_table_kernel
from .devices import on_device, processors
from .launching import enqueue
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
    """How tokens and channels are cut, and the arguments that both kernels share."""

    def __init__(self, kernel: str, streams: list[Tensor], weights: list[Tensor], b, cu_seqlens, order):
        (self.batch, self.T, _), self.device = streams[0].shape, streams[0].device
        self.widths, self.W = [x.shape[-1] for x in streams], weights[0].shape[-1]
        self.launch = LAUNCHES[kernel, streams[0].element_size()]
        self.sequences = self.batch if cu_seqlens is None else len(cu_seqlens) - 1
        self.tiles = [-(-width // self.launch.channels) for width in self.widths]
        warps = self.batch * -(-self.T // self.launch.strip) * sum(self.tiles) * self.launch.warps
        self.strip = self.launch.strip if warps >= 16 * processors(self.device) else self.launch.short_strip
        self.table, self.all_have_tokens = None, cu_seqlens is None and order is None
        # Of a row with padding, the strips of the padding and of the rest: together one more at most.
        self.strips_per_row = -(-self.T // self.strip) + (order is not None)
        self.strips = self.batch * self.strips_per_row
        if cu_seqlens is not None:
            self._tabulate(cu_seqlens)
        self.programs = self.strips * sum(self.tiles)
        self.beta_sizes = (0, 0, 0, 0, 0) if b is None else (b.shape[2], -(-b[0].numel() // _BETA_BLOCK), *b.stride())
        self.grid = self.programs + self.batch * self.beta_sizes[1]
        self.options = {"num_warps": self.launch.warps}

    def _tabulate(self, cu_seqlens: Tensor) -> None:
        # An unused tail counts as one more sequence.
        self.strips = (self.T + (self.sequences + 1) * (self.strip - 1)) // self.strip
        self.table = torch.empty((self.strips, 3), dtype=torch.int32, device=self.device)
        first = torch.empty((2, self.sequences + 1), dtype=torch.int32, device=self.device)
        blocks, width = -(-self.strips // 128), self.sequences + 1
        arguments = (cu_seqlens, self.table, first, self.T, self.sequences, 0, self.strips, self.strip, width, blocks)
        enqueue(span_table_kernel, 2 * blocks, arguments, dict(C=CHUNK, BLOCK=128), {})

    def sizes(self, beta_scale: float, unit: int) -> tuple:
        tiles = (self.tiles[0], self.tiles[1], sum(self.tiles))
        units = [width // unit for width in self.widths]
        return (beta_scale, self.T, self.strips_per_row, self.strip, self.programs, *tiles, *units)

    def constants(self, unit: int) -> dict:
        channels, unroll, *_ = self.launch
        return {"W": self.W, "BD": channels, "UNROLL": unroll, "UNIT": unit, "BLOCK": _BETA_BLOCK}

    def states(self, given: list[Optional[Tensor]], like: list[Tensor]) -> list[Tensor]:
        """[N, D, W - 1] for a kernel to write; where sequences may have no tokens, those keep what is given, or zero."""
        shapes = [(self.sequences, width, self.W - 1) for width in self.widths]
        if self.all_have_tokens:
            return [x.new_empty(shape) for x, shape in zip(like, shapes)]
        return [x.new_zeros(shape) if y is None else y.to(x.dtype, copy=True) for x, y, shape in zip(like, given, shapes)]


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _unit(streams: list[Tensor]) -> int:
    """Elements of the widest load, up to 16 bytes, that no stride, start or number of channels breaks."""
    unit = 16 // streams[0].element_size()
    numbers = [n for x in streams for n in (*x.stride()[:2], x.shape[-1], x.data_ptr() // x.element_size())]
    while any(number % unit for number in numbers):
        unit //= 2
    return unit


def _strides(streams: list[Tensor], unit: int) -> list[int]:
    return [stride // unit for x in streams for stride in x.stride()[:2]]


def prologue_forward(streams, weights, b, states, beta_scale, output_final_state, cu_seqlens, order=None, padded=None):
    """y of q, k and v, beta or None, and their final states or Nones; `streams`, `weights` and `states` are lists of
    three, `order` and `padded` of a `PaddingOrder`."""
    streams, weights = [_dense(x) for x in streams], [w.contiguous() for w in weights]
    states = [None if state is None else state.contiguous() for state in states]
    with on_device(streams[0]):
        plan, unit = _Plan("forward", streams, weights, b, cu_seqlens, order), _unit(streams)
        results = [x.new_empty(x.shape) for x in streams]
        finals = plan.states(states, streams) if output_final_state else [None] * 3
        beta = None if b is None else b.new_empty(b.shape, dtype=torch.float32)
        arguments = (*streams, *weights, *results, *states, *finals, b, beta, plan.table, cu_seqlens, order, padded)
        arguments += (*plan.sizes(beta_scale, unit), *_strides(streams, unit), *plan.beta_sizes)
        enqueue(forward_kernel, plan.grid, arguments, plan.constants(unit), plan.options)
    return results, beta, finals


def prologue_backward(
    gradients, dbeta, dfinals, streams, weights, b, states, beta_scale, cu_seqlens, order=None, padded=None
):
    """Gradients of streams, weights, b and states, the last as Nones where there are no states; `dfinals` may be Nones."""
    streams, weights = [_dense(x) for x in streams], [w.contiguous() for w in weights]
    gradients = [_dense(x) for x in gradients]
    states, dfinals = ([None if x is None else x.contiguous() for x in y] for y in (states, dfinals))
    with on_device(streams[0]):
        plan, unit = _Plan("backward", streams, weights, b, cu_seqlens, order), _unit([*streams, *gradients])
        results = [x.new_empty(x.shape) for x in streams]
        dstates = [None] * 3 if states[0] is None else plan.states(dfinals, states)
        db = None if b is None else b.new_empty(b.shape)
        sums = torch.empty((plan.strips, plan.W, sum(plan.widths)), dtype=torch.float32, device=plan.device)
        dbeta = None if dbeta is None else dbeta.contiguous()
        arguments = (*streams, *weights, *states, *gradients, *dfinals, *results, *dstates, sums, b, dbeta, db)
        arguments += (plan.table, cu_seqlens, order, padded, *plan.sizes(beta_scale, unit))
        arguments += (*_strides(streams, unit), *_strides(gradients, unit), *plan.beta_sizes)
        enqueue(backward_kernel, plan.grid, arguments, plan.constants(unit), plan.options)
        dweights = [w.new_empty(w.shape) for w in weights]
        sum_kernel[(-(-sums.shape[2] // 64), plan.W)](
            sums, *dweights, plan.strips, *plan.widths[:2], sums.shape[2], W=plan.W, BD=64, ROWS=32, num_warps=4
        )
    return results, dweights, db, dstates
