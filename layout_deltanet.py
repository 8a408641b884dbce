"""Padding and packing: turns what callers pass (masks, positions, boundaries) into what the layers need, once a forward."""

import os
from typing import NamedTuple

import torch
from transformers.cache_utils import Cache

from .kernels.context_parallel import Segment
from .kernels.short_conv import padding_order


class TokenLayout(NamedTuple):
    """Which tokens of a [B, T] batch exist and where sequences begin; read by every delta-rule layer."""

    real: torch.Tensor | None = None  # [B, T] bool, False at padding and behind the last packed sequence
    order: tuple | None = None  # what `short_convolution` needs to step over padding
    cu_seqlens: torch.Tensor | None = None  # [N + 1] boundaries of packed sequences, B = 1
    segment: Segment | None = None  # where the tokens lie in sequences that several processes share


def values_are_readable(tensor: torch.Tensor) -> bool:
    """Whether a check may look at values: always on the CPU, elsewhere only with `DELTANET_CHECK=1` (it waits for the
    device), never while tracing."""
    if torch.compiler.is_compiling():
        return False
    return tensor.device.type == "cpu" or os.environ.get("DELTANET_CHECK") == "1"


def check_token_ids(input_ids: torch.Tensor, vocab_size: int) -> None:
    """Raise `ValueError` unless the ids are integers [B, T] of the vocabulary."""
    if input_ids.ndim != 2 or input_ids.is_floating_point():
        shape = tuple(input_ids.shape)
        raise ValueError(f"`input_ids` has shape {shape} and is {input_ids.dtype}; allowed: integers [batch, tokens].")
    if values_are_readable(input_ids) and input_ids.numel() > 0:
        low, high = input_ids.min().item(), input_ids.max().item()
        if low < 0 or high >= vocab_size:
            raise ValueError(f"`input_ids` holds ids from {low} to {high}; allowed: 0 to {vocab_size - 1} (vocab_size).")


def check_mask(attention_mask: torch.Tensor, batch: int, length: int, past_key_values: Cache | None) -> None:
    """Raise `ValueError` unless the mask is [batch, tokens seen + new tokens] of zeros and ones."""
    shape = tuple(attention_mask.shape)
    if len(shape) != 2 or shape[0] != batch:
        raise ValueError(f"`attention_mask` has shape {shape}; allowed: [{batch}, tokens], one row for each sequence.")
    if values_are_readable(attention_mask) and bool(((attention_mask != 0) & (attention_mask != 1)).any()):
        raise ValueError(
            "`attention_mask` holds other values than 0 and 1; allowed: 0 at padding and 1 at real tokens. Numbers of "
            "packed sequences go into `seq_idx`."
        )
    seen = 0
    if past_key_values is not None:
        seen = past_key_values.get_seq_length()
        if isinstance(seen, torch.Tensor):
            if not values_are_readable(seen):
                return
            seen = seen.item()
    if shape[1] != seen + length:
        raise ValueError(
            f"`attention_mask` covers {shape[1]} tokens; allowed: {seen + length} ({seen} in the cache and {length} new)."
        )


def padding_layout(attention_mask: torch.Tensor | None, length: int, width: int) -> TokenLayout:
    """Layout of a batch whose last `length` mask columns say which of the new tokens are real."""
    if attention_mask is None:
        return TokenLayout()
    real = attention_mask[:, -length:].bool()
    if values_are_readable(real) and bool(real.all()):
        return TokenLayout()
    return TokenLayout(real=real, order=padding_order(real, width))


def packed_layout(cu_seqlens: torch.Tensor, length: int) -> tuple[TokenLayout, torch.Tensor]:
    """Layout of sequences packed in one row of `length` tokens, and each token's position [1, T] in its sequence."""
    index = torch.arange(length, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), index, right=True)
    position_ids = (index - cu_seqlens[sequence])[None]
    return TokenLayout(real=(index < cu_seqlens[-1])[None], cu_seqlens=cu_seqlens), position_ids


def find_boundaries(
    shape: tuple[int, int],
    position_ids: torch.Tensor | None,
    cu_seq_lens_q: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    attention_mask: torch.Tensor | dict | None,
    past_key_values: Cache | None,
) -> torch.Tensor | None:
    """
    Boundaries [N + 1] of packed sequences in an input of `shape` [B, T], or `None` where every row is one sequence.

    `cu_seq_lens_q` is taken as it is. `seq_idx` and, without a mask and a cache, `position_ids` are read, which waits for
    the device. Raises `ValueError` for boundaries that cannot be honoured: in a batch of several rows or together with a
    mask or a cache. Restarts in `position_ids` next to a mask or a cache are looked for where `values_are_readable`.
    """
    for name, index in (("seq_idx", seq_idx), ("position_ids", position_ids)):
        if index is not None and (index.ndim != 2 or index.shape[1] != shape[1] or index.shape[0] not in (1, shape[0])):
            raise ValueError(f"`{name}` has shape {tuple(index.shape)}; allowed: {list(shape)}.")
    alone = attention_mask is None and past_key_values is None
    name = "cu_seq_lens_q" if cu_seq_lens_q is not None else "seq_idx" if seq_idx is not None else None
    if name is not None and (shape[0] != 1 or not alone):
        raise ValueError(
            f"`{name}` marks packed sequences; allowed: one row (batch is {shape[0]}), without `attention_mask` and "
            "without `past_key_values`."
        )
    if name == "cu_seq_lens_q":
        return _check_boundaries(cu_seq_lens_q, shape[1])
    if name == "seq_idx":
        return _boundaries_from_starts((seq_idx[:, 1:] != seq_idx[:, :-1])[0], shape[1])
    if position_ids is None or isinstance(attention_mask, dict):
        return None
    if alone and shape[0] == 1:
        return _boundaries_from_starts((position_ids[:, 1:] != position_ids[:, :-1] + 1)[0], shape[1])
    _refuse_restarts(shape[0], position_ids, attention_mask, must_look=alone)
    return None


def _refuse_restarts(batch: int, position_ids: torch.Tensor, attention_mask: torch.Tensor | None, must_look: bool) -> None:
    """Raise `ValueError` where positions do not grow from one real token to the next."""
    if torch.compiler.is_compiling() or not (must_look or values_are_readable(position_ids)):
        return
    restarts = position_ids[:, 1:] <= position_ids[:, :-1]
    if attention_mask is not None:
        real = attention_mask[:, -position_ids.shape[1] :].bool()
        restarts = restarts & real[:, 1:] & real[:, :-1]
    if bool(restarts.any()):
        raise ValueError(
            f"`position_ids` restart inside a row. That marks packed sequences; allowed: one row (batch is {batch}), "
            "without `attention_mask` and without `past_key_values`. If the restarts are padding, pass a mask that says so."
        )


def _check_boundaries(cu_seqlens: torch.Tensor, length: int) -> torch.Tensor:
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2 or cu_seqlens.is_floating_point():
        raise ValueError(
            f"`cu_seq_lens_q` is {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}; allowed: integers of shape [N + 1]."
        )
    if values_are_readable(cu_seqlens):
        values = cu_seqlens.tolist()
        if values[0] != 0 or values[-1] > length or sorted(values) != values:
            raise ValueError(f"`cu_seq_lens_q` is {values}; allowed: from 0, never decreasing, up to {length} tokens.")
    return cu_seqlens


def _boundaries_from_starts(starts: torch.Tensor, length: int) -> torch.Tensor | None:
    """`starts` [T - 1] is True where token t + 1 begins a sequence."""
    if torch.compiler.is_compiling():
        # The number of sequences is data; empty sequences at the end make the shape independent of it.
        index = torch.arange(1, length, device=starts.device)
        ends = torch.where(starts, index, length).sort().values
        return _with_ends(ends, length)
    ends = starts.nonzero()[:, 0] + 1
    return _with_ends(ends, length) if ends.numel() > 0 else None


def _with_ends(ends: torch.Tensor, length: int) -> torch.Tensor:
    return torch.cat([ends.new_zeros(1), ends, ends.new_full((1,), length)])


__all__ = [
    "TokenLayout",
    "check_mask",
    "check_token_ids",
    "find_boundaries",
    "packed_layout",
    "padding_layout",
    "values_are_readable",
]
