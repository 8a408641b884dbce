"""What the Triton kernels make of segments against float64, on any device, for the interpreter and for a GPU."""

import torch
from oracle import delta_rule_batched, tokens

from deltanet.kernels import context_parallel
from deltanet.kernels.context_parallel import _entering_gradient, _placed, _segment_map
from deltanet.kernels.delta_rule import chunk_delta_rule

MAPS = ("N", "M", "D", "D computed anew")
HALVES = ("o", "dq", "dk", "dv", "dbeta")


def inputs(device, dtype, B, T, H, K, V):
    q, k, v, beta = tokens(B, T, H, K, V, "silu")
    do = torch.randn(B, T, H, V, generator=torch.Generator().manual_seed(3))
    return [*(x.to(device, dtype) for x in (q * 3, k * 2, v)), beta.to(device), do.to(device, dtype)]


def exact(q, k, v, beta, h0=None, cu_seqlens=None):
    """The recurrence, or for many tokens the chunked form in float64, which other tests compare with it."""
    if q.shape[1] <= 256:
        return delta_rule_batched(q, k, v, beta, h0=h0, l2=True, cu_seqlens=cu_seqlens)
    return chunk_delta_rule(*(x.double() for x in (q, k, v, beta)), None, h0, True, True, cu_seqlens)


def maps(device, dtype, B, T, H, K, V):
    """(N, M and D of the kernels, those of float64)."""
    from deltanet.kernels.chunk_segments import entering_gradient, mapped_forward, segment_map

    q, k, v, beta, do = inputs(device, dtype, B, T, H, K, V)
    nothing = torch.zeros(B, H, K, V, dtype=torch.float64, device=device)
    identity = torch.eye(K, dtype=torch.float64, device=device).expand(B, H, K, K)
    N = exact(q, k, v, beta, nothing)[1]
    M = exact(q, k, k * 0, beta, identity.contiguous())[1]
    S = nothing.clone().requires_grad_()
    D = torch.autograd.grad(exact(q, k, v, beta, S)[0], S, do.double())[0]

    state, mapped = segment_map(k, v, beta, True)
    o, _, tau, factors, *_ = mapped_forward(q, k, v, beta, K**-0.5, None, False, True, mapped)
    assert torch.equal(o, chunk_delta_rule(q, k, v, beta, use_qk_l2norm_in_kernel=True)[0])
    saved = (tau, factors, mapped.maps)
    found = [entering_gradient(do, q, k, v, beta, *x, K**-0.5, True) for x in (saved, [x.new_empty(0) for x in saved])]
    return [state[..., :V], state[..., V:], *found], [N, M, D, D]


def halves(patch, device, dtype, bounds, B, T, H, K, V):
    """(o and gradients of two processes' segments, one after the other, those of the whole in float64)."""
    *whole, do = inputs(device, dtype, B, T, H, K, V)
    cu_seqlens = None if bounds is None else torch.tensor(bounds, device=device)
    leaves = [x.double().requires_grad_() for x in whole]
    o = exact(*leaves, cu_seqlens=cu_seqlens)[0]
    expected = [o.detach(), *torch.autograd.grad(o, leaves, do.double())]

    places = []
    for rank in range(2):
        patch.setattr(context_parallel.dist, "get_rank", lambda group, rank=rank: rank)
        patch.setattr(context_parallel.dist, "get_world_size", lambda group: 2)
        places.append(context_parallel.segment(None, T // 2, cu_seqlens))
    parts = [[x[:, i * T // 2 : (i + 1) * T // 2] for x in (*whole, do)] for i in range(2)]
    S = _segment_map(*parts[0][1:4], True, places[0])[0][..., :V].contiguous()
    unsaved = torch.empty(0, device=device)
    dS = _entering_gradient(parts[1][4], *parts[1][:4], [unsaved] * 2, unsaved, K**-0.5, True, places[1])
    first = _half(parts[0], places[0], torch.zeros_like(S), dS)
    second = _half(parts[1], places[1], S, torch.zeros_like(dS))
    return [torch.cat(pair, 1) for pair in zip(first, second)], expected


def _half(part, place, S, dS):
    if place.packing is not None:
        S, dS = _placed(S, place.packing.first, place), _placed(dS, place.packing.last, place)
    own = [x.detach().clone().requires_grad_() for x in part[:4]]
    o, final_state = chunk_delta_rule(*own, None, S, True, True, place.cu_seqlens)
    return [o.detach(), *torch.autograd.grad([o, final_state], own, [part[4], dS])]
