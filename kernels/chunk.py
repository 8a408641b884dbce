"""The chunked delta rule on a GPU: what is launched for a forward and for a backward pass.

Forward: `inverse_kernel`, then `output_kernel`. Backward: `scan_kernel` in both directions at once, then
`gradient_kernel`. Where sequences and heads are too few to fill the card, sequences are cut into spans: scans from zero
give the map of every span, `join_kernel` the state that each starts with. On Hopper GPUs `output_kernel` and
`scan_kernel` have a second form, which takes what it can read through the copy engine.
"""

import functools
from typing import Callable, NamedTuple, Optional

import torch
from torch import Tensor

from .chunk_backward import gradient_kernel
from .chunk_configurations import launch
from .chunk_forward import output_kernel
from .chunk_states import join_kernel, scan_kernel
from .chunk_tiles import inverse_kernel, span_table_kernel
from .devices import has_copy_engine, on_device, processors, shared_memory
from .launching import Prepared
from .reference import CHUNK

try:
    from .chunk_hopper import descriptor
    from .chunk_hopper_forward import hopper_output_kernel
    from .chunk_hopper_states import hopper_scan_kernel
except ImportError:  # a Triton that has no Gluon: `has_copy_engine` says no
    descriptor = hopper_output_kernel = hopper_scan_kernel = None

# A span's map costs a scan of its own over K more columns, which pays for spans of so many chunks and for so many spans.
_SHORTEST_SPAN, _FEWEST_SPANS = 32, 4


class Rows(NamedTuple):
    """How a tensor [B, T, H, D] lies that is read in place; `start` is its address modulo 16."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    start: int
    itemsize: int

    @property
    def unit(self) -> int:
        """Elements of the widest load, up to 16 bytes, that no stride breaks."""
        unit = 16 // self.itemsize
        while any(stride % unit for stride in self.stride[:3]) or self.start % (unit * self.itemsize):
            unit //= 2
        return unit

    @property
    def is_copyable(self) -> bool:
        """Whether a Hopper GPU's copy engine reads it: 16-bit numbers, strides of 16 bytes, no row read twice."""
        repeated = any(stride == 0 and size > 1 for stride, size in zip(self.stride, self.shape))
        return self.itemsize == 2 and self.stride[-1] == 1 and self.unit == 8 and not repeated


class _Cut(NamedTuple):
    """Tables of packed sequences on their device: where chunks and spans lie, and the first ones of every sequence."""

    chunks: Optional[Tensor] = None
    spans: Optional[Tensor] = None
    first_chunk: Optional[Tensor] = None
    first_span: Optional[Tensor] = None
    cu_seqlens: Optional[Tensor] = None

    @property
    def of_spans(self) -> tuple[Optional[Tensor], ...]:
        return self.spans, self.cu_seqlens, self.first_chunk


class _Plan:
    """How a batch is cut, chunks for the parallel kernels and spans for the scans, and launches for tensors of its layout.

    Plans are kept: layers and training steps that have the same shapes share one.
    """

    def __init__(self, rows: tuple[Rows, ...], dtype: torch.dtype, device, sequences: Optional[int], backward: bool):
        self.rows, self.backward, self.dtype, self.device = rows, backward, dtype, device
        self.unit = min(x.unit for x in rows)
        (self.batch, self.T, self.H, self.K), self.V = rows[0].shape, rows[2].shape[-1]
        self.exact = dtype == torch.float32
        self.precision = "tf32x3" if self.exact else "tf32"
        # Below this, the gradient of a value times its beta has too few digits left to divide by beta again.
        self.small = 2**-10 if dtype == torch.float16 else 1e-30
        self.KP, self.VP = (max(16, 1 << (size - 1).bit_length()) for size in (self.K, self.V))
        self.is_packed, self.sequences = sequences is not None, self.batch if sequences is None else sequences
        self.chunks_per_row = -(-self.T // CHUNK)
        self.chunks = count_chunks(self.batch, self.T, sequences)
        self.narrow = self.sequences * self.H * -(-self.V // 64) < processors(device)
        self.hopper = has_copy_engine(device) and 32 < self.K <= 128 and all(x.is_copyable for x in rows)
        self.span = choose_span(self)
        self.split = self.span < self.T
        self.spans_per_row = -(-self.T // self.span)
        self.spans = self.batch * self.spans_per_row
        if self.is_packed:
            self.spans = (self.T + (self.sequences + 1) * (self.span - 1)) // self.span
        self.sizes = self.T, self.H, self.batch * self.H
        self.launches: dict[tuple, Prepared] = {}

    def prepared(self, prepare: Callable[..., Prepared], *choices) -> Prepared:
        """The launch that `prepare(plan, *choices)` makes."""
        key = prepare, *choices
        if key not in self.launches:
            self.launches[key] = prepare(self, *choices)
        return self.launches[key]

    def tabulate(self, cu_seqlens: Optional[Tensor]) -> _Cut:
        if cu_seqlens is None:
            return _Cut()
        width = _multiple_of_four(self.sequences + 1)
        table = self.new(self.chunks + self.spans, 3, dtype=torch.int32)
        first = self.new(2, width, dtype=torch.int32)
        self.prepared(_tabulation, width)(cu_seqlens, table, first)
        return _Cut(table[: self.chunks], table[self.chunks :], *first, cu_seqlens)

    def options(self, kernel: str) -> tuple[int, dict]:
        """Columns of V a program takes, and Triton's options."""
        limit = shared_memory(self.device)
        narrow = self.narrow and not self.split
        chosen = launch(kernel, self.K, self.V, self.dtype.itemsize, narrow, limit, self.hopper)
        options = {"num_warps": chosen.warps, "num_stages": chosen.stages}
        if chosen.registers is not None and torch.version.hip is None:
            options["maxnreg"] = chosen.registers
        return chosen.columns, options

    def strides(self, *rows: Rows) -> list[int]:
        return [stride // self.unit for x in rows for stride in x.stride[:3]]

    @property
    def plain(self) -> dict:
        """What kernels are compiled for that read rows by their strides."""
        return dict(UNIT=self.unit, PRECISION=self.precision)

    def tiles(self, *widths: int) -> tuple[Callable, ...]:
        """Makers of descriptors for tiles of so many columns."""
        return tuple(functools.partial(descriptor, columns=width) for width in widths)

    def new(self, *shape: int, dtype: Optional[torch.dtype] = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    def states(self, given: Optional[Tensor]) -> Tensor:
        """[N, H, K, V] float32 for the scans to write: sequences without tokens keep what is given, or zero."""
        shape = (self.sequences, self.H, self.K, self.V)
        if not self.is_packed:
            return self.new(*shape, dtype=torch.float32)
        return torch.zeros(shape, device=self.device) if given is None else given.clone()


keep_plan = functools.lru_cache(maxsize=256)(_Plan)


class Batch(NamedTuple):
    """q, k, v [B, T, H, D], in the backward do as well, with dense rows; the plan for them and their tables."""

    tensors: list[Tensor]
    plan: _Plan
    cut: _Cut = _Cut()

    @property
    def with_gradient(self) -> list[Tensor]:
        """q, k, v and do; of a forward pass, which has no do, v stands in for it and is not read."""
        return [*self.tensors, self.tensors[2]][:4]


def _batch(tensors: tuple[Tensor, ...], cu_seqlens: Optional[Tensor], backward: bool = False) -> Batch:
    q, sequences = tensors[0], None if cu_seqlens is None else len(cu_seqlens) - 1
    tensors = [x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in tensors]
    rows = tuple([Rows(x.shape, x.stride(), x.data_ptr() % 16, q.dtype.itemsize) for x in tensors])
    plan = keep_plan(rows, q.dtype, q.device, sequences, backward)
    return Batch(tensors, plan, plan.tabulate(cu_seqlens))


def _multiple_of_four(x: int) -> int:
    """Of rows of a table: its parts start at multiples of 16 bytes, as another alignment would be another compilation."""
    return -(-x // 4) * 4


def count_chunks(B: int, T: int, sequences: Optional[int]) -> int:
    """Chunks of a batch; a bound, where `sequences` are packed and their lengths are on the device."""
    if sequences is None:
        return B * -(-T // CHUNK)
    # Every sequence may have a chunk that is not full, and an unused tail counts as one more.
    return _multiple_of_four((T + (sequences + 1) * (CHUNK - 1)) // CHUNK)


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
        batch = _batch((q, k, v), cu_seqlens)
        plan, kept = batch.plan, None
        if keep_states:
            kept = plan.new(plan.chunks, plan.H, plan.K, plan.V), plan.new(*v.shape)
        results = outputs(batch, beta, scale, initial_state, output_final_state, use_l2, kept)
        return *results, *(kept or (plan.new(0), plan.new(0)))


class Mapped(NamedTuple):
    """What a forward computes of keys, values and beta alone, whatever the queries and the initial state."""

    tau: Tensor
    factors: Tensor
    maps: Optional[Tensor]
    offsets: Optional[Tensor]


def _map(batch: Batch, beta: Tensor, o: Tensor, use_l2: bool, spans: bool) -> Mapped:
    """`o` is where packed sequences want zeros behind the last one; `spans` asks for maps and offsets."""
    plan = batch.plan
    tau = plan.new(plan.batch, plan.T, plan.H, CHUNK)
    factors = plan.new(3, plan.batch, plan.H, plan.T, dtype=torch.float32)
    invert = plan.prepared(_inversion, beta.stride(), use_l2)
    invert(batch.tensors[1], beta, tau, factors, o, batch.cut.chunks)
    if not spans:
        return Mapped(tau, factors, None, None)
    maps, offsets = _maps(plan)
    _scan(batch, tau, factors, forward=(None, None, None, maps, offsets), store=False)
    return Mapped(tau, factors, maps, offsets)


def outputs(
    batch: Batch, beta, scale, initial_state, output_final_state, use_l2, kept=None, mapped: Optional[Mapped] = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`chunk_forward` of a batch on the current device, up to the factors; `kept` are tensors for the states and errors."""
    plan = batch.plan
    initial_state = None if initial_state is None else initial_state.contiguous()
    o = plan.new(plan.batch, plan.T, plan.H, plan.V)
    tau, factors, maps, offsets = mapped or _map(batch, beta, o, use_l2, plan.split)
    starts = _join(batch, maps, offsets, initial_state, reverse=False) if plan.split else initial_state
    final_state = plan.states(initial_state) if output_final_state else None
    write = plan.prepared(_output, scale, use_l2)
    write(*batch.tensors, tau, factors, o, starts, final_state, *(kept or (None, None)), *batch.cut.of_spans)
    final_state = factors.new_empty(0) if final_state is None else final_state
    return o, final_state, tau, factors


def _tabulation(plan: _Plan, width: int) -> Prepared:
    blocks = -(-max(plan.chunks, plan.spans) // 128)
    numbers = (plan.T, plan.sequences, plan.chunks, plan.spans, plan.span, width, blocks)
    return Prepared(span_table_kernel, 2 * blocks, numbers, dict(C=CHUNK, BLOCK=128), {})


def _inversion(plan: _Plan, beta_stride: tuple[int, ...], use_l2: bool) -> Prepared:
    _, options = plan.options("inverse")
    numbers = (*plan.sizes, plan.chunks_per_row, *plan.strides(plan.rows[1]), *beta_stride)
    constants = dict(K=plan.K, KP=plan.KP, V=plan.V, VP=plan.VP, C=CHUNK, L2=use_l2, EXACT=plan.exact)
    return Prepared(inverse_kernel, plan.chunks * plan.H, numbers, constants | plan.plain, options)


def _output(plan: _Plan, scale: float, use_l2: bool) -> Prepared:
    columns, options = plan.options("output")
    programs = -(-plan.V // columns) * plan.H * plan.spans
    numbers = (scale, *plan.sizes, plan.spans_per_row, plan.span)
    constants = dict(K=plan.K, KP=plan.KP, V=plan.V, BV=columns, C=CHUNK, L2=use_l2, SPLIT=plan.split)
    if plan.hopper:
        tiles = plan.tiles(plan.KP, plan.KP, columns, CHUNK)
        return Prepared(hopper_output_kernel, programs, numbers, constants, options, tiles)
    numbers = (*numbers, *plan.strides(*plan.rows))
    return Prepared(output_kernel, programs, numbers, constants | plan.plain, options)


def _scan(batch: Batch, tau, factors, forward=None, reverse=None, store=True) -> None:
    """One launch of `scan_kernel`. `forward` is (states, errors, initial, maps, offsets), `reverse` (states, slots,
    initial, final); either may be None."""
    scan = batch.plan.prepared(_both_scans, forward is not None, reverse is not None, store)
    states = (*(forward or [None] * 5), *(reverse or [None] * 4))
    scan(*batch.with_gradient, tau, factors, *states, *batch.cut.of_spans)


def _both_scans(plan: _Plan, forward: bool, reverse: bool, store: bool) -> Prepared:
    columns, options = plan.options("scan")
    value_tiles, map_tiles = -(-plan.V // columns), -(-plan.K // columns)
    programs = (value_tiles + (0 if store else map_tiles)) * plan.H * plan.spans if forward else 0
    reverse_programs = value_tiles * plan.H * plan.spans if reverse else 0
    numbers = (*plan.sizes, plan.spans_per_row, plan.span, programs)
    constants = dict(K=plan.K, KP=plan.KP, V=plan.V, BV=columns, C=CHUNK, SPLIT=plan.split, STORE=store)
    constants |= dict(FORWARD=forward, REVERSE=reverse, SMALL=plan.small)
    programs += reverse_programs
    if plan.hopper:
        tiles = plan.tiles(plan.KP, plan.KP, columns, columns, CHUNK)
        return Prepared(hopper_scan_kernel, programs, numbers, constants, options, tiles)
    rows = [*plan.rows, plan.rows[2]][:4]
    return Prepared(scan_kernel, programs, (*numbers, *plan.strides(*rows)), constants | plan.plain, options)


def _maps(plan: _Plan) -> tuple[Tensor, Tensor]:
    shape = (plan.spans, plan.H, plan.K)
    return plan.new(*shape, plan.K, dtype=torch.float32), plan.new(*shape, plan.V, dtype=torch.float32)


def _join(batch: Batch, maps: Tensor, offsets: Tensor, initial: Optional[Tensor], reverse: bool) -> Tensor:
    """The state with which every span starts, or in reverse the gradient with which it ends: [spans, H, K, V]."""
    result = torch.empty_like(offsets)
    batch.plan.prepared(_joining, reverse)(maps, offsets, initial, result, batch.cut.first_span)
    return result


def _joining(plan: _Plan, reverse: bool) -> Prepared:
    columns = min(16 if plan.KP > 128 else 32, plan.VP)
    programs = -(-plan.V // columns) * plan.H * plan.sequences
    constants = dict(K=plan.K, KP=plan.KP, V=plan.V, BV=columns, ROWS=min(plan.KP, 64), REVERSE=reverse)
    constants["PRECISION"] = plan.precision
    return Prepared(join_kernel, programs, (plan.H, plan.spans_per_row), constants, dict(num_warps=4, num_stages=1))


def chunk_backward(
    do, dht, q, k, v, beta, tau, factors, states, errors, scale, initial_state, use_l2, cu_seqlens
):  # fmt: skip
    """Gradients as in `reference.chunk_backward`; the others are what the forward saved, or empty."""
    with on_device(q):
        if not tau.numel():
            tau, factors = outputs(_batch((q, k, v), cu_seqlens), beta, scale, initial_state, False, use_l2)[2:4]
        kept = (states, errors) if states.numel() else None
        return _backward(do, dht, q, k, v, beta, tau, factors, initial_state, use_l2, cu_seqlens, kept)


def _backward(do, dht, q, k, v, beta, tau, factors, initial_state, use_l2, cu_seqlens, kept):
    batch = _batch((q, k, v, do), cu_seqlens, backward=True)
    plan = batch.plan
    initial_state, dht = (None if z is None else z.contiguous() for z in (initial_state, dht))
    starts, ends = initial_state, dht
    if plan.split:
        maps, offsets = _maps(plan)
        gradient_offsets = torch.empty_like(offsets)
        backward_map = (None, None, None, gradient_offsets)
        _scan(batch, tau, factors, (None, None, None, maps, offsets), backward_map, store=False)
        starts = _join(batch, maps, offsets, initial_state, reverse=False)
        ends = _join(batch, maps, gradient_offsets, dht, reverse=True)

    states, errors = kept or (plan.new(plan.chunks, plan.H, plan.K, plan.V), plan.new(*v.shape))
    forward = None if kept else (states, errors, starts, None, None)
    dh0 = None if initial_state is None else plan.states(dht)
    results = [plan.new(*z.shape, dtype=z.dtype) for z in (q, k, v, beta)]
    state_gradients = torch.empty_like(states)
    _scan(batch, tau, factors, forward, (state_gradients, results[2], ends, dh0))
    q, k, _, do = batch.tensors
    # All chunks in parallel, after both scans.
    differentiate = plan.prepared(_gradients, use_l2)
    differentiate(q, k, do, factors, errors, states, state_gradients, *results, batch.cut.chunks)
    return *results, factors.new_empty(0) if dh0 is None else dh0


def _gradients(plan: _Plan, use_l2: bool) -> Prepared:
    columns, options = plan.options("gradient")
    q, k, _, do = plan.rows
    numbers = (*plan.sizes, plan.chunks_per_row, *plan.strides(q, k, do))
    constants = dict(K=plan.K, KP=plan.KP, V=plan.V, VP=plan.VP, BV=columns, C=CHUNK, L2=use_l2, SMALL=plan.small)
    constants["ONE_PASS"] = plan.KP <= 128
    return Prepared(gradient_kernel, plan.chunks * plan.H, numbers, constants | plan.plain, options)
