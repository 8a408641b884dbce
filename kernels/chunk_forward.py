"""The chunked delta rule on a GPU, forward: outputs from inputs, states never leaving the chip. See README.md here.

With r = 1/|k|, rq = scale/|q| and tau of each chunk (`chunk_tiles.py`), for the chunks of a span in order

    X = V - diag(r) K S                     what the memory does not yet know
    E = X - tau diag(beta) X                each token's error against the state just before it
    W = diag(r beta) E                      the values it writes, scaled so that raw keys write them
    O = diag(rq) (Q S + tril(Q Kᵀ) W)
    S <- S + Kᵀ W

Norms never touch a tile of keys or queries: they scale rows of results, so that tiles go from memory to the tensor cores
as they are.
"""

try:  # Transformers wants every package that custom code imports outside of a `try`
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the fused kernels need Triton") from error

from .chunk_tiles import L2_EPS, find_edges, find_span, load_rows, store_rows


@triton.jit(
    do_not_specialize=[
        "scale", "T", "H", "BH", "spans_per_row", "span",
        "q_b", "q_t", "q_h", "k_b", "k_t", "k_h", "v_b", "v_t", "v_h",
    ]
)  # fmt: skip
def output_kernel(
    q,
    k,
    v,
    tau,
    factors,
    o,
    initial,
    final,
    states,
    errors,
    table,
    cu_seqlens,
    first_chunk,
    scale,
    T,
    H,
    BH,
    spans_per_row,
    span,
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
    v_b,
    v_t,
    v_h,
    K: tl.constexpr,
    KP: tl.constexpr,
    V: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    UNIT: tl.constexpr,
    L2: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One span, head and tile of value columns: o, the factor rq of each token, and the final state.

    `initial` holds a state for every span (SPLIT) or every sequence, or is None; `final` may be None, and so may `states`
    and `errors`, which keep for the backward what its scan would compute again: S of every chunk and E of every token.
    """
    tiles: tl.constexpr = (V + BV - 1) // BV
    tile = tl.program_id(0) % tiles
    h = ((tl.program_id(0) // tiles) % H).to(tl.int64)
    index = tl.program_id(0) // tiles // H
    b, n, start, stop = find_span(index, table, T, spans_per_row, span)
    if (n < 0) | (start == stop):
        return
    i, ik, iv = tl.arange(0, C), tl.arange(0, KP), tile * BV + tl.arange(0, BV)
    dtype: tl.constexpr = k.dtype.element_ty
    chunk0, _, closes = find_edges(n, start, stop, cu_seqlens, first_chunk, T, C)
    length = stop - start
    token = b * T + start
    q += (b * q_b + start * q_t.to(tl.int64) + h * q_h) * UNIT
    k += (b * k_b + start * k_t.to(tl.int64) + h * k_h) * UNIT
    v += (b * v_b + start * v_t.to(tl.int64) + h * v_h) * UNIT
    token_errors = (token * H + h) * V
    o += token_errors
    tau += (token * H + h) * C
    factors += (b * H + h) * T + start
    plane = tl.cast(BH, tl.int64) * T
    # Offsets of 32 bits within a state, its base a scalar: a tile of 64-bit pointers would fill the registers.
    state = ik[:, None] * V + iv[None, :]
    state_mask = (ik < K)[:, None] & (iv < V)[None, :]
    size: tl.constexpr = K * V

    S = tl.zeros([KP, BV], tl.float32)  # [K, BV]
    if initial is not None:
        own = index if SPLIT else n
        S += tl.load(initial + (own.to(tl.int64) * H + h) * size + state, mask=state_mask, other=0.0)
    causal = i[:, None] >= i[None, :]
    for chunk in range(tl.cdiv(length, C)):
        first = tl.cast(chunk, tl.int64) * C
        left = length - chunk * C
        rows = tl.minimum(i, left - 1)
        b_q = load_rows(q + first * (q_t * UNIT), rows, q_t * UNIT, ik, K, KP != K)  # [C, K]
        if L2:
            squares = b_q.to(tl.float32) * b_q.to(tl.float32)
            rq = tl.rsqrt(tl.sum(squares, 1) + L2_EPS) * scale
        else:
            rq = tl.full([C], 1.0, tl.float32) * scale
        tl.store(factors + 2 * plane + first + i, rq, mask=i < left)
        b_k = load_rows(k + first * (k_t * UNIT), rows, k_t * UNIT, ik, K, KP != K)  # [C, K]
        b_v = load_rows(v + first * (v_t * UNIT), rows, v_t * UNIT, iv, V, V % BV != 0)  # [C, BV]
        b_tau = load_rows(tau + first * (H * C), rows, H * C, i, C, False)  # [C, C]
        r = tl.load(factors + first + rows)
        beta = tl.load(factors + plane + first + i, mask=i < left, other=0.0)
        b_S = S.to(dtype)
        X = b_v - r[:, None] * tl.dot(b_k, b_S, input_precision=PRECISION)  # [C, BV]
        E = X - tl.dot(b_tau, (beta[:, None] * X).to(dtype), input_precision=PRECISION)
        if states is not None:
            tl.store(states + ((chunk0 + chunk) * H + h) * size + state, b_S, mask=state_mask)
            store_rows(errors + token_errors + first * (H * V), E, i, left, H * V, iv, V, V % BV != 0)
        W = ((r * beta)[:, None] * E).to(dtype)
        P = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        P = tl.where(causal, P * rq[:, None], 0.0)  # [C, C]
        b_o = tl.dot(b_q, b_S, input_precision=PRECISION) * rq[:, None]
        b_o = tl.dot(P.to(dtype), W, b_o, input_precision=PRECISION)
        store_rows(o + first * (H * V), b_o, i, left, H * V, iv, V, V % BV != 0)
        S = tl.dot(tl.trans(b_k), W, S, input_precision=PRECISION)
    if final is not None:
        if closes:
            tl.store(final + (n.to(tl.int64) * H + h) * size + state, S, mask=state_mask)
