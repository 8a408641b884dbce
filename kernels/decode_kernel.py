"""The decoding step on a GPU in one launch: convolutions, norms, delta rule and output norm of a token.

A program has one head of one row: it moves the head's state through registers in tiles [K, BV], one of them where K x V
is at most 128 x 128, and keeps the whole output for the norm. All of the first tile is asked for before anything is waited
for, so that a step of one row costs little more than one trip to memory; many rows cost their bytes.

Expected on an H100 (3.0 TB/s; 132 multiprocessors that take some 60 bytes a clock each), H 16, D 128, float32 state: a
row moves 2.1 MB of states and 0.2 MB of the rest. One row, 16 programs: 64 KiB in and 64 KiB out of one multiprocessor,
0.6 us each, two trips to memory, 1.2 us, and a dozen barriers, in all 3 to 4 us. 64 rows: 147 MB, 49 us.
"""

from typing import Optional

import torch
from torch import Tensor

from .chunk_configurations import Launch
from .devices import on_device

try:  # Transformers wants every package that custom code imports outside of a `try`
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the fused kernels need Triton") from error


@triton.jit
def _inputs(x, past, weight, channel, p_c, p_w, C: tl.constexpr, W: tl.constexpr, WP: tl.constexpr):
    """The last W inputs of the channels, oldest first and in the dtype of x, and their weights: [channels, WP]."""
    tap = tl.arange(0, WP)[None, :]
    inside = channel < C
    new = tl.load(x + channel, mask=inside, other=0.0)
    before = tl.load(past + channel[:, None] * p_c + tap * p_w, mask=inside[:, None] & (tap < W - 1), other=0.0)
    taps = tl.load(weight + channel[:, None] * W + tap, mask=inside[:, None] & (tap < W), other=0.0)
    return tl.where(tap == W - 1, new[:, None], before.to(new.dtype)), taps.to(tl.float32)


@triton.jit
def _convolve(window, taps):
    """SiLU of the convolution, rounded to the dtype of its input: [channels] in float32."""
    y = tl.sum(window.to(tl.float32) * taps, 1)
    return (y * tl.sigmoid(y)).to(window.dtype).to(tl.float32)


@triton.jit
def _shift(past, window, channel, p_c, p_w, C: tl.constexpr, W: tl.constexpr, WP: tl.constexpr):
    tap = tl.arange(0, WP)[None, :]
    kept = (channel < C)[:, None] & (tap > 0) & (tap < W)
    tl.store(past + channel[:, None] * p_c + (tap - 1) * p_w, window.to(past.dtype.element_ty), mask=kept)


@triton.jit
def _load_state(place, ik, iv, K: tl.constexpr, V: tl.constexpr, PADDED: tl.constexpr):
    if PADDED:
        S = tl.load(place, mask=(ik < K)[:, None] & (iv < V)[None, :], other=0.0)
    else:
        S = tl.load(place)
    return S.to(tl.float32)


@triton.jit
def _add_two(a, b, c, d):
    return a + c, b + d


@triton.jit
def _add_three(a, b, c, d, e, f):
    return a + d, b + e, c + f


@triton.jit(
    do_not_specialize=[
        "scale", "beta_scale", "eps", "H", "q_b", "k_b", "v_b", "beta_b", "gate_b", "q_n", "k_n", "v_n", "p_c", "p_w",
    ]
)  # fmt: skip
def decode_kernel(
    q, k, v, beta, gate, q_past, k_past, v_past, q_weight, k_weight, v_weight, state, norm_weight, o, indices,
    scale, beta_scale, eps, H, q_b, k_b, v_b, beta_b, gate_b, q_n, k_n, v_n, p_c, p_w, s_n,
    K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, TILES: tl.constexpr, W: tl.constexpr,
    WP: tl.constexpr, SHARED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One row and head. *_b are the strides of rows, *_n those of states, p_c and p_w those inside the convolutions'
    states; everything else is dense. `beta`, `gate` and `indices` may be None; o is contiguous. Triton specialises on s_n,
    without which it could not tell that rows of a state start where 16 bytes can be loaded at once."""
    TP: tl.constexpr = triton.next_power_of_2(TILES)
    PADDED: tl.constexpr = KP != K or TILES * BV != V
    dtype: tl.constexpr = o.dtype.element_ty
    b = (tl.program_id(0) // H).to(tl.int64)
    h = (tl.program_id(0) % H).to(tl.int64)
    ik, iv, jv = tl.arange(0, KP), tl.arange(0, BV), tl.arange(0, TP * BV)
    tile = tl.arange(0, TP)[:, None]
    columns = tile * BV + iv[None, :]  # [TP, BV]
    o += (b * H + h) * V
    n = b
    if indices is not None:
        n = tl.load(indices + b).to(tl.int64)
        if n < 0:
            tl.store(o + columns, tl.zeros([TP, BV], dtype), mask=columns < V)
            return
    q_past += n * q_n + h * K * p_c
    k_past += n * k_n + h * K * p_c
    v_past += n * v_n + h * V * p_c

    q_window, q_taps = _inputs(q + b * q_b + h * K, q_past, q_weight + h * K * W, ik, p_c, p_w, K, W, WP)
    k_window, k_taps = _inputs(k + b * k_b + h * K, k_past, k_weight + h * K * W, ik, p_c, p_w, K, W, WP)
    v_window, v_taps = _inputs(v + b * v_b + h * V, v_past, v_weight + h * V * W, jv, p_c, p_w, V, W, WP)
    place = state + n * s_n + h * K * V + ik[:, None] * V + iv[None, :]
    if TILES == 1:
        S = _load_state(place, ik, iv, K, V, PADDED)
    b_beta = beta_scale
    if beta is not None:
        b_beta = tl.sigmoid(tl.load(beta + b * beta_b + h).to(tl.float32)) * beta_scale
    w = tl.load(norm_weight + columns, mask=columns < V, other=0.0).to(tl.float32)
    if gate is not None:
        g = tl.load(gate + b * gate_b + h * V + columns, mask=columns < V, other=0.0).to(tl.float32)

    b_q = _convolve(q_window, q_taps)
    b_k = _convolve(k_window, k_taps)
    b_v = tl.reshape(_convolve(v_window, v_taps), (TP, BV))
    qq, kk, qk = tl.reduce((b_q * b_q, b_k * b_k, b_q * b_k), 0, _add_three)
    r_q, r_k = tl.rsqrt(qq + 1e-6) * scale, tl.rsqrt(kk + 1e-6)
    b_q *= r_q
    b_k *= r_k
    b_o = tl.zeros([TP, BV], tl.float32)
    for i in tl.range(TILES, num_stages=STAGES):
        if TILES > 1:
            S = _load_state(place + i * BV, ik, i * BV + iv, K, V, PADDED)  # [K, BV]
        read_q, read_k = tl.reduce((S * b_q[:, None], S * b_k[:, None]), 0, _add_two)  # [BV]
        v_new = b_beta * (tl.sum(tl.where(tile == i, b_v, 0.0), 0) - read_k)
        b_o = tl.where(tile == i, (read_q + qk * r_q * r_k * v_new)[None, :], b_o)
        S += b_k[:, None] * v_new[None, :]
        if SHARED:
            tl.debug_barrier()
        if PADDED:
            here = (ik < K)[:, None] & (i * BV + iv < V)[None, :]
            tl.store(place + i * BV, S.to(state.dtype.element_ty), mask=here)
        else:
            tl.store(place + i * BV, S.to(state.dtype.element_ty))
    # Several threads hold the same input; none must write it before all have read it.
    tl.debug_barrier()
    _shift(q_past, q_window, ik, p_c, p_w, K, W, WP)
    _shift(k_past, k_window, ik, p_c, p_w, K, W, WP)
    _shift(v_past, v_window, jv, p_c, p_w, V, W, WP)

    b_o = b_o.to(dtype).to(tl.float32)
    b_o *= tl.rsqrt(tl.sum(tl.sum(b_o * b_o, 1), 0) / V + eps) * w
    if gate is not None:
        b_o = b_o.to(dtype).to(tl.float32) * (g * tl.sigmoid(g)).to(dtype).to(tl.float32)
    tl.store(o + columns, b_o.to(dtype), mask=columns < V)


def launch_of(K: int, V: int) -> Launch:
    """Tiles of at most 64 KiB, half of that where there are several; a thread holds 64 numbers of one, or fewer. Two
    programs of 8 warps fit a multiprocessor: one computes while the other waits for memory."""
    KP, VP = 1 << (K - 1).bit_length(), 1 << (V - 1).bit_length()
    columns = min(VP, 256) if KP * VP <= 16384 else min(256, 8192 // KP)
    # The convolution of all values of a head is in registers too.
    return Launch(columns, 8 if KP * columns >= 8192 or VP >= 1024 else 4, 1)


def decode_forward(
    q, k, v, beta, gate, q_past, k_past, v_past, state, q_weight, k_weight, v_weight, norm_weight, norm_eps, beta_scale,
    scale, state_indices: Optional[Tensor], launch: Optional[Launch] = None,
) -> Tensor:  # fmt: skip
    """As `decode_step.composed`; `launch` overrides `launch_of`."""
    (B, channels), (_, H, K, V), W = v.shape, state.shape, q_weight.shape[-1]
    columns, warps, stages, _ = launch or launch_of(K, V)
    KP = 1 << (K - 1).bit_length()
    o = torch.empty((B, channels), dtype=v.dtype, device=v.device)
    with on_device(q):
        decode_kernel[(B * H,)](
            q, k, v, beta, gate, q_past, k_past, v_past, q_weight, k_weight, v_weight, state, norm_weight, o, state_indices,
            scale, beta_scale, norm_eps, H, q.stride(0), k.stride(0), v.stride(0),
            0 if beta is None else beta.stride(0), 0 if gate is None else gate.stride(0),
            q_past.stride(0), k_past.stride(0), v_past.stride(0), *q_past.stride()[1:], state.stride(0),
            K=K, KP=KP, V=V, BV=columns, TILES=-(-V // columns), W=W, WP=1 << (W - 1).bit_length(),
            # Sixteen bytes a thread are at most 8 numbers: in a smaller tile several threads hold the same ones.
            SHARED=KP * columns < 8 * 32 * warps, STAGES=stages, num_warps=warps, num_stages=1,
        )  # fmt: skip
    return o
