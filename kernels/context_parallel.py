"""The delta rule over sequences that several processes share: each holds one contiguous segment, in the order of ranks.

A segment takes the state S that enters it to M S + N: N is its final state from zero, M that from the identity with
values of zero. Every process computes the map of its own segment, one all-gather hands it those of all others, and
applying those before it in turn gives the state from which its segment is computed as usual. Backward is the mirror
image: the gradient dS of the state that leaves a segment becomes Mᵀ dS + D, where D is what the segment's own outputs
give; one all-gather of D, and M is known from the forward. Nothing is approximated.

The fused kernels map the spans of a segment once, for the exchange and for the outputs (README.md, "Long sequences of few
heads"); other implementations run the rule once more, on values [V | 0] and the state [0 | I].

A process receives, for every row of the batch and whatever the length, (R - 1) H K (K + V) numbers in the forward and
(R - 1) H K V in the backward, R being the number of processes; float32, or float64 for float64 inputs.

The short convolution needs the last W - 1 inputs of the segment before: one small all-gather each way.

Symbols: the glossary of `delta_rule.py`.
"""

from typing import NamedTuple, Optional

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .checks import check_boundary_values, check_inputs
from .delta_rule import NAMESPACE, implementation
from .reference import compute_dtype


class Packing(NamedTuple):
    """Packed sequences as one segment sees them; of N sequences, those that lie elsewhere are empty here."""

    cu_seqlens: Tensor  # [N + 1] bounds inside the segment
    first: Tensor  # [1] the sequence of the segment's first token
    last: Tensor  # [1] the sequence of its last token
    began: Tensor  # [1] where the first token's sequence began: 0, or negative for a segment before
    opening: Tensor  # [T] bool, tokens of a sequence that began on an earlier process
    closing: Tensor  # [T] bool, tokens of a sequence that goes on in the next process
    passes: Tensor  # [1] bool, that is one sequence, which fills the segment


class Segment(NamedTuple):
    """This process's share of the sequences; the same for every layer, so make it once a forward, with `segment`."""

    group: Optional["dist.ProcessGroup"]
    rank: int
    size: int
    packing: Optional[Packing]

    @property
    def cu_seqlens(self) -> Optional[Tensor]:
        return None if self.packing is None else self.packing.cu_seqlens


def segment(group: Optional["dist.ProcessGroup"], length: int, cu_seqlens: Optional[Tensor] = None) -> Segment:
    """The segment of this process among the processes of `group` (`None` for all), of `length` tokens.

    `cu_seqlens` [N + 1] are bounds of packed sequences in the whole row, the same on every process. All segments are then
    of one length; without it they may differ. Values are looked at as in `chunk_delta_rule`.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if cu_seqlens is None:
        return Segment(group, rank, size, None)
    check_boundary_values(cu_seqlens, size * length)
    bounds = cu_seqlens.long() - rank * length
    starts, ends = bounds[:-1], bounds[1:].contiguous()
    token = torch.arange(length, device=bounds.device)
    first, last = (torch.searchsorted(ends, t, right=True).clamp(max=len(ends) - 1) for t in (token[:1], token[-1:]))
    enters, leaves = (starts[first] < 0) & (ends[first] > 0), ends[last] > length
    packing = Packing(
        cu_seqlens=bounds.clamp(0, length),
        first=first,
        last=last,
        began=torch.where(enters, starts[first], 0),
        opening=enters & (token < ends[first]),
        closing=leaves & (token >= starts[last]),
        passes=enters & leaves & (first == last),
    )
    return Segment(group, rank, size, packing)


def context_parallel_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    segment: Segment,
    scale: Optional[float] = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
) -> tuple[Tensor, Optional[Tensor]]:
    """`chunk_delta_rule` over whole sequences, of which every process of `segment.group` gives and gets its own tokens.

    Args:
        q, k: [B, T, H, K], v: [B, T, H, V], beta: [B, T, H], scale, use_qk_l2norm_in_kernel: as in `chunk_delta_rule`,
            with the tokens of this process. Sequences begin with a state of zero.
        segment: from `segment(group, T, cu_seqlens)`.
        output_final_state: give every process the state behind the last token of all; not for packed sequences.

    Returns:
        o [B, T, H, V] of this process's tokens, in the dtype of v, and the final state [B, H, K, V] or None. o is
        differentiable once in q, k, v and beta; every process must call this, and then backward, as often as the others.

    Raises:
        TypeError, ValueError: as in `chunk_delta_rule`; or a final state is wanted of packed sequences.
    """
    check_inputs(q, k, v, beta, None, segment.cu_seqlens)
    if output_final_state and segment.packing is not None:
        raise ValueError("output_final_state is True with packed sequences; without cu_seqlens there is one state a row")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    return _ContextParallel.apply(q, k, v, beta, scale, output_final_state, use_qk_l2norm_in_kernel, segment)


class _ContextParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, beta, scale, output_final_state, use_l2, segment):
        with _own_precision(q):
            own, mapped = _segment_map(k, v, beta, use_l2, segment)
            N, M = all_gather(own, segment.group).split([v.shape[3], k.shape[3]], -1)
            S = torch.zeros_like(N[0])
            for r in range(segment.rank):
                S = N[r] + M[r] @ S
        initial = S if segment.packing is None else _placed(S, segment.packing.first, segment)
        arguments = (q, k, v, beta, scale, initial, output_final_state, use_l2)
        if mapped is None:
            op = getattr(torch.ops, NAMESPACE).chunk_delta_rule
            o, final_state, *saved = op(*arguments, segment.cu_seqlens, False)
            maps = S.new_empty(0)
        else:
            from .chunk_segments import mapped_forward

            o, final_state, *saved = mapped_forward(*arguments, mapped)
            maps = mapped.maps
        ctx.save_for_backward(q, k, v, beta, S, M[segment.rank + 1 :].clone(), maps, *saved)
        ctx.scale, ctx.use_l2, ctx.segment = scale, use_l2, segment
        if not output_final_state:
            return o, None
        dist.broadcast(final_state, group_src=segment.size - 1, group=segment.group)
        ctx.mark_non_differentiable(final_state)
        return o, final_state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do, _):
        q, k, v, beta, S, M, maps, *saved = ctx.saved_tensors
        segment = ctx.segment
        with _own_precision(q):
            own = _entering_gradient(do, q, k, v, beta, saved, maps, ctx.scale, ctx.use_l2, segment)
            D, dS = all_gather(own, segment.group), torch.zeros_like(S)
            for r in reversed(range(segment.rank + 1, segment.size)):
                dS = D[r] + M[r - segment.rank - 1].mT @ dS
        if segment.packing is not None:
            S, dS = _placed(S, segment.packing.first, segment), _placed(dS, segment.packing.last, segment)
        op = getattr(torch.ops, NAMESPACE).chunk_delta_rule_backward
        gradients = op(do, dS, q, k, v, beta, *saved, ctx.scale, S, ctx.use_l2, segment.cu_seqlens)
        return *gradients[:4], None, None, None, None


def _own_precision(q: Tensor):
    """Autocast would round the maps."""
    return torch.autocast(q.device.type, enabled=False)


def _segment_map(k: Tensor, v: Tensor, beta: Tensor, use_l2: bool, segment: Segment):
    """[N | M] of this process's segment, [B, H, K, V + K], and what the fused forward over it need not compute again, if
    anything."""
    packing, (B, _, H, K), V = segment.packing, k.shape, v.shape[3]
    if packing is not None:
        # With a beta of zero a token is as if it were not there.
        beta = beta.masked_fill(~packing.closing[:, None], 0)
    if implementation(k).name == "triton":
        from .chunk_segments import segment_map

        state, mapped = segment_map(k, v, beta, use_l2)
    else:
        identity = torch.eye(K, dtype=compute_dtype(k.dtype), device=k.device).expand(B, H, K, K)
        op = getattr(torch.ops, NAMESPACE).chunk_delta_rule
        _, state, *_ = op(k, k, F.pad(v, (0, K)), beta, 1.0, F.pad(identity, (V, 0)), True, use_l2, None, False)
        mapped = None
    if packing is None:
        return state, mapped
    state[..., V:].mul_(packing.passes)
    return state, None


def _entering_gradient(do, q, k, v, beta, saved, maps, scale, use_l2, segment: Segment) -> Tensor:
    """D, the gradient of the state that enters this process's segment, as far as its own outputs are concerned."""
    zero = q.new_zeros((len(q), *q.shape[2:], v.shape[3]), dtype=compute_dtype(q.dtype))
    if segment.rank == 0:
        return zero
    if segment.packing is not None:
        absent = ~segment.packing.opening
        do, beta = do.masked_fill(absent[:, None, None], 0), beta.masked_fill(absent[:, None], 0)
        saved = [x.new_empty(0) for x in saved]
    if implementation(q).name == "triton":
        from .chunk_segments import entering_gradient

        return entering_gradient(do, q, k, v, beta, *saved[:2], maps, scale, use_l2)
    op = getattr(torch.ops, NAMESPACE).chunk_delta_rule_backward
    return op(do, None, q, k, v, beta, *saved, scale, zero, use_l2, None)[4]


def _placed(state: Tensor, index: Tensor, segment: Segment) -> Tensor:
    """[1, H, K, V] -> [N, H, K, V]: one sequence's state among those of all, which have none."""
    states = state.new_zeros((len(segment.cu_seqlens) - 1, *state.shape[1:]))
    return states.index_copy_(0, index, state)


def all_gather(x: Tensor, group: Optional["dist.ProcessGroup"]) -> Tensor:
    """x of every process, [R, *x.shape]; no gradient."""
    size = dist.get_world_size(group)
    out = x.new_empty((size * len(x), *x.shape[1:]))
    dist.all_gather_into_tensor(out, x.contiguous(), group=group)
    return out.unflatten(0, (size, -1))


def neighbouring_inputs(x: Tensor, width: int, segment: Segment) -> tuple[Tensor, Tensor]:
    """What `short_convolution` takes as `initial_state` and, of the whole rows, gives as final state.

    Args:
        x: [B, T, D], this process's inputs; T of at least W - 1.
        width: W of the convolution.

    Returns:
        The last W - 1 inputs before this process's segment, [N, D, W - 1] in the dtype of x, N being B or the number of
        packed sequences; zero where a sequence begins. Differentiable. And the last W - 1 of all processes, [B, D, W - 1].
    """
    past, packing = width - 1, segment.packing
    if x.shape[1] < past:
        raise ValueError(f"x has {x.shape[1]} tokens; a segment has at least {past}, for a convolution of width {width}")
    if past == 0:
        before = last = x.new_zeros(len(x), x.shape[2], 0)
    else:
        before, last = (rows.mT for rows in _Neighbours.apply(x[:, x.shape[1] - past :], segment))
    if packing is None:
        return before, last
    elsewhere = torch.arange(-past, 0, device=x.device) < packing.began
    return _placed(before.masked_fill(elsewhere, 0), packing.first, segment), last


class _Neighbours(torch.autograd.Function):
    """The x of the process before, zeros on the first; and that of the last, without gradient."""

    @staticmethod
    def forward(ctx, x, segment):
        ctx.segment = segment
        everyone = all_gather(x, segment.group)
        last = everyone[-1].clone()
        ctx.mark_non_differentiable(last)
        return everyone[segment.rank - 1].clone() if segment.rank > 0 else torch.zeros_like(last), last

    @staticmethod
    def backward(ctx, gradient, _):
        segment = ctx.segment
        everyone = all_gather(gradient, segment.group)
        return everyone[segment.rank + 1].clone() if segment.rank + 1 < segment.size else torch.zeros_like(everyone[0]), None
