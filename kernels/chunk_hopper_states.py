"""`scan_kernel` of `chunk_states.py` for Hopper GPUs, in Gluon; formulas, symbols and arguments are there.

Descriptors take the place of q, k, v, do and tau. Shared memory holds two stages of the inputs and the state; the values
on their way to a product lie where the state lay, which by then has been read. So two programs fit a multiprocessor.
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

from .chunk_hopper import accumulator, allocate_barriers, allocate_stages, clear_rows, fetch, matrix, store_lines, take
from .chunk_tiles import find_edges, find_span


@gluon.jit
def _fetch_forward(k, v, tau, k_s, v_s, tau_s, ready, stage, b, token, h, column, pred):
    size: gl.constexpr = k.block_type.nbytes + v.block_type.nbytes + tau.block_type.nbytes
    mbarrier.expect(ready.index(stage), size, pred=pred)
    fetch(k, k_s, ready, stage, b, token, h, 0, pred)
    fetch(tau, tau_s, ready, stage, b, token, h, 0, pred)
    fetch(v, v_s, ready, stage, b, token, h, column, pred)


@gluon.jit
def _fetch_reverse(q, k, do, tau, q_s, k_s, do_s, tau_s, ready, stage, b, token, h, column, pred):
    size: gl.constexpr = q.block_type.nbytes + k.block_type.nbytes + do.block_type.nbytes + tau.block_type.nbytes
    mbarrier.expect(ready.index(stage), size, pred=pred)
    fetch(k, k_s, ready, stage, b, token, h, 0, pred)
    fetch(q, q_s, ready, stage, b, token, h, 0, pred)
    fetch(do, do_s, ready, stage, b, token, h, column, pred)
    fetch(tau, tau_s, ready, stage, b, token, h, 0, pred)


@gluon.jit
def _forward_scan(
    k, v, tau, factors, states, errors, initial, maps, offsets, table, cu_seqlens, first_chunk, T, H, BH,
    spans_per_row, span, pid,
    K: gl.constexpr, KP: gl.constexpr, V: gl.constexpr, BV: gl.constexpr, C: gl.constexpr,
    SPLIT: gl.constexpr, STORE: gl.constexpr,
):  # fmt: skip
    value_tiles: gl.constexpr = (V + BV - 1) // BV
    tiles: gl.constexpr = value_tiles if STORE else value_tiles + (K + BV - 1) // BV
    tile = pid % tiles
    h = ((pid // tiles) % H).to(gl.int64)
    index = pid // tiles // H
    b, n, start, stop = find_span(index, table, T, spans_per_row, span)
    if (n >= 0) & (start < stop):
        dtype: gl.constexpr = k.dtype
        mma: gl.constexpr = accumulator(BV)
        chunk0, _, _ = find_edges(n, start, stop, cu_seqlens, first_chunk, T, C)
        of_map = tile >= value_tiles
        column = gl.where(of_map, tile - value_tiles, tile) * BV
        length = stop - start
        factors += (b * H + h) * T + start
        plane = gl.cast(BH, gl.int64) * T
        ik = gl.arange(0, KP, layout=gl.SliceLayout(1, mma))
        iv = column + gl.arange(0, BV, layout=gl.SliceLayout(0, mma))
        i = gl.arange(0, C, layout=gl.SliceLayout(1, mma))
        state = ik[:, None] * V + iv[None, :]
        state_mask = (ik < K)[:, None] & (iv < V)[None, :]
        size: gl.constexpr = K * V
        k_s, v_s, tau_s = allocate_stages(k), allocate_stages(v), allocate_stages(tau)
        shared = gl.allocate_shared_memory(dtype, [2 * C, BV], matrix(2 * C, BV, dtype))
        S_s, x_s, e_s = shared.slice(0, KP), shared.slice(0, C), shared.slice(C, C)
        ready = allocate_barriers()

        S = gl.zeros([KP, BV], gl.float32, mma)
        if STORE:
            errors += ((b * T + start) * H + h) * V
            if initial is not None:
                own = index if SPLIT else n
                S = gl.load(initial + (own.to(gl.int64) * H + h) * size + state, mask=state_mask, other=0.0)
        else:
            S = gl.where(of_map & (ik[:, None] == iv[None, :]), 1.0, S)
        row, head = b.to(gl.int32), h.to(gl.int32)
        # A map has no values: columns behind the last read as zeros.
        v_column = gl.where(of_map, value_tiles * BV, column)
        _fetch_forward(k, v, tau, k_s, v_s, tau_s, ready, 0, row, start, head, v_column, True)
        next_r = gl.load(factors + i, mask=i < length, other=0.0)
        next_beta = gl.load(factors + plane + i, mask=i < length, other=0.0)
        S_s.store(S.to(dtype))
        fence_async_shared()
        zeros = gl.zeros([C, BV], gl.float32, mma)
        for chunk in range(gl.cdiv(length, C)):
            first = gl.cast(chunk, gl.int64) * C
            left = length - chunk * C
            stage = chunk % 2
            r, beta = next_r, next_beta
            following = start + (chunk + 1) * C
            _fetch_forward(k, v, tau, k_s, v_s, tau_s, ready, 1 - stage, row, following, head, v_column, left > C)
            next_r = gl.load(factors + first + C + i, mask=i < left - C, other=0.0)
            next_beta = gl.load(factors + plane + first + C + i, mask=i < left - C, other=0.0)
            mbarrier.wait(ready.index(stage), (chunk // 2) & 1)
            b_k, b_v, b_tau = take(k_s, stage), take(v_s, stage), take(tau_s, stage)
            if table is not None:
                if left < C:
                    clear_rows(b_k, left)
                    clear_rows(b_v, left)
                    clear_rows(b_tau, left)
                    fence_async_shared()

            KS = warpgroup_mma(b_k, S_s, zeros, use_acc=False, is_async=True)  # [C, BV]
            if STORE:
                store_lines(states + ((chunk0 + chunk) * H + h) * size, S_s, K, V, column, V)
            values = b_v.load(mma).to(gl.float32)
            KS = warpgroup_mma_wait(0, deps=[KS])
            X = values - r[:, None] * KS
            x_s.store((beta[:, None] * X).to(dtype))
            fence_async_shared()
            tauX = warpgroup_mma(b_tau, x_s, zeros, use_acc=False, is_async=True)
            tauX = warpgroup_mma_wait(0, deps=[tauX])
            E = X - tauX
            x_s.store(((r * beta)[:, None] * E).to(dtype))  # W
            fence_async_shared()
            S = warpgroup_mma(b_k.permute((1, 0)), x_s, S, is_async=True)
            if STORE:
                e_s.store(E.to(dtype))
                store_lines(errors + first * (H * V), e_s, left, H * V, column, V)
            S = warpgroup_mma_wait(0, deps=[S])
            S_s.store(S.to(dtype))
            fence_async_shared()
        if not STORE:
            slot = index.to(gl.int64) * H + h
            if of_map:
                map_mask = (ik < K)[:, None] & (iv < K)[None, :]
                gl.store(maps + slot * (K * K) + ik[:, None] * K + iv[None, :], S, mask=map_mask)
            else:
                gl.store(offsets + slot * size + state, S, mask=state_mask)


@gluon.jit
def _reverse_scan(
    q, k, do, tau, factors, states, slots, initial, final, table, cu_seqlens, first_chunk, T, H, BH,
    spans_per_row, span, pid,
    K: gl.constexpr, KP: gl.constexpr, V: gl.constexpr, BV: gl.constexpr, C: gl.constexpr,
    SPLIT: gl.constexpr, STORE: gl.constexpr, SMALL: gl.constexpr,
):  # fmt: skip
    tiles: gl.constexpr = (V + BV - 1) // BV
    column = (pid % tiles) * BV
    h = ((pid // tiles) % H).to(gl.int64)
    index = pid // tiles // H
    b, n, start, stop = find_span(index, table, T, spans_per_row, span)
    if (n >= 0) & (start < stop):
        dtype: gl.constexpr = k.dtype
        mma: gl.constexpr = accumulator(BV)
        operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=mma, k_width=2)
        chunk0, opens, _ = find_edges(n, start, stop, cu_seqlens, first_chunk, T, C)
        length = stop - start
        factors += (b * H + h) * T + start
        plane = gl.cast(BH, gl.int64) * T
        ik = gl.arange(0, KP, layout=gl.SliceLayout(1, mma))
        iv = column + gl.arange(0, BV, layout=gl.SliceLayout(0, mma))
        i = gl.arange(0, C, layout=gl.SliceLayout(1, mma))
        causal = i[:, None] <= gl.arange(0, C, layout=gl.SliceLayout(0, mma))[None, :]
        state = ik[:, None] * V + iv[None, :]
        state_mask = (ik < K)[:, None] & (iv < V)[None, :]
        size: gl.constexpr = K * V
        q_s, k_s, do_s, tau_s = allocate_stages(q), allocate_stages(k), allocate_stages(do), allocate_stages(tau)
        shared = gl.allocate_shared_memory(dtype, [2 * C, BV], matrix(2 * C, BV, dtype))
        S_s, x_s, y_s = shared.slice(0, KP), shared.slice(0, C), shared.slice(C, C)
        ready = allocate_barriers()

        dS = gl.zeros([KP, BV], gl.float32, mma)
        if STORE:
            slots += ((b * T + start) * H + h) * V
            if initial is not None:
                own = index if SPLIT else n
                dS = gl.load(initial + (own.to(gl.int64) * H + h) * size + state, mask=state_mask, other=0.0)
        row, head = b.to(gl.int32), h.to(gl.int32)
        chunks = gl.cdiv(length, C)
        last = (chunks - 1) * C
        _fetch_reverse(q, k, do, tau, q_s, k_s, do_s, tau_s, ready, 0, row, start + last, head, column, True)
        next_r = gl.load(factors + last + i, mask=i < length - last, other=0.0)
        next_beta = gl.load(factors + plane + last + i, mask=i < length - last, other=0.0)
        next_rq = gl.load(factors + 2 * plane + last + i, mask=i < length - last, other=0.0)
        S_s.store(dS.to(dtype))
        fence_async_shared()
        zeros = gl.zeros([C, BV], gl.float32, mma)
        for step in range(chunks):
            chunk = chunks - 1 - step
            first = gl.cast(chunk, gl.int64) * C
            left = length - chunk * C
            stage = step % 2
            r, beta, rq = next_r, next_beta, next_rq
            following, more = start + (chunk - 1) * C, chunk > 0
            _fetch_reverse(q, k, do, tau, q_s, k_s, do_s, tau_s, ready, 1 - stage, row, following, head, column, more)
            mask = (i >= 0) & more
            next_r = gl.load(factors + first - C + i, mask=mask, other=0.0)
            next_beta = gl.load(factors + plane + first - C + i, mask=mask, other=0.0)
            next_rq = gl.load(factors + 2 * plane + first - C + i, mask=mask, other=0.0)
            mbarrier.wait(ready.index(stage), (step // 2) & 1)
            b_q, b_k, b_do, b_tau = take(q_s, stage), take(k_s, stage), take(do_s, stage), take(tau_s, stage)
            if table is not None:
                if left < C:
                    clear_rows(b_q, left)
                    clear_rows(b_k, left)
                    clear_rows(b_do, left)
                    clear_rows(b_tau, left)
                    fence_async_shared()

            P = warpgroup_mma(b_k, b_q.permute((1, 0)), gl.zeros([C, C], gl.float32, mma), use_acc=False, is_async=True)
            dW = warpgroup_mma(b_k, S_s, zeros, use_acc=False, is_async=True)  # [C, BV]
            b_do.store((rq[:, None] * b_do.load(mma).to(gl.float32)).to(dtype))
            fence_async_shared()
            if STORE:
                store_lines(states + ((chunk0 + chunk) * H + h) * size, S_s, K, V, column, V)
            P = warpgroup_mma_wait(1, deps=[P])
            P = gl.convert_layout(gl.where(causal, P * r[:, None], 0.0).to(dtype), operand)  # transposed: [key, query]
            dW = warpgroup_mma_wait(0, deps=[dW])
            dW *= r[:, None]
            dW = warpgroup_mma(P, b_do, dW, is_async=True)
            dS = warpgroup_mma(b_q.permute((1, 0)), b_do, dS, is_async=True)

            dW = warpgroup_mma_wait(1, deps=[dW])
            x = beta[:, None] * dW
            x_s.store(x.to(dtype))
            if dtype == gl.bfloat16:
                # For similar keys G is a small difference: bfloat16 alone would lose half of its digits.
                y_s.store((x - x.to(dtype).to(gl.float32)).to(dtype))
            fence_async_shared()
            tauX = warpgroup_mma(b_tau.permute((1, 0)), x_s, zeros, use_acc=False, is_async=True)
            if dtype == gl.bfloat16:
                tauX = warpgroup_mma(b_tau.permute((1, 0)), y_s, tauX, is_async=True)
            tauX, dS = warpgroup_mma_wait(0, deps=[tauX, dS])
            G = dW - tauX
            x_s.store((-(r * beta)[:, None] * G).to(dtype))
            fence_async_shared()
            dS = warpgroup_mma(b_k.permute((1, 0)), x_s, dS, is_async=True)
            if STORE:
                y_s.store(gl.where((beta < SMALL)[:, None], G, beta[:, None] * G).to(dtype))
                store_lines(slots + first * (H * V), y_s, left, H * V, column, V)
            dS = warpgroup_mma_wait(0, deps=[dS])
            S_s.store(dS.to(dtype))
            fence_async_shared()
        if final is not None:
            if STORE:
                if opens:
                    gl.store(final + (n.to(gl.int64) * H + h) * size + state, dS, mask=state_mask)
            else:
                gl.store(final + (index.to(gl.int64) * H + h) * size + state, dS, mask=state_mask)


@gluon.jit(do_not_specialize=["T", "H", "BH", "spans_per_row", "span", "programs"])
def hopper_scan_kernel(
    q, k, v, do, tau, factors, states, errors, initial, maps, offsets,
    state_gradients, slots, gradient_initial, gradient_final,
    table, cu_seqlens, first_chunk, T, H, BH, spans_per_row, span, programs,
    K: gl.constexpr, KP: gl.constexpr, V: gl.constexpr, BV: gl.constexpr, C: gl.constexpr,
    SPLIT: gl.constexpr, STORE: gl.constexpr, FORWARD: gl.constexpr, REVERSE: gl.constexpr, SMALL: gl.constexpr,
):  # fmt: skip
    pid = gl.program_id(0)
    if FORWARD:
        if pid < programs:
            _forward_scan(
                k, v, tau, factors, states, errors, initial, maps, offsets, table, cu_seqlens, first_chunk, T, H, BH,
                spans_per_row, span, pid, K, KP, V, BV, C, SPLIT, STORE,
            )  # fmt: skip
    if REVERSE:
        if pid >= programs:
            _reverse_scan(
                q, k, do, tau, factors, state_gradients, slots, gradient_initial, gradient_final,
                table, cu_seqlens, first_chunk, T, H, BH, spans_per_row, span, pid - programs,
                K, KP, V, BV, C, SPLIT, STORE, SMALL,
            )  # fmt: skip
