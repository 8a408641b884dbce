"""The chunked delta rule on a GPU: what is launched for a forward and for a backward pass.

Forward: `inverse_kernel`, then `output_kernel`. Backward: `scan_kernel` in both directions at once, then
`gradient_kernel`. Where sequences and heads are too few to fill the card, sequences are cut into spans: scans from zero
give the map of every span, `join_kernel` the state that each starts with. On Hopper GPUs `output_kernel` and
`scan_kernel` have a second form, which takes what it can read through the copy engine.
"""

from typing import NamedTuple, Optional

import torch
from torch import Tensor

from .chunk_backward import gradient_kernel
from .chunk_configurations import launch
from .chunk_forward import output_kernel
from .chunk_states import join_kernel, scan_kernel
from .chunk_tiles import inverse_kernel, span_table_kernel
from .devices import has_copy_engine, on_device, processors, shared_memory
from .launching import enqueue
from .reference import CHUNK

try:
    from .chunk_hopper import descriptor
    from .chunk_hopper_forward import hopper_output_kernel
    from .chunk_hopper_states import hopper_scan_kernel
except ImportError:  # a Triton that has no Gluon: `has_copy_engine` says no
    descriptor = hopper_output_kernel = hopper_scan_kernel = None

# A span's map costs a scan of its own over K more columns, which pays for spans of so many chunks and for so many spans.
_SHORTEST_SPAN, _FEWEST_SPANS = 32, 4


class _Rows(NamedTuple):
    """A tensor [B, T, H, D] that is read in place, its strides in units of `unit` elements."""

    tensor: Tensor
    unit: int

    @property
    def is_copyable(self) -> bool:
        """Whether a Hopper GPU's copy engine reads it: 16-bit numbers, strides of 16 bytes, no row read twice."""
        x = self.tensor
        repeated = any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape))
        return x.element_size() == 2 and x.stride(-1) == 1 and self.unit == 8 and not repeated


def _rows(x: Tensor) -> _Rows:
    """Rows must be dense; the unit is the widest load, up to 16 bytes, that no stride breaks."""
    x = x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
    unit = 16 // x.element_size()
    while any(stride % unit for stride in x.stride()[:3]) or x.data_ptr() % (unit * x.element_size()):
        unit //= 2
    return _Rows(x, unit)


class _Plan:
    """How a batch is cut: chunks for the parallel kernels, spans for the scans."""

    def __init__(self, tensors: tuple[Tensor, ...], cu_seqlens: Optional[Tensor], backward: bool):
        q, _, v = tensors[:3]
        self.rows, self.backward = [_rows(x) for x in tensors], backward
        self.unit = min(x.unit for x in self.rows)
        self.batch, self.T, self.H, self.K = q.shape
        self.V, self.dtype, self.device = v.shape[-1], q.dtype, q.device
        self.exact = q.dtype == torch.float32
        self.precision = "tf32x3" if self.exact else "tf32"
        # Below this, the gradient of a value times its beta has too few digits left to divide by beta again.
        self.small = 2**-10 if q.dtype == torch.float16 else 1e-30
        self.KP, self.VP = (max(16, 1 << (size - 1).bit_length()) for size in (self.K, self.V))
        self.sequences = self.batch if cu_seqlens is None else len(cu_seqlens) - 1
        self.chunks_per_row = -(-self.T // CHUNK)
        self.chunks = count_chunks(self.batch, self.T, cu_seqlens)
        self.narrow = self.sequences * self.H * -(-self.V // 64) < processors(self.device)
        self.hopper = has_copy_engine(self.device) and 32 < self.K <= 128 and all(x.is_copyable for x in self.rows)
        self.span = choose_span(self)
        self.split = self.span < self.T
        self.spans_per_row = -(-self.T // self.span)
        self.spans = self.batch * self.spans_per_row
        self.cu_seqlens, self.chunk_table, self.span_table, self.first_chunk, self.first_span = cu_seqlens, *[None] * 4
        if cu_seqlens is not None:
            self._tabulate(cu_seqlens)

    def _tabulate(self, cu_seqlens: Tensor) -> None:
        self.spans = (self.T + (self.sequences + 1) * (self.span - 1)) // self.span
        width = _multiple_of_four(self.sequences + 1)
        table = torch.empty((self.chunks + self.spans, 3), dtype=torch.int32, device=self.device)
        first = torch.empty((2, width), dtype=torch.int32, device=self.device)
        blocks = -(-max(self.chunks, self.spans) // 128)
        arguments = (cu_seqlens, table, first, self.T, self.sequences, self.chunks, self.spans, self.span, width, blocks)
        enqueue(span_table_kernel, 2 * blocks, arguments, dict(C=CHUNK, BLOCK=128), {})
        self.chunk_table, self.span_table = table[: self.chunks], table[self.chunks :]
        self.first_chunk, self.first_span = first

    def launch(self, kernel: str) -> tuple[int, dict]:
        """Columns of V a program takes, and Triton's options."""
        limit = shared_memory(self.device)
        narrow = self.narrow and not self.split
        chosen = launch(kernel, self.K, self.V, self.dtype.itemsize, narrow, limit, self.hopper)
        options = {"num_warps": chosen.warps, "num_stages": chosen.stages}
        if chosen.registers is not None and torch.version.hip is None:
            options["maxnreg"] = chosen.registers
        return chosen.columns, options

    def cut(self) -> tuple[Optional[Tensor], ...]:
        """Where spans lie: tables for packed sequences, else nothing."""
        return self.span_table, self.cu_seqlens, self.first_chunk

    def sizes(self) -> tuple[int, int, int]:
        return self.T, self.H, self.batch * self.H

    def strides(self, *rows: _Rows) -> list[int]:
        return [stride // self.unit for x in rows for stride in x.tensor.stride()[:3]]

    @property
    def plain(self) -> dict:
        """What kernels are compiled for that read rows by their strides."""
        return dict(UNIT=self.unit, PRECISION=self.precision)

    def descriptors(self, tau: Tensor, columns: int) -> list:
        """Of q, k, v, do (in the backward) and tau, keys in whole rows and values in tiles of `columns`."""
        widths = (self.KP, self.KP, columns, columns)
        return [*(descriptor(x.tensor, width) for x, width in zip(self.rows, widths)), descriptor(tau, CHUNK)]

    def new(self, *shape: int, dtype: Optional[torch.dtype] = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    def states(self, given: Optional[Tensor]) -> Tensor:
        """[N, H, K, V] float32 for the scans to write: sequences without tokens keep what is given, or zero."""
        shape = (self.sequences, self.H, self.K, self.V)
        if self.cu_seqlens is None:
            return self.new(*shape, dtype=torch.float32)
        return torch.zeros(shape, device=self.device) if given is None else given.clone()


def _multiple_of_four(x: int) -> int:
    """Of rows of a table: its parts start at multiples of 16 bytes, as another alignment would be another compilation."""
    return -(-x // 4) * 4


def count_chunks(B: int, T: int, cu_seqlens: Optional[Tensor]) -> int:
    """Chunks of a batch; a bound, where sequences are packed and their lengths are on the device."""
    if cu_seqlens is None:
        return B * -(-T // CHUNK)
    # Every sequence may have a chunk that is not full, and an unused tail counts as one more.
    return _multiple_of_four((T + len(cu_seqlens) * (CHUNK - 1)) // CHUNK)


def choose_span(plan: _Plan) -> int:
    """Tokens of a span: the whole sequence, or a share of a long one where that would leave most of the card idle.

    The backward runs two scans at once and would map spans in both directions: only a quarter as many programs make it
    worth while.
    """
    whole = plan.chunks_per_row * CHUNK
    programs = plan.sequences * plan.H * -(-plan.V // 64)
    enough = programs * (4 if plan.backward else 1) > processors(plan.device) // 4
    if enough or plan.chunks_per_row < _FEWEST_SPANS * _SHORTEST_SPAN:
        return whole
    # As many as run at once, two on a multiprocessor: one more would wait for all of them.
    wanted = max(1, 2 * processors(plan.device) // programs)
    return min(whole, max(_SHORTEST_SPAN, -(-plan.chunks_per_row // wanted)) * CHUNK)


def chunk_forward(q, k, v, beta, scale, initial_state, output_final_state, use_l2, cu_seqlens, keep_states=False):
    """Shapes and results as in `reference.chunk_forward`; what it saves are tau [B, T, H, 64] in the dtype of q, the
    factors [3, B, H, T] of every token in float32 (1/|k|, beta and scale/|q|) and, both empty without `keep_states`, the
    states [chunks, H, K, V] that enter the chunks and the errors [B, T, H, V] of the tokens, in the dtype of q."""
    with on_device(q):
        return _forward(q, k, v, beta, scale, initial_state, output_final_state, use_l2, cu_seqlens, keep_states)


class Mapped(NamedTuple):
    """What a forward computes of keys, values and beta alone, whatever the queries and the initial state."""

    tau: Tensor
    factors: Tensor
    maps: Optional[Tensor]
    offsets: Optional[Tensor]


def _map(plan: _Plan, beta: Tensor, o: Tensor, use_l2: bool, spans: bool) -> Mapped:
    """`o` is where packed sequences want zeros behind the last one; `spans` asks for maps and offsets."""
    tau = plan.new(plan.batch, plan.T, plan.H, CHUNK)
    factors = plan.new(3, plan.batch, plan.H, plan.T, dtype=torch.float32)
    _invert(plan, beta, tau, factors, o, use_l2)
    if not spans:
        return Mapped(tau, factors, None, None)
    maps, offsets = _maps(plan)
    _scan(plan, tau, factors, forward=(None, None, None, maps, offsets), store=False)
    return Mapped(tau, factors, maps, offsets)


def _forward(
    q, k, v, beta, scale, initial_state, output_final_state, use_l2, cu_seqlens, keep_states,
    mapped: Optional[Mapped] = None,
):  # fmt: skip
    plan = _Plan((q, k, v), cu_seqlens, backward=False)
    initial_state = None if initial_state is None else initial_state.contiguous()
    o = plan.new(*v.shape)
    tau, factors, maps, offsets = mapped or _map(plan, beta, o, use_l2, plan.split)
    starts = _join(plan, maps, offsets, initial_state, reverse=False) if plan.split else initial_state
    final_state = plan.states(initial_state) if output_final_state else None
    kept = (plan.new(plan.chunks, plan.H, plan.K, plan.V), plan.new(*v.shape)) if keep_states else (None, None)
    _outputs(plan, tau, factors, o, starts, final_state, kept, scale, use_l2)
    final_state = factors.new_empty(0) if final_state is None else final_state
    return o, final_state, tau, factors, *(plan.new(0) if x is None else x for x in kept)


def _outputs(plan: _Plan, tau, factors, o, starts, final_state, kept, scale: float, use_l2: bool) -> None:
    columns, options = plan.launch("output")
    programs = -(-plan.V // columns) * plan.H * plan.spans
    arguments = (factors, o, starts, final_state, *kept, *plan.cut(), scale, *plan.sizes(), plan.spans_per_row, plan.span)
    constants = dict(K=plan.K, KP=plan.KP, V=plan.V, BV=columns, C=CHUNK, L2=use_l2, SPLIT=plan.split)
    if plan.hopper:
        enqueue(hopper_output_kernel, programs, (*plan.descriptors(tau, columns), *arguments), constants, options)
        return
    arguments = (*(x.tensor for x in plan.rows), tau, *arguments, *plan.strides(*plan.rows))
    enqueue(output_kernel, programs, arguments, constants | plan.plain, options)


def _invert(plan: _Plan, beta: Tensor, tau: Tensor, factors: Tensor, o: Tensor, use_l2: bool) -> None:
    _, options = plan.launch("inverse")
    k = plan.rows[1]
    arguments = (k.tensor, beta, tau, factors, o, plan.chunk_table, *plan.sizes(), plan.chunks_per_row)
    arguments += (*plan.strides(k), *beta.stride())
    constants = dict(K=plan.K, KP=plan.KP, V=plan.V, VP=plan.VP, C=CHUNK, L2=use_l2, EXACT=plan.exact)
    enqueue(inverse_kernel, plan.chunks * plan.H, arguments, constants | plan.plain, options)


def _scan(plan: _Plan, tau, factors, forward=None, reverse=None, store=True) -> None:
    """One launch of `scan_kernel`. `forward` is (states, errors, initial, maps, offsets), `reverse` (states, slots,
    initial, final); either may be None."""
    columns, options = plan.launch("scan")
    value_tiles, map_tiles = -(-plan.V // columns), -(-plan.K // columns)
    programs = (value_tiles + (0 if store else map_tiles)) * plan.H * plan.spans if forward else 0
    reverse_programs = value_tiles * plan.H * plan.spans if reverse else 0
    arguments = (factors, *(forward or [None] * 5), *(reverse or [None] * 4), *plan.cut())
    arguments += (*plan.sizes(), plan.spans_per_row, plan.span, programs)
    constants = dict(K=plan.K, KP=plan.KP, V=plan.V, BV=columns, C=CHUNK, SPLIT=plan.split, STORE=store)
    constants |= dict(FORWARD=forward is not None, REVERSE=reverse is not None, SMALL=plan.small)
    programs += reverse_programs
    if plan.hopper:
        *tiles, matrix = plan.descriptors(tau, columns)
        enqueue(hopper_scan_kernel, programs, (*_with_gradient(tiles), matrix, *arguments), constants, options)
        return
    rows = _with_gradient(plan.rows)
    arguments = (*(x.tensor for x in rows), tau, *arguments, *plan.strides(*rows))
    enqueue(scan_kernel, programs, arguments, constants | plan.plain, options)


def _with_gradient(rows: list) -> list:
    """q, k, v and do; of a forward pass, which has no do, v stands in for it and is not read."""
    return [*rows, rows[2]][:4]


def _maps(plan: _Plan) -> tuple[Tensor, Tensor]:
    shape = (plan.spans, plan.H, plan.K)
    return plan.new(*shape, plan.K, dtype=torch.float32), plan.new(*shape, plan.V, dtype=torch.float32)


def _join(plan: _Plan, maps: Tensor, offsets: Tensor, initial: Optional[Tensor], reverse: bool) -> Tensor:
    """The state with which every span starts, or in reverse the gradient with which it ends: [spans, H, K, V]."""
    result, columns = torch.empty_like(offsets), min(16 if plan.KP > 128 else 32, plan.VP)
    programs = -(-plan.V // columns) * plan.H * plan.sequences
    arguments = (maps, offsets, initial, result, plan.first_span, plan.H, plan.spans_per_row)
    constants = dict(K=plan.K, KP=plan.KP, V=plan.V, BV=columns, ROWS=min(plan.KP, 64), REVERSE=reverse)
    constants["PRECISION"] = plan.precision
    enqueue(join_kernel, programs, arguments, constants, dict(num_warps=4, num_stages=1))
    return result


def chunk_backward(
    do, dht, q, k, v, beta, tau, factors, states, errors, scale, initial_state, use_l2, cu_seqlens
):  # fmt: skip
    """Gradients as in `reference.chunk_backward`; the others are what the forward saved, or empty."""
    with on_device(q):
        if not tau.numel():
            tau, factors = _forward(q, k, v, beta, scale, initial_state, False, use_l2, cu_seqlens, False)[2:4]
        kept = (states, errors) if states.numel() else None
        return _backward(do, dht, q, k, v, beta, tau, factors, initial_state, use_l2, cu_seqlens, kept)


def _backward(do, dht, q, k, v, beta, tau, factors, initial_state, use_l2, cu_seqlens, kept):
    plan = _Plan((q, k, v, do), cu_seqlens, backward=True)
    initial_state, dht = (None if z is None else z.contiguous() for z in (initial_state, dht))
    starts, ends = initial_state, dht
    if plan.split:
        maps, offsets = _maps(plan)
        gradient_offsets = torch.empty_like(offsets)
        backward_map = (None, None, None, gradient_offsets)
        _scan(plan, tau, factors, (None, None, None, maps, offsets), backward_map, store=False)
        starts = _join(plan, maps, offsets, initial_state, reverse=False)
        ends = _join(plan, maps, gradient_offsets, dht, reverse=True)

    states, errors = kept or (plan.new(plan.chunks, plan.H, plan.K, plan.V), plan.new(*v.shape))
    forward = None if kept else (states, errors, starts, None, None)
    dh0 = None if initial_state is None else plan.states(dht)
    results = [plan.new(*z.shape, dtype=z.dtype) for z in (q, k, v, beta)]
    state_gradients = torch.empty_like(states)
    _scan(plan, tau, factors, forward, (state_gradients, results[2], ends, dh0))
    _gradients(plan, factors, states, state_gradients, errors, results, use_l2)
    return *results, factors.new_empty(0) if dh0 is None else dh0


def _gradients(plan: _Plan, factors, states, state_gradients, errors, results, use_l2: bool) -> None:
    """All chunks in parallel, after both scans."""
    columns, options = plan.launch("gradient")
    q, k, _, do = plan.rows
    arguments = (q.tensor, k.tensor, do.tensor, factors, errors, states, state_gradients, *results, plan.chunk_table)
    arguments += (*plan.sizes(), plan.chunks_per_row, *plan.strides(q, k, do))
    constants = dict(K=plan.K, KP=plan.KP, V=plan.V, VP=plan.VP, BV=columns, C=CHUNK, L2=use_l2, SMALL=plan.small)
    constants["ONE_PASS"] = plan.KP <= 128
    enqueue(gradient_kernel, plan.chunks * plan.H, arguments, constants | plan.plain, options)
