"""The chunked delta rule on a GPU: the scans over states that the backward and the split of a sequence need.

A scan writes what it meets (the state that enters each chunk, or its gradient), or only the affine map of its span: a
span takes S to M S + B, where B is the span's result from zero and M its result from the identity with V = 0. Backward,
dS goes to Mᵀ dS + dB with the same M. Maps of consecutive spans are joined by `join_kernel`.
"""

try:  # Transformers wants every package that custom code imports outside of a `try`
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the fused kernels need Triton") from error

from .chunk_tiles import find_edges, find_span, load_rows, store_rows


@triton.jit
def _forward_scan(
    k, v, tau, factors, states, errors, initial, maps, offsets, table, cu_seqlens, first_chunk, T, H, BH,
    spans_per_row, span, k_b, k_t, k_h, v_b, v_t, v_h, pid,
    K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, UNIT: tl.constexpr,
    SPLIT: tl.constexpr, STORE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One span, head and tile of columns. STORE: the states [K, V] that enter the chunks and the errors E of the tokens,
    starting from `initial`. Otherwise the span's map: tiles behind those of V are columns of M."""
    value_tiles: tl.constexpr = (V + BV - 1) // BV
    tiles: tl.constexpr = value_tiles if STORE else value_tiles + (K + BV - 1) // BV
    tile = pid % tiles
    h = ((pid // tiles) % H).to(tl.int64)
    index = pid // tiles // H
    b, n, start, stop = find_span(index, table, T, spans_per_row, span)
    if (n >= 0) & (start < stop):
        i, ik = tl.arange(0, C), tl.arange(0, KP)
        dtype: tl.constexpr = k.dtype.element_ty
        chunk0, _, _ = find_edges(n, start, stop, cu_seqlens, first_chunk, T, C)
        of_map = tile >= value_tiles
        iv = tl.where(of_map, tile - value_tiles, tile) * BV + tl.arange(0, BV)
        length = stop - start
        token = b * T + start
        k += (b * k_b + start * k_t.to(tl.int64) + h * k_h) * UNIT
        v += (b * v_b + start * v_t.to(tl.int64) + h * v_h) * UNIT
        tau += (token * H + h) * C
        factors += (b * H + h) * T + start
        plane = tl.cast(BH, tl.int64) * T
        state = ik[:, None] * V + iv[None, :]
        state_mask = (ik < K)[:, None] & (iv < V)[None, :]
        size: tl.constexpr = K * V

        S = tl.zeros([KP, BV], tl.float32)  # [K, BV]
        if STORE:
            errors += (token * H + h) * V
            if initial is not None:
                own = index if SPLIT else n
                S += tl.load(initial + (own.to(tl.int64) * H + h) * size + state, mask=state_mask, other=0.0)
        else:
            S += tl.where(of_map & (ik[:, None] == iv[None, :]), 1.0, 0.0)
        value_limit = tl.where(of_map, 0, V)
        for chunk in range(tl.cdiv(length, C)):
            first = tl.cast(chunk, tl.int64) * C
            left = length - chunk * C
            rows = tl.minimum(i, left - 1)
            b_k = load_rows(k + first * (k_t * UNIT), rows, k_t * UNIT, ik, K, KP != K)  # [C, K]
            b_tau = load_rows(tau + first * (H * C), rows, H * C, i, C, False)  # [C, C]
            r = tl.load(factors + first + rows)
            beta = tl.load(factors + plane + first + i, mask=i < left, other=0.0)
            b_S = S.to(dtype)
            if STORE:
                b_v = load_rows(v + first * (v_t * UNIT), rows, v_t * UNIT, iv, V, V % BV != 0)  # [C, BV]
                tl.store(states + ((chunk0 + chunk) * H + h) * size + state, b_S, mask=state_mask)
            else:
                tile_v = v + first * (v_t * UNIT) + rows[:, None] * (v_t * UNIT) + iv[None, :]
                b_v = tl.load(tile_v, mask=(iv < value_limit)[None, :], other=0.0)
            X = b_v - r[:, None] * tl.dot(b_k, b_S, input_precision=PRECISION)  # [C, BV]
            E = X - tl.dot(b_tau, (beta[:, None] * X).to(dtype), input_precision=PRECISION)
            if STORE:
                store_rows(errors + first * (H * V), E, i, left, H * V, iv, V, V % BV != 0)
            S = tl.dot(tl.trans(b_k), ((r * beta)[:, None] * E).to(dtype), S, input_precision=PRECISION)
        if not STORE:
            slot = index.to(tl.int64) * H + h
            if of_map:
                map_mask = (ik < K)[:, None] & (iv < K)[None, :]
                tl.store(maps + slot * (K * K) + ik[:, None] * K + iv[None, :], S, mask=map_mask)
            else:
                tl.store(offsets + slot * size + state, S, mask=state_mask)


@triton.jit
def _reverse_scan(
    q, k, do, tau, factors, states, slots, initial, final, table, cu_seqlens, first_chunk, T, H, BH,
    spans_per_row, span, q_b, q_t, q_h, k_b, k_t, k_h, do_b, do_t, do_h, pid,
    K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, UNIT: tl.constexpr,
    SPLIT: tl.constexpr, STORE: tl.constexpr, SMALL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One span, head and tile of value columns, from its last chunk to its first.

    STORE: the gradients dS [K, V] of the states that leave the chunks, and of each token its slot, starting from
    `initial`; and the gradient of the initial state where the span opens its sequence, into `final`. Otherwise dB of the
    span, into `final`. A slot is dv = beta G, from which G is had by division, or G itself where beta is below SMALL.
    """
    tiles: tl.constexpr = (V + BV - 1) // BV
    tile = pid % tiles
    h = ((pid // tiles) % H).to(tl.int64)
    index = pid // tiles // H
    b, n, start, stop = find_span(index, table, T, spans_per_row, span)
    if (n >= 0) & (start < stop):
        i, ik, iv = tl.arange(0, C), tl.arange(0, KP), tile * BV + tl.arange(0, BV)
        dtype: tl.constexpr = k.dtype.element_ty
        chunk0, opens, _ = find_edges(n, start, stop, cu_seqlens, first_chunk, T, C)
        length = stop - start
        token = b * T + start
        q += (b * q_b + start * q_t.to(tl.int64) + h * q_h) * UNIT
        k += (b * k_b + start * k_t.to(tl.int64) + h * k_h) * UNIT
        do += (b * do_b + start * do_t.to(tl.int64) + h * do_h) * UNIT
        tau += (token * H + h) * C
        factors += (b * H + h) * T + start
        plane = tl.cast(BH, tl.int64) * T
        state = ik[:, None] * V + iv[None, :]
        state_mask = (ik < K)[:, None] & (iv < V)[None, :]
        size: tl.constexpr = K * V

        dS = tl.zeros([KP, BV], tl.float32)  # [K, BV]
        if STORE:
            slots += (token * H + h) * V
            if initial is not None:
                own = index if SPLIT else n
                dS += tl.load(initial + (own.to(tl.int64) * H + h) * size + state, mask=state_mask, other=0.0)
        causal = i[:, None] <= i[None, :]
        chunks = tl.cdiv(length, C)
        for step in range(chunks):
            chunk = chunks - 1 - step
            first = tl.cast(chunk, tl.int64) * C
            left = length - chunk * C
            rows = tl.minimum(i, left - 1)
            b_q = load_rows(q + first * (q_t * UNIT), rows, q_t * UNIT, ik, K, KP != K)  # [C, K]
            b_k = load_rows(k + first * (k_t * UNIT), rows, k_t * UNIT, ik, K, KP != K)  # [C, K]
            b_do = load_rows(do + first * (do_t * UNIT), rows, do_t * UNIT, iv, V, V % BV != 0)  # [C, BV]
            b_tau = load_rows(tau + first * (H * C), rows, H * C, i, C, False)  # [C, C]
            r = tl.load(factors + first + rows)
            beta = tl.load(factors + plane + first + i, mask=i < left, other=0.0)
            rq = tl.load(factors + 2 * plane + first + i, mask=i < left, other=0.0)
            b_dS = dS.to(dtype)
            if STORE:
                tl.store(states + ((chunk0 + chunk) * H + h) * size + state, b_dS, mask=state_mask)
            P = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)  # transposed: [key, query]
            P = tl.where(causal, P * r[:, None], 0.0)
            b_do = (rq[:, None] * b_do).to(dtype)
            dW = tl.dot(b_k, b_dS, input_precision=PRECISION) * r[:, None]  # [C, BV]
            dW = tl.dot(P.to(dtype), b_do, dW, input_precision=PRECISION)
            x = beta[:, None] * dW
            G = dW - tl.dot(tl.trans(b_tau), x.to(dtype), input_precision=PRECISION)
            if dtype == tl.bfloat16:
                # For similar keys G is a small difference: bfloat16 alone would lose half of its digits.
                G -= tl.dot(tl.trans(b_tau), (x - x.to(dtype).to(tl.float32)).to(dtype), input_precision=PRECISION)
            if STORE:
                slot = tl.where((beta < SMALL)[:, None], G, beta[:, None] * G)
                store_rows(slots + first * (H * V), slot, i, left, H * V, iv, V, V % BV != 0)
            dS = tl.dot(tl.trans(b_q), b_do, dS, input_precision=PRECISION)
            dS = tl.dot(tl.trans(b_k), (-(r * beta)[:, None] * G).to(dtype), dS, input_precision=PRECISION)
        if final is not None:
            if STORE:
                if opens:
                    tl.store(final + (n.to(tl.int64) * H + h) * size + state, dS, mask=state_mask)
            else:
                tl.store(final + (index.to(tl.int64) * H + h) * size + state, dS, mask=state_mask)


_SCALARS = ["T", "H", "BH", "spans_per_row", "span", "q_b", "q_t", "q_h", "k_b", "k_t", "k_h"]


@triton.jit(do_not_specialize=[*_SCALARS, "v_b", "v_t", "v_h", "do_b", "do_t", "do_h", "programs"])
def scan_kernel(
    q, k, v, do, tau, factors, states, errors, initial, maps, offsets,
    state_gradients, slots, gradient_initial, gradient_final,
    table, cu_seqlens, first_chunk, T, H, BH, spans_per_row, span, programs,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, do_b, do_t, do_h,
    K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, UNIT: tl.constexpr,
    SPLIT: tl.constexpr, STORE: tl.constexpr, FORWARD: tl.constexpr, REVERSE: tl.constexpr,
    SMALL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The first `programs` programs scan forward, the others in reverse: neither waits for the other, so both hide each
    other's latency in one launch."""
    pid = tl.program_id(0)
    if FORWARD:
        if pid < programs:
            _forward_scan(
                k, v, tau, factors, states, errors, initial, maps, offsets, table, cu_seqlens, first_chunk, T, H, BH,
                spans_per_row, span, k_b, k_t, k_h, v_b, v_t, v_h, pid,
                K, KP, V, BV, C, UNIT, SPLIT, STORE, PRECISION,
            )  # fmt: skip
    if REVERSE:
        if pid >= programs:
            _reverse_scan(
                q, k, do, tau, factors, state_gradients, slots, gradient_initial, gradient_final,
                table, cu_seqlens, first_chunk, T, H, BH, spans_per_row, span,
                q_b, q_t, q_h, k_b, k_t, k_h, do_b, do_t, do_h, pid - programs,
                K, KP, V, BV, C, UNIT, SPLIT, STORE, SMALL, PRECISION,
            )  # fmt: skip


@triton.jit(do_not_specialize=["H", "spans_per_row"])
def join_kernel(
    maps, offsets, initial, result, first_span, H, spans_per_row,
    K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, ROWS: tl.constexpr, REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One sequence, head and tile of value columns: the state with which each span starts (in reverse: the gradient
    with which it ends), from the maps of the spans. A state passes through memory: its rows are computed in blocks."""
    tiles: tl.constexpr = (V + BV - 1) // BV
    iv = (tl.program_id(0) % tiles) * BV + tl.arange(0, BV)
    h = ((tl.program_id(0) // tiles) % H).to(tl.int64)
    n = tl.program_id(0) // tiles // H
    if first_span is None:
        begin = n * spans_per_row
        count = spans_per_row
    else:
        begin = tl.load(first_span + n)
        count = tl.load(first_span + n + 1) - begin
    ik = tl.arange(0, KP)
    mask = (ik < K)[:, None] & (iv < V)[None, :]
    place = ik[:, None] * V + iv[None, :]
    S = tl.zeros([KP, BV], tl.float32)  # [K, BV]
    if initial is not None:
        S += tl.load(initial + (n.to(tl.int64) * H + h) * (K * V) + place, mask=mask, other=0.0)
    step_size: tl.constexpr = -1 if REVERSE else 1
    span = (begin + (count - 1 if REVERSE else 0)).to(tl.int64)
    if count > 0:
        tl.store(result + (span * H + h) * (K * V) + place, S, mask=mask)
    for _ in range(count - 1):
        tl.debug_barrier()
        slot = span * H + h
        following = (span + step_size) * H + h
        S = tl.load(result + slot * (K * V) + place, mask=mask, other=0.0)
        for block in tl.static_range(0, KP, ROWS):
            rows = block + tl.arange(0, ROWS)
            square = (rows < K)[:, None] & (ik < K)[None, :]
            if REVERSE:
                M = tl.load(maps + slot * (K * K) + ik[None, :] * K + rows[:, None], mask=square, other=0.0)
            else:
                M = tl.load(maps + slot * (K * K) + rows[:, None] * K + ik[None, :], mask=square, other=0.0)
            part = rows[:, None] * V + iv[None, :]
            part_mask = (rows < K)[:, None] & (iv < V)[None, :]
            B = tl.load(offsets + slot * (K * V) + part, mask=part_mask, other=0.0)
            S_next = tl.dot(M, S, B, input_precision=PRECISION)
            tl.store(result + following * (K * V) + part, S_next, mask=part_mask)
        span += step_size
