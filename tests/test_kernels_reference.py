"""kernels/reference.py against the float64 recurrence: numbers, gradients, packing."""

import pytest
import torch
from oracle import KEYS, assert_close, delta_rule, relative_error, state, tokens, with_gradients

from deltanet.kernels.reference import (
    chunk_backward,
    chunk_forward,
    chunk_inverse,
    recurrent_delta_rule_reference,
    step_forward,
)

LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
GRADIENT_LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


def chunked(q, k, v, beta, h0, do=None, dht=None, scale=None, l2=False, cu_seqlens=None):
    """Outputs, and with `do` gradients, of the chunked form."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    o, ht, *saved = chunk_forward(q, k, v, beta, scale, h0, True, l2, cu_seqlens)
    if do is None:
        return [o, ht]
    return [o, ht, *chunk_backward(do, dht, q, k, v, beta, *saved, scale, h0, l2, cu_seqlens)]


def compare(inputs, limit, gradient_limit, **options):
    expected = with_gradients(lambda *x: delta_rule(*x[:4], h0=x[4], **options), [x.double() for x in inputs])
    g = torch.Generator().manual_seed(2)
    do, dht = (torch.randn(x.shape, generator=g) for x in expected[:2])
    actual = chunked(*inputs, do, dht, **options)
    assert_close(actual, expected, [limit, limit] + [gradient_limit] * 5)
    return actual


@pytest.mark.parametrize("l2", [False, True])
@pytest.mark.parametrize(
    "T, K, V", [(1, 16, 16), (15, 60, 24), (63, 32, 64), (64, 128, 128), (65, 16, 128), (130, 60, 60)]
)
def test_chunked_form(T, K, V, l2):
    inputs = [*tokens(2, T, 2, K, V), state(2, 2, K, V)]
    compare(inputs, 1e-5, 1e-5, l2=l2)


def test_chunked_form_on_a_long_sequence():
    compare([*tokens(1, 1000, 2, 64, 32, "silu"), state(1, 2, 64, 32)], 1e-5, 1e-5, l2=True)


@pytest.mark.parametrize("beta", [0.0, 1.0, 1.9, None])
@pytest.mark.parametrize("keys", KEYS)
def test_adversarial_keys(keys, beta):
    # Identical keys and beta 1.9: A has a condition number of thousands, and so has the map from inputs to outputs.
    limit = 1e-4 if (keys, beta) == ("identical", 1.9) else 1e-5
    compare([*tokens(1, 130, 2, 64, 64, keys, beta), state(1, 2, 64, 64)], limit, limit, l2=True)


@pytest.mark.parametrize("keys", ["silu", "correlated"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_only_at_the_border(dtype, keys):
    inputs = [*tokens(1, 130, 2, 64, 48, keys, dtype=dtype), state(1, 2, 64, 48)]
    expected = with_gradients(lambda *x: delta_rule(*x[:4], h0=x[4], l2=True), [x.double() for x in inputs])
    g = torch.Generator().manual_seed(2)
    do, dht = torch.randn(expected[0].shape, generator=g), torch.randn(expected[1].shape, generator=g)
    actual = chunked(*inputs, do, dht, l2=True)
    assert [x.dtype for x in actual] == [dtype, torch.float32, dtype, dtype, dtype, dtype, torch.float32]
    assert_close(actual, expected, [LIMITS[dtype]] * 2 + [GRADIENT_LIMITS[dtype]] * 5)
    assert relative_error(actual[0], expected[0]) < torch.finfo(dtype).eps


def test_float64_is_computed_in_float64():
    compare([*tokens(1, 70, 1, 16, 8, dtype=torch.float64), state(1, 1, 16, 8, torch.float64)], 1e-7, 1e-7)
    inputs = tokens(1, 70, 1, 16, 8, dtype=torch.float64)
    o, ht = chunked(*inputs, None)
    expected = delta_rule(*inputs)
    assert o.dtype == ht.dtype == torch.float64
    assert_close([o, ht], expected, 1e-13)


@pytest.mark.parametrize("zero", ["q", "v", "k", "beta"])
def test_zero_reference_demands_exact_zeros(zero):
    inputs = tokens(1, 70, 2, 16, 24)
    inputs["qkv".index(zero) if zero != "beta" else 3].zero_()
    expected = with_gradients(delta_rule, [x.double() for x in inputs])
    g = torch.Generator().manual_seed(2)
    do, dht = (torch.randn(x.shape, generator=g) for x in expected[:2])
    actual = chunked(*inputs, None, do, dht)[:6]
    assert sum(not x.any() for x in expected) >= 1
    assert_close(actual, expected, 1e-5)


@pytest.mark.parametrize("bounds, T", [([0, 0, 1, 66, 66, 130], 130), ([0, 64, 128], 140), ([0, 0], 5), ([0, 3, 4], 9)])
def test_packed_equals_separate(bounds, T):
    """Empty sequences, sequences of one token, and a tail of no sequence whose outputs and gradients are zero."""
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    inputs = [*tokens(1, T, 2, 24, 40), state(len(bounds) - 1, 2, 24, 40)]
    actual = compare(inputs, 1e-5, 1e-5, cu_seqlens=cu_seqlens, l2=True)
    for name, x in zip(("o", "dq", "dk", "dv", "dbeta"), [actual[0], *actual[2:6]]):
        assert not x[:, bounds[-1] :].any(), name
    for n, (start, end) in enumerate(zip(bounds, bounds[1:])):
        if start == end:
            assert torch.equal(actual[1][n], inputs[4][n])
            continue
        alone = chunked(*(x[:, start:end] for x in inputs[:4]), inputs[4][n : n + 1], l2=True)
        assert_close([actual[0][:, start:end], actual[1][n : n + 1]], alone, 1e-6)


def test_no_value_crosses_a_boundary():
    inputs = tokens(1, 100, 1, 16, 16)
    cu_seqlens = torch.tensor([0, 40, 90])
    clean = chunked(*inputs, None, cu_seqlens=cu_seqlens)[0]
    for x in inputs:
        x[:, 40:90] = float("nan")
        x[:, 90:] = float("inf")
    dirty = chunked(*inputs, None, cu_seqlens=cu_seqlens)[0]
    assert torch.equal(dirty[:, :40], clean[:, :40]) and not dirty[:, 90:].any()


def test_inputs_are_not_modified():
    inputs = [*tokens(2, 65, 2, 16, 24), state(2, 2, 16, 24)]
    before = [x.clone() for x in inputs]
    do, dht = torch.ones(2, 65, 2, 24), torch.ones(2, 2, 16, 24)
    chunked(*inputs, do, dht, l2=True)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before))
    assert do.eq(1).all() and dht.eq(1).all()


def test_backward_without_gradient_of_the_final_state_or_saved_inverse():
    q, k, v, beta = tokens(1, 70, 2, 16, 24)
    expected = with_gradients(lambda *x: delta_rule(*x)[:1], [x.double() for x in (q, k, v, beta)])[1:]
    do = torch.randn(v.shape, generator=torch.Generator().manual_seed(2))
    _, _, Tinv, factors = chunk_forward(q, k, v, beta, 0.25, None, False, False, None)
    assert Tinv.shape == (1, 70, 2, 64)
    for saved in (Tinv, Tinv.new_empty(0)):
        assert_close(chunk_backward(do, None, q, k, v, beta, saved, factors, 0.25, None, False, None)[:4], expected, 1e-5)


def test_two_runs_are_equal():
    inputs = [*tokens(2, 200, 2, 32, 32), state(2, 2, 32, 32)]
    do, dht = torch.randn(2, 200, 2, 32), torch.randn(2, 2, 32, 32)
    assert all(map(torch.equal, chunked(*inputs, do, dht), chunked(*inputs, do, dht)))


@pytest.mark.parametrize("size", [16, 32, 64])
@pytest.mark.parametrize(
    "keys, beta, limit", [("gaussian", None, 1e-6), ("correlated", 1.0, 1e-6), ("identical", 1.9, 1e-4)]
)
def test_inverse(keys, beta, limit, size):
    _, k, _, b = tokens(1, size, 3, 64, 1, keys, beta)
    k, b = k.transpose(1, 2), b.transpose(1, 2)[..., None]
    A = torch.tril(b.double() * (k.double() @ k.double().mT), -1)
    expected = torch.linalg.inv(torch.eye(size, dtype=torch.float64) + A)
    assert relative_error(chunk_inverse(k, b), expected) < limit


@pytest.mark.parametrize("cu_seqlens", [None, torch.tensor([0, 0, 1, 20])])
def test_recurrence_and_its_autograd(cu_seqlens):
    inputs = [*tokens(1, 22, 2, 12, 20), state(1 if cu_seqlens is None else 3, 2, 12, 20)]
    inputs = [x.double() for x in inputs]
    options = dict(output_final_state=True, use_qk_l2norm_in_kernel=True, cu_seqlens=cu_seqlens)
    actual = with_gradients(
        lambda q, k, v, b, h0: recurrent_delta_rule_reference(q, k, v, b, initial_state=h0, **options), inputs
    )
    expected = with_gradients(lambda *x: delta_rule(*x[:4], h0=x[4], l2=True, cu_seqlens=cu_seqlens), inputs)
    assert_close(actual, expected, 1e-12)


def test_recurrence_leaves_an_unused_tail_zero_whatever_it_holds():
    q, k, v, beta = tokens(1, 12, 1, 16, 16)
    v[:, 9:] = float("nan")
    o, _ = recurrent_delta_rule_reference(q, k, v, beta, cu_seqlens=torch.tensor([0, 9]))
    assert o[:, :9].isfinite().all() and not o[:, 9:].any()


def test_recurrence_scales_before_it_rounds():
    inputs = tokens(1, 40, 2, 24, 24, dtype=torch.bfloat16)
    expected = delta_rule(*inputs)[0]
    assert relative_error(recurrent_delta_rule_reference(*inputs)[0], expected) < 1.9e-3


@pytest.mark.parametrize("state_dtype, limit", [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("indices", [None, [1, -1, 4], [-1, 0, -1], [-1, -1, -1]])
def test_step(indices, state_dtype, limit):
    q, k, v, beta = (x[:, 0] for x in tokens(3, 1, 2, 16, 24))
    S = state(3 if indices is None else 5, 2, 16, 24, state_dtype)
    before = S.clone()
    o = step_forward(q, k, v, beta, S, 0.3, True, None if indices is None else torch.tensor(indices))
    rows = [0, 1, 2] if indices is None else indices
    for b, n in enumerate(rows):
        if n == -1:
            assert not o[b].any()
            continue
        one = [x[b : b + 1, None] for x in (q, k, v, beta)]
        expected = delta_rule(*one, scale=0.3, h0=before[n : n + 1], l2=True)
        assert_close([o[b], S[n]], [expected[0][0, 0], expected[1][0]], [1e-6, limit])
    untouched = [n for n in range(len(S)) if n not in rows]
    assert torch.equal(S[untouched], before[untouched])
