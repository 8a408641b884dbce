"""kernels/prologue.py: the fused kernels in Triton's interpreter and the composed form, both against float64.

What only a GPU shows is in `test_gpu_prologue.py`.
"""

import logging

import pytest
import torch
import torch._dynamo
from models import tiny_config, token_ids
from oracle import assert_close
from prologue_cases import NAMES, Case, limits
from torch._dynamo.testing import CompileCounterWithBackend

from deltanet import DeltaNetForCausalLM
from deltanet.kernels import prologue as module
from deltanet.kernels.prologue import delta_rule_prologue
from deltanet.kernels.short_conv import padding_order, short_convolution

CPU = torch.device("cpu")
WIDTHS = (12, 16, 24)
PACKS = [
    ([0, 0, 1, 11, 13, 13, 14], 16, 4),  # empty sequences, one token, two, a strip and a bit, an unused tail
    ([0, 0, 1, 3, 11], 11, 2),
    ([0, 2, 4, 4], 4, 3),
    ([0, 0], 5, 4),  # no sequence holds a token
]


@pytest.fixture
def small(monkeypatch, nan_in_fresh_memory):
    """Tiles and strips that few channels and tokens overflow."""
    launch = pytest.importorskip("deltanet.kernels.prologue_launch")
    for key, value in launch.LAUNCHES.items():
        monkeypatch.setitem(launch.LAUNCHES, key, value._replace(channels=32, unroll=4, strip=8, short_strip=8))
    monkeypatch.setattr(launch, "keep_plan", launch._Plan)


def interpreted(test):
    return pytest.mark.interpreter(pytest.mark.usefixtures("small")(test))


def run(case):
    actual = case.actual()
    assert [x.dtype for x in actual[:3]] == [x.dtype for x in case.streams]
    assert_close(actual, case.expected(), limits(case.streams[0].dtype)[: len(actual)], NAMES)
    return actual


def same(actual, expected):
    return all(map(torch.equal, actual, expected))


@interpreted
@pytest.mark.parametrize("B, T, W", [(1, 1, 2), (1, 2, 4), (2, 3, 3), (2, 8, 4), (1, 11, 2), (1, 19, 4)])
def test_lengths_and_widths(B, T, W):
    run(Case(CPU, torch.float32, T, (20, 32, 40), W, B))


@interpreted
@pytest.mark.parametrize("bounds", [None, [0, 1, 10]])
def test_half_precision(bounds):
    run(Case(CPU, torch.float16, 11, WIDTHS, bounds=bounds))


@interpreted
@pytest.mark.parametrize("bounds, T, W", PACKS)
def test_packs(bounds, T, W):
    actual = run(Case(CPU, torch.float32, T, WIDTHS, W, bounds=bounds))
    for i in (0, 1, 2, 7, 8, 9):
        assert not actual[i][:, bounds[-1] :].any(), f"{NAMES[i]} of a token of no sequence"


MASKS = {
    "left": [[0] * 2 + [1] * 9, [0] * 9 + [1] * 2],
    "right": [[1] * 10 + [0], [1] * 2 + [0] * 9],
    "interior": [[1, 0, 1, 1, 0, 0, 1, 0, 1, 1, 0], [0] * 11],
}


@interpreted
@pytest.mark.parametrize("states", [True, False])
@pytest.mark.parametrize("side", MASKS)
def test_padding_is_as_if_cut_out(side, states):
    """Whatever padding holds: it has neither output nor gradient."""
    case, mask = Case(CPU, torch.float32, 11, WIDTHS, B=2, states=states), torch.tensor(MASKS[side])
    clean = [x.clone() for x in case.streams]
    for x in case.streams:
        x[mask == 0] = float("nan")
    case.padding_order = padding_order(mask, 4)
    actual = case.actual()
    case.streams, pieces = clean, [row.nonzero().flatten() for row in mask]
    assert_close(actual, case.expected(pieces), limits(torch.float32)[: len(actual)], NAMES)


@interpreted
@pytest.mark.parametrize("bounds", [None, [0, 0, 2, 11]])
def test_without_states(bounds):
    case = Case(CPU, torch.float32, 12, WIDTHS, bounds=bounds, states=False)
    run(case)
    with torch.no_grad():
        results = delta_rule_prologue(*case.streams, None, case.weights, cu_seqlens=case.cu_seqlens)
    assert results.beta is None and results.final_states == (None, None, None)
    assert same(results[:3], case.call(case.inputs)[:3])


@interpreted
def test_what_a_sequence_or_padding_holds_stays_there():
    case = Case(CPU, torch.float32, 11, WIDTHS, bounds=[0, 5, 9])
    clean = case.actual()
    case.streams = [x.clone() for x in case.streams]
    for x in case.streams:
        x[:, :5] = x[:, 9:] = float("nan")
    for i, (actual, expected) in enumerate(zip(case.actual(), clean)):
        if i in (0, 1, 2, 7, 8, 9):
            assert torch.equal(actual[:, 5:], expected[:, 5:]), NAMES[i]


@interpreted
@pytest.mark.parametrize("step", [1, 2], ids=["dense rows", "every other element"])
def test_views_of_a_packed_projection(step):
    case = Case(CPU, torch.float32, 5, WIDTHS, B=2)
    expected, parts = case.actual(), [*case.streams, case.b]
    packed = torch.empty(5, 2, sum(x.shape[2] for x in parts) * step).transpose(0, 1)[..., ::step]
    views = packed.copy_(torch.cat(parts, -1)).split([x.shape[2] for x in parts], -1)
    case.streams, case.b = list(views[:3]), views[3]
    case.states = [x.mT.contiguous().mT for x in case.states]
    case.gradients = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in case.gradients]
    assert same(case.actual(), expected)


@interpreted
def test_a_gradient_of_some_results():
    case = Case(CPU, torch.float32, 3, WIDTHS)
    for kept in ((1,), (3,), (5,)):
        one, inputs = Case(CPU, torch.float32, 3, WIDTHS), [x.detach().requires_grad_() for x in case.inputs]
        one.gradients = [g if i in kept else g.zero_() for i, g in enumerate(one.gradients)]
        results, given = case.call(inputs), [case.gradients[i] for i in kept]
        actual = torch.autograd.grad([results[i] for i in kept], inputs, given, allow_unused=True, materialize_grads=True)
        assert_close(actual, one.expected()[7:], 1e-6, NAMES[7:])


@interpreted
def test_runs_repeat_bit_for_bit():
    case = Case(CPU, torch.float16, 11, WIDTHS)
    assert same(case.actual(), case.actual())


@interpreted
def test_differentiable_once():
    case = Case(CPU, torch.float32, 2, WIDTHS)
    inputs = [x.requires_grad_() for x in case.inputs]
    (gradient,) = torch.autograd.grad(case.call(inputs)[0].sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="prologue is differentiable once"):
        gradient.sum().backward()


@interpreted
@pytest.mark.parametrize("bounds, states", [(None, False), ([0, 1, 2], True)])
def test_operator_is_registered_as_pytorch_wants(bounds, states):
    case = Case(CPU, torch.float32, 3, WIDTHS, 2, bounds=bounds, states=states)
    tensors = [x.requires_grad_() for x in (*case.streams, case.b, *case.weights)]
    operator = getattr(torch.ops, module.NAMESPACE).prologue.default
    torch.library.opcheck(operator, (*tensors, *case.states, 2.0, states, case.cu_seqlens, None, None))


@interpreted
def test_compile_fullgraph_any_length():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def compiled(*inputs):
        *results, finals = delta_rule_prologue(
            *inputs[:4], inputs[4:7], beta_scale=2.0, initial_states=inputs[7:], output_final_state=True
        )
        return [*results, *finals]

    for T in (5, 6):
        case = Case(CPU, torch.float32, T, WIDTHS, B=2)
        expected = case.actual()
        case.call = lambda inputs: compiled(*inputs)
        assert same(case.actual(), expected)
    assert counter.frame_count == 1


@interpreted
@pytest.mark.parametrize("options", ["plain", "padded", "packed"])
def test_model_is_that_of_the_composed_form(monkeypatch, options):
    monkeypatch.setenv("DELTANET_BACKEND", "torch")  # the delta rule's own kernels have their own tests
    torch.manual_seed(0)
    model = DeltaNetForCausalLM(tiny_config(hidden_size=16, num_hidden_layers=1, allow_neg_eigval=True))
    ids = token_ids(1 if options == "packed" else 2, 7)
    more = {"padded": {"attention_mask": (torch.arange(7) >= torch.tensor([[0], [3]])).long()}}
    more["packed"] = {"cu_seq_lens_q": torch.tensor([0, 2, 3, 7])}

    def compute():
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False, **more.get(options, {})).loss
        loss.backward()
        with torch.no_grad():
            first = model(ids[:, :5], use_cache=True)
            second = model(ids[:, 5:], past_key_values=first.past_key_values)
        return [loss.detach(), first.logits, second.logits, *(p.grad.clone() for p in model.parameters())]

    results = []
    for fused in (True, False):
        monkeypatch.setattr(module, "_is_fused", lambda *_: fused)  # noqa: B023
        results.append(compute())
    assert_close(*results, 1e-5, range(len(results[0])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bounds, T, W", [(None, 19, 4), *PACKS])
def test_composed(dtype, bounds, T, W):
    run(Case(CPU, dtype, T, WIDTHS, W, bounds=bounds))


def arguments(T=5, W=4, **changes):
    case = Case(CPU, torch.float32, T, WIDTHS, W, B=2)
    return {**dict(zip("qkv", case.streams)), "b": case.b, "weights": case.weights, "initial_states": case.states, **changes}


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({}, ""),
        ({"activations": (None, None, "silu")}, "an activation other than SiLU"),
        ({"padding_order": padding_order(torch.tensor([[0, 1, 1, 0, 1], [0, 0, 0, 0, 0]]), 4)}, ""),
        (arguments(W=5), "widths [5, 5, 5], not one of 2, 3, 4"),
        ({"q": torch.zeros(2, 5, 12).half()}, "q, k and v differ in their dtypes or states"),
        ({"initial_states": [None, None, torch.zeros(2, 24, 3)]}, "q, k and v differ in their dtypes or states"),
    ],
)
def test_what_the_kernels_do_not_take_is_composed(monkeypatch, changes, reason):
    reasons = []
    monkeypatch.setattr(module, "_is_fused", lambda device, dtype, reason: bool(reasons.append(reason)))
    x = arguments(**changes)
    actual = delta_rule_prologue(**x, output_final_state=True)
    assert reasons == [reason]
    for i, name in enumerate("qkv"):
        y, final_state = short_convolution(
            x[name], x["weights"][i], None, x.get("activations", ["silu"] * 3)[i], x["initial_states"][i], True,
            padding_order=x.get("padding_order"),
        )  # fmt: skip
        assert torch.equal(actual[i], y) and torch.equal(actual.final_states[i], final_state)


def test_float64_is_composed_in_float64():
    q, k, v, b, weights, states = (
        [y.double() for y in x] if isinstance(x, list) else x.double() for x in arguments().values()
    )
    result = delta_rule_prologue(q, k, v, b, weights, initial_states=states, beta_scale=2)
    assert {x.dtype for x in result[:4]} == {torch.float64}
    assert torch.equal(result.beta, 2 * b.sigmoid())


def test_one_log_line_says_what_runs_and_why(caplog):
    module._announce.cache_clear()
    with caplog.at_level(logging.INFO, logger="deltanet"):
        for _ in range(3):
            delta_rule_prologue(**arguments())
    assert caplog.messages == ["prologue on cpu: torch implementation (no fused kernels for cpu)"]


def test_environment_forces_an_implementation(monkeypatch, caplog):
    module._announce.cache_clear()
    monkeypatch.setenv("DELTANET_BACKEND", "torch")
    with caplog.at_level(logging.INFO, logger="deltanet"):
        delta_rule_prologue(**arguments())
    assert caplog.messages == ["prologue on cpu: torch implementation (DELTANET_BACKEND asks for it)"]
    monkeypatch.setenv("DELTANET_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="DELTANET_BACKEND is 'triton', but "):
        delta_rule_prologue(**arguments())
    monkeypatch.setenv("DELTANET_BACKEND", "cuda")
    with pytest.raises(ValueError, match="DELTANET_BACKEND is 'cuda'; it may be one of torch, recurrent, triton"):
        delta_rule_prologue(**arguments())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"b": torch.zeros(2, 4, 3)}, r"b has shape \(2, 4, 3\) and q \(2, 5, 12\); \[B, T\] must be equal"),
        ({"k": torch.zeros(2, 4, 16)}, r"k has shape \(2, 4, 16\) and q"),
        ({"activations": ("gelu", "silu", "silu")}, "activation is 'gelu'; it may be None or 'silu'"),
        ({"initial_states": [torch.zeros(2, 12, 4)] * 3}, "initial_state has shape"),
        ({"weights": [torch.zeros(3, 1, 4)] * 3}, "weight has shape"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "batch size 2; it must be 1"),
        ({"initial_states": [None, None]}, "shorter"),
    ],
)
def test_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        delta_rule_prologue(**arguments(**changes))
