"""What the delta rule accepts. Metadata is checked when a function is called, so it also guards a traced graph; values
are checked inside the operators, on CPU tensors always and on others with DELTANET_CHECK=1."""

import os
from typing import Optional

import torch
from torch import Tensor

MAX_K = 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INDEX_DTYPES = (torch.int32, torch.int64)


def check_inputs(q, k, v, beta, initial_state: Optional[Tensor], cu_seqlens: Optional[Tensor]) -> None:
    """Raise unless the arguments of `chunk_delta_rule` fit together; looks at shapes, dtypes and devices only."""
    _check_tokens(q, k, v, beta, ("B", "T", "H"))
    sequences = q.shape[0]
    if cu_seqlens is not None:
        _check_index("cu_seqlens", cu_seqlens, q)
        if q.shape[0] != 1:
            raise ValueError(f"cu_seqlens packs sequences in one row, but q has batch size {q.shape[0]}; it must be 1")
        if cu_seqlens.shape[0] < 2:
            raise ValueError("cu_seqlens has fewer than two entries; it is [0, end of sequence 1, ...]")
        sequences = cu_seqlens.shape[0] - 1
    if initial_state is not None:
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        _check_state("initial_state", initial_state, q, v, (dtype,))
        if initial_state.shape[0] != sequences:
            raise ValueError(
                f"initial_state holds {initial_state.shape[0]} states; it must hold {sequences}, one for each sequence"
            )


def check_step(q, k, v, beta, state: Tensor, state_indices: Optional[Tensor]) -> None:
    """Raise unless the arguments of `delta_rule_step` fit together; looks at shapes, dtypes and devices only."""
    _check_tokens(q, k, v, beta, ("B", "H"))
    _check_state("state", state, q, v, _step_dtypes(q))
    _check_rows(q, state, state_indices)


def check_decode_step(
    q, k, v, beta, gate, q_past, k_past, v_past, state, q_weight, k_weight, v_weight, norm_weight, state_indices
) -> None:  # fmt: skip
    """Raise unless the arguments of `decode_step` fit together; looks at shapes, dtypes and devices only."""
    for name, x, rank in (("q", q, 2), ("v", v, 2), ("state", state, 4), ("norm_weight", norm_weight, 1)):
        if x.dim() != rank or 0 in x.shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; it must have {rank} dimensions, none empty")
    (B, keys), values, N = q.shape, v.shape[1], state.shape[0]
    V, W = norm_weight.shape[0], q_weight.shape[-1]
    H = max(1, values // V)
    K = keys // H
    for name, x, shape in (
        ("q", q, (B, keys)), ("k", k, (B, keys)), ("v", v, (B, values)), ("beta", beta, (B, H)), ("gate", gate, (B, values)),
        ("state", state, (N, H, K, V)), ("conv_states[0]", q_past, (N, keys, W - 1)),
        ("conv_states[1]", k_past, (N, keys, W - 1)), ("conv_states[2]", v_past, (N, values, W - 1)),
        ("conv_weights[0]", q_weight, (keys, 1, W)), ("conv_weights[1]", k_weight, (keys, 1, W)),
        ("conv_weights[2]", v_weight, (values, 1, W)), ("norm_weight", norm_weight, (V,)),
    ):  # fmt: skip
        if x is None:
            continue
        if x.shape != shape:
            fits = f"with q {tuple(q.shape)}, v of {values} channels and norm_weight {tuple(norm_weight.shape)}"
            raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be {list(shape)} {fits}")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device} and q on {q.device}; all arguments must be on one device")
    if K > MAX_K:
        raise ValueError(f"q and k have head size {K}; at most {MAX_K} is supported")
    if q.dtype not in DTYPES:
        raise TypeError(f"q is {q.dtype}; it may be one of {_names(DTYPES)}")
    for name, x in (("k", k), ("v", v), ("gate", gate)):
        if x is not None and x.dtype != q.dtype:
            raise TypeError(f"{name} is {x.dtype} and q {q.dtype}; q, k, v and gate must have one dtype")
    _check_state_dtype("state", state, q, _step_dtypes(q))
    _check_rows(q, state, state_indices)


def _step_dtypes(q: Tensor) -> tuple[torch.dtype, ...]:
    return (torch.float64,) if q.dtype == torch.float64 else (torch.float32, torch.bfloat16)


def _check_rows(q: Tensor, state: Tensor, state_indices: Optional[Tensor]) -> None:
    if state_indices is not None:
        _check_index("state_indices", state_indices, q)
        if state_indices.shape[0] != q.shape[0]:
            raise ValueError(
                f"state_indices has {state_indices.shape[0]} entries; it must have {q.shape[0]}, one for each row of q"
            )
    elif state.shape[0] != q.shape[0]:
        raise ValueError(
            f"state holds {state.shape[0]} states for {q.shape[0]} rows of q; without state_indices these must be equal"
        )


def _check_tokens(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, names: tuple[str, ...]) -> None:
    layout = ", ".join(names)
    for name, x, rank, last in (("q", q, 1, ", K"), ("k", k, 1, ", K"), ("v", v, 1, ", V"), ("beta", beta, 0, "")):
        if x.dim() != len(names) + rank:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be [{layout}{last}]")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device} and q on {q.device}; all arguments must be on one device")
        if x.shape[: len(names)] != q.shape[: len(names)]:
            raise ValueError(f"{name} has shape {tuple(x.shape)} and q {tuple(q.shape)}; [{layout}] must be equal")
    if q.dtype not in DTYPES:
        raise TypeError(f"q is {q.dtype}; it may be one of {_names(DTYPES)}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(f"{name} is {x.dtype} and q {q.dtype}; q, k and v must have one dtype")
    if beta.dtype not in (torch.float32, q.dtype):
        raise TypeError(f"beta is {beta.dtype}; it may be torch.float32 or the dtype of q, {q.dtype}")
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"k has head size {k.shape[-1]} and q {q.shape[-1]}; they must be equal")
    if q.shape[-1] > MAX_K:
        raise ValueError(f"q and k have head size {q.shape[-1]}; at most {MAX_K} is supported")
    for name, x in (("q", q), ("v", v)):
        if 0 in x.shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; no dimension may be empty")


def _check_state(name: str, state: Tensor, q: Tensor, v: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    shape = (q.shape[-2], q.shape[-1], v.shape[-1])
    if state.dim() != 4 or state.shape[1:] != shape:
        sizes = ", ".join(map(str, shape))
        raise ValueError(f"{name} has shape {tuple(state.shape)}; it must be [N, H, K, V] = [N, {sizes}]")
    _check_state_dtype(name, state, q, dtypes)
    if state.device != q.device:
        raise ValueError(f"{name} is on {state.device} and q on {q.device}; all arguments must be on one device")


def _check_state_dtype(name: str, state: Tensor, q: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if state.dtype not in dtypes:
        raise TypeError(f"{name} is {state.dtype}; with q in {q.dtype} it may be {_names(dtypes)}")


def _check_index(name: str, index: Tensor, q: Tensor) -> None:
    if index.dim() != 1:
        raise ValueError(f"{name} has shape {tuple(index.shape)}; it must have one dimension")
    if index.dtype not in INDEX_DTYPES:
        raise TypeError(f"{name} is {index.dtype}; it may be {_names(INDEX_DTYPES)}")
    if index.device != q.device:
        raise ValueError(f"{name} is on {index.device} and q on {q.device}; all arguments must be on one device")


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(map(str, dtypes))


def _reads_values(x: Tensor) -> bool:
    return x.device.type == "cpu" or os.environ.get("DELTANET_CHECK") == "1"


def check_values(q: Tensor, beta: Tensor, cu_seqlens: Optional[Tensor]) -> None:
    """Raise ValueError for NaN in beta, or boundaries that are not 0 <= ... <= T in order."""
    if not _reads_values(q):
        return
    if beta.isnan().any():
        raise ValueError("beta contains NaN")
    if cu_seqlens is not None:
        check_boundary_values(cu_seqlens, q.shape[1])


def check_boundary_values(cu_seqlens: Tensor, T: int) -> None:
    """Raise ValueError unless 0 = cu_seqlens[0] <= cu_seqlens[1] <= ... <= T, where values may be read."""
    if not _reads_values(cu_seqlens):
        return
    if cu_seqlens[0] != 0:
        raise ValueError(f"cu_seqlens starts with {int(cu_seqlens[0])}; it must start with 0")
    if (cu_seqlens.diff() < 0).any():
        raise ValueError(f"cu_seqlens decreases: {cu_seqlens.tolist()[:16]}; it must be non-decreasing")
    if cu_seqlens[-1] > T:
        raise ValueError(f"cu_seqlens ends at {int(cu_seqlens[-1])}; there are {T} tokens")


def check_step_values(beta: Optional[Tensor], state: Tensor, state_indices: Optional[Tensor]) -> None:
    """Raise ValueError for NaN in beta, or indices outside [-1, N) or naming one state twice."""
    if not _reads_values(state):
        return
    if beta is not None and beta.isnan().any():
        raise ValueError("beta contains NaN")
    if state_indices is None:
        return
    if ((state_indices < -1) | (state_indices >= len(state))).any():
        raise ValueError(f"state_indices is {state_indices.tolist()[:16]}; entries may be -1 to {len(state) - 1}")
    used = state_indices[state_indices >= 0]
    if len(used.unique()) != len(used):
        raise ValueError(f"state_indices is {state_indices.tolist()[:16]}; no state may be named twice")
