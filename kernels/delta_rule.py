"""The delta rule of DeltaNet (arXiv 2406.06484): public functions, torch operators and the choice of implementation.

Glossary, the paper's symbols as they appear in every file of this folder:

    B, T, H    batch, tokens, heads             K, V     d_k and d_v, the sizes of a key and of a value
    N          states: B, or the number of packed sequences
    q, k, v    query, key, value of a token     beta     writing strength of a token, in (0, 1), or (0, 2)
    S          the state, a K x V matrix: S <- S + k beta (v - Sᵀ k)ᵀ, then o = scale Sᵀ q
    C          tokens of a chunk, 64            Q, K, V  a chunk's rows
    A          tril(diag(beta) K Kᵀ, -1)        Tinv     (I + A)⁻¹, the matrix T of the paper without its beta
    R, Vn      V - K S, and Tinv diag(beta) R: the values a chunk really writes
    tau, E, W  of the Triton kernels: Tinv without its identity and its betas; errors, Vn = diag(beta) E; Vn over |k|
    r, rq      1 / |k| and scale / |q| of a token
    h0, ht     initial and final state          do, dht  gradients of o and of the final state
"""

import contextlib
import functools
import logging
from typing import Callable, NamedTuple, Optional

import torch
from torch import Tensor

from .checks import check_inputs, check_step, check_step_values, check_values
from .devices import forced_backend, fused_kernels_refuse, triton_refuses
from .operators import refuse, register, registered, save_nothing
from .reference import CHUNK, chunk_backward, chunk_forward, compute_dtype, recurrent_forward, step_forward

NAMESPACE = "deltanet"
"""Namespace of the operators. A changed copy of this file (a Hub export) must use another: copies that share one share
the operators of whichever was loaded first."""

logger = logging.getLogger("deltanet.kernels")


def chunk_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    scale: Optional[float] = None,
    initial_state: Optional[Tensor] = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Optional[Tensor] = None,
    keep_states: bool = False,
) -> tuple[Tensor, Optional[Tensor]]:
    """The delta rule over whole sequences, parallel inside chunks of 64 tokens (arXiv 2406.06484, equations 8 to 11).

    Args:
        q, k: [B, T, H, K], one dtype of float32, bfloat16, float16, float64; K up to 256; any strides.
        v: [B, T, H, V] of the same dtype.
        beta: [B, T, H], float32 or the dtype of q.
        scale: multiplies q; None means K ** -0.5.
        initial_state: [N, H, K, V] float32 (float64 for float64 inputs), N being B or the number of packed sequences.
        output_final_state: return the state after the last token of every sequence.
        use_qk_l2norm_in_kernel: divide q and k by sqrt(sum of squares + 1e-6), in float32.
        cu_seqlens: [N + 1] int32 or int64, bounds of the packed sequences, the first 0; B must be 1. Sequences may be
            empty. Tokens from cu_seqlens[-1] on belong to no sequence: their output and gradients are zero.
        keep_states: let the fused kernels save what their backward otherwise computes again, the state of every chunk and
            the error of every token: K V / 32 + 2 V bytes more a token and head in 16 bits. Results are the same.

    Returns:
        o [B, T, H, V] in the dtype of v, and the final state [N, H, K, V] in the dtype of `initial_state`, or None.

    Differentiable once in q, k, v, beta and initial_state, through both results.

    Raises:
        TypeError, ValueError: an argument does not fit. Values (cu_seqlens, NaN in beta) are looked at on CPU tensors,
            and on others only with DELTANET_CHECK=1 in the environment, because that waits for the device.
        RuntimeError: DELTANET_BACKEND names an implementation that cannot run here.
    """
    check_inputs(q, k, v, beta, initial_state, cu_seqlens)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    arguments = (q, k, v, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens, keep_states)
    o, final_state, *_ = _chunk_op(*arguments)
    return o, final_state if output_final_state else None


def recurrent_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    scale: Optional[float] = None,
    initial_state: Optional[Tensor] = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Optional[Tensor] = None,
) -> tuple[Tensor, Optional[Tensor]]:
    """`chunk_delta_rule` one token after the other: the same arguments, results, gradients and errors.

    For a few tokens, and for comparison. Its gradient is that of the chunked form, which is the same function.
    """
    check_inputs(q, k, v, beta, initial_state, cu_seqlens)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    arguments = (q, k, v, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens, False)
    o, final_state, *_ = _recurrent_op(*arguments)
    return o, final_state if output_final_state else None


def delta_rule_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    state: Tensor,
    *,
    scale: Optional[float] = None,
    use_qk_l2norm_in_kernel: bool = False,
    state_indices: Optional[Tensor] = None,
) -> Tensor:
    """One token of the delta rule, for decoding; `state` is updated in place. Not differentiable.

    Args:
        q, k: [B, H, K]; v: [B, H, V]; beta: [B, H]; dtypes as in `chunk_delta_rule`.
        state: [N, H, K, V] float32 or bfloat16 (float64 with float64 inputs), any strides; arithmetic is float32.
        scale, use_qk_l2norm_in_kernel: as in `chunk_delta_rule`.
        state_indices: [B] int32 or int64, the state of each row; -1 leaves every state alone and returns zeros for
            the row. No state twice. None means row b uses state b, and N must be B.

    Returns:
        o [B, H, V] in the dtype of v.

    Raises:
        TypeError, ValueError: as in `chunk_delta_rule`; values of state_indices are looked at under the same rule.
    """
    check_step(q, k, v, beta, state, state_indices)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    return _step_op(q, k, v, beta, state, scale, use_qk_l2norm_in_kernel, state_indices)


class Implementation(NamedTuple):
    """How a device computes the rule; signatures of the functions of the same names in `reference.py`."""

    name: str
    forward: Callable
    backward: Callable
    step: Callable
    saved: Callable
    """(q, v, cu_seqlens, keep_states) -> uninitialised tensors like what `forward` returns for `backward`, four at most."""
    keeps_states: bool = False
    """Whether `forward` takes `keep_states`, and `backward` what was kept, or empty tensors."""


def _saved_by_torch(q: Tensor, *_) -> tuple[Tensor, ...]:
    dtype = compute_dtype(q.dtype)
    return q.new_empty((*q.shape[:3], CHUNK), dtype=dtype), q.new_empty(0, dtype=dtype)


def _saved_by_triton(q: Tensor, v: Tensor, cu_seqlens: Optional[Tensor], keep_states: bool) -> tuple[Tensor, ...]:
    from .chunk import count_chunks

    B, T, H, K = q.shape
    sequences = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    states = (count_chunks(B, T, sequences), H, K, v.shape[3])
    kept = (states, v.shape) if keep_states else (0, 0)
    return q.new_empty((B, T, H, CHUNK)), q.new_empty((3, B, H, T), dtype=torch.float32), *map(q.new_empty, kept)


def _saved_by_recurrence(q: Tensor, *_) -> tuple[Tensor, ...]:
    dtype = compute_dtype(q.dtype)
    return q.new_empty(0, dtype=dtype), q.new_empty(0, dtype=dtype)


_TORCH = Implementation("torch", chunk_forward, chunk_backward, step_forward, _saved_by_torch)
_RECURRENT = Implementation("recurrent", recurrent_forward, chunk_backward, step_forward, _saved_by_recurrence)


@functools.cache
def _triton_implementations() -> tuple[Optional[tuple[Implementation, Implementation]], str]:
    """The chunked and the recurrent form in Triton, or None and why there are none."""
    if reason := triton_refuses():
        return None, reason
    try:
        from .chunk import chunk_backward as backward
        from .chunk import chunk_forward as forward
        from .recurrent import recurrent_forward as recurrence
        from .recurrent import step_forward as step
    except ImportError as error:
        return None, f"the Triton kernels cannot be imported ({error})"
    chunked = Implementation("triton", forward, backward, step, _saved_by_triton, True)
    return (chunked, Implementation("triton recurrent", recurrence, backward, step, _saved_by_recurrence, True)), ""


def _choose(q: Tensor, recurrent: bool) -> Implementation:
    forced, K = forced_backend(), q.shape[-1]
    plain = _RECURRENT if recurrent else _TORCH
    if forced in ("torch", "recurrent"):
        return _announced(q, _RECURRENT if forced == "recurrent" else plain, "DELTANET_BACKEND asks for it")
    if not forced and q.device.type != "cuda":
        return _announced(q, plain, f"no fused kernels for {q.device.type}")
    fused, reason = _triton_implementations()
    reason = reason or fused_kernels_refuse(q.device, q.dtype, K)
    if reason and forced:
        raise RuntimeError(f"DELTANET_BACKEND is 'triton', but {reason}")
    if reason:
        return _announced(q, plain, reason)
    return _announced(q, fused[recurrent], "DELTANET_BACKEND asks for it" if forced else "tensors on a GPU")


def _announced(q: Tensor, chosen: Implementation, reason: str) -> Implementation:
    _announce(q.device.type, chosen.name, reason)
    return chosen


@functools.cache
def _announce(device: str, name: str, reason: str) -> None:
    logger.info("delta rule on %s: %s implementation (%s)", device, name, reason)


def implementation(q: Tensor) -> Implementation:
    """What runs `chunk_delta_rule` for a tensor like q: by its device, or as DELTANET_BACKEND says."""
    return _choose(q, recurrent=False)


def _recurrence(q: Tensor) -> Implementation:
    return _choose(q, recurrent=True)


def fused_kernels_missing(device: torch.device, dtype: torch.dtype, K: int) -> str:
    """Why the fused kernels cannot run for queries of `dtype` and head size K on `device`; empty where they can."""
    return _triton_implementations()[1] or fused_kernels_refuse(device, dtype, K)


def _own_precision(q: Tensor):
    """Autocast reaches into operators; the arithmetic here keeps the precision that it chose."""
    kind = q.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()


_FORWARD = (
    "(Tensor q, Tensor k, Tensor v, Tensor beta, float scale, Tensor? initial_state, bool output_final_state, "
    "bool use_l2, Tensor? cu_seqlens, bool keep_states) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_BACKWARD = (
    "(Tensor do, Tensor? dht, Tensor q, Tensor k, Tensor v, Tensor beta, Tensor Tinv, Tensor factors, Tensor states, "
    "Tensor errors, float scale, Tensor? initial_state, bool use_l2, Tensor? cu_seqlens) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _define(name: str, choose: Callable[[Tensor], Implementation]):
    """Register the operator `name` and its gradient, each running what `choose` picks for q."""

    def forward(q, k, v, beta, scale, initial_state, output_final_state, use_l2, cu_seqlens, keep_states):
        check_values(q, beta, cu_seqlens)
        chosen = choose(q)
        keep = (keep_states,) if chosen.keeps_states else ()
        arguments = (q, k, v, beta, scale, initial_state, output_final_state, use_l2, cu_seqlens, *keep)
        with _own_precision(q):
            return _six(q, chosen.forward(*arguments))

    def fake_forward(q, k, v, beta, scale, initial_state, output_final_state, use_l2, cu_seqlens, keep_states):
        sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        shape = (sequences, q.shape[2], q.shape[3], v.shape[3]) if output_final_state else (0,)
        final_state = q.new_empty(shape, dtype=compute_dtype(q.dtype))
        return _six(q, (v.new_empty(v.shape), final_state, *choose(q).saved(q, v, cu_seqlens, keep_states)))

    def backward(
        do, dht, q, k, v, beta, Tinv, factors, states, errors, scale, initial_state, use_l2, cu_seqlens
    ):  # fmt: skip
        # What was saved tells whose it is, whatever the environment says by now.
        run = _triton_implementations()[0][0] if factors.numel() else _TORCH if Tinv.numel() else choose(q)
        saved = (Tinv, factors, states, errors) if run.keeps_states else (Tinv, factors)
        with _own_precision(q):
            return run.backward(do, dht, q, k, v, beta, *saved, scale, initial_state, use_l2, cu_seqlens)

    def fake_backward(
        do, dht, q, k, v, beta, Tinv, factors, states, errors, scale, initial_state, use_l2, cu_seqlens
    ):  # fmt: skip
        dh0 = q.new_empty(0 if initial_state is None else initial_state.shape, dtype=compute_dtype(q.dtype))
        return *(x.new_empty(x.shape) for x in (q, k, v, beta)), dh0

    gradient = register(
        NAMESPACE, f"{name}_backward", _BACKWARD, backward, fake_backward, save_nothing, functools.partial(refuse, name)
    )
    differentiate = functools.partial(_differentiate, gradient)
    return register(NAMESPACE, name, _FORWARD, forward, fake_forward, _save, differentiate)


def _six(q: Tensor, results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The operator returns six tensors; an implementation that saves less gives fewer."""
    return *results, *(q.new_empty(0) for _ in range(6 - len(results)))


def _save(ctx, inputs, output):
    q, k, v, beta, ctx.scale, initial_state, output_final_state, ctx.use_l2, cu_seqlens, _ = inputs
    ctx.save_for_backward(q, k, v, beta, *output[2:], initial_state, cu_seqlens)
    ctx.mark_non_differentiable(*(output[2:] if output_final_state else output[1:]))
    ctx.set_materialize_grads(False)


def _differentiate(gradient, ctx, do, dht, *_):
    *saved, initial_state, cu_seqlens = ctx.saved_tensors
    do = saved[2].new_zeros(saved[2].shape) if do is None else do
    dq, dk, dv, dbeta, dh0 = gradient(do, dht, *saved, ctx.scale, initial_state, ctx.use_l2, cu_seqlens)
    return dq, dk, dv, dbeta, None, None if initial_state is None else dh0, None, None, None, None


def _define_step():
    if registered(NAMESPACE, "delta_rule_step"):
        return registered(NAMESPACE, "delta_rule_step")

    @torch.library.custom_op(f"{NAMESPACE}::delta_rule_step", mutates_args={"state"})
    def step(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        state: Tensor,
        scale: float,
        use_l2: bool,
        state_indices: Optional[Tensor],
    ) -> Tensor:
        check_step_values(beta, state, state_indices)
        with _own_precision(q):
            return implementation(q).step(q, k, v, beta, state, scale, use_l2, state_indices)

    @step.register_fake
    def _(q, k, v, beta, state, scale, use_l2, state_indices):
        return v.new_empty(v.shape)

    return step


_chunk_op = _define("chunk_delta_rule", implementation)
_recurrent_op = _define("recurrent_delta_rule", _recurrence)
_step_op = _define_step()
