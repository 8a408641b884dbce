"""kernels/decode_step.py: the composed form and the kernel in Triton's interpreter against float64, and the operator."""

import importlib
import logging

import pytest
import torch
import torch._dynamo
from decode_cases import RESULTS, Step, limit_of
from oracle import assert_close

from deltanet.kernels import decode_step as module
from deltanet.kernels.decode_step import decode_step
from deltanet.kernels.delta_rule import NAMESPACE

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
INTERPRETED = pytest.mark.parametrize("dtype", ["float32", "float16"])
OPTIONS = [
    {"gate": False},
    {"beta": False},
    {"beta_scale": 2.0},
    {"width": 2, "beta_scale": 2.0},
    {"width": 3, "gate": False, "beta": False},
]
COMPOSED = module.composed
ROWS = [[1, -1, 3], [4, 0, 2], [-1, -1, -1], [-1, 0, -1]]


@pytest.fixture(autouse=True)
def fresh_choice():
    for cached in (module._announce, module._choose):
        cached.cache_clear()


@pytest.fixture
def fused(monkeypatch):
    """Requires that the kernel runs."""
    pytest.importorskip("triton")
    monkeypatch.setattr(module, "composed", None)


def compare(step: Step):
    expected = step.expected()
    actual = step.actual()
    assert actual[0].dtype == step.tokens["v"].dtype and actual[0].is_contiguous()
    assert_close(actual, expected, limit_of(step), RESULTS)
    return actual


def untouched(step: Step, before) -> list[int]:
    """The slots whose states, all four, are bit for bit what they were."""
    return [n for n in range(len(step.state)) if all(torch.equal(x[n], y[n]) for x, y in zip(step.held(), before))]


def check_rows(step: Step):
    before = [x.clone() for x in step.held()]
    o = compare(step)[0]
    rows = step.rows.tolist()
    assert untouched(step, before) == [n for n in range(len(step.state)) if n not in rows]
    assert all(not o[b].any() for b, n in enumerate(rows) if n < 0)


# The composed form


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, *OPTIONS, {"width": 1}, {"width": 9}], ids=str)
def test_composed(dtype, options):
    compare(Step(dtype=DTYPES[dtype], K=24, V=40, **options))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_composed_rows(dtype, rows):
    check_rows(Step(dtype=DTYPES[dtype], B=3, slots=5, rows=rows))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_composed_with_a_rounded_state(dtype):
    compare(Step(dtype=DTYPES[dtype], state_dtype=torch.bfloat16))


# The kernel


@pytest.mark.interpreter
@INTERPRETED
@pytest.mark.parametrize("options", [{}, *OPTIONS], ids=str)
def test_kernel(fused, dtype, options):
    compare(Step(dtype=DTYPES[dtype], **options))


@pytest.mark.interpreter
@INTERPRETED
@pytest.mark.parametrize("K, V", [(24, 40), (17, 5), (40, 16), (1, 1)])
def test_kernel_sizes(fused, dtype, K, V):
    compare(Step(dtype=DTYPES[dtype], B=1, K=K, V=V, width=3))


@pytest.mark.interpreter
@pytest.mark.parametrize("V, stages", [(16, 1), (20, 1), (20, 3)])
def test_kernel_with_several_tiles(fused, monkeypatch, V, stages):
    kernel = importlib.import_module("deltanet.kernels.decode_kernel")
    monkeypatch.setattr(kernel, "launch_of", lambda K, V: kernel.Launch(8, 4, stages))
    compare(Step(K=16, V=V, B=1, H=2))


@pytest.mark.interpreter
@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_kernel_rows(fused, rows, index_dtype):
    step = Step(B=3, H=1, slots=5, rows=rows)
    step.rows = step.rows.to(index_dtype)
    check_rows(step)


@pytest.mark.interpreter
@pytest.mark.parametrize("transposed", [False, True])
def test_kernel_reads_views(fused, transposed):
    """Rows of a packed projection, and states that lie between other things, the convolutions' also token by token."""
    step = Step(B=2, H=1)
    packed = torch.cat([step.tokens[name] for name in ("q", "k", "v", "gate", "beta")], 1)
    step.tokens = dict(zip(("q", "k", "v", "gate", "beta"), packed.split([16, 16, 16, 16, 1], 1)))
    spaced = lambda x: torch.stack([x, x + 1], 1)[:, 0]  # noqa: E731
    step.state, step.conv_states = spaced(step.state), [spaced(x) for x in step.conv_states]
    if transposed:
        step.conv_states = [spaced(x.mT.contiguous()).mT for x in step.conv_states]
    around = [x._base[:, 1].clone() for x in step.held()]
    compare(step)
    assert all(torch.equal(x._base[:, 1], y) for x, y in zip(step.held(), around))
    assert step.conv_states[0].stride()[1:] == ((1, 16) if transposed else (3, 1))


@pytest.mark.interpreter
def test_kernel_follows_the_composed_form(fused):
    """Forty tokens in float16, where a rounding in another place would show."""
    steps = [Step(dtype=torch.float16, B=1, H=1, seed=seed) for seed in range(40)]
    first, kernel = steps[0], importlib.import_module("deltanet.kernels.decode_kernel")
    held = [[x.clone() for x in first.held()] for _ in range(2)]
    weights = (*first.conv_weights, first.norm_weight)
    outputs = [[], []]
    for step in steps:
        tokens = [step.tokens[name] for name in ("q", "k", "v", "beta", "gate")]
        for i, (run, (state, *past)) in enumerate(zip((kernel.decode_forward, COMPOSED), held)):
            outputs[i].append(run(*tokens, *past, state, *weights, 1e-5, 1.0, 0.25, None))
    # A rounding more or fewer is 2e-4; sums in another order fall on the other side of one now and then.
    actual, expected = ([torch.stack(o), *states] for o, states in zip(outputs, held))
    assert_close(actual, expected, [1e-4, 1e-5, 0.0, 0.0, 0.0], RESULTS)


# The operator


def test_strided_states_take_the_composed_form():
    step = Step()
    step.state = step.state.mT.contiguous().mT
    step.conv_states = [x.mT.contiguous().mT for x in step.conv_states]
    step.tokens["q"] = step.tokens["q"].mT.contiguous().mT
    compare(step)
    arguments = [*step.tokens.values(), *step.conv_states, step.state, *step.conv_weights, step.norm_weight]
    assert not module._is_dense(*arguments)


def test_opcheck():
    step = Step(rows=[1, -1])
    arguments = step.arguments
    scalars = (1e-5, 1.0, 0.25)
    torch.library.opcheck(
        getattr(torch.ops, NAMESPACE).decode_step.default,
        (*step.tokens.values(), *step.conv_states, step.state, *step.conv_weights, step.norm_weight, *scalars, step.rows),
        test_utils=("test_schema", "test_faketensor"),
    )
    assert arguments["state"] is step.state


def test_compile_fullgraph():
    torch._dynamo.reset()
    compiled = torch.compile(decode_step, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for B in (2, 3):
            step, same = Step(B=B), Step(B=B)
            for _ in range(2):
                assert torch.equal(compiled(**step.arguments), decode_step(**same.arguments))
            assert all(map(torch.equal, step.held(), same.held()))
    torch._dynamo.reset()


def test_autocast_leaves_the_precision_alone():
    step, same = Step(), Step()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = step.actual()
    assert all(map(torch.equal, actual, same.actual()))


def test_a_gradient_is_refused():
    step = Step()
    step.norm_weight.requires_grad_()
    with pytest.raises(RuntimeError, match="decode_step has no gradient"):
        decode_step(**step.arguments)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"q": torch.zeros(2, 1, 32)}, ValueError, r"q has shape \(2, 1, 32\); it must have 2 dimensions"),
        ({"k": torch.zeros(2, 31)}, ValueError, r"k has shape \(2, 31\); it must be \[2, 32\]"),
        ({"state": torch.zeros(2, 2, 16, 8)}, ValueError, r"state has shape .* must be \[2, 2, 16, 16\]"),
        ({"state": torch.zeros(2, 2, 16, 16).half()}, TypeError, "state is torch.float16; .*torch.bfloat16"),
        ({"state": torch.zeros(3, 2, 16, 16), "conv_states": [torch.zeros(3, 32, 3)] * 3}, ValueError, "3 states for 2"),
        ({"conv_states": [torch.zeros(2, 32, 4)] * 3}, ValueError, r"conv_states\[0\] has shape .* \[2, 32, 3\]"),
        ({"conv_weights": [torch.zeros(32, 1, w) for w in (4, 4, 3)]}, ValueError, r"conv_weights\[2\] .* \[32, 1, 4\]"),
        ({"beta": torch.zeros(2, 1)}, ValueError, r"beta has shape \(2, 1\); it must be \[2, 2\]"),
        ({"gate": torch.zeros(2, 32).half()}, TypeError, "gate is torch.float16 and q torch.float32"),
        ({"norm_weight": torch.zeros(16, device="meta")}, ValueError, "norm_weight is on meta and q on cpu"),
        ({"state_indices": torch.tensor([0])}, ValueError, "state_indices has 1 entries; it must have 2"),
        ({"state_indices": torch.tensor([0, 2])}, ValueError, r"state_indices is \[0, 2\]; entries may be -1 to 1"),
        ({"state_indices": torch.tensor([1, 1])}, ValueError, r"\[1, 1\]; no state may be named twice"),
        ({"beta": torch.full((2, 2), float("nan"))}, ValueError, "beta contains NaN"),
    ],
)
def test_errors(changes, error, message):
    with pytest.raises(error, match=message), torch.no_grad():
        decode_step(**{**Step().arguments, **changes})


def test_long_keys_are_refused():
    with pytest.raises(ValueError, match="head size 257; at most 256"):
        Step(K=257, H=1).actual()


def test_one_log_line_says_what_runs_and_why(caplog, monkeypatch):
    monkeypatch.delenv("DELTANET_BACKEND", raising=False)
    with caplog.at_level(logging.INFO, logger="deltanet"):
        for dtype in (torch.float32, torch.float32, torch.float16):
            Step(dtype=dtype).actual()
        monkeypatch.setenv("DELTANET_BACKEND", "torch")
        Step().actual()
    assert caplog.messages == [
        "decoding step on cpu: composed implementation (no fused kernels for cpu)",
        "decoding step on cpu: composed implementation (DELTANET_BACKEND asks for it)",
    ]


@pytest.mark.parametrize(
    "arguments, reason",
    [
        ((torch.float64, 4, True), "do not take float64"),
        ((torch.float32, 1, True), "convolutions of width 2 to 8, not 1"),
        ((torch.float32, 9, True), "convolutions of width 2 to 8, not 9"),
        ((torch.float32, 4, False), "states that are dense"),
    ],
)
def test_what_the_kernel_refuses(monkeypatch, arguments, reason):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(module, "triton_refuses", lambda: "")
    cpu = torch.device("cpu")
    assert reason in module._refusal(cpu, *arguments)
    with pytest.raises(RuntimeError, match=f"DELTANET_BACKEND is 'triton', but .*{reason}"):
        module._choose(cpu, *arguments, "triton", True)
    assert module._refusal(cpu, torch.float32, 4, True) == ""
