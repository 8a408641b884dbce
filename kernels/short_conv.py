"""The short convolution before q, k and v: depthwise and causal over time, in differentiable PyTorch operations.

    y[t] = activation(bias + sum_j weight[:, 0, j] * x[t - (W - 1) + j])

Symbols: B, T, D batch, tokens, channels; W width of the kernel; N sequences (B, or the packed ones). The state is what
the next token needs of the past: the last W - 1 inputs, [N, D, W - 1], oldest first, zero before the first token.
"""

from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_boundary_values


class PaddingOrder(NamedTuple):
    """A permutation that puts padding first and keeps the order of the rest, for rows of W - 1 states and T tokens."""

    gather: Tensor  # [B * (W - 1 + T)] row of the flattened input for every row of the sorted one
    scatter: Tensor  # [B * T] row of the flattened sorted output for every token
    real: Tensor  # [B, T] bool
    padded: Tensor  # [B] number of padded tokens
    absent: Tensor  # [B, T, 1] bool, where `real` is not


def padding_order(mask: Tensor, width: int) -> PaddingOrder:
    """What `short_convolution` needs to know of a padding mask; the same for every layer, so compute it once.

    Args:
        mask: [B, T] bool or integer, zero at padded tokens, wherever they are.
        width: W of the convolution.
    """
    if mask.dim() != 2:
        raise ValueError(f"mask has shape {tuple(mask.shape)}; it must be [B, T]")
    past, real = width - 1, mask != 0
    (B, T), length = mask.shape, past + mask.shape[1]
    counts = torch.cat([real.new_ones(B, past), real], 1)
    order = torch.argsort(counts.int(), dim=1, stable=True)
    place = torch.empty_like(order).scatter_(1, order, torch.arange(length, device=mask.device).expand(B, -1))
    row = torch.arange(B, device=mask.device)[:, None]
    # The W - 1 states precede every real token, so only a padded token lands before position W - 1.
    scatter = row * T + (place[:, past:] - past).clamp(min=0)
    return PaddingOrder((row * length + order).flatten(), scatter.flatten(), real, (~real).sum(1), ~real[..., None])


def short_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor] = None,
    activation: Optional[str] = None,
    initial_state: Optional[Tensor] = None,
    output_final_state: bool = False,
    cu_seqlens: Optional[Tensor] = None,
    padding_order: Optional[PaddingOrder] = None,
) -> tuple[Tensor, Optional[Tensor]]:
    """Depthwise causal convolution of whole sequences.

    Args:
        x: [B, T, D], any strides; bfloat16 and float16 are computed in float32 and rounded once.
        weight, bias: [D, 1, W] and [D].
        activation: None or "silu".
        initial_state: [N, D, W - 1], the inputs before the first token.
        output_final_state: return the state after the last token of every sequence.
        cu_seqlens: [N + 1] int32 or int64, starts of the packed sequences, the first 0; B must be 1. No sequence sees
            another. Tokens from cu_seqlens[-1] on give zero. Values are checked as in `chunk_delta_rule`.
        padding_order: from `padding_order(mask, W)`. A padded token writes nothing: real tokens and the final state
            are as if padding were cut out of its row, and its output is zero.

    Returns:
        y [B, T, D] and the final state [N, D, W - 1] or None, both in the dtype of x. Differentiable in x, weight,
        bias and initial_state.

    Raises:
        ValueError, TypeError: an argument does not fit.
    """
    check_convolution(x, weight, activation, initial_state, cu_seqlens, padding_order)
    if cu_seqlens is not None:
        return _packed(x, weight, bias, activation, initial_state, output_final_state, cu_seqlens)
    past, (B, T, D) = weight.shape[-1] - 1, x.shape
    state = x.new_zeros(B, D, past) if initial_state is None else initial_state.to(x.dtype)
    if padding_order is not None:
        # Zero times a non-finite padded input would still reach the gradient of the weight.
        x = x.masked_fill(~padding_order.real[..., None], 0)
    rows = torch.cat([state.mT, x], 1)
    if padding_order is not None:
        rows = rows.flatten(0, 1).index_select(0, padding_order.gather).view(B, past + T, D)
    y = _convolve(rows, weight, bias, activation)
    if padding_order is not None:
        y = y.flatten(0, 1).index_select(0, padding_order.scatter).view(B, T, D)
        y = y.masked_fill(~padding_order.real[..., None], 0)
    return y, _as_state(rows[:, T:]) if output_final_state else None


def check_convolution(x, weight, activation, initial_state, cu_seqlens, padding_order) -> None:
    """Raise unless the arguments of `short_convolution` fit together."""
    if x.dim() != 3 or 0 in x.shape:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be [B, T, D], no dimension empty")
    if not x.is_floating_point():
        raise TypeError(f"x is {x.dtype}; it must be a floating-point dtype")
    if weight.dim() != 3 or weight.shape[:2] != (x.shape[2], 1):
        raise ValueError(f"weight has shape {tuple(weight.shape)}; it must be [D, 1, W] with D = {x.shape[2]}")
    _check_activation(activation)
    if cu_seqlens is not None:
        _check_packing(x, cu_seqlens)
        if padding_order is not None:
            raise ValueError("padding_order and cu_seqlens exclude each other: packed sequences have no padding")
    if padding_order is not None:
        (B, T), width = padding_order.real.shape, weight.shape[2]
        made_for = padding_order.gather.shape[0] // B - T + 1
        if x.shape[:2] != (B, T) or width != made_for:
            raise ValueError(
                f"padding_order is for [B, T] = {(B, T)} and width {made_for}; "
                f"x has shape {tuple(x.shape)} and weight width {width}"
            )
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if initial_state is not None:
        _check_state("initial_state", initial_state, (sequences, x.shape[2], weight.shape[2] - 1))


def _check_packing(x: Tensor, cu_seqlens: Tensor) -> None:
    if x.shape[0] != 1:
        raise ValueError(f"cu_seqlens packs sequences in one row, but x has batch size {x.shape[0]}; it must be 1")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"cu_seqlens has shape {tuple(cu_seqlens.shape)}; it must be [N + 1] with N of 1 or more")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens is {cu_seqlens.dtype}; it may be torch.int32 or torch.int64")
    if cu_seqlens.device != x.device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device} and x on {x.device}; they must be on one device")
    if not torch.compiler.is_compiling():
        check_boundary_values(cu_seqlens, x.shape[1])


def _check_activation(activation: Optional[str]) -> None:
    if activation not in (None, "silu"):
        raise ValueError(f"activation is {activation!r}; it may be None or 'silu'")


def _check_state(name: str, state: Tensor, shape: tuple[int, ...]) -> None:
    if state.shape != shape:
        sizes = ", ".join(map(str, shape))
        raise ValueError(f"{name} has shape {tuple(state.shape)}; it must be [N, D, W - 1] = [{sizes}]")


def _convolve(rows: Tensor, weight: Tensor, bias: Optional[Tensor], activation: Optional[str]) -> Tensor:
    """[B, W - 1 + T, D] -> [B, T, D]."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    # As an image of height 1 with channels last: no transposed copy. On a CPU the forward takes a quarter of the time
    # of conv1d or of shifted products, forward and backward two thirds.
    image = rows.to(dtype).mT.unsqueeze(2).contiguous(memory_format=torch.channels_last)
    bias = None if bias is None else bias.to(dtype)
    y = F.conv2d(image, weight.to(dtype).unsqueeze(2), bias, groups=len(weight)).squeeze(2).mT
    return (F.silu(y) if activation == "silu" else y).to(rows.dtype)


def _as_state(rows: Tensor) -> Tensor:
    return rows.mT.clone(memory_format=torch.contiguous_format)


def _packed(x, weight, bias, activation, initial_state, output_final_state, cu_seqlens):
    """Convolve the row as if it were one sequence, then put right the first W - 1 tokens of every sequence."""
    past, (_, T, D) = weight.shape[-1] - 1, x.shape
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    state = x.new_zeros(len(starts), D, past) if initial_state is None else initial_state.to(x.dtype)
    # A row more at the end takes what is computed for tokens that a short sequence does not have.
    y = _convolve(F.pad(x, (0, 0, past, 1)), weight, bias, activation)[0]
    if past:
        local = torch.arange(past, device=x.device)
        heads = _read(x, state, starts, torch.arange(-past, past, device=x.device).expand(len(starts), -1))
        target = torch.where(local < lengths[:, None], starts[:, None] + local, T)
        y = y.index_copy(0, target.flatten(), _convolve(heads, weight, bias, activation).flatten(0, 1))
    y = y[:T].masked_fill((torch.arange(T, device=x.device) >= cu_seqlens[-1])[:, None], 0)
    if not output_final_state:
        return y[None], None
    if not past:
        return y[None], state.clone()
    return y[None], _as_state(_read(x, state, starts, lengths[:, None] - past + local))


def _read(x: Tensor, state: Tensor, starts: Tensor, position: Tensor) -> Tensor:
    """Inputs [N, P, D] at positions [N, P] of every sequence; negative positions are in its state [N, D, W - 1]."""
    past = state.shape[-1]
    token = (starts[:, None] + position).clamp(0, x.shape[1] - 1)
    row = torch.arange(len(starts), device=x.device)[:, None] * past + (position + past).clamp(0, past - 1)
    shape = (*position.shape, x.shape[-1])
    current = x[0].index_select(0, token.flatten()).view(shape)
    before = state.mT.flatten(0, 1).index_select(0, row.flatten()).view(shape)
    return torch.where((position >= 0)[..., None], current, before)


def short_convolution_step(
    x: Tensor, weight: Tensor, bias: Optional[Tensor], activation: Optional[str], state: Tensor
) -> Tensor:
    """One token: x [B, D] -> y [B, D] in the dtype of x; `state` [B, D, W - 1] is shifted by one in place.

    Other arguments and errors as in `short_convolution`. Gradients reach x, weight and bias, not the past.
    """
    if x.dim() != 2 or weight.dim() != 3 or weight.shape[:2] != (x.shape[1], 1):
        shapes = f"{tuple(x.shape)} and weight {tuple(weight.shape)}"
        raise ValueError(f"x has shape {shapes}; they must be [B, D] and [D, 1, W]")
    _check_activation(activation)
    _check_state("state", state, (len(x), len(weight), weight.shape[-1] - 1))
    window = torch.cat([state.to(x.dtype), x[..., None]], -1)
    dtype = torch.promote_types(x.dtype, torch.float32)
    y = (window.to(dtype) * weight[:, 0].to(dtype)).sum(-1)
    y = y if bias is None else y + bias.to(dtype)
    state.copy_(window[..., 1:].detach())
    return (F.silu(y) if activation == "silu" else y).to(x.dtype)
