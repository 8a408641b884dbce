"""The prologue of the delta rule: short convolutions and SiLU of q, k and v, and the writing strength, in one operation.

    q, k, v = silu(short_convolution(q)), ...          beta = beta_scale sigmoid(b)

On a GPU one kernel reads the projections in place, and one goes back (`prologue_kernels.py`); everywhere else, and for
what those do not take, the same is composed out of `short_conv.py` and PyTorch. The L2 norm of q and k belongs to the
delta rule's own kernels, where it costs a factor per row instead of a trip through memory.
"""

import functools
import logging
from typing import NamedTuple, Optional, Sequence

import torch
from torch import Tensor

from .delta_rule import NAMESPACE
from .devices import forced_backend, fused_kernels_refuse, triton_refuses
from .operators import refuse, register, save_nothing
from .reference import compute_dtype
from .short_conv import PaddingOrder, check_convolution, short_convolution

logger = logging.getLogger("deltanet.kernels")

WIDTHS = (2, 3, 4)
"""Widths of a convolution that the kernels take."""


class Prologue(NamedTuple):
    """q [B, T, Dk], k [B, T, Dk] and v [B, T, Dv] in the dtype they came in, beta [B, T, H] float32, None without b, and
    the final states [N, D, W - 1] of q, k and v, Nones where they were not asked for."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Optional[Tensor]
    final_states: tuple[Optional[Tensor], Optional[Tensor], Optional[Tensor]]


def delta_rule_prologue(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    b: Optional[Tensor],
    weights: Sequence[Tensor],
    *,
    beta_scale: float = 1.0,
    activations: Sequence[Optional[str]] = ("silu", "silu", "silu"),
    initial_states: Sequence[Optional[Tensor]] = (None, None, None),
    output_final_state: bool = False,
    cu_seqlens: Optional[Tensor] = None,
    padding_order: Optional[PaddingOrder] = None,
) -> Prologue:
    """Convolutions of the projections q, k and v, and beta from the projection b.

    Args:
        q, k, v: [B, T, D], each with a D of its own and any strides; rows that are not dense are copied.
        b: [B, T, H], or None.
        weights: [D, 1, W] of q, k and v.
        beta_scale: multiplies sigmoid(b): 2 allows negative eigenvalues.
        activations: of q, k and v, "silu" or None.
        initial_states, output_final_state, cu_seqlens, padding_order: as in `short_convolution`, the states as three.

    All arithmetic is float32 (float64 for float64), with one rounding at the end. The fused kernels take SiLU for all
    three, one width of 2 to 4 and one dtype other than float64; they are differentiable once, sum in a fixed order, and
    never wait for the device.

    Raises:
        TypeError, ValueError: an argument does not fit, as in `short_convolution`.
        RuntimeError: DELTANET_BACKEND names an implementation that cannot run here.
    """
    streams = (q, k, v)
    for x, weight, activation, state in zip(streams, weights, activations, initial_states, strict=True):
        check_convolution(x, weight, activation, state, cu_seqlens, padding_order)
    for name, x in (("k", k), ("v", v), ("b", b)):
        if x is not None and (x.dim() != 3 or x.shape[:2] != q.shape[:2]):
            raise ValueError(f"{name} has shape {tuple(x.shape)} and q {tuple(q.shape)}; [B, T] must be equal")
    reason = _not_covered(streams, weights, activations, initial_states)
    if _is_fused(q.device, q.dtype, reason):
        order = (None, None) if padding_order is None else (padding_order.gather, padding_order.padded)
        results = _op(*streams, b, *weights, *initial_states, float(beta_scale), output_final_state, cu_seqlens, *order)
        finals = results[4:] if output_final_state else (None, None, None)
        return Prologue(*results[:3], None if b is None else results[3], tuple(finals))
    convolved = [
        short_convolution(x, weight, None, activation, state, output_final_state, cu_seqlens, padding_order)
        for x, weight, activation, state in zip(streams, weights, activations, initial_states)
    ]
    beta = None if b is None else b.to(compute_dtype(b.dtype)).sigmoid() * beta_scale
    return Prologue(*(y for y, _ in convolved), beta, tuple(final for _, final in convolved))


def _not_covered(streams, weights, activations, initial_states) -> str:
    """Why the kernels do not take these arguments, on any device; empty where they do."""
    widths = [weight.shape[-1] for weight in weights]
    if set(activations) != {"silu"}:
        return "an activation other than SiLU"
    if widths[0] not in WIDTHS or widths.count(widths[0]) < 3:
        return f"widths {widths}, not one of {', '.join(map(str, WIDTHS))}"
    for tensors in (streams, weights, initial_states):
        if len({None if x is None else x.dtype for x in tensors}) > 1:
            return "q, k and v differ in their dtypes or states"
    return ""


@torch.compiler.assume_constant_result
def _is_fused(device: torch.device, dtype: torch.dtype, not_covered: str) -> bool:
    """Whether the kernels run; a compiled graph keeps the answer."""
    forced = forced_backend()
    if forced in ("torch", "recurrent"):
        return _announced(device, False, "DELTANET_BACKEND asks for it")
    if not forced and device.type != "cuda":
        return _announced(device, False, f"no fused kernels for {device.type}")
    refused = triton_refuses() or fused_kernels_refuse(device, dtype, 0)
    if refused and forced:
        raise RuntimeError(f"DELTANET_BACKEND is 'triton', but {refused}")
    if refused or not_covered:
        return _announced(device, False, refused or not_covered)
    return _announced(device, True, "DELTANET_BACKEND asks for it" if forced else "tensors on a GPU")


def _announced(device: torch.device, fused: bool, reason: str) -> bool:
    _announce(device.type, "triton" if fused else "torch", reason)
    return fused


@functools.cache
def _announce(device: str, name: str, reason: str) -> None:
    logger.info("prologue on %s: %s implementation (%s)", device, name, reason)


def _define():
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        b: Optional[Tensor],
        q_weight: Tensor,
        k_weight: Tensor,
        v_weight: Tensor,
        q_state: Optional[Tensor],
        k_state: Optional[Tensor],
        v_state: Optional[Tensor],
        beta_scale: float,
        output_final_state: bool,
        cu_seqlens: Optional[Tensor],
        order: Optional[Tensor],
        padded: Optional[Tensor],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        from .prologue_launch import prologue_forward

        weights, states = [q_weight, k_weight, v_weight], [q_state, k_state, v_state]
        results, beta, finals = prologue_forward(
            [q, k, v], weights, b, states, beta_scale, output_final_state, cu_seqlens, order, padded
        )
        beta = q.new_empty(0, dtype=torch.float32) if beta is None else beta
        return *results, beta, *(q.new_empty(0) if final is None else final for final in finals)

    def fake_forward(
        q, k, v, b, q_weight, k_weight, v_weight, q_state, k_state, v_state, beta_scale, output_final_state, cu_seqlens,
        order, padded,
    ):  # fmt: skip
        sequences, past = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1, q_weight.shape[2] - 1
        results = [x.new_empty(x.shape) for x in (q, k, v)]
        finals = [x.new_empty((sequences, x.shape[2], past) if output_final_state else 0) for x in (q, k, v)]
        return *results, q.new_empty(0 if b is None else b.shape, dtype=torch.float32), *finals

    def backward(
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        dbeta: Optional[Tensor],
        dq_final: Optional[Tensor],
        dk_final: Optional[Tensor],
        dv_final: Optional[Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        b: Optional[Tensor],
        q_weight: Tensor,
        k_weight: Tensor,
        v_weight: Tensor,
        q_state: Optional[Tensor],
        k_state: Optional[Tensor],
        v_state: Optional[Tensor],
        beta_scale: float,
        cu_seqlens: Optional[Tensor],
        order: Optional[Tensor],
        padded: Optional[Tensor],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        from .prologue_launch import prologue_backward

        weights, states = [q_weight, k_weight, v_weight], [q_state, k_state, v_state]
        finals = [dq_final, dk_final, dv_final]
        dstreams, dweights, db, dstates = prologue_backward(
            [dq, dk, dv], dbeta, finals, [q, k, v], weights, b, states, beta_scale, cu_seqlens, order, padded
        )
        db = q.new_empty(0) if db is None else db
        return *dstreams, db, *dweights, *(q.new_empty(0) if dstate is None else dstate for dstate in dstates)

    def fake_backward(dq, dk, dv, dbeta, dq_final, dk_final, dv_final, q, k, v, b, *rest):
        weights, states = rest[:3], rest[3:6]
        results = [x.new_empty(x.shape) for x in (q, k, v)]
        dstates = [q.new_empty(0) if state is None else state.new_empty(state.shape) for state in states]
        db = q.new_empty(0) if b is None else b.new_empty(b.shape)
        return *results, db, *(weight.new_empty(weight.shape) for weight in weights), *dstates

    schemas = [torch.library.infer_schema(function, mutates_args=()) for function in (forward, backward)]
    once = functools.partial(refuse, "prologue")
    gradient = register(NAMESPACE, "prologue_backward", schemas[1], backward, fake_backward, save_nothing, once)
    differentiate = functools.partial(_differentiate, gradient)
    return register(NAMESPACE, "prologue", schemas[0], forward, fake_forward, _save, differentiate)


def _save(ctx, inputs, output):
    *tensors, ctx.beta_scale, output_final_state, cu_seqlens, order, padded = inputs
    ctx.save_for_backward(*tensors, cu_seqlens, order, padded)
    unused = [] if tensors[3] is not None else [output[3]]
    ctx.mark_non_differentiable(*unused, *(() if output_final_state else output[4:]))
    ctx.set_materialize_grads(False)


def _differentiate(op, ctx, *gradients):
    *tensors, cu_seqlens, order, padded = ctx.saved_tensors
    streams, b, weight, states = tensors[:3], tensors[3], tensors[4], tensors[7:]
    dy = [x.new_zeros(x.shape) if g is None else g for x, g in zip(streams, gradients)]
    dbeta, dfinals = gradients[3], gradients[4:]
    if b is not None and dbeta is None:
        dbeta = b.new_zeros(b.shape, dtype=torch.float32)
    if any(g is not None for g in dfinals):
        sequences = streams[0].shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        shapes = [(sequences, x.shape[2], weight.shape[2] - 1) for x in streams]
        dfinals = [x.new_zeros(shape) if g is None else g for x, g, shape in zip(streams, dfinals, shapes)]
    results = op(*dy, dbeta, *dfinals, *tensors, ctx.beta_scale, cu_seqlens, order, padded)
    *dstreams, db = results[:4]
    dstates = [None if state is None else g for state, g in zip(states, results[7:])]
    return *dstreams, None if b is None else db, *results[4:7], *dstates, None, None, None, None, None


_op = _define()
