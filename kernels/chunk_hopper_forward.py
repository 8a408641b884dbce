"""`output_kernel` of `chunk_forward.py` for Hopper GPUs, in Gluon; formulas and symbols are there.

A chunk is a chain: K S, then tau X, then Kᵀ W, each waiting for the one before. Q Kᵀ, Q S and the norms of the queries
run beside it, and so does the way of the outputs to memory.
"""

try:  # Transformers wants every package that custom code imports outside of a `try`
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
except ImportError as error:
    raise ImportError("the kernels for Hopper need Gluon, a part of Triton") from error

from .chunk_hopper import (
    accumulator,
    allocate_barriers,
    allocate_stages,
    clear_rows,
    fetch,
    lines,
    matrix,
    store_lines,
    take,
)
from .chunk_tiles import L2_EPS, find_edges, find_span


@gluon.jit
def _fetch_chunk(q, k, v, tau, q_s, k_s, v_s, tau_s, ready, stage, b, token, h, column, pred):
    size: gl.constexpr = q.block_type.nbytes + k.block_type.nbytes + v.block_type.nbytes + tau.block_type.nbytes
    mbarrier.expect(ready.index(stage), size, pred=pred)
    fetch(k, k_s, ready, stage, b, token, h, 0, pred)
    fetch(q, q_s, ready, stage, b, token, h, 0, pred)
    fetch(v, v_s, ready, stage, b, token, h, column, pred)
    fetch(tau, tau_s, ready, stage, b, token, h, 0, pred)


@gluon.jit(do_not_specialize=["scale", "T", "H", "BH", "spans_per_row", "span"])
def hopper_output_kernel(
    q, k, v, tau, factors, o, initial, final, states, errors, table, cu_seqlens, first_chunk,
    scale, T, H, BH, spans_per_row, span,
    K: gl.constexpr, KP: gl.constexpr, V: gl.constexpr, BV: gl.constexpr, C: gl.constexpr, L2: gl.constexpr,
    SPLIT: gl.constexpr,
):  # fmt: skip
    """q, k, v and tau are descriptors; the rest as in `output_kernel`."""
    tiles: gl.constexpr = (V + BV - 1) // BV
    column = (gl.program_id(0) % tiles) * BV
    h = ((gl.program_id(0) // tiles) % H).to(gl.int64)
    index = gl.program_id(0) // tiles // H
    b, n, start, stop = find_span(index, table, T, spans_per_row, span)
    if (n < 0) | (start == stop):
        return
    dtype: gl.constexpr = k.dtype
    mma: gl.constexpr = accumulator(BV)
    operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=mma, k_width=2)
    # Tiles of 32 columns leave registers to hold the queries, which then are read once from shared memory.
    IN_REGISTERS: gl.constexpr = BV <= 32
    chunk0, _, closes = find_edges(n, start, stop, cu_seqlens, first_chunk, T, C)
    length = stop - start
    token = ((b * T + start) * H + h) * V
    o += token
    factors += (b * H + h) * T + start
    plane = gl.cast(BH, gl.int64) * T
    ik = gl.arange(0, KP, layout=gl.SliceLayout(1, mma))
    iv = column + gl.arange(0, BV, layout=gl.SliceLayout(0, mma))
    i = gl.arange(0, C, layout=gl.SliceLayout(1, mma))
    causal = i[:, None] >= gl.arange(0, C, layout=gl.SliceLayout(0, mma))[None, :]
    state = ik[:, None] * V + iv[None, :]
    state_mask = (ik < K)[:, None] & (iv < V)[None, :]
    size: gl.constexpr = K * V
    q_s, k_s, v_s, tau_s = allocate_stages(q), allocate_stages(k), allocate_stages(v), allocate_stages(tau)
    S_s = gl.allocate_shared_memory(dtype, [KP, BV], matrix(KP, BV, dtype))
    ready = allocate_barriers()

    S = gl.zeros([KP, BV], gl.float32, mma)
    if initial is not None:
        own = index if SPLIT else n
        S = gl.load(initial + (own.to(gl.int64) * H + h) * size + state, mask=state_mask, other=0.0)
    row, head = b.to(gl.int32), h.to(gl.int32)
    _fetch_chunk(q, k, v, tau, q_s, k_s, v_s, tau_s, ready, 0, row, start, head, column, True)
    next_r = gl.load(factors + i, mask=i < length, other=0.0)
    next_beta = gl.load(factors + plane + i, mask=i < length, other=0.0)
    S_s.store(S.to(dtype))
    fence_async_shared()
    zeros = gl.zeros([C, BV], gl.float32, mma)
    chunks = gl.cdiv(length, C)
    for chunk in range(chunks):
        first = gl.cast(chunk, gl.int64) * C
        left = length - chunk * C
        stage = chunk % 2
        r, beta = next_r, next_beta
        following = start + (chunk + 1) * C
        _fetch_chunk(q, k, v, tau, q_s, k_s, v_s, tau_s, ready, 1 - stage, row, following, head, column, left > C)
        next_r = gl.load(factors + first + C + i, mask=i < left - C, other=0.0)
        next_beta = gl.load(factors + plane + first + C + i, mask=i < left - C, other=0.0)
        mbarrier.wait(ready.index(stage), (chunk // 2) & 1)
        b_q, b_k, x_s, b_tau = take(q_s, stage), take(k_s, stage), take(v_s, stage), take(tau_s, stage)
        if table is not None:
            if left < C:
                clear_rows(b_q, left)
                clear_rows(b_k, left)
                clear_rows(x_s, left)
                clear_rows(b_tau, left)
                fence_async_shared()

        KS = warpgroup_mma(b_k, S_s, zeros, use_acc=False, is_async=True)  # [C, BV]
        if states is not None:
            store_lines(states + ((chunk0 + chunk) * H + h) * size, S_s, K, V, column, V)
        left_q = b_q.load(operand) if IN_REGISTERS else b_q
        P = warpgroup_mma(left_q, b_k.permute((1, 0)), gl.zeros([C, C], gl.float32, mma), use_acc=False, is_async=True)
        b_o = warpgroup_mma(left_q, S_s, zeros, use_acc=False, is_async=True)
        rq = gl.full([C], 1.0, gl.float32, gl.SliceLayout(1, mma)) * scale
        if L2:
            values = (left_q if IN_REGISTERS else b_q.load(lines(KP))).to(gl.float32)
            squares = gl.convert_layout(gl.sum(values * values, 1), gl.SliceLayout(1, mma))
            rq = gl.rsqrt(squares + L2_EPS) * scale
        gl.store(factors + 2 * plane + first + i, rq, mask=i < left)
        b_v = x_s.load(mma).to(gl.float32)

        KS = warpgroup_mma_wait(2, deps=[KS])
        X = b_v - r[:, None] * KS
        x_s.store((beta[:, None] * X).to(dtype))  # in the place of the values
        fence_async_shared()
        tauX = warpgroup_mma(b_tau, x_s, zeros, use_acc=False, is_async=True)
        P, b_o = warpgroup_mma_wait(1, deps=[P, b_o])
        P = gl.convert_layout(gl.where(causal, P * rq[:, None], 0.0).to(dtype), operand)
        b_o *= rq[:, None]

        tauX = warpgroup_mma_wait(0, deps=[tauX])
        E = X - tauX
        if states is not None:
            # The queries have been read, and leave their place.
            e_s = q_s.index(stage)._reinterpret(dtype, [C, BV], matrix(C, BV, dtype))
            e_s.store(E.to(dtype))
            store_lines(errors + token + first * (H * V), e_s, left, H * V, column, V)
        x_s.store(((r * beta)[:, None] * E).to(dtype))  # W
        fence_async_shared()
        S = warpgroup_mma(b_k.permute((1, 0)), x_s, S, is_async=True)
        b_o = warpgroup_mma(P, x_s, b_o, is_async=True)
        S = warpgroup_mma_wait(1, deps=[S])
        S_s.store(S.to(dtype))
        b_o = warpgroup_mma_wait(0, deps=[b_o])
        x_s.store(b_o.to(dtype))
        store_lines(o + first * (H * V), x_s, left, H * V, column, V)
        fence_async_shared()
    if final is not None:
        if closes:
            gl.store(final + (n.to(gl.int64) * H + h) * size + state, S, mask=state_mask)
