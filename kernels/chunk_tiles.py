"""What the Triton kernels of the chunked delta rule share: tiles, spans of tokens, and the inverse of a chunk.

Rows behind the end of a sequence are read as copies of its last row, which needs no mask; their beta and rq are zero, so
that they write nothing and nothing flows back from them.

Symbols: the glossary of `delta_rule.py`. Derivation, traffic and measurements: the README.md of this folder.
"""

try:  # Transformers wants every package that custom code imports outside of a `try`
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the fused kernels need Triton") from error

L2_EPS = tl.constexpr(1e-6)


@triton.jit
def load_rows(p, rows, stride, columns, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Rows of a matrix, zeros beyond its columns. PADDED: the tile is wider than the matrix may be."""
    tile = p + rows[:, None] * stride + columns[None, :]
    if PADDED:
        return tl.load(tile, mask=(columns < WIDTH)[None, :], other=0.0)
    else:
        return tl.load(tile)


@triton.jit
def store_rows(p, x, rows, stop, stride, columns, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    mask = (rows < stop)[:, None]
    if PADDED:
        mask = mask & (columns < WIDTH)[None, :]
    tl.store(p + rows[:, None] * stride + columns[None, :], x.to(p.dtype.element_ty), mask=mask)


@triton.jit
def find_span(index, table, T, spans_per_row, span):
    """(batch row, sequence, first token, end) of a span of tokens; tokens of no sequence have sequence -1.

    `table` is None where every row is one sequence, cut into `spans_per_row` spans of `span` tokens.
    """
    if table is None:
        sequence = index // spans_per_row
        row = sequence
        start = (index % spans_per_row) * span
        stop = tl.minimum(start + span, T)
    else:
        sequence = tl.load(table + 3 * index)
        row = sequence * 0
        start = tl.load(table + 3 * index + 1)
        stop = tl.load(table + 3 * index + 2)
    return row.to(tl.int64), sequence, start, stop


@triton.jit
def find_edges(sequence, start, stop, cu_seqlens, first_chunk, T, C: tl.constexpr):
    """(chunk in which a span starts, whether it opens its sequence, whether it closes it)."""
    if cu_seqlens is None:
        return sequence.to(tl.int64) * tl.cdiv(T, C) + start // C, start == 0, stop == T
    else:
        opening = tl.load(cu_seqlens + sequence).to(tl.int32)
        closing = tl.load(cu_seqlens + sequence + 1).to(tl.int32)
        chunk = tl.load(first_chunk + sequence) + (start - opening) // C
        return chunk.to(tl.int64), start == opening, stop == closing


@triton.jit(do_not_specialize=["T", "N", "chunks", "spans", "span", "width", "blocks"])
def span_table_kernel(
    cu_seqlens, table, first, T, N, chunks, spans, span, width, blocks, C: tl.constexpr, BLOCK: tl.constexpr
):
    """For packed sequences, two tables in one: rows [0, chunks) cut every sequence into chunks, the next `spans` rows
    into spans of `span` tokens, always from the sequence's own start.

    A row is (sequence, first token, end). Tokens after the last sequence have rows of sequence -1; rows of the bound that
    hold no token end where they start. first [2, width]: first[0, n] is the first chunk of sequence n, first[1, n] its
    first span; n = N closes the list.
    """
    of_spans = tl.program_id(0) // blocks
    part = tl.program_id(0) % blocks
    rows = tl.where(of_spans == 1, spans, chunks)
    size = tl.where(of_spans == 1, span, C)
    first += of_spans * width
    i = part * BLOCK + tl.arange(0, BLOCK)
    sequence = tl.zeros([BLOCK], tl.int32)
    opened = tl.zeros([BLOCK], tl.int32)
    total = 0
    for block in range(tl.cdiv(N, BLOCK)):
        n = block * BLOCK + tl.arange(0, BLOCK)
        lo = tl.load(cu_seqlens + n, mask=n < N, other=0).to(tl.int32)
        hi = tl.load(cu_seqlens + n + 1, mask=n < N, other=0).to(tl.int32)
        count = (hi - lo + size - 1) // size
        ends = total + tl.cumsum(count, 0)
        if part == 0:
            tl.store(first + n, ends - count, mask=n < N)
        passed = (ends[None, :] <= i[:, None]) & (n < N)[None, :]  # [row, n]
        sequence += tl.sum(passed.to(tl.int32), 1)
        opened = tl.maximum(opened, tl.max(tl.where(passed, ends[None, :], 0), 1))
        total += tl.sum(count, 0)
    if part == 0:
        tl.store(first + N, total)
    start = tl.load(cu_seqlens + sequence).to(tl.int32) + (i - opened) * size
    tail = sequence == N
    end = tl.load(cu_seqlens + sequence + 1, mask=~tail, other=0).to(tl.int32)
    end = tl.where(tail, T, end)
    start = tl.minimum(start, end)
    table += 3 * (of_spans * chunks + i)
    tl.store(table, tl.where(tail, -1, sequence), mask=i < rows)
    tl.store(table + 1, start, mask=i < rows)
    tl.store(table + 2, tl.minimum(start + size, end), mask=i < rows)


@triton.jit
def _merge(tau, L, above, left, row, column, m: tl.constexpr):
    """Blocks of m rows, each with its own tau, to blocks of 2 m; `above` and `left` are -beta of the row and of the column,
    `row` and `column` where an entry is, in one matrix or in each of a batch."""
    between = (row // m != column // m) & (row // (2 * m) == column // (2 * m))
    x = tl.where(between, L, 0.0)
    y = tl.dot(x, above * tau, x.to(tl.float32), input_precision="tf32x3")
    return tau + tl.dot(tau * left, y.to(L.dtype), y, input_precision="tf32x3").to(L.dtype)


@triton.jit
def resolvent(L, beta, i):
    """tau = (I + L diag(beta))⁻¹ L of a strictly lower L [64, 64] in float32 or float16; i = 0..63.

    tau carries no factor beta of its own row or column, so a vanishing beta loses nothing. Two blocks merge into one by
    (I - tau beta) L (I - beta tau) with the L between them: as accurate as substitution, and all of it is tensor-core
    work. An entry is computed once, so that float16 rounds it once. Power series of L lose every digit on similar keys.

    Up to 16 rows the blocks on the diagonal are a batch of four matrices: each warp merges its own in registers.
    """
    b = -beta.to(L.dtype)
    four, j = tl.arange(0, 4), tl.arange(0, 16)
    diagonal = (four[:, None] == four[None, :])[:, None, :, None]
    blocks = tl.sum(tl.where(diagonal, tl.reshape(L, [4, 16, 4, 16]), 0.0), 2)
    row, column = j[None, :, None], j[None, None, :]
    small = tl.where(row // 2 == column // 2, blocks, 0.0)
    b_blocks = tl.reshape(b, [4, 16])
    for level in tl.static_range(1, 4):
        small = _merge(small, blocks, b_blocks[:, :, None], b_blocks[:, None, :], row, column, 1 << level)
    tau = tl.reshape(tl.where(diagonal, small[:, :, None, :], 0.0), [64, 64])
    for level in tl.static_range(4, 6):
        tau = _merge(tau, L, b[:, None], b[None, :], i[:, None], i[None, :], 1 << level)
    return tau


@triton.jit(do_not_specialize=["T", "H", "BH", "chunks_per_row", "k_b", "k_t", "k_h", "beta_b", "beta_t", "beta_h"])
def inverse_kernel(
    k,
    beta,
    tau,
    factors,
    o,
    table,
    T,
    H,
    BH,
    chunks_per_row,
    k_b,
    k_t,
    k_h,
    beta_b,
    beta_t,
    beta_h,
    K: tl.constexpr,
    KP: tl.constexpr,
    V: tl.constexpr,
    VP: tl.constexpr,
    C: tl.constexpr,
    UNIT: tl.constexpr,
    L2: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One chunk and head: tau [C, C], and r = 1/|k| and beta of its tokens; zeros into o where no sequence is."""
    h = (tl.program_id(0) % H).to(tl.int64)
    b, sequence, start, stop = find_span(tl.program_id(0) // H, table, T, chunks_per_row, C)
    if start == stop:
        return
    i = tl.arange(0, C)
    length = stop - start
    token = b * T + start
    o += (token * H + h) * V
    tau += (token * H + h) * C
    factors += (b * H + h) * T + start
    plane = tl.cast(BH, tl.int64) * T
    if table is not None:
        if sequence < 0:
            j = tl.arange(0, VP)
            store_rows(o, tl.zeros([C, VP], tl.float32), i, length, H * V, j, V, VP != V)
            store_rows(tau, tl.zeros([C, C], tl.float32), i, length, H * C, i, C, False)
            for which in tl.static_range(3):
                tl.store(factors + which * plane + i, tl.zeros([C], tl.float32), mask=i < length)
            return

    k += (b * k_b + start * k_t.to(tl.int64) + h * k_h) * UNIT
    ik = tl.arange(0, KP)
    b_k = load_rows(k, tl.minimum(i, length - 1), k_t * UNIT, ik, K, KP != K)  # [C, K]
    beta += b * beta_b + start * beta_t.to(tl.int64) + h * beta_h
    b_beta = tl.load(beta + i * beta_t, mask=i < length, other=0.0).to(tl.float32)

    L = tl.dot(b_k, tl.trans(b_k), input_precision=PRECISION)  # [C, C]
    r = tl.full([C], 1.0, tl.float32)
    if L2:
        squares = tl.where(i[:, None] == i[None, :], L, 0.0)
        r = tl.rsqrt(tl.sum(squares, 1) + L2_EPS)
        L *= r[:, None] * r[None, :]
    L = tl.where(i[:, None] > i[None, :], L, 0.0).to(tl.float32 if EXACT else tl.float16)
    store_rows(tau, resolvent(L, b_beta, i), i, length, H * C, i, C, False)
    tl.store(factors + i, r, mask=i < length)
    tl.store(factors + plane + i, b_beta, mask=i < length)
