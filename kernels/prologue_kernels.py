"""The prologue on a GPU: short convolution and SiLU of q, k and v, and the writing strength, in one launch each way.

A program takes a strip of tokens of one sequence and a tile of channels of q, k or v, and goes through the strip with the
last W - 1 inputs in registers, so that memory moves each input once. The programs behind those compute beta. In the
backward, the preactivation z is computed again, and the gradient of an input is complete W - 1 tokens later, when the last
output that read it is known:

    dz[t] = dy[t] silu'(z[t])      dx[s] = sum_j weight[j] dz[s + W - 1 - j]      dweight[j] = sum_s x[s] dz[s + W - 1 - j]

where s also runs over the state, positions -(W - 1) to -1. A strip sums its share of dweight, and `sum_kernel` adds the
strips in a fixed order: two runs agree in every bit.

Bytes for a token and a channel in 16 bits: 4 forward (x, y); backward 6 (x, dy, dx) and 8 W / strip, the sums of strips
written and read. Strips read 2 (W - 1) or 3 (W - 1) rows of their neighbours, mostly from the L2 cache. B8 T4096 with 3 x
2,048 channels: 0.81 GB and 1.26 GB, predicted 0.27 and 0.42 ms at 3 TB/s.

Symbols: the glossary of `delta_rule.py`; D channels, W the convolution's width, BD channels of a program.
"""

from .chunk_tiles import find_span

try:  # Transformers wants every package that custom code imports outside of a `try`
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the fused kernels need Triton") from error


@triton.jit
def _pick(stream, q, k, v):
    """The one of three scalars or pointers that belongs to stream 0, 1 or 2."""
    return tl.where(stream == 0, q, tl.where(stream == 1, k, v))


@triton.jit
def _find_strip(index, table, cu_seqlens, padded, T, strips_per_row, strip, W: tl.constexpr):
    """(batch row, sequence, first token, end, first token and end of the sequence, where in the order token 0 is).

    Tokens of no sequence are behind the end of one, further than a convolution sees: inputs and states are zero there.
    An order puts the padding of a row first; the strips of its sequence come before those of the padding.
    """
    row, sequence, start, stop = find_span(index, table, T, strips_per_row, strip)
    place = row * 0
    if padded is not None:
        opening = tl.load(padded + row).to(tl.int32)
        of_sequence = tl.cdiv(T - opening, strip)
        i = index % strips_per_row
        is_padding = i >= of_sequence
        start = tl.where(is_padding, (i - of_sequence) * strip, opening + i * strip)
        stop = tl.minimum(start + strip, tl.where(is_padding, opening, T))
        # Sorted rows of the states lie between those of the padding and of the sequence.
        place = row * (T + W - 1) + tl.where(is_padding, 0, W - 1)
        opening = tl.where(is_padding, -4, opening)
        closing = tl.where(is_padding, -4, T)
    elif table is None:
        opening = start * 0
        closing = opening + T
    else:
        opening = tl.load(cu_seqlens + sequence, mask=sequence >= 0, other=-4).to(tl.int32)
        closing = tl.load(cu_seqlens + sequence + 1, mask=sequence >= 0, other=-4).to(tl.int32)
    return row, sequence.to(tl.int64), start, stop, opening, closing, place


@triton.jit
def _offset(t, step, order, row, T, W: tl.constexpr):
    """From the first token of a batch row to token t, in its place or where `order` says."""
    if order is None:
        return tl.cast(t, tl.int64) * step
    else:
        first = row * (T + W - 1) + W - 1
        return (tl.load(order + t, mask=(t >= 0) & (t < T), other=0).to(tl.int64) - first) * step


@triton.jit
def _next_row(base, running, u: tl.constexpr, t, step, order, row, T, W: tl.constexpr):
    """Where token t is, u tokens behind the one at `running`. Offsets from the first token would cost ten instructions a
    load, a third of the backward."""
    if order is None:
        return running + u * step
    else:
        return base + _offset(t, step, order, row, T, W)


@triton.jit
def _load_taps(weight, column, inside, W: tl.constexpr):
    """weight [D, 1, W] -> W times [BD], float32."""
    j = tl.arange(0, 2 if W == 2 else 4)
    tile = tl.load(weight + column[:, None] * W + j[None, :], mask=inside[:, None] & (j < W)[None, :], other=0.0)
    taps = ()
    for i in tl.static_range(W):
        taps += (tl.sum(tl.where((j == i)[None, :], tile.to(tl.float32), 0.0), 1),)
    return taps


@triton.jit
def _load_input(x, state, t, step, opening, closing, order, row, T, column, inside, W: tl.constexpr):
    """Input [BD] of token t; before the sequence its state or zero, behind it zero. float32."""
    here = (t >= opening) & (t < closing)
    place = x + _offset(tl.where(here, t, -1), step, order, row, T, W) + column
    value = tl.load(place, mask=inside & here, other=0.0).to(tl.float32)
    if state is not None:
        before = tl.load(state + column * (W - 1) + (t - opening + W - 1), mask=inside & (t < opening), other=0.0)
        value += before.to(x.dtype.element_ty).to(tl.float32)
    return value


@triton.jit
def _convolve(inputs, taps, W: tl.constexpr):
    """W inputs [BD], oldest first -> [BD]."""
    z = inputs[0] * taps[0]
    for j in tl.static_range(1, W):
        z += inputs[j] * taps[j]
    return z


@triton.jit
def _sigmoid(z):
    r = tl.rsqrt(1.0 + tl.exp2(z * -1.4426950408889634))
    return r * r


@triton.jit
def _beta_places(block, T, H, blocks_per_row, raw_b, raw_t, raw_h, BLOCK: tl.constexpr):
    """For a block of the elements of [B, T, H]: offsets in a dense tensor and in one of these strides; which exist."""
    row = (block // blocks_per_row).to(tl.int64)
    i = (block % blocks_per_row) * BLOCK + tl.arange(0, BLOCK)
    place = row * raw_b + (i // H).to(tl.int64) * raw_t + (i % H) * raw_h
    return row * T * H + i, place, i < T * H


@triton.jit(
    do_not_specialize=[
        "beta_scale", "T", "strips_per_row", "strip", "programs", "q_tiles", "k_tiles", "tiles", "q_units", "k_units",
        "v_units", "q_b", "q_t", "k_b", "k_t", "v_b", "v_t", "H", "blocks_per_row", "raw_b", "raw_t", "raw_h",
    ]
)  # fmt: skip
def forward_kernel(
    q, k, v, q_weight, k_weight, v_weight, q_out, k_out, v_out, q_state, k_state, v_state, q_final, k_final, v_final,
    b, beta, table, cu_seqlens, order, padded, beta_scale, T, strips_per_row, strip, programs, q_tiles, k_tiles, tiles,
    q_units, k_units, v_units, q_b, q_t, k_b, k_t, v_b, v_t, H, blocks_per_row, raw_b, raw_t, raw_h,
    W: tl.constexpr, BD: tl.constexpr, UNROLL: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One strip and tile of channels: y, and at the end of a sequence its final state. Behind `programs`, a block of beta.
    Strides of q, k and v and their numbers of channels are in units of UNIT elements; outputs and states are dense."""
    index = tl.program_id(0)
    if index >= programs:
        if b is not None:
            own, place, exists = _beta_places(index - programs, T, H, blocks_per_row, raw_b, raw_t, raw_h, BLOCK)
            raw = tl.load(b + place, mask=exists, other=0.0).to(tl.float32)
            tl.store(beta + own, tl.sigmoid(raw) * beta_scale, mask=exists)
        return
    tile = index % tiles
    row, sequence, start, stop, opening, closing, sorted_place = _find_strip(
        index // tiles, table, cu_seqlens, padded, T, strips_per_row, strip, W
    )
    if order is not None:
        order += sorted_place
    stream = tl.where(tile < q_tiles, 0, tl.where(tile < q_tiles + k_tiles, 1, 2))
    x, y, weight = _pick(stream, q, k, v), _pick(stream, q_out, k_out, v_out), _pick(stream, q_weight, k_weight, v_weight)
    x_b, x_t, D = _pick(stream, q_b, k_b, v_b), _pick(stream, q_t, k_t, v_t), _pick(stream, q_units, k_units, v_units) * UNIT
    column = (tile - _pick(stream, 0, q_tiles, q_tiles + k_tiles)) * BD + tl.arange(0, BD)
    inside = column < D
    x += row * x_b * UNIT
    y += row * T * D
    x_step, y_step = x_t.to(tl.int64) * UNIT, D.to(tl.int64)
    state = None
    if q_state is not None:
        state = _pick(stream, q_state, k_state, v_state) + sequence * D * (W - 1)

    taps = _load_taps(weight, column, inside, W)
    inputs = ()  # the last W - 1, oldest first
    for j in tl.static_range(W - 1):
        inputs += (_load_input(x, state, start - (W - 1) + j, x_step, opening, closing, order, row, T, column, inside, W),)
    x_row, y_row = x + start * x_step, y + start * y_step
    readable = tl.minimum(stop, closing)
    for group in range(start, stop, UNROLL):
        loaded = ()
        for u in tl.static_range(UNROLL):
            place = _next_row(x, x_row, u, group + u, x_step, order, row, T, W) + column
            loaded += (tl.load(place, mask=inside & (group + u < readable), other=0.0),)
        for u in tl.static_range(UNROLL):
            inputs += (loaded[u].to(tl.float32),)
            z = _convolve(inputs, taps, W)
            b_y = z * _sigmoid(z)
            place = _next_row(y, y_row, u, group + u, y_step, order, row, T, W) + column
            tl.store(place, b_y.to(y.dtype.element_ty), mask=inside & (group + u < stop))
            inputs = inputs[1:]
        x_row += UNROLL * x_step
        y_row += UNROLL * y_step

    if q_final is not None:
        final = _pick(stream, q_final, k_final, v_final) + sequence * D * (W - 1)
        last = inside & (stop == closing)
        for j in tl.static_range(W - 1):
            value = _load_input(x, state, closing - (W - 1) + j, x_step, opening, closing, order, row, T, column, last, W)
            tl.store(final + column * (W - 1) + j, value.to(final.dtype.element_ty), mask=last)


@triton.jit
def _gradient_of_preactivation(z, dy):
    s = _sigmoid(z)
    return dy * (s * (1.0 + z * (1.0 - s)))


@triton.jit
def _gradient_of_input(errors, taps, W: tl.constexpr):
    """dx[s] from dz[s], ..., dz[s + W - 1]."""
    dx = errors[W - 1] * taps[0]
    for j in tl.static_range(1, W):
        dx += errors[W - 1 - j] * taps[j]
    return dx


@triton.jit
def _add_products(sums, value, errors, W: tl.constexpr):
    """sums[j] + x[s] dz[s + W - 1 - j]."""
    result = ()
    for j in tl.static_range(W):
        result += (sums[j] + value * errors[W - 1 - j],)
    return result


@triton.jit(
    do_not_specialize=[
        "beta_scale", "T", "strips_per_row", "strip", "programs", "q_tiles", "k_tiles", "tiles", "q_units", "k_units",
        "v_units", "q_b", "q_t", "k_b", "k_t", "v_b", "v_t", "qg_b", "qg_t", "kg_b", "kg_t", "vg_b", "vg_t",
        "H", "blocks_per_row", "raw_b", "raw_t", "raw_h",
    ]
)  # fmt: skip
def backward_kernel(
    q, k, v, q_weight, k_weight, v_weight, q_state, k_state, v_state, q_grad, k_grad, v_grad,
    dq_final, dk_final, dv_final, dq, dk, dv, dq_state, dk_state, dv_state, sums, b, dbeta, db, table, cu_seqlens, order,
    padded, beta_scale, T, strips_per_row, strip, programs, q_tiles, k_tiles, tiles, q_units, k_units, v_units,
    q_b, q_t, k_b, k_t, v_b, v_t, qg_b, qg_t, kg_b, kg_t, vg_b, vg_t, H, blocks_per_row, raw_b, raw_t, raw_h,
    W: tl.constexpr, BD: tl.constexpr, UNROLL: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One strip and tile of channels: dx, the strip's row of `sums` [strips, W, all channels], and at the start of a
    sequence dstate. Behind `programs`, a block of db. Units as in `forward_kernel`."""
    index = tl.program_id(0)
    if index >= programs:
        if b is not None:
            own, place, exists = _beta_places(index - programs, T, H, blocks_per_row, raw_b, raw_t, raw_h, BLOCK)
            s = tl.sigmoid(tl.load(b + place, mask=exists, other=0.0).to(tl.float32))
            b_db = tl.load(dbeta + own, mask=exists, other=0.0) * (beta_scale * s * (1.0 - s))
            tl.store(db + own, b_db.to(db.dtype.element_ty), mask=exists)
        return
    tile = index % tiles
    row, sequence, start, stop, opening, closing, sorted_place = _find_strip(
        index // tiles, table, cu_seqlens, padded, T, strips_per_row, strip, W
    )
    if order is not None:
        order += sorted_place
    stream = tl.where(tile < q_tiles, 0, tl.where(tile < q_tiles + k_tiles, 1, 2))
    x, dy, dx = _pick(stream, q, k, v), _pick(stream, q_grad, k_grad, v_grad), _pick(stream, dq, dk, dv)
    x_b, x_t, D = _pick(stream, q_b, k_b, v_b), _pick(stream, q_t, k_t, v_t), _pick(stream, q_units, k_units, v_units) * UNIT
    dy_b, dy_t = _pick(stream, qg_b, kg_b, vg_b), _pick(stream, qg_t, kg_t, vg_t)
    weight = _pick(stream, q_weight, k_weight, v_weight)
    column = (tile - _pick(stream, 0, q_tiles, q_tiles + k_tiles)) * BD + tl.arange(0, BD)
    inside = column < D
    x += row * x_b * UNIT
    dy += row * dy_b * UNIT
    dx += row * T * D
    x_step, dy_step, dx_step = x_t.to(tl.int64) * UNIT, dy_t.to(tl.int64) * UNIT, D.to(tl.int64)
    opens = start == opening
    state = None
    if q_state is not None:
        state = _pick(stream, q_state, k_state, v_state) + sequence * D * (W - 1)
        dstate = _pick(stream, dq_state, dk_state, dv_state) + sequence * D * (W - 1)
    dfinal = None
    if dq_final is not None:
        # Element j of the final state is token closing - (W - 1) + j.
        dfinal = _pick(stream, dq_final, dk_final, dv_final) + sequence * D * (W - 1) + column * (W - 1) + (W - 1) - closing

    taps = _load_taps(weight, column, inside, W)
    inputs, errors, products = (), (), ()
    for j in tl.static_range(W - 1):
        inputs += (_load_input(x, state, start - (W - 1) + j, x_step, opening, closing, order, row, T, column, inside, W),)
        errors += (tl.zeros([BD], tl.float32),)
    for _ in tl.static_range(W):
        products += (tl.zeros([BD], tl.float32),)
    # The first W - 1 errors complete the gradients of the inputs before the strip, which are its own if they are a state.
    for j in tl.static_range(W - 1):
        t = start + j
        inputs += (_load_input(x, None, t, x_step, opening, closing, order, row, T, column, inside, W),)
        b_dy = _load_input(dy, None, t, dy_step, opening, closing, order, row, T, column, inside, W)
        errors += (_gradient_of_preactivation(_convolve(inputs, taps, W), b_dy),)
        if state is not None:
            products = _add_products(products, tl.where(opens, inputs[0], 0.0), errors, W)
            b_dx = _gradient_of_input(errors, taps, W)
            if dfinal is not None:
                kept = inside & opens & (t >= closing)
                b_dx += tl.load(dfinal + (t - (W - 1)), mask=kept, other=0.0).to(tl.float32)
            tl.store(dstate + column * (W - 1) + j, b_dx.to(dstate.dtype.element_ty), mask=inside & opens)
        inputs, errors = inputs[1:], errors[1:]

    x_row, dy_row, dx_row = x + (start + W - 1) * x_step, dy + (start + W - 1) * dy_step, dx + start * dx_step
    for group in range(start, stop, UNROLL):
        loaded, loaded_dy = (), ()
        for u in tl.static_range(UNROLL):
            t = group + u + W - 1
            place = _next_row(x, x_row, u, t, x_step, order, row, T, W) + column
            loaded += (tl.load(place, mask=inside & (t < closing), other=0.0),)
            place = _next_row(dy, dy_row, u, t, dy_step, order, row, T, W) + column
            loaded_dy += (tl.load(place, mask=inside & (t < closing), other=0.0),)
        for u in tl.static_range(UNROLL):
            s = group + u
            inputs += (loaded[u].to(tl.float32),)
            errors += (_gradient_of_preactivation(_convolve(inputs, taps, W), loaded_dy[u].to(tl.float32)),)
            # Behind the strip there is nothing: it ends with its sequence or after a multiple of UNROLL tokens.
            products = _add_products(products, inputs[0], errors, W)
            b_dx = _gradient_of_input(errors, taps, W)
            if dfinal is not None:
                kept = inside & (s >= closing - (W - 1)) & (s < closing)
                b_dx += tl.load(dfinal + s, mask=kept, other=0.0).to(tl.float32)
            place = _next_row(dx, dx_row, u, s, dx_step, order, row, T, W) + column
            tl.store(place, b_dx.to(dx.dtype.element_ty), mask=inside & (s < stop))
            inputs, errors = inputs[1:], errors[1:]
        x_row += UNROLL * x_step
        dy_row += UNROLL * dy_step
        dx_row += UNROLL * dx_step

    channels = (q_units + k_units + v_units) * UNIT
    before = _pick(stream, 0, q_units, q_units + k_units) * UNIT
    sums += (index // tiles).to(tl.int64) * W * channels + before + column
    for j in tl.static_range(W):
        tl.store(sums + j * channels, products[j], mask=inside)


@triton.jit(do_not_specialize=["strips", "q_width", "k_width", "channels"])
def sum_kernel(
    sums, dq_weight, dk_weight, dv_weight, strips, q_width, k_width, channels,
    W: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """sums [strips, W, all channels] -> dweight [D, 1, W] of q, k and v, for one tile of channels and one tap."""
    tap = tl.program_id(0) % W
    column = tl.program_id(0) // W * BD + tl.arange(0, BD)
    total = tl.zeros([BD], tl.float32)
    for first in range(0, strips, ROWS):
        rows = first + tl.arange(0, ROWS)
        place = sums + (rows.to(tl.int64) * W + tap)[:, None] * channels + column[None, :]
        total += tl.sum(tl.load(place, mask=(rows < strips)[:, None] & (column < channels)[None, :], other=0.0), 0)
    k_column, v_column = column - q_width, column - q_width - k_width
    to_k = tl.where(v_column >= 0, dv_weight + v_column * W, dk_weight + k_column * W)
    place = tl.where(k_column >= 0, to_k, dq_weight + column * W) + tap
    tl.store(place, total.to(dq_weight.dtype.element_ty), mask=column < channels)
