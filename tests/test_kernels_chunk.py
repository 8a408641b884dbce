"""The Triton kernels in Triton's interpreter against the recurrence in float64: values, final states, every gradient.

What the interpreter shows are equations, masks, tails, strides and tables, in float32 and float16; it computes bfloat16
wrong, and knows no races, layouts or precision of products: `test_gpu_delta_rule.py` is about those. Fresh memory is NaN.
"""

import functools

import pytest
import torch
from cases import DTYPES, Case, limits
from oracle import NAMES, assert_close, relative_error

from deltanet.kernels.delta_rule import chunk_delta_rule, delta_rule_step, recurrent_delta_rule

pytest.importorskip("triton")
pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("nan_in_fresh_memory")]

DTYPE = pytest.mark.parametrize("dtype", ["float32", "float16"])
SIZES = [(16, 24), (24, 16), (40, 64), (64, 40), (32, 32)]
PACKS = [
    ([0, 0, 1, 66, 66, 120], 130),  # empty sequences, one token, a whole chunk and a bit, an unused tail
    ([0, 64, 65, 129], 129),
    ([0, 0], 20),  # no sequence holds a token
]


def case(dtype, T, K=32, V=32, **options):
    return Case(torch.device("cpu"), DTYPES[dtype], T, K, V, **options)


def run(one, rule=chunk_delta_rule, keys="silu", beta=None):
    actual = one.actual(rule)
    assert_close(actual, one.expected(), limits(one.inputs[0].dtype, keys, beta))
    return actual


@pytest.fixture
def spans(monkeypatch):
    """Sequences are cut every 64 tokens, as long ones are on a GPU."""
    from deltanet.kernels import chunk

    monkeypatch.setattr(chunk, "choose_span", lambda plan: 64)
    monkeypatch.setattr(chunk, "keep_plan", chunk._Plan)


@DTYPE
@pytest.mark.parametrize("T", [1, 15, 64, 65, 130])
def test_lengths(dtype, T):
    run(case(dtype, T, B=2, H=1 if T > 64 else 3))


@DTYPE
@pytest.mark.parametrize("K, V", SIZES)
def test_sizes(dtype, K, V):
    run(case(dtype, 67, K, V))


@DTYPE
@pytest.mark.parametrize("l2", [True, False])
def test_keys_that_leave_no_room_for_one_pass(dtype, l2):
    run(case(dtype, 67, 144, 40, H=1, l2=l2))


@DTYPE
@pytest.mark.parametrize("l2", [True, False])
@pytest.mark.parametrize("bounds, T", PACKS)
def test_packs(dtype, l2, bounds, T):
    actual = run(case(dtype, T, 24, 32, H=1, bounds=bounds, l2=l2))
    for x in (actual[0], *actual[2:6]):
        assert not x[:, bounds[-1] :].any(), "a token of no sequence has an output or a gradient"


@DTYPE
@pytest.mark.parametrize("K, V", [(32, 16), (24, 40)])
@pytest.mark.parametrize("bounds", [None, [0, 0, 70, 71, 120]], ids=["dense", "packed"])
def test_spans(spans, dtype, K, V, bounds):
    run(case(dtype, 130, K, V, H=1, bounds=bounds))


@DTYPE
@pytest.mark.parametrize("bounds", [None, [0, 0, 70, 71, 120]], ids=["dense", "packed"])
@pytest.mark.parametrize("split", [False, True])
def test_kept_states(request, dtype, bounds, split):
    """The backward takes them for what it would have computed: not a bit may differ."""
    if split:
        request.getfixturevalue("spans")
    one = case(dtype, 130, 24, 40, H=1, bounds=bounds)
    kept = run(one, functools.partial(chunk_delta_rule, keep_states=True))
    assert all(map(torch.equal, kept, one.actual()))


@DTYPE
@pytest.mark.parametrize("keys", ["silu", "correlated", "identical", "zero"])
@pytest.mark.parametrize("beta", [0.0, 1.0, 1.9])
def test_adversarial_keys(dtype, keys, beta):
    one = case(dtype, 70, H=1, keys=keys, beta=beta)
    if keys == "zero":  # the norm's gradient is a thousandfold there, too much for float16 otherwise
        one.gradients = [x / 64 for x in one.gradients]
    if keys == "identical" and beta > 1 and dtype == "float16":  # beyond the reach of two bytes; finite all the same
        assert all(x.isfinite().all() for x in one.actual())
    else:
        run(one, keys=keys, beta=beta)


@DTYPE
@pytest.mark.parametrize("l2, length", [(False, 1.3), (True, 20.0), (True, 0.1), (True, 0.003)])
def test_keys_of_another_length(dtype, l2, length):
    """Without the norm a key of length 1.3 is still stable; with it the length drops out, and the gradient scales."""
    one = case(dtype, 70, H=1, l2=l2)
    one.inputs[1] = one.inputs[1] * length
    run(one)


@DTYPE
@pytest.mark.parametrize("l2", [True, False])
def test_scale(dtype, l2):
    run(case(dtype, 70, 24, 16, H=1, l2=l2, scale=0.7))


def test_beta_of_the_dtype_of_q():
    assert run(case("float16", 70, H=1, beta_dtype=torch.float16))[5].dtype == torch.float16


@DTYPE
@pytest.mark.parametrize("step", [1, 2], ids=["dense rows", "every other element"])
def test_views_of_a_packed_projection(dtype, step):
    """Heads next to each other in one tensor, beta and the gradient of o with tokens inside."""
    B, T, H, K, V = 2, 66, 2, 24, 16
    one = case(dtype, T, K, V, B=B, H=H)
    packed = torch.empty(B, T, H * (2 * K + V) * step, dtype=DTYPES[dtype])[..., ::step]
    views = [x.unflatten(-1, (H, -1)) for x in packed.split([H * K, H * K, H * V], -1)]
    for i, view in enumerate(views):
        one.inputs[i] = view.copy_(one.inputs[i])
    one.inputs[3] = one.inputs[3].transpose(1, 2).contiguous().transpose(1, 2)
    one.inputs[4] = one.inputs[4].mT.contiguous().mT
    one.gradients[0] = one.gradients[0].transpose(1, 2).contiguous().transpose(1, 2)
    assert one.inputs[0].stride() == (T * H * (2 * K + V) * step, H * (2 * K + V) * step, K * step, step)
    run(one)


@pytest.mark.parametrize("bounds", [None, [0, 70, 71, 120]], ids=["dense", "packed"])
@pytest.mark.parametrize("split", [False, True])
def test_without_states(request, bounds, split):
    if split:
        request.getfixturevalue("spans")
    one = case("float32", 130, 16, 24, H=1, bounds=bounds)
    inputs = [x.detach().requires_grad_() for x in one.inputs[:4]]
    o, final_state = chunk_delta_rule(*inputs, use_qk_l2norm_in_kernel=True, cu_seqlens=one.cu_seqlens)
    assert final_state is None
    one.inputs[4].zero_(), one.gradients[1].zero_()
    expected, names = one.expected(), ("o", *NAMES[2:6])
    actual = [o.detach(), *torch.autograd.grad(o, inputs, one.gradients[0])]
    assert_close(actual, [expected[0], *expected[2:6]], limits(torch.float32)[2:], names)


@pytest.mark.parametrize("bounds", [None, [0, 0, 70, 71, 120]], ids=["dense", "packed"])
def test_runs_repeat_bit_for_bit(spans, bounds):
    one = case("float32", 130, 24, 40, H=1, bounds=bounds)
    assert all(map(torch.equal, one.actual(), one.actual()))


@DTYPE
@pytest.mark.parametrize("bounds, T", [(None, 20), *PACKS[::2]])
def test_recurrence(dtype, bounds, T):
    """Its gradients come from the chunked form, which makes the inverse that was not saved."""
    run(case(dtype, T, 24, 40, H=1, bounds=bounds), recurrent_delta_rule)


@DTYPE
@pytest.mark.parametrize("K, V", SIZES)
def test_step(dtype, K, V):
    """Rows in any order of states, one of no state, a state that nobody names."""
    one = case(dtype, 1, K, V, B=3)
    *x, h0 = one.inputs
    expected, states = one.expected()[:2]
    places = torch.tensor([4, -1, 1])
    state = torch.full((5, *h0.shape[1:]), 7.0)
    state[places[::2]] = h0[::2]
    o = delta_rule_step(*(z[:, 0] for z in x), state, use_qk_l2norm_in_kernel=True, state_indices=places)
    assert relative_error(o[::2], expected[::2, 0]) < limits(DTYPES[dtype])[0] and not o[1].any()
    assert relative_error(state[places[::2]], states[::2]) < 1e-6
    assert (state[[0, 2, 3]] == 7).all()
