"""The chunked delta rule on a GPU, backward: the gradients of a chunk from what the scans left. See README.md here.

With S the state that enters the chunk, dS the gradient of the state that leaves it, E and G of `chunk_states.py`,
W = diag(r beta) E and F = diag(r beta) G, for raw q and k:

    dv    = diag(beta) G           dbeta = rowsum(G * E)
    dP    = tril(diag(rq) dO Wᵀ)   dL    = tril(F Wᵀ, -1)
    y     = diag(rq) dO Sᵀ + dP K                      dq = y - q (q·y) / |q|²
    z     = dPᵀ Q + W dSᵀ - F Sᵀ - (dL + dLᵀ) K        dk = z - k (k·z) / |k|²

the subtracted terms being those of the L2 norm.
"""

try:  # Transformers wants every package that custom code imports outside of a `try`
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the fused kernels need Triton") from error

from .chunk_tiles import L2_EPS, find_span, load_rows, store_rows


@triton.jit(
    do_not_specialize=[
        "T", "H", "BH", "chunks_per_row", "q_b", "q_t", "q_h", "k_b", "k_t", "k_h", "do_b", "do_t", "do_h",
    ]
)  # fmt: skip
def gradient_kernel(
    q, k, do, factors, errors, states, state_gradients, dq, dk, dv, dbeta, table,
    T, H, BH, chunks_per_row, q_b, q_t, q_h, k_b, k_t, k_h, do_b, do_t, do_h,
    K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    UNIT: tl.constexpr, L2: tl.constexpr, SMALL: tl.constexpr, ONE_PASS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk and head: dq, dk, dv, dbeta; zeros where no sequence is. dv holds the slots of the reverse scan.

    ONE_PASS reads every tile once and keeps dq and dk in registers meanwhile, which K = 256 does not leave room for.
    """
    h = (tl.program_id(0) % H).to(tl.int64)
    chunk = tl.program_id(0) // H
    b, n, start, stop = find_span(chunk, table, T, chunks_per_row, C)
    if start == stop:
        return
    i, ik = tl.arange(0, C), tl.arange(0, KP)
    dtype: tl.constexpr = k.dtype.element_ty
    tiles: tl.constexpr = (V + BV - 1) // BV
    length = stop - start
    token = (b * T + start) * H + h
    if table is not None:
        if n < 0:
            j = tl.arange(0, VP)
            store_rows(dq + token * K, tl.zeros([C, KP], tl.float32), i, length, H * K, ik, K, KP != K)
            store_rows(dk + token * K, tl.zeros([C, KP], tl.float32), i, length, H * K, ik, K, KP != K)
            store_rows(dv + token * V, tl.zeros([C, VP], tl.float32), i, length, H * V, j, V, VP != V)
            tl.store(dbeta + token + i * H, tl.zeros([C], dbeta.dtype.element_ty), mask=i < length)
            return
    rows = tl.minimum(i, length - 1)
    sk = tl.minimum(ik, K - 1) if KP != K else ik
    q += (b * q_b + start * q_t.to(tl.int64) + h * q_h) * UNIT
    k += (b * k_b + start * k_t.to(tl.int64) + h * k_h) * UNIT
    do += (b * do_b + start * do_t.to(tl.int64) + h * do_h) * UNIT
    errors += token * V
    dv += token * V
    states += (chunk.to(tl.int64) * H + h) * (K * V)
    state_gradients += (chunk.to(tl.int64) * H + h) * (K * V)
    factors += (b * H + h) * T + start
    plane = tl.cast(BH, tl.int64) * T
    r = tl.load(factors + rows)
    beta = tl.load(factors + plane + i, mask=i < length, other=0.0)
    rq = tl.load(factors + 2 * plane + i, mask=i < length, other=0.0)

    small = beta < SMALL
    factor = tl.where(small, r * beta, r)  # slots -> F
    dP = tl.zeros([C, C], tl.float32)  # [query, key]
    dL = tl.zeros([C, C], tl.float32)
    y = tl.zeros([C, KP], tl.float32)
    z = tl.zeros([C, KP], tl.float32)
    b_dbeta = tl.zeros([C], tl.float32)
    for tile in range(tiles):
        iv = tile * BV + tl.arange(0, BV)
        b_do = load_rows(do, rows, do_t * UNIT, iv, V, V % BV != 0)  # [C, BV]
        E = load_rows(errors, rows, H * V, iv, V, V % BV != 0).to(tl.float32)
        slot = load_rows(dv, rows, H * V, iv, V, V % BV != 0).to(tl.float32)
        b_dbeta += tl.sum(E * slot, 1)
        W = ((r * beta)[:, None] * E).to(dtype)
        F = (-factor[:, None] * slot).to(dtype)
        dP = tl.dot(b_do, tl.trans(W), dP, input_precision=PRECISION)
        dL = tl.dot(F, tl.trans(W), dL, input_precision=PRECISION)
        if ONE_PASS:
            S = load_rows(states, sk, V, iv, V, V % BV != 0)  # [K, BV]
            dS = load_rows(state_gradients, sk, V, iv, V, V % BV != 0)
            y = tl.dot(b_do, tl.trans(S), y, input_precision=PRECISION)
            z = tl.dot(W, tl.trans(dS), z, input_precision=PRECISION)
            z = tl.dot(F, tl.trans(S), z, input_precision=PRECISION)
    b_dbeta /= tl.where(small, 1.0, beta)
    tl.store(dbeta + token + i * H, b_dbeta.to(dbeta.dtype.element_ty), mask=i < length)
    b_dP = tl.where(i[:, None] >= i[None, :], dP * rq[:, None], 0.0).to(dtype)
    dL = tl.where(i[:, None] > i[None, :], dL, 0.0)
    shrink = 1.0
    if dtype == tl.float16:
        # dL grows with r², which very short keys take out of range; z is brought to its scale and back.
        shrink = tl.minimum(1.0, 1024.0 / tl.max(tl.max(tl.abs(dL), 1), 0))
    b_dL = (dL * shrink).to(dtype)

    if not ONE_PASS:
        for tile in range(tiles):
            iv = tile * BV + tl.arange(0, BV)
            b_do = load_rows(do, rows, do_t * UNIT, iv, V, V % BV != 0)
            S = load_rows(states, sk, V, iv, V, V % BV != 0)
            y = tl.dot(b_do, tl.trans(S), y, input_precision=PRECISION)
    b_k = load_rows(k, rows, k_t * UNIT, ik, K, KP != K)  # [C, K]
    y = tl.dot(b_dP, b_k, y * rq[:, None], input_precision=PRECISION)
    b_q = load_rows(q, rows, q_t * UNIT, ik, K, KP != K)  # [C, K]
    if L2:
        x = b_q.to(tl.float32)
        y -= x * (tl.sum(x * y, 1) / (tl.sum(x * x, 1) + L2_EPS))[:, None]
    store_rows(dq + token * K, y, i, length, H * K, ik, K, KP != K)

    # Before the loop below, which then needs no tile beside its own: at K = 256 two programs fit a multiprocessor.
    z = tl.dot(tl.trans(b_dP), b_q, z, input_precision=PRECISION)
    z = tl.dot(b_dL, b_k, z * shrink, input_precision=PRECISION)
    z = tl.dot(tl.trans(b_dL), b_k, z, input_precision=PRECISION) / shrink
    if not ONE_PASS:
        for tile in range(tiles):
            iv = tile * BV + tl.arange(0, BV)
            E = load_rows(errors, rows, H * V, iv, V, V % BV != 0).to(tl.float32)
            slot = load_rows(dv, rows, H * V, iv, V, V % BV != 0).to(tl.float32)
            S = load_rows(states, sk, V, iv, V, V % BV != 0)
            dS = load_rows(state_gradients, sk, V, iv, V, V % BV != 0)
            z = tl.dot(((r * beta)[:, None] * E).to(dtype), tl.trans(dS), z, input_precision=PRECISION)
            z = tl.dot((-factor[:, None] * slot).to(dtype), tl.trans(S), z, input_precision=PRECISION)
    if L2:
        x = b_k.to(tl.float32)
        z -= x * (tl.sum(x * z, 1) * r * r)[:, None]
    store_rows(dk + token * K, z, i, length, H * K, ik, K, KP != K)

    if tl.max(tl.where(small & (i < length), 1, 0), 0) > 0:
        for tile in range(tiles):
            iv = tile * BV + tl.arange(0, BV)
            mask = (small & (i < length))[:, None] & (iv < V)[None, :]
            slots = dv + i[:, None] * (H * V) + iv[None, :]
            slot = tl.load(slots, mask=mask, other=0.0)
            tl.store(slots, (beta[:, None] * slot).to(dtype), mask=mask)
