"""The maps and gradients of segments in Triton's interpreter, against the recurrence in float64 and its autograd."""

import pytest
import torch
from cases import DTYPES, limits
from oracle import assert_close, delta_rule_batched, tokens

from deltanet.kernels.delta_rule import chunk_delta_rule

pytest.importorskip("triton")
pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("nan_in_fresh_memory")]

# With spans of 64: one span, whole ones, and one that is not full.
LENGTHS = (40, 128, 150)


@pytest.fixture(params=[64, None])
def span(request, monkeypatch):
    from deltanet.kernels import chunk

    if request.param:
        monkeypatch.setattr(chunk, "choose_span", lambda plan: request.param)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("T", LENGTHS)
def test_segment(span, dtype, T):
    from deltanet.kernels.chunk_segments import entering_gradient, segment_map

    B, H, K, V = (2, 1, 24, 40)
    dtype = DTYPES[dtype]
    q, k, v, beta = tokens(B, T, H, K, V, "silu")
    q, k, v = (x.to(dtype) for x in (q * 3, k * 2, v))
    do = torch.randn(B, T, H, V, generator=torch.Generator().manual_seed(3)).to(dtype)
    identity = torch.eye(K, dtype=torch.float64).expand(B, H, K, K)
    nothing = torch.zeros(B, H, K, V, dtype=torch.float64)
    N = delta_rule_batched(q, k, v, beta, h0=nothing, l2=True)[1]
    M = delta_rule_batched(q, k, torch.zeros(B, T, H, K), beta, h0=identity, l2=True)[1]
    S = nothing.requires_grad_()
    D = torch.autograd.grad(delta_rule_batched(q, k, v, beta, h0=S, l2=True)[0], S, do.double())[0]

    state = segment_map(k, v, beta, True)
    op = torch.ops.deltanet.chunk_delta_rule
    _, _, *saved = op(q, k, v, beta, K**-0.5, None, False, True, None)
    found = [entering_gradient(do, q, k, v, beta, *s, K**-0.5, True) for s in (saved, [x.new_empty(0) for x in saved])]
    actual = [state[..., :V], state[..., V:], *found]
    assert_close(actual, [N, M, D, D], limits(dtype)[0], ("N", "M", "D", "D computed anew"))


@pytest.mark.parametrize("bounds", [None, [0, 5, 70, 150, 180]])
def test_two_halves_are_the_whole(monkeypatch, bounds):
    """The operation with the processes' exchange played by hand: the halves one after the other."""
    from deltanet.kernels import context_parallel
    from deltanet.kernels.context_parallel import _entering_gradient, _placed, _segment_map

    q, k, v, beta = tokens(1, 180, 1, 24, 40, "silu")
    do = torch.randn(v.shape, generator=torch.Generator().manual_seed(3))
    cu_seqlens = None if bounds is None else torch.tensor(bounds)
    inputs = [x.requires_grad_() for x in (q, k, v, beta)]
    o = delta_rule_batched(*inputs, l2=True, cu_seqlens=cu_seqlens)[0]
    expected = [o.detach(), *torch.autograd.grad(o, inputs, do.double())]

    places = []
    for rank in range(2):
        monkeypatch.setattr(context_parallel.dist, "get_rank", lambda group, rank=rank: rank)
        monkeypatch.setattr(context_parallel.dist, "get_world_size", lambda group: 2)
        places.append(context_parallel.segment(None, 90, cu_seqlens))
    halves = [[x.detach()[:, i * 90 : (i + 1) * 90] for x in (*inputs, do)] for i in range(2)]
    states = [torch.zeros(1, 1, 24, 40), _segment_map(*halves[0][1:4], True, places[0])[..., :40]]
    entering = _entering_gradient(halves[1][4], *halves[1][:4], [torch.empty(0)] * 2, 24**-0.5, True, places[1])
    results = []
    for half, place, S, dS in zip(halves, places, states, (entering, torch.zeros_like(entering))):
        own = [x.clone().requires_grad_() for x in half[:4]]
        if bounds is not None:
            S, dS = _placed(S, place.packing.first, place), _placed(dS, place.packing.last, place)
        o, final = chunk_delta_rule(*own, None, S, True, True, place.cu_seqlens)
        results.append([o.detach(), *torch.autograd.grad([o, final], own, [half[4], dS])])
    actual = [torch.cat(parts, 1) for parts in zip(*results)]
    assert_close(actual, expected, 1e-5, ("o", "dq", "dk", "dv", "dbeta"))
