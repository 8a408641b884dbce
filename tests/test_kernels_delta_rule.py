"""kernels/delta_rule.py: the public functions, as numbers and as operators that compile, export and checkpoint."""

import functools
import importlib
import logging
import pathlib
import sys
import types

import pytest
import torch
import torch._dynamo
from oracle import assert_close, delta_rule, state, tokens, with_gradients
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from deltanet.kernels import checks
from deltanet.kernels import delta_rule as module
from deltanet.kernels.delta_rule import chunk_delta_rule, delta_rule_step, recurrent_delta_rule

OPS = getattr(torch.ops, module.NAMESPACE)
FUNCTIONS = pytest.mark.parametrize("rule", [chunk_delta_rule, recurrent_delta_rule])


@pytest.fixture(autouse=True)
def fresh_choice(monkeypatch):
    monkeypatch.delenv("DELTANET_BACKEND", raising=False)
    for cached in (module._announce, module._triton_implementations):
        cached.cache_clear()


def run(rule, inputs, **options):
    call = lambda q, k, v, b, h0: rule(q, k, v, b, initial_state=h0, output_final_state=True, **options)  # noqa: E731
    return with_gradients(call, inputs)


@FUNCTIONS
@pytest.mark.parametrize("cu_seqlens", [None, [0, 0, 1, 60]])
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1.5e-2)])
def test_values_gradients_and_dtypes(rule, dtype, limit, cu_seqlens):
    cu_seqlens = None if cu_seqlens is None else torch.tensor(cu_seqlens)
    inputs = [*tokens(1, 65, 2, 60, 24, dtype=dtype), state(1 if cu_seqlens is None else 3, 2, 60, 24)]
    inputs[3] = inputs[3].float()
    actual = run(rule, inputs, use_qk_l2norm_in_kernel=True, scale=0.5, cu_seqlens=cu_seqlens)
    expected = with_gradients(
        lambda *x: delta_rule(*x[:4], 0.5, x[4], True, cu_seqlens), [x.double() for x in inputs]
    )
    assert [x.dtype for x in actual] == [dtype, torch.float32, dtype, dtype, dtype, torch.float32, torch.float32]
    # The random gradient of o is drawn in float32 and rounded to the dtype of o.
    assert_close(actual, expected, limit)


@FUNCTIONS
@pytest.mark.parametrize("cu_seqlens", [None, torch.tensor([0, 0, 1, 5])])
def test_gradcheck(rule, cu_seqlens):
    B, N = (2, 2) if cu_seqlens is None else (1, 3)
    inputs = [*tokens(B, 6, 1, 3, 2, dtype=torch.float64), state(N, 1, 3, 2, torch.float64)]
    call = lambda q, k, v, b, h0: rule(q, k, v, b, 0.7, h0, True, True, cu_seqlens)  # noqa: E731
    assert torch.autograd.gradcheck(call, [x.requires_grad_() for x in inputs])


def test_gradcheck_across_chunks():
    inputs = [x.requires_grad_() for x in tokens(1, 66, 1, 2, 2, dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda *x: chunk_delta_rule(*x)[0], inputs)


def test_gradient_through_one_result_only():
    inputs = [*tokens(1, 20, 2, 8, 8), state(1, 2, 8, 8)]
    for i in (0, 1):
        call = lambda q, k, v, b, h0: chunk_delta_rule(q, k, v, b, None, h0, True)[i : i + 1]  # noqa: B023, E731
        oracle = lambda *x: delta_rule(*x[:4], h0=x[4])[i : i + 1]  # noqa: B023, E731
        actual, expected = with_gradients(call, inputs), with_gradients(oracle, [x.double() for x in inputs])
        assert_close(actual, expected, 1e-5)


@pytest.mark.parametrize("split", [1, 7, 63, 64, 65, 100])
def test_any_split_continues(split):
    x = tokens(2, 130, 2, 32, 24)
    whole, S = chunk_delta_rule(*x, output_final_state=True)
    first, middle = chunk_delta_rule(*(z[:, :split] for z in x), output_final_state=True)
    second, end = recurrent_delta_rule(*(z[:, split:] for z in x), initial_state=middle, output_final_state=True)
    assert_close([torch.cat([first, second], 1), end], [whole, S], 1e-5)
    for t in range(split, 130):
        torch.testing.assert_close(delta_rule_step(*(z[:, t] for z in x), middle), whole[:, t], rtol=0, atol=2e-6)
    assert_close([middle], [S], 1e-5)


def test_no_state_unless_asked():
    x = tokens(1, 5, 1, 8, 8)
    assert chunk_delta_rule(*x)[1] is None and recurrent_delta_rule(*x)[1] is None


def test_initial_state_is_kept():
    h0 = state(1, 1, 8, 8)
    before = h0.clone()
    _, ht = chunk_delta_rule(*tokens(1, 5, 1, 8, 8), initial_state=h0, output_final_state=True)
    assert torch.equal(h0, before) and ht.data_ptr() != h0.data_ptr()


@FUNCTIONS
def test_strided_inputs(rule):
    big = torch.randn(2, 4, 70, 60, generator=torch.Generator().manual_seed(0))
    views = big.transpose(1, 2)[..., ::2]
    q, k, v, beta = views[..., :10], views[..., 10:20], views[..., 20:30], views[..., 0].sigmoid()
    h0 = state(2, 4, 10, 10).mT
    actual = run(rule, [q, k, v, beta, h0], use_qk_l2norm_in_kernel=True)
    expected = run(rule, [x.contiguous() for x in (q, k, v, beta, h0)], use_qk_l2norm_in_kernel=True)
    assert_close(actual, expected, 1e-6)


def test_step_reads_and_writes_strided_state():
    x = [z[:, 0] for z in tokens(2, 1, 2, 16, 24)]
    S = state(2, 2, 16, 24)
    transposed = S.mT.contiguous().mT
    results = [delta_rule_step(*x, transposed), transposed]
    assert_close(results, [delta_rule_step(*x, S), S], 1e-6)


def test_second_derivative_is_refused():
    x = [z.requires_grad_() for z in tokens(1, 5, 1, 8, 8)]
    for rule in (chunk_delta_rule, recurrent_delta_rule):
        (dq,) = torch.autograd.grad(rule(*x)[0].sum(), x[0], create_graph=True)
        with pytest.raises(RuntimeError, match=f"{rule.__name__} is differentiable once"):
            dq.sum().backward()


def test_two_copies_of_the_file_in_one_process(monkeypatch):
    """Each works, and the operators of the first stay alive."""
    package = types.ModuleType("a_second_copy")
    package.__path__ = [str(pathlib.Path(module.__file__).parent)]
    monkeypatch.setitem(sys.modules, "a_second_copy", package)
    twin = importlib.import_module("a_second_copy.delta_rule")
    x = tokens(1, 5, 2, 16, 24)
    assert twin is not module and twin.NAMESPACE == module.NAMESPACE
    for _ in range(3):
        assert torch.equal(twin.chunk_delta_rule(*x)[0], chunk_delta_rule(*x)[0])
        assert torch.equal(twin.recurrent_delta_rule(*x)[0], recurrent_delta_rule(*x)[0])
        step = [f(*(z[:, 0] for z in x), state(1, 2, 16, 24)) for f in (twin.delta_rule_step, delta_rule_step)]
        assert torch.equal(*step)


class Layer(torch.nn.Module):
    def __init__(self, rule=chunk_delta_rule):
        super().__init__()
        self.rule, self.proj = rule, torch.nn.Linear(16, 16)

    def forward(self, q, k, v, beta):
        o, S = self.rule(self.proj(q), k, v, beta, output_final_state=True, use_qk_l2norm_in_kernel=True)
        return torch.nn.functional.silu(o).sum() + S.square().sum()


def gradients(function, T=70):
    torch.manual_seed(0)
    x = [z.requires_grad_() for z in tokens(2, T, 2, 16, 24)]
    function(*x).backward()
    return [z.grad for z in x]


@FUNCTIONS
def test_compile_fullgraph_forward_and_backward_any_length(rule):
    torch._dynamo.reset()
    layer = Layer(rule)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)
    for T in (70, 33, 5, 128):
        assert_close(gradients(compiled, T), gradients(layer, T), 1e-6)
    assert counter.frame_count == 1


def test_compile_with_packing_and_step():
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def decode(q, k, v, beta, cu_seqlens, S, rows):
        o, _ = chunk_delta_rule(q, k, v, beta, cu_seqlens=cu_seqlens)
        return o, delta_rule_step(q[0], k[0], v[0], beta[0], S, state_indices=rows)

    x, S = tokens(1, 5, 2, 16, 24), state(7, 2, 16, 24)
    cu_seqlens, rows, same = torch.tensor([0, 2, 4]), torch.tensor([3, -1, 0, 6, -1]), S.clone()
    o, step = decode(*x, cu_seqlens, S, rows)
    assert torch.equal(o, chunk_delta_rule(*x, cu_seqlens=cu_seqlens)[0])
    assert torch.equal(step, delta_rule_step(*(z[0] for z in x), same, state_indices=rows)) and torch.equal(S, same)


def test_export_with_dynamic_length():
    class Rule(torch.nn.Module):
        def forward(self, q, k, v, beta):
            return chunk_delta_rule(q, k, v, beta, output_final_state=True)

    T = torch.export.Dim("T", min=2, max=4096)
    shapes = {name: {1: T} for name in ("q", "k", "v", "beta")}
    program = torch.export.export(Rule(), tuple(tokens(1, 9, 2, 16, 24)), dynamic_shapes=shapes)
    assert OPS.chunk_delta_rule.default in [node.target for node in program.graph.nodes]
    x = tokens(1, 77, 2, 16, 24)
    assert all(map(torch.equal, program.module()(*x), chunk_delta_rule(*x, output_final_state=True)))


class Count(TorchDispatchMode):
    def __init__(self, op):
        super().__init__()
        self.op, self.calls = op, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func is self.op
        return func(*args, **(kwargs or {}))


def keep_rule(ctx, op, *args, **kwargs):
    rule = OPS.chunk_delta_rule.default
    return CheckpointPolicy.MUST_SAVE if op == rule else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("selective", [False, True])
def test_activation_checkpointing(selective):
    """Full checkpointing computes the rule twice; a selective policy sees the operator and keeps its results."""
    layer, options = Layer(), {}
    if selective:
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, keep_rule)
    with Count(OPS.chunk_delta_rule.default) as count:
        actual = gradients(lambda *x: checkpoint(layer, *x, use_reentrant=False, **options))
    assert count.calls == (1 if selective else 2)
    assert all(map(torch.equal, actual, gradients(layer)))


def test_compile_with_checkpointing():
    torch._dynamo.reset()
    layer = Layer()
    compiled = torch.compile(
        lambda *x: checkpoint(layer, *x, use_reentrant=False), fullgraph=True, backend="aot_eager"
    )
    assert_close(gradients(compiled), gradients(layer), 1e-6)


@FUNCTIONS
@pytest.mark.parametrize("options", ["plain", "state", "packed", "half"])
def test_opcheck(rule, options):
    cu_seqlens = torch.tensor([0, 0, 5, 18], dtype=torch.int32) if options == "packed" else None
    dtype = torch.float16 if options == "half" else torch.float32
    x = [z.requires_grad_() for z in tokens(1, 20, 2, 16, 24, dtype=dtype)]
    h0 = state(1, 2, 16, 24).requires_grad_() if options == "state" else None
    arguments = (*x, 0.25, h0, options != "plain", True, cu_seqlens, options == "state")
    torch.library.opcheck(getattr(OPS, rule.__name__).default, arguments)


def test_opcheck_step():
    x = [z[:, 0] for z in tokens(2, 1, 2, 16, 24)]
    for rows in (None, torch.tensor([1, -1])):
        torch.library.opcheck(OPS.delta_rule_step.default, (*x, state(2, 2, 16, 24), 0.25, True, rows))


def changed(name, value):
    x = dict(zip(("q", "k", "v", "beta"), tokens(2, 6, 2, 16, 24)))
    return {**x, name: value}


BAD = [
    ("q", torch.zeros(2, 6, 32), ValueError, r"q has shape \(2, 6, 32\); it must be \[B, T, H, K\]"),
    ("beta", torch.zeros(2, 6), ValueError, r"beta has shape \(2, 6\); it must be \[B, T, H\]"),
    ("k", torch.zeros(2, 5, 2, 16), ValueError, r"k has shape .* and q .* must be equal"),
    ("v", torch.zeros(2, 6, 1, 24), ValueError, r"v has shape .* and q .* must be equal"),
    ("k", torch.zeros(2, 6, 2, 8), ValueError, "k has head size 8 and q 16"),
    ("v", torch.zeros(2, 6, 2, 0), ValueError, "v has shape .* no dimension may be empty"),
    ("k", torch.zeros(2, 6, 2, 16, dtype=torch.half), TypeError, "k is torch.float16 and q torch.float32"),
    ("beta", torch.zeros(2, 6, 2, dtype=torch.half), TypeError, "beta is torch.float16; it may be torch.float32"),
    ("q", torch.zeros(2, 6, 2, 16, dtype=torch.int32), TypeError, "q is torch.int32; it may be one of"),
    ("v", torch.zeros(2, 6, 2, 24, device="meta"), ValueError, "v is on meta and q on cpu"),
    ("beta", torch.full((2, 6, 2), float("nan")), ValueError, "beta contains NaN"),
    ("initial_state", torch.zeros(2, 2, 24, 16), ValueError, r"initial_state has shape .* \[N, 2, 16, 24\]"),
    ("initial_state", torch.zeros(3, 2, 16, 24), ValueError, "initial_state holds 3 states; it must hold 2"),
    ("initial_state", torch.zeros(2, 2, 16, 24).half(), TypeError, "initial_state is torch.float16; .*float32"),
    ("initial_state", torch.zeros(2, 2, 16, 24, device="meta"), ValueError, "initial_state is on meta"),
    ("cu_seqlens", torch.tensor([0, 6]), ValueError, "cu_seqlens packs .* batch size 2; it must be 1"),
]


@FUNCTIONS
@pytest.mark.parametrize("name, value, error, message", BAD, ids=lambda x: x if isinstance(x, str) else "")
def test_errors(rule, name, value, error, message):
    with pytest.raises(error, match=message):
        rule(**changed(name, value))


@pytest.mark.parametrize(
    "value, error, message",
    [
        (torch.tensor([[0, 6]]), ValueError, "one dimension"),
        (torch.tensor([0]), ValueError, "fewer than two entries"),
        (torch.tensor([0.0, 6.0]), TypeError, "cu_seqlens is torch.float32; it may be torch.int32, torch.int64"),
        (torch.tensor([0, 6], device="meta"), ValueError, "cu_seqlens is on meta"),
        (torch.tensor([1, 6]), ValueError, "starts with 1; it must start with 0"),
        (torch.tensor([0, 4, 2, 6]), ValueError, r"cu_seqlens decreases: \[0, 4, 2, 6\]"),
        (torch.tensor([0, 7]), ValueError, "cu_seqlens ends at 7; there are 6 tokens"),
    ],
)
@FUNCTIONS
def test_errors_of_packing(rule, value, error, message):
    with pytest.raises(error, match=message):
        rule(*tokens(1, 6, 2, 16, 24), cu_seqlens=value)


@FUNCTIONS
def test_errors_of_size(rule):
    with pytest.raises(ValueError, match="head size 257; at most 256"):
        rule(*tokens(1, 2, 1, 257, 8))
    with pytest.raises(ValueError, match=r"q has shape \(1, 0, 1, 8\); no dimension may be empty"):
        rule(*tokens(1, 0, 1, 8, 8))
    with pytest.raises(ValueError, match="initial_state holds 1 states; it must hold 2"):
        rule(*tokens(1, 4, 1, 8, 8), initial_state=state(1, 1, 8, 8), cu_seqlens=torch.tensor([0, 2, 4]))


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"q": torch.zeros(2, 1, 2, 16)}, ValueError, r"q has shape .* \[B, H, K\]"),
        ({"state": torch.zeros(3, 2, 16, 24)}, ValueError, "state holds 3 states for 2 rows"),
        ({"state": torch.zeros(2, 2, 16, 24).half()}, TypeError, "state is torch.float16; .*torch.bfloat16"),
        ({"state": torch.zeros(2, 2, 24, 16)}, ValueError, "state has shape"),
        ({"state_indices": torch.tensor([0])}, ValueError, "state_indices has 1 entries; it must have 2"),
        ({"state_indices": torch.tensor([0.0, 1.0])}, TypeError, "state_indices is torch.float32"),
        ({"state_indices": torch.tensor([0, 2])}, ValueError, r"state_indices is \[0, 2\]; entries may be -1 to 1"),
        ({"state_indices": torch.tensor([0, -2])}, ValueError, r"state_indices is \[0, -2\]; entries may be -1 to 1"),
        ({"state_indices": torch.tensor([1, 1])}, ValueError, r"\[1, 1\]; no state may be named twice"),
        ({"beta": torch.full((2, 2), float("nan"))}, ValueError, "beta contains NaN"),
    ],
)
def test_errors_of_step(changes, error, message):
    x = dict(zip(("q", "k", "v", "beta"), (z[:, 0] for z in tokens(2, 1, 2, 16, 24))))
    with pytest.raises(error, match=message):
        delta_rule_step(**{**x, "state": state(2, 2, 16, 24), **changes})


def test_values_off_the_cpu_are_read_on_request_only(monkeypatch):
    monkeypatch.delenv("DELTANET_CHECK", raising=False)
    elsewhere = torch.empty(1, device="meta")
    assert checks._reads_values(torch.empty(1)) and not checks._reads_values(elsewhere)
    monkeypatch.setenv("DELTANET_CHECK", "1")
    assert checks._reads_values(elsewhere)


def test_one_log_line_says_what_runs_and_why(caplog):
    with caplog.at_level(logging.INFO, logger="deltanet"):
        for _ in range(3):
            chunk_delta_rule(*tokens(1, 3, 1, 8, 8))
            chunk_delta_rule(*tokens(1, 3, 1, 8, 8, dtype=torch.float64))
    assert [r.getMessage() for r in caplog.records] == [
        "delta rule on cpu: torch implementation (no fused kernels for cpu)"
    ]


@pytest.mark.parametrize("backend", ["torch", "recurrent"])
def test_environment_forces_an_implementation(monkeypatch, caplog, backend):
    monkeypatch.setenv("DELTANET_BACKEND", backend)
    inputs = [*tokens(1, 20, 1, 8, 8), state(1, 1, 8, 8)]
    with caplog.at_level(logging.INFO, logger="deltanet"):
        actual = run(chunk_delta_rule, inputs)
    assert f"delta rule on cpu: {backend} implementation (DELTANET_BACKEND asks for it)" in caplog.messages
    saved = OPS.chunk_delta_rule(*inputs[:4], 1.0, None, False, False, None, False)[2]
    assert saved.numel() == (0 if backend == "recurrent" else 20 * 64)
    assert_close(actual, with_gradients(lambda *x: delta_rule(*x[:4], h0=x[4]), inputs), 1e-5)


def test_environment_is_checked(monkeypatch):
    monkeypatch.setenv("DELTANET_BACKEND", "cuda")
    with pytest.raises(ValueError, match="DELTANET_BACKEND is 'cuda'; it may be one of torch, recurrent, triton"):
        chunk_delta_rule(*tokens(1, 3, 1, 8, 8))
    monkeypatch.setenv("DELTANET_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="DELTANET_BACKEND is 'triton', but "):
        chunk_delta_rule(*tokens(1, 3, 1, 8, 8))
