"""Context parallelism of a model: processes that share the tokens of every row, each with one contiguous segment."""

import torch
import torch.distributed as dist
from transformers.cache_utils import Cache

from .configuration_deltanet import DELTA_LAYER_TYPE
from .kernels.context_parallel import all_gather, segment
from .layout_deltanet import TokenLayout, find_boundaries, values_are_readable


class ContextParallelMixin:
    """For models whose outputs belong to one token each."""

    @property
    def context_group(self) -> "dist.ProcessGroup | None":
        return getattr(self.base_model, "_context_group", None)

    def set_context_parallel(self, group) -> None:
        """
        Share the tokens of every row among the processes of `group`, a `ProcessGroup` or a `DeviceMesh` of one dimension:
        each then calls the model with its own segment [B, T], in the order of ranks, and gets its own outputs. `None` ends
        it.

        The loss is so scaled that its mean over the processes is the loss of the whole rows; averaged gradients, as DDP and
        FSDP make them, are its gradients. With `num_items_in_batch` it is each process's sum over that number instead.
        `use_cache=True` gives every process the whole cache, with which all can go on alike once this has ended.

        Raises:
            ValueError: the model has layers that need all tokens at once.
        """
        others = sorted({kind for kind in self.config.layer_types if kind != DELTA_LAYER_TYPE})
        if group is not None and others:
            raise ValueError(
                f"`group` is given, but the model has layers of {', '.join(others)}, which would see one segment only; "
                "allowed with context parallelism: delta-rule layers alone."
            )
        self.base_model._context_group = group.get_group() if hasattr(group, "get_group") else group


def segment_of(x: torch.Tensor, group: "dist.ProcessGroup", dim: int = 1) -> torch.Tensor:
    """This process's tokens of x, whose dimension `dim` has those of all processes.

    Raises:
        ValueError: the tokens cannot be divided evenly; pad them, with labels of -100 or behind the last boundary.
    """
    size = dist.get_world_size(group)
    if x.shape[dim] % size:
        raise ValueError(f"`x` has {x.shape[dim]} tokens; allowed: multiples of {size}, the number of processes.")
    return x.chunk(size, dim)[dist.get_rank(group)]


def segment_layout(
    group: "dist.ProcessGroup",
    inputs_embeds: torch.Tensor,
    position_ids: torch.Tensor | None,
    cu_seq_lens_q: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    past_key_values: Cache | None,
    use_cache: bool | None,
) -> TokenLayout:
    """
    Layout of this process's tokens [B, T, hidden_size]. `position_ids`, `seq_idx` and `attention_mask` are of these tokens
    too; `cu_seq_lens_q` are boundaries in the whole row of all processes.

    Raises `ValueError` for a cache that is not new, for boundaries as `find_boundaries`, and (where `values_are_readable`)
    unless every process has as many rows and tokens.
    """
    batch, length = inputs_embeds.shape[:2]
    if values_are_readable(inputs_embeds):
        _check_shapes(torch.tensor([batch, length], device=inputs_embeds.device), group)
    whole = (batch, length * dist.get_world_size(group))
    position_ids, seq_idx = (_whole(x, length, group) for x in (position_ids, seq_idx))
    cu_seqlens = find_boundaries(whole, position_ids, cu_seq_lens_q, seq_idx, attention_mask, None)
    if past_key_values is not None or use_cache and not (attention_mask is None and cu_seqlens is None):
        raise ValueError(
            "With context parallelism a forward can begin a cache, by `use_cache=True` without a mask or packed sequences, "
            "and `past_key_values` are not allowed: the processes hold different tokens. To go on from the cache and to "
            "`generate`, end it with `set_context_parallel(None)`."
        )
    own = segment(group, length, cu_seqlens)
    real = None if attention_mask is None else attention_mask.bool()
    if cu_seqlens is not None:
        real = (torch.arange(length, device=cu_seqlens.device) < own.cu_seqlens[-1])[None]
    return TokenLayout(real=real, cu_seqlens=own.cu_seqlens, segment=own)


def _check_shapes(shape: torch.Tensor, group: "dist.ProcessGroup") -> None:
    shapes = all_gather(shape, group).tolist()
    if any(other != shapes[0] for other in shapes):
        raise ValueError(f"The processes hold inputs of [batch, tokens] = {shapes}; allowed: the same on every process.")


def _whole(x: torch.Tensor | None, length: int, group: "dist.ProcessGroup") -> torch.Tensor | None:
    """[B, T] of every process side by side; what has another shape is left for `find_boundaries` to refuse."""
    if x is None or x.ndim != 2 or x.shape[1] != length:
        return x
    return torch.cat(tuple(all_gather(x, group)), 1)


def shifted_labels(labels: torch.Tensor, group: "dist.ProcessGroup") -> torch.Tensor:
    """The label that each position predicts, [B, T]: the next one, which behind a segment's last is the next process's."""
    firsts, following = all_gather(labels[:, :1], group), dist.get_rank(group) + 1
    last = firsts[following] if following < len(firsts) else torch.full_like(firsts[0], -100)
    return torch.cat([labels[:, 1:], last], 1)


def labels_a_process(labels: torch.Tensor, group: "dist.ProcessGroup") -> torch.Tensor:
    """How many labels count, divided by the number of processes: the mean of all processes' losses, each a sum over it, is
    the loss of the whole rows, and averaged gradients are its gradients."""
    count = (labels != -100).sum().float()
    dist.all_reduce(count, group=group)
    return count / dist.get_world_size(group)


__all__ = ["ContextParallelMixin", "labels_a_process", "segment_layout", "segment_of", "shifted_labels"]
