"""The delta rule on a GPU one token after the other: for decoding, for a few tokens, and for comparison.

A program keeps a state's tile [K, BV] in registers and does all arithmetic in float32. Memory moves one state in and one
out, and each token once: for one token a call costs the bytes of its states.
"""

from typing import Optional

import torch
from torch import Tensor

from .devices import on_device
from .launching import Prepared

try:  # Transformers wants every package that custom code imports outside of a `try`
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the fused kernels need Triton") from error


@triton.jit(
    do_not_specialize=[
        "scale", "T", "H", "q_b", "q_t", "q_h", "q_k", "k_b", "k_t", "k_h", "k_k", "v_b", "v_t", "v_h", "v_v",
        "beta_b", "beta_t", "beta_h", "s_n", "s_h", "s_k", "s_v",
    ]
)  # fmt: skip
def recurrent_kernel(
    q, k, v, beta, o, initial, final, indices, cu_seqlens, scale, T, H,
    q_b, q_t, q_h, q_k, k_b, k_t, k_h, k_k, v_b, v_t, v_h, v_v, beta_b, beta_t, beta_h, s_n, s_h, s_k, s_v,
    K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, L2: tl.constexpr,
):  # fmt: skip
    """One sequence, head and tile of value columns. `initial` and `final` may be one tensor, or None; `indices` names the
    state of each sequence, -1 none: its outputs are zero. o is contiguous."""
    tiles: tl.constexpr = (V + BV - 1) // BV
    tile = tl.program_id(0) % tiles
    h = ((tl.program_id(0) // tiles) % H).to(tl.int64)
    n = (tl.program_id(0) // tiles // H).to(tl.int64)
    ik, iv = tl.arange(0, KP), tile * BV + tl.arange(0, BV)
    in_k, in_v = ik < K, iv < V
    if cu_seqlens is None:
        b = n
        start = n * 0
        length = T
    else:
        b = n * 0
        start = tl.load(cu_seqlens + n).to(tl.int64)
        length = (tl.load(cu_seqlens + n + 1) - start).to(tl.int32)
    q += b * q_b + start * q_t + h * q_h
    k += b * k_b + start * k_t + h * k_h
    v += b * v_b + start * v_t + h * v_h
    beta += b * beta_b + start * beta_t + h * beta_h
    o += ((b * T + start) * H + h) * V
    own = n
    if indices is not None:
        own = tl.load(indices + n).to(tl.int64)
    place = own * s_n + h * s_h + ik[:, None].to(tl.int64) * s_k + iv[None, :].to(tl.int64) * s_v
    here = in_k[:, None] & in_v[None, :] & (own >= 0)

    S = tl.zeros([KP, BV], tl.float32)  # [K, BV]
    if initial is not None:
        S += tl.load(initial + place, mask=here, other=0.0).to(tl.float32)
    for t in range(length):
        token = tl.cast(t, tl.int64)
        b_q = tl.load(q + token * q_t + ik * q_k, mask=in_k, other=0.0).to(tl.float32)
        b_k = tl.load(k + token * k_t + ik * k_k, mask=in_k, other=0.0).to(tl.float32)
        b_v = tl.load(v + token * v_t + iv * v_v, mask=in_v, other=0.0).to(tl.float32)
        b_beta = tl.load(beta + token * beta_t).to(tl.float32)
        if L2:
            b_q *= tl.rsqrt(tl.sum(b_q * b_q, 0) + 1e-6)
            b_k *= tl.rsqrt(tl.sum(b_k * b_k, 0) + 1e-6)
        error = b_v - tl.sum(S * b_k[:, None], 0)  # [BV]
        S += b_k[:, None] * (b_beta * error)[None, :]
        b_o = tl.sum(S * b_q[:, None], 0) * scale
        b_o = tl.where(own >= 0, b_o, 0.0)
        tl.store(o + token * H * V + iv, b_o.to(o.dtype.element_ty), mask=in_v)
    if final is not None:
        tl.store(final + place, S.to(final.dtype.element_ty), mask=here)


def _run(q, k, v, beta, o, initial, final, indices, cu_seqlens, scale, use_l2) -> None:
    """q, k, v [B, T, H, D], beta [B, T, H]; strides of `initial` and `final` are the same."""
    (B, T, H, K), V = q.shape, v.shape[-1]
    KP = max(16, 1 << (K - 1).bit_length())
    columns = min(max(1, 4096 // KP), 1 << (V - 1).bit_length())
    sequences = B if cu_seqlens is None else len(cu_seqlens) - 1
    state = initial if final is None else final
    strides = (0, 0, 0, 0) if state is None else state.stride()
    numbers = (scale, T, H, *q.stride(), *k.stride(), *v.stride(), *beta.stride(), *strides)
    constants = dict(K=K, KP=KP, V=V, BV=columns, L2=use_l2)
    programs = -(-V // columns) * H * sequences
    with on_device(q):
        launch = Prepared(recurrent_kernel, programs, numbers, constants, dict(num_warps=4, num_stages=1))
        launch(q, k, v, beta, o, initial, final, indices, cu_seqlens)


def recurrent_forward(q, k, v, beta, scale, initial_state, output_final_state, use_l2, cu_seqlens, keep_states=False):
    """As `reference.recurrent_forward`: it saves nothing, not even states that one asks to keep."""
    # A tail behind the last sequence is nobody's: its outputs are zero.
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device) if cu_seqlens is None else v.new_zeros(v.shape)
    initial_state = None if initial_state is None else initial_state.contiguous()
    sequences = len(q) if cu_seqlens is None else len(cu_seqlens) - 1
    empty = q.new_empty(0, dtype=torch.float32)
    final_state = None
    if output_final_state:
        final_state = q.new_empty((sequences, q.shape[2], q.shape[3], v.shape[3]), dtype=torch.float32)
    _run(q, k, v, beta, o, initial_state, final_state, None, cu_seqlens, scale, use_l2)
    return o, empty if final_state is None else final_state, empty, torch.empty_like(empty)


def step_forward(q, k, v, beta, state, scale, use_l2, state_indices: Optional[Tensor]):
    """As `reference.step_forward`: one token, `state` updated in place."""
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    q, k, v, beta, rows = (x[:, None] for x in (q, k, v, beta, o))
    _run(q, k, v, beta, rows, state, state, state_indices, None, scale, use_l2)
    return o
