"""The chunked delta rule on a GPU: what is launched for a forward and for a backward pass.

Forward: `inverse_kernel`, then `output_kernel`. Backward: `scan_kernel` in both directions at once, then
`gradient_kernel`. Where sequences and heads are too few to fill the card, sequences are cut into spans: scans from zero
give the map of every span, `join_kernel` the state that each starts with.
"""

from typing import NamedTuple, Optional

import torch
from torch import Tensor

from .chunk_backward import gradient_kernel
from .chunk_configurations import launch
from .chunk_forward import output_kernel
from .chunk_states import join_kernel, scan_kernel
from .chunk_tiles import inverse_kernel, span_table_kernel
from .devices import on_device, processors, shared_memory
from .reference import CHUNK

# A span's map costs a scan of its own over K more columns; shorter spans than this many chunks do not pay for it.
_SHORTEST_SPAN = 16


class _Rows(NamedTuple):
    """A tensor [B, T, H, D] that is read in place, its strides in units of `unit` elements."""

    tensor: Tensor
    unit: int

    def strides(self, unit: int) -> tuple[int, int, int]:
        return tuple(stride // unit for stride in self.tensor.stride()[:3])


def _rows(x: Tensor) -> _Rows:
    """Rows must be dense; the unit is the widest load, up to 16 bytes, that no stride breaks."""
    x = x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
    unit = 16 // x.element_size()
    while any(stride % unit for stride in x.stride()[:3]) or x.data_ptr() % (unit * x.element_size()):
        unit //= 2
    return _Rows(x, unit)


class _Plan:
    """How a batch is cut: chunks for the parallel kernels, spans for the scans."""

    def __init__(self, q: Tensor, v: Tensor, cu_seqlens: Optional[Tensor], backward: bool):
        self.backward = backward
        self.batch, self.T, self.H, self.K = q.shape
        self.V, self.dtype, self.device = v.shape[-1], q.dtype, q.device
        self.exact = q.dtype == torch.float32
        self.precision = "tf32x3" if self.exact else "tf32"
        # Below this, the gradient of a value times its beta has too few digits left to divide by beta again.
        self.small = 2**-10 if q.dtype == torch.float16 else 1e-30
        self.KP, self.VP = (max(16, 1 << (size - 1).bit_length()) for size in (self.K, self.V))
        self.sequences = self.batch if cu_seqlens is None else len(cu_seqlens) - 1
        # An unused tail counts as one more sequence.
        extra = 0 if cu_seqlens is None else self.sequences * (CHUNK - 1) + CHUNK - 1
        self.chunks_per_row = -(-self.T // CHUNK)
        self.chunks = self.batch * self.chunks_per_row if cu_seqlens is None else (self.T + extra) // CHUNK
        self.narrow = self.sequences * self.H * -(-self.V // 64) < processors(self.device)
        self.span = choose_span(self)
        self.split = self.span < self.T
        self.spans_per_row = -(-self.T // self.span)
        self.spans = self.batch * self.spans_per_row
        self.cu_seqlens, self.chunk_table, self.span_table, self.first_chunk, self.first_span = cu_seqlens, *[None] * 4
        if cu_seqlens is not None:
            self._tabulate(cu_seqlens)

    def _tabulate(self, cu_seqlens: Tensor) -> None:
        # Multiples of four keep every part of the tables aligned to 16 bytes: another alignment is another compilation.
        self.chunks = _multiple_of_four(self.chunks)
        self.spans = (self.T + (self.sequences + 1) * (self.span - 1)) // self.span
        width = _multiple_of_four(self.sequences + 1)
        table = torch.empty((self.chunks + self.spans, 3), dtype=torch.int32, device=self.device)
        first = torch.empty((2, width), dtype=torch.int32, device=self.device)
        grid, block = -(-max(self.chunks, self.spans) // 128), 128
        span_table_kernel[(grid, 2)](
            cu_seqlens, table, first, self.T, self.sequences, self.chunks, self.spans, self.span, width,
            C=CHUNK, BLOCK=block,
        )  # fmt: skip
        self.chunk_table, self.span_table = table[: self.chunks], table[self.chunks :]
        self.first_chunk, self.first_span = first

    def launch(self, kernel: str) -> tuple[int, dict]:
        """Columns of V a program takes, and Triton's options."""
        limit = shared_memory(self.device)
        chosen = launch(kernel, self.K, self.V, self.dtype.itemsize, self.narrow and not self.split, limit)
        options = {"num_warps": chosen.warps, "num_stages": chosen.stages}
        if chosen.registers is not None and torch.version.hip is None:
            options["maxnreg"] = chosen.registers
        return chosen.columns, options

    def new(self, *shape: int, dtype: Optional[torch.dtype] = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    def states(self, given: Optional[Tensor]) -> Tensor:
        """[N, H, K, V] float32 for the scans to write: sequences without tokens keep what is given, or zero."""
        shape = (self.sequences, self.H, self.K, self.V)
        if self.cu_seqlens is None:
            return self.new(*shape, dtype=torch.float32)
        return torch.zeros(shape, device=self.device) if given is None else given.clone()


def _multiple_of_four(x: int) -> int:
    return -(-x // 4) * 4


def choose_span(plan: _Plan) -> int:
    """Tokens of a span: the whole sequence, or a share of it where that would leave most of the card idle.

    The backward runs two scans at once and would map spans in both directions: only a quarter as many programs make it
    worth while.
    """
    whole = plan.chunks_per_row * CHUNK
    programs = plan.sequences * plan.H * -(-plan.V // 64)
    if programs * (4 if plan.backward else 1) > processors(plan.device) // 2:
        return whole
    # As many as run at once, two on a multiprocessor: one more would wait for all of them.
    wanted = max(1, 2 * processors(plan.device) // programs)
    return min(whole, max(_SHORTEST_SPAN, -(-plan.chunks_per_row // wanted)) * CHUNK)


def _shared_unit(*rows: _Rows) -> int:
    return min(x.unit for x in rows)


def chunk_forward(q, k, v, beta, scale, initial_state, output_final_state, use_l2, cu_seqlens):
    """Shapes and results as in `reference.chunk_forward`; what it saves are tau [B, T, H, 64] in the dtype of q and the
    factors [3, B, H, T] of every token in float32: 1/|k|, beta and scale/|q|."""
    with on_device(q):
        return _forward(q, k, v, beta, scale, initial_state, output_final_state, use_l2, cu_seqlens)


class Mapped(NamedTuple):
    """What a forward computes of keys, values and beta alone, whatever the queries and the initial state."""

    tau: Tensor
    factors: Tensor
    maps: Optional[Tensor]
    offsets: Optional[Tensor]


def _map(plan: _Plan, k: _Rows, v: _Rows, unit: int, beta: Tensor, o: Tensor, use_l2: bool, spans: bool) -> Mapped:
    """`o` is where packed sequences want zeros behind the last one; `spans` asks for maps and offsets."""
    tau = plan.new(plan.batch, plan.T, plan.H, CHUNK)
    factors = plan.new(3, plan.batch, plan.H, plan.T, dtype=torch.float32)
    _invert(plan, k, unit, beta, tau, factors, o, use_l2)
    if not spans:
        return Mapped(tau, factors, None, None)
    maps, offsets = _maps(plan)
    _scan(plan, [k, k, v, v], unit, tau, factors, forward=(None, None, None, maps, offsets), store=False)
    return Mapped(tau, factors, maps, offsets)


def _forward(
    q, k, v, beta, scale, initial_state, output_final_state, use_l2, cu_seqlens, mapped: Optional[Mapped] = None
):
    plan, x = _Plan(q, v, cu_seqlens, backward=False), [_rows(z) for z in (q, k, v)]
    unit = _shared_unit(*x)
    initial_state = None if initial_state is None else initial_state.contiguous()
    o = plan.new(*v.shape)
    tau, factors, maps, offsets = mapped or _map(plan, *x[1:], unit, beta, o, use_l2, plan.split)
    starts = _join(plan, maps, offsets, initial_state, reverse=False) if plan.split else initial_state
    final_state = plan.states(initial_state) if output_final_state else None
    columns, options = plan.launch("output")
    output_kernel[(-(-plan.V // columns) * plan.H * plan.spans,)](
        *(z.tensor for z in x), tau, factors, o, starts, final_state,
        plan.span_table, cu_seqlens, plan.first_chunk, scale,
        plan.T, plan.H, plan.batch * plan.H, plan.spans_per_row, plan.span, *(s for z in x for s in z.strides(unit)),
        K=plan.K, KP=plan.KP, V=plan.V, BV=columns, C=CHUNK, UNIT=unit, L2=use_l2, SPLIT=plan.split,
        PRECISION=plan.precision, **options,
    )  # fmt: skip
    return o, factors.new_empty(0) if final_state is None else final_state, tau, factors


def _invert(plan: _Plan, k: _Rows, unit: int, beta: Tensor, tau: Tensor, factors: Tensor, o: Tensor, use_l2: bool):
    _, options = plan.launch("inverse")
    inverse_kernel[(plan.chunks * plan.H,)](
        k.tensor, beta, tau, factors, o, plan.chunk_table,
        plan.T, plan.H, plan.batch * plan.H, plan.chunks_per_row, *k.strides(unit), *beta.stride(),
        K=plan.K, KP=plan.KP, V=plan.V, VP=plan.VP, C=CHUNK, UNIT=unit, L2=use_l2,
        EXACT=plan.exact, PRECISION=plan.precision, **options,
    )  # fmt: skip


def _scan(plan: _Plan, x: list, unit: int, tau, factors, forward=None, reverse=None, store=True) -> None:
    """One launch of `scan_kernel`. `forward` is (states, errors, initial, maps, offsets), `reverse` (states, slots,
    initial, final); either may be None. x holds q, k, v and do, of which a direction that does not run needs nothing."""
    columns, options = plan.launch("scan")
    value_tiles, map_tiles = -(-plan.V // columns), -(-plan.K // columns)
    programs = (value_tiles + (0 if store else map_tiles)) * plan.H * plan.spans if forward else 0
    reverse_programs = value_tiles * plan.H * plan.spans if reverse else 0
    q, k, v, do = x
    scan_kernel[(programs + reverse_programs,)](
        q.tensor, k.tensor, v.tensor, do.tensor, tau, factors, *(forward or [None] * 5), *(reverse or [None] * 4),
        plan.span_table, plan.cu_seqlens, plan.first_chunk,
        plan.T, plan.H, plan.batch * plan.H, plan.spans_per_row, plan.span, programs,
        *(s for z in x for s in z.strides(unit)),
        K=plan.K, KP=plan.KP, V=plan.V, BV=columns, C=CHUNK, UNIT=unit, SPLIT=plan.split, STORE=store,
        FORWARD=forward is not None, REVERSE=reverse is not None, SMALL=plan.small, PRECISION=plan.precision,
        **options,
    )  # fmt: skip


def _maps(plan: _Plan) -> tuple[Tensor, Tensor]:
    shape = (plan.spans, plan.H, plan.K)
    return plan.new(*shape, plan.K, dtype=torch.float32), plan.new(*shape, plan.V, dtype=torch.float32)


def _join(plan: _Plan, maps: Tensor, offsets: Tensor, initial: Optional[Tensor], reverse: bool) -> Tensor:
    """The state with which every span starts, or in reverse the gradient with which it ends: [spans, H, K, V]."""
    result, columns = torch.empty_like(offsets), min(16 if plan.KP > 128 else 32, plan.VP)
    join_kernel[(-(-plan.V // columns) * plan.H * plan.sequences,)](
        maps, offsets, initial, result, plan.first_span, plan.H, plan.spans_per_row,
        K=plan.K, KP=plan.KP, V=plan.V, BV=columns, ROWS=min(plan.KP, 64), REVERSE=reverse,
        PRECISION=plan.precision, num_warps=4, num_stages=1,
    )  # fmt: skip
    return result


def chunk_backward(do, dht, q, k, v, beta, tau, factors, scale, initial_state, use_l2, cu_seqlens):
    """Gradients as in `reference.chunk_backward`; `tau` and `factors` are what the forward saved, or empty."""
    with on_device(q):
        if not tau.numel():
            *_, tau, factors = _forward(q, k, v, beta, scale, initial_state, False, use_l2, cu_seqlens)
        return _backward(do, dht, q, k, v, beta, tau, factors, initial_state, use_l2, cu_seqlens)


def _backward(do, dht, q, k, v, beta, tau, factors, initial_state, use_l2, cu_seqlens):
    plan, x = _Plan(q, v, cu_seqlens, backward=True), [_rows(z) for z in (q, k, v, do)]
    unit = _shared_unit(*x)
    initial_state, dht = (None if z is None else z.contiguous() for z in (initial_state, dht))
    starts, ends = initial_state, dht
    if plan.split:
        maps, offsets = _maps(plan)
        gradient_offsets = torch.empty_like(offsets)
        backward_map = (None, None, None, gradient_offsets)
        _scan(plan, x, unit, tau, factors, (None, None, None, maps, offsets), backward_map, store=False)
        starts = _join(plan, maps, offsets, initial_state, reverse=False)
        ends = _join(plan, maps, gradient_offsets, dht, reverse=True)

    errors, states = plan.new(*v.shape), plan.new(plan.chunks, plan.H, plan.K, plan.V)
    dh0 = None if initial_state is None else plan.states(dht)
    results = [plan.new(*z.shape, dtype=z.dtype) for z in (q, k, v, beta)]
    _gradients(plan, x, unit, tau, factors, states, errors, starts, ends, dh0, results, use_l2)
    return *results, factors.new_empty(0) if dh0 is None else dh0


def _gradients(plan, x, unit, tau, factors, states, errors, starts, ends, dh0, results, use_l2) -> None:
    """Both scans at once, then all chunks in parallel."""
    state_gradients = torch.empty_like(states)
    reverse = (state_gradients, results[2], ends, dh0)
    _scan(plan, x, unit, tau, factors, (states, errors, starts, None, None), reverse)
    columns, options = plan.launch("gradient")
    q, k, _, do = x
    gradient_kernel[(plan.chunks * plan.H,)](
        q.tensor, k.tensor, do.tensor, factors, errors, states, state_gradients, *results, plan.chunk_table,
        plan.T, plan.H, plan.batch * plan.H, plan.chunks_per_row, *(s for z in (q, k, do) for s in z.strides(unit)),
        K=plan.K, KP=plan.KP, V=plan.V, VP=plan.VP, BV=columns, C=CHUNK, UNIT=unit, L2=use_l2, SMALL=plan.small,
        ONE_PASS=plan.KP <= 128, PRECISION=plan.precision, **options,
    )  # fmt: skip
