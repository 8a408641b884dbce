"""The fused kernels against float64, on inputs rounded to their dtype: sizes, lengths, keys, packs, strides.

Fresh memory holds NaN and every case runs twice, bit for bit the same.
"""

import functools

import pytest
import torch
from cases import DTYPES, Case, limits
from oracle import NAMES, assert_close, delta_rule, delta_rule_batched, state, tokens, with_gradients

from deltanet.kernels.delta_rule import chunk_delta_rule, delta_rule_step, recurrent_delta_rule

gpu = pytest.mark.gpu
pytestmark = [
    pytest.mark.usefixtures("nan_in_fresh_memory"),
    # The reference's products and sums on a GPU say that they might not repeat.
    pytest.mark.filterwarnings("ignore:.*deterministic"),
]

DTYPE = pytest.mark.parametrize("dtype", list(DTYPES))
# Every size of a key and of a value, equal and not; each pair compiles a set of kernels, which is what takes the time.
SIZES = [
    *(("float32", K, V) for K, V in ((16, 24), (64, 64), (100, 192), (256, 256))),
    *(("bfloat16", K, V) for K, V in ((24, 100), (64, 64), (64, 256), (192, 16), (256, 64), (256, 256))),
    *(("float16", K, V) for K, V in ((16, 16), (64, 128), (100, 24), (256, 192))),
]


def twice(case, rule=chunk_delta_rule):
    """The results of one of two runs that agree in every bit; NaN agrees with NaN here, and fails later by name."""
    results, again = ([x.contiguous() for x in case.actual(rule)] for _ in range(2))
    for name, a, b in zip(NAMES, results, again):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), f"{name} differs between two runs"
    return results


@gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "K, V, bounds",
    [(128, 128, None), (64, 64, [0, 0, 1, 300, 490]), (96, 72, [0, 130, 131]), (40, 200, None)],
)
@pytest.mark.parametrize("span", [None, 128], ids=["whole", "spans"])
@pytest.mark.parametrize("H", [2, 70], ids=["narrow", "wide"])
def test_kernels_for_hopper(monkeypatch, device, check, dtype, K, V, bounds, span, H):
    """They run wherever a Hopper GPU is; here each beside the kernels that other cards get, on sizes that need padding."""
    from deltanet.kernels import chunk
    from deltanet.kernels.launching import Prepared

    if not chunk.has_copy_engine(device):
        pytest.skip("needs a Hopper GPU and Triton 3.6")
    if span:
        monkeypatch.setattr(chunk, "choose_span", lambda plan: span)
    monkeypatch.setattr(chunk, "keep_plan", chunk._Plan)
    case = Case(device, DTYPES[dtype], 500, K, V, H=H, bounds=bounds)
    used, launch = [], Prepared.__call__
    monkeypatch.setattr(Prepared, "__call__", lambda self, *x: (used.append(self.kernel.__name__), launch(self, *x)))
    results, expected = twice(case), case.expected()
    assert {"hopper_output_kernel", "hopper_scan_kernel"} <= set(used)
    # A span's map is rounded to the dtype chunk by chunk, which the gradient of the initial state passes all of.
    bounds_of = [*limits(DTYPES[dtype])[:6], (1.5 if span else 1) * limits(DTYPES[dtype])[6]]
    check(results, expected, bounds_of)
    kept = twice(case, functools.partial(chunk_delta_rule, keep_states=True))
    check(kept, expected, bounds_of)
    if not span:  # maps of spans come from another compilation in the backward, and may round otherwise
        assert all(map(torch.equal, kept, results))
    monkeypatch.setattr(chunk, "has_copy_engine", lambda _: False)
    check(twice(case), expected, bounds_of)
    assert "output_kernel" in used


def test_batched_oracle_is_the_oracle():
    for bounds in (None, [0, 0, 1, 9]):
        B, N = (2, 2) if bounds is None else (1, 3)
        inputs = [*tokens(B, 12, 2, 5, 3), state(N, 2, 5, 3)]
        cu_seqlens = None if bounds is None else torch.tensor(bounds)
        run = lambda rule: with_gradients(  # noqa: E731
            lambda q, k, v, b, h0: rule(q, k, v, b, 0.3, h0, True, cu_seqlens),  # noqa: B023
            [x.double() for x in inputs],  # noqa: B023
        )
        assert_close(run(delta_rule_batched), run(delta_rule), 1e-13)


@gpu
@pytest.mark.parametrize("keys, beta", [("silu", None), ("correlated", 1.0), ("identical", 1.9)])
def test_chunked_reference_is_the_recurrence(device, keys, beta):
    case = Case(device, torch.float64, 500, K=32, V=24, keys=keys, beta=beta, bounds=[0, 0, 1, 300, 490])
    case.inputs = [x.double() for x in case.inputs]
    expected = with_gradients(
        lambda q, k, v, b, h0: delta_rule_batched(q, k, v, b, None, h0, True, case.cu_seqlens), case.inputs
    )
    g = torch.Generator().manual_seed(2)
    case.gradients = [torch.randn(x.shape, generator=g).to(x) for x in expected[:2]]
    assert_close(case.expected(), expected, 1e-8)


@gpu
@DTYPE
@pytest.mark.parametrize("T", [1, 15, 63, 64, 65, 1000, 4096])
def test_lengths(device, check, dtype, T):
    case = Case(device, DTYPES[dtype], T, B=2, H=3)
    check(twice(case), case.expected(), limits(DTYPES[dtype]))


@gpu
@pytest.mark.parametrize("dtype, K, V", SIZES)
@pytest.mark.parametrize("T", [65, 700])
def test_sizes(device, check, dtype, K, V, T):
    case = Case(device, DTYPES[dtype], T, K, V, B=2)
    check(twice(case), case.expected(), limits(DTYPES[dtype]))


@gpu
@DTYPE
@pytest.mark.parametrize("keys", ["silu", "correlated", "identical", "zero"])
@pytest.mark.parametrize("beta", [0.0, 1.0, 1.9])
def test_adversarial_keys(device, check, dtype, keys, beta):
    case = Case(device, DTYPES[dtype], 1000, keys=keys, beta=beta)
    if keys == "zero":  # the norm's gradient is a thousandfold there, too much for float16 otherwise
        case.gradients = [x / 64 for x in case.gradients]
    actual, expected = twice(case), case.expected()
    limit = limits(DTYPES[dtype], keys, beta)
    if keys == "identical" and beta > 1:  # beyond the reach of two bytes; finite all the same
        limit = [1e-3 if dtype == "float32" else 1e30] * 7
    check(actual, expected, limit)


@gpu
@DTYPE
@pytest.mark.parametrize("l2", [True, False])
@pytest.mark.parametrize(
    "bounds, T",
    [
        ([0, 0, 1, 65, 65, 129, 130, 700], 777),  # empty sequences, one token, whole chunks, an unused tail
        ([0, 64, 128, 129], 129),
        ([0, 0], 70),  # no sequence holds a token
        (list(range(0, 301)), 300),  # a token each
        ([0, 3000, 3001, 9000], 9100),  # so long that a row is split over the device
    ],
    ids=["mixed", "chunks", "empty", "ones", "long"],
)
def test_packs(device, check, dtype, l2, bounds, T):
    case = Case(device, DTYPES[dtype], T, bounds=bounds, l2=l2)
    actual = twice(case)
    check(actual, case.expected(), limits(DTYPES[dtype]))
    for x in (actual[0], *actual[2:6]):
        assert not x[:, bounds[-1] :].any(), "a token of no sequence has an output or a gradient"


@gpu
@DTYPE
def test_packed_equals_separate(device, check, dtype):
    bounds = [0, 100, 101, 300]
    case = Case(device, DTYPES[dtype], 300, bounds=bounds)
    case.cu_seqlens = case.cu_seqlens.int()
    packed, parts = case.actual(), []
    for n, (start, end) in enumerate(zip(bounds, bounds[1:])):
        one = Case(device, DTYPES[dtype], end - start)
        one.inputs = [*(x[:, start:end] for x in case.inputs[:4]), case.inputs[4][n : n + 1]]
        one.gradients = [case.gradients[0][:, start:end], case.gradients[1][n : n + 1]]
        parts.append(one.actual())
    separate = [torch.cat(x, 0 if i in (1, 6) else 1) for i, x in enumerate(zip(*parts))]
    check(packed, separate, limits(DTYPES[dtype]))


@gpu
@DTYPE
def test_without_norm_and_without_states(device, check, dtype):
    case = Case(device, DTYPES[dtype], 200, l2=False, B=2)
    check(twice(case), case.expected(), limits(DTYPES[dtype]))
    x = [z.detach().requires_grad_() for z in case.inputs[:4]]
    o, final_state = chunk_delta_rule(*x)
    assert final_state is None
    case.inputs[4].zero_(), case.gradients[1].zero_()
    actual = [o.detach(), *torch.autograd.grad(o, x, case.gradients[0])]
    expected = case.expected()
    check(actual, [expected[0], *expected[2:6]], limits(DTYPES[dtype])[2:], ("o", "dq", "dk", "dv", "dbeta"))


@gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_beta_of_the_dtype_of_q(device, check, dtype):
    case = Case(device, DTYPES[dtype], 200, beta_dtype=DTYPES[dtype])
    actual = twice(case)
    assert actual[5].dtype == DTYPES[dtype]
    check(actual, case.expected(), limits(DTYPES[dtype]))


@gpu
@DTYPE
@pytest.mark.parametrize("B, H", [(1, 1), (1, 5), (40, 8)])
def test_few_and_many_heads(device, check, dtype, B, H):
    """Long rows of few heads may be split over the device, many heads may take other tiles."""
    case = Case(device, DTYPES[dtype], 8192 if B == 1 else 300, B=B, H=H)
    check(twice(case), case.expected(), limits(DTYPES[dtype]))


@gpu
@DTYPE
def test_gradient_through_one_result(device, check, dtype):
    case = Case(device, DTYPES[dtype], 130)
    for i in (0, 1):
        one = Case(device, DTYPES[dtype], 130)
        one.gradients[1 - i].zero_()
        inputs = [x.detach().requires_grad_() for x in case.inputs]
        results = case.call(chunk_delta_rule, inputs)
        used = inputs[1:] if i else inputs  # the state does not depend on q
        actual = torch.autograd.grad(results[i], used, case.gradients[i])
        check(actual, one.expected()[2 + i :], limits(DTYPES[dtype])[2 + i :], ("dq", "dk", "dv", "dbeta", "dh0")[i:])


@gpu
@DTYPE
@pytest.mark.parametrize("split", [1, 64, 100])
def test_any_split_continues(device, check, dtype, split):
    """Chunked, then chunked, recurrent or single steps from the state of the first part."""
    *x, h0 = Case(device, DTYPES[dtype], 300).inputs
    options = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
    whole = chunk_delta_rule(*x, initial_state=h0, **options)
    first, middle = chunk_delta_rule(*(z[:, :split] for z in x), initial_state=h0, **options)
    for rule in (chunk_delta_rule, recurrent_delta_rule):
        second, end = rule(*(z[:, split:] for z in x), initial_state=middle, **options)
        check([torch.cat([first, second], 1), end], whole, limits(DTYPES[dtype])[:2])
    steps = [delta_rule_step(*(z[:, t] for z in x), middle, use_qk_l2norm_in_kernel=True) for t in range(split, split + 5)]
    check([torch.stack(steps, 1)], [whole[0][:, split : split + 5]], limits(DTYPES[dtype])[:1])


def requested(which):
    """Bytes asked of the allocator, without what it rounds them up to."""
    return torch.cuda.memory_stats()[f"requested_bytes.all.{which}"]


@gpu
@DTYPE
def test_views_of_a_packed_projection_are_read_in_place(device, dtype):
    """The same bits as from copies, and not a byte more memory at the peak."""
    B, T, H, K, V = 2, 2000, 4, 128, 128
    packed = torch.randn(B, T, H * (2 * K + V), generator=torch.Generator().manual_seed(0)).to(device, DTYPES[dtype])
    views = [x.unflatten(-1, (H, -1)) for x in packed.split([H * K, H * K, H * V], -1)]
    beta = torch.rand(B, H, T, generator=torch.Generator().manual_seed(1)).to(device).transpose(1, 2)
    do = torch.randn(B, T, H, V, generator=torch.Generator().manual_seed(2)).to(packed)

    def run(inputs, do):
        inputs = [x.detach().requires_grad_() for x in inputs]
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        before = requested("current") if device.type == "cuda" else 0
        o, _ = chunk_delta_rule(*inputs, use_qk_l2norm_in_kernel=True)
        forward = requested("peak") - before if device.type == "cuda" else 0
        gradients = torch.autograd.grad(o, inputs, do)
        backward = requested("peak") - before if device.type == "cuda" else 0
        return [o.detach(), *gradients], (forward, backward)

    copies = [x.contiguous() for x in (*views, beta)]
    run(copies, do)  # buffers that are kept for later calls exist from now on
    (actual, memory), (expected, plain) = run([*views, beta], do), run(copies, do)
    assert all(map(torch.equal, actual, expected))
    assert memory == plain
    strided, _ = run(copies, do.transpose(1, 2).contiguous().transpose(1, 2))
    assert all(map(torch.equal, strided, expected))


@gpu
def test_transposed_states(device):
    case = Case(device, torch.bfloat16, 100, B=2)
    expected = case.actual()
    case.inputs[4] = case.inputs[4].mT.contiguous().mT
    case.gradients[1] = case.gradients[1].mT.contiguous().mT
    assert all(map(torch.equal, case.actual(), expected))
