"""The decoding step of a delta layer: everything between its input projections and its output projection, for one token.

    q, k, v = SiLU(short convolution of the projections), rounded to their dtype; the convolutions' states shift by one
    q, k    = q / |q|, k / |k|                            per head, 1e-6 under the root
    beta    = beta_scale sigmoid(b)                       in float32
    S      <- S + k beta (v - Sᵀ k)ᵀ                      o = scale Sᵀ q, rounded to the dtype of v
    o       = RMSNorm of each head, rounded; where gated, times SiLU(gate), rounded before and after the product

`composed` is that in PyTorch operations, one after the other, and runs wherever the kernel of `decode_kernel.py` does
not: `decode_step` picks one of them and a log line says which, and why.
"""

import functools
import logging
import os
from typing import Callable, Optional, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_decode_step, check_step_values
from .delta_rule import NAMESPACE
from .devices import forced_backend, fused_kernels_refuse, triton_refuses
from .operators import registered
from .reference import compute_dtype, step_forward, write_rows
from .short_conv import short_convolution_step

WIDTHS = range(2, 9)
"""Widths of a convolution that the kernel takes."""

logger = logging.getLogger("deltanet.kernels")


def decode_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Optional[Tensor],
    gate: Optional[Tensor],
    conv_states: Sequence[Tensor],
    state: Tensor,
    conv_weights: Sequence[Tensor],
    norm_weight: Tensor,
    *,
    norm_eps: float,
    beta_scale: float = 1.0,
    scale: Optional[float] = None,
    state_indices: Optional[Tensor] = None,
) -> Tensor:
    """One token through a delta layer with SiLU, L2 norm and short convolutions. All four states change in place.

    Args:
        q, k: [B, H * K], the projections before their convolutions; v: [B, H * V] of the same dtype. Rows may be apart.
        beta: [B, H], the projection before its sigmoid; None stands for a sigmoid of one.
        gate: [B, H * V] before its SiLU, or None.
        conv_states: of q, k and v, [N, H * K or H * V, W - 1] each, oldest input first.
        state: [N, H, K, V] float32 or bfloat16 (float64 with float64 inputs); arithmetic is float32.
        conv_weights: [H * K or H * V, 1, W] each; norm_weight: [V].
        norm_eps: of the output norm. beta_scale: multiplies the sigmoid. scale: multiplies q; None means K ** -0.5.
        state_indices: [B] int32 or int64, the states of each row; -1 leaves every state alone and returns zeros for the
            row. No state twice. None means row b uses states b, and N must be B.

    Returns:
        o [B, H * V] in the dtype of v, contiguous.

    Not differentiable. Nothing waits for the device, B and N compile nothing, and a CUDA graph may capture it.

    Raises:
        TypeError, ValueError: an argument does not fit. Values (NaN in beta, state_indices) are looked at on CPU tensors,
            and on others only with DELTANET_CHECK=1 in the environment.
        RuntimeError: a gradient is wanted, or DELTANET_BACKEND is "triton" and the kernel cannot run.
    """
    arguments = (q, k, v, beta, gate, *conv_states, state, *conv_weights, norm_weight)
    check_decode_step(*arguments, state_indices)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in arguments):
        raise RuntimeError("decode_step has no gradient, and an argument requires one; call it under torch.no_grad()")
    scale = state.shape[2] ** -0.5 if scale is None else float(scale)
    return _op(*arguments, float(norm_eps), float(beta_scale), scale, state_indices)


def composed(
    q, k, v, beta, gate, q_past, k_past, v_past, state, q_weight, k_weight, v_weight, norm_weight, norm_eps, beta_scale,
    scale, state_indices: Optional[Tensor],
) -> Tensor:  # fmt: skip
    """The step in PyTorch operations."""
    H, V = state.shape[1], state.shape[3]
    rows = None if state_indices is None else state_indices.long()
    with torch.autocast(q.device.type, enabled=False):  # it would reach in here and lower the precision
        streams = ((q, q_weight, q_past), (k, k_weight, k_past), (v, v_weight, v_past))
        q, k, v = (_convolve(*stream, rows).unflatten(-1, (H, -1)) for stream in streams)
        dtype = compute_dtype(v.dtype)
        if beta is None:
            strength = q.new_full(q.shape[:2], beta_scale, dtype=dtype)
        else:
            strength = beta.to(dtype).sigmoid() * beta_scale
        o = step_forward(q, k, v, strength, state, scale, True, rows)
        o = F.rms_norm(o.to(dtype), (V,), norm_weight.to(dtype), norm_eps).to(v.dtype)
        if gate is not None:
            o = o * F.silu(gate).unflatten(-1, (H, V))
        o = o.flatten(1)
        return o if rows is None else o.masked_fill((rows < 0)[:, None], 0)


def _convolve(x: Tensor, weight: Tensor, past: Tensor, rows: Optional[Tensor]) -> Tensor:
    if rows is None:
        return short_convolution_step(x, weight, None, "silu", past)
    before = past.index_select(0, rows.clamp(min=0))
    after = before.clone()
    y = short_convolution_step(x, weight, None, "silu", after)
    write_rows(past, rows, before, after)
    return y


def _is_dense(q, k, v, beta, gate, q_past, k_past, v_past, state, *weights) -> bool:
    """Whether only rows and states are apart, which the kernel asks for; convolutions' states may be transposed."""
    _, _, K, V = state.shape
    if state.stride()[1:] != (K * V, V, 1) or not q_past.stride()[1:] == k_past.stride()[1:] == v_past.stride()[1:]:
        return False
    return all(x is None or x.stride(1) == 1 for x in (q, k, v, beta, gate)) and all(x.is_contiguous() for x in weights)


def _refusal(device: torch.device, dtype: torch.dtype, W: int, is_dense: bool) -> str:
    """Why the kernel cannot run; empty where it can."""
    # Heads of one: the step needs next to no shared memory, whatever the head size.
    if reason := triton_refuses() or fused_kernels_refuse(device, dtype, 1):
        return reason
    if W not in WIDTHS:
        return f"the decoding kernel takes convolutions of width {WIDTHS.start} to {WIDTHS.stop - 1}, not {W}"
    return "" if is_dense else "the decoding kernel takes states that are dense but for the distance between rows"


@functools.cache
def _choose(device: torch.device, dtype: torch.dtype, W: int, is_dense: bool, forced: str, interpreted: bool) -> Callable:
    """What runs a step, with a log line; `interpreted` is there because `fused_kernels_refuse` looks at it."""
    if forced in ("torch", "recurrent"):
        return _announced(device, composed, "DELTANET_BACKEND asks for it")
    if not forced and device.type != "cuda":
        return _announced(device, composed, f"no fused kernels for {device.type}")
    reason = _refusal(device, dtype, W, is_dense)
    if reason and forced:
        raise RuntimeError(f"DELTANET_BACKEND is 'triton', but {reason}")
    if reason:
        return _announced(device, composed, reason)
    from .decode_kernel import decode_forward

    return _announced(device, decode_forward, "DELTANET_BACKEND asks for it" if forced else "tensors on a GPU")


def _announced(device: torch.device, chosen: Callable, reason: str) -> Callable:
    _announce(device.type, "composed" if chosen is composed else "fused", reason)
    return chosen


@functools.cache
def _announce(device: str, name: str, reason: str) -> None:
    logger.info("decoding step on %s: %s implementation (%s)", device, name, reason)


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Optional[Tensor],
    gate: Optional[Tensor],
    q_past: Tensor,
    k_past: Tensor,
    v_past: Tensor,
    state: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    norm_weight: Tensor,
    norm_eps: float,
    beta_scale: float,
    scale: float,
    state_indices: Optional[Tensor],
) -> Tensor:
    check_step_values(beta, state, state_indices)
    arguments = (q, k, v, beta, gate, q_past, k_past, v_past, state, q_weight, k_weight, v_weight, norm_weight)
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    run = _choose(q.device, q.dtype, q_weight.shape[-1], _is_dense(*arguments), forced_backend(), interpreted)
    return run(*arguments, norm_eps, beta_scale, scale, state_indices)


def _define():
    """Register the operator. `torch.library.custom_op` would add 90 us on the host to each call, for gradients and version
    counters that a step has no use for."""
    if registered(NAMESPACE, "decode_step"):
        return registered(NAMESPACE, "decode_step")
    name = f"{NAMESPACE}::decode_step"
    schema = torch.library.infer_schema(_run, mutates_args=("q_past", "k_past", "v_past", "state"))
    torch.library.define(name, schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(name, "default", _run)
    torch.library.register_fake(name, lambda q, k, v, *_: v.new_empty(v.shape))
    return registered(NAMESPACE, "decode_step")


_op = _define()
