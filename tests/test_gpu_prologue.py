"""The fused prologue on a GPU: against float64, and inside PyTorch. Fresh memory is NaN, and every case runs twice."""

import pytest
import torch
import torch._dynamo.testing
from models import tiny_config
from oracle import assert_close, relative_error
from prologue_cases import NAMES, Case, limits
from torch.utils.checkpoint import checkpoint

from deltanet import DeltaNetForCausalLM
from deltanet.kernels import prologue as module
from deltanet.kernels.prologue import delta_rule_prologue
from deltanet.kernels.short_conv import padding_order

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("nan_in_fresh_memory"),
    pytest.mark.filterwarnings("ignore:.*deterministic"),
]
HALF = torch.bfloat16
DTYPE = pytest.mark.parametrize("dtype", [torch.float32, HALF, torch.float16], ids=str)


def same(actual, expected):
    return all(map(torch.equal, actual, expected))


def twice(case):
    results, again = ([x.contiguous() for x in case.actual()] for _ in range(2))
    for name, a, b in zip(NAMES, results, again):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), f"{name} differs between two runs"
    return results


def run(check, case):
    actual = twice(case)
    check(actual, case.expected(), limits(case.streams[0].dtype)[: len(actual)], NAMES)
    return actual


def test_the_fused_kernels_run(cuda, monkeypatch):
    """Otherwise every test here would pass on the composed form."""
    monkeypatch.delenv("DELTANET_BACKEND", raising=False)
    case = Case(cuda, HALF, 5)
    q = case.streams[0].requires_grad_()
    assert "prologue" in type(case.call([q, *case.inputs[1:]])[0].grad_fn).__name__
    assert not module._is_fused(cuda, torch.float64, "")


@DTYPE
@pytest.mark.parametrize("W", [2, 3, 4])
@pytest.mark.parametrize("T", [1, 2, 3, 15, 64, 65, 129, 1000])
def test_lengths_and_widths(device, check, dtype, T, W):
    run(check, Case(device, dtype, T, (200, 256, 264), W, B=2))


@DTYPE
@pytest.mark.parametrize("states", [True, False])
def test_many_tokens(device, check, dtype, states):
    """Long strips: enough programs to fill the card."""
    run(check, Case(device, dtype, 4096, (512, 512, 1024), B=8, heads=8, states=states))


@DTYPE
@pytest.mark.parametrize("W", [2, 3, 4])
@pytest.mark.parametrize(
    "bounds, T",
    [
        ([0, 0, 1, 65, 65, 67, 130, 700], 777),  # empty sequences, one token, two, an unused tail
        ([0, 64, 128, 129], 129),
        ([0, 0], 70),  # no sequence holds a token
        (list(range(0, 301)), 300),  # a token each
        ([0, 3000, 3001, 9000], 9100),
    ],
    ids=["mixed", "strips", "empty", "ones", "long"],
)
def test_packs(device, check, dtype, W, bounds, T):
    actual = run(check, Case(device, dtype, T, (200, 256, 264), W, bounds=bounds))
    for i in (0, 1, 2, 7, 8, 9):
        assert not actual[i][:, bounds[-1] :].any(), f"{NAMES[i]} of a token of no sequence"


@DTYPE
@pytest.mark.parametrize("W", [2, 3, 4])
@pytest.mark.parametrize("states", [True, False])
def test_padding_is_as_if_cut_out(device, check, dtype, W, states):
    """Padding left, right, anywhere, everywhere, nowhere, and all but one token; whatever it holds."""
    case, T = Case(device, dtype, 200, (200, 256, 264), W, B=6, states=states), torch.arange(200)
    anywhere = torch.rand(200, generator=torch.Generator().manual_seed(3)) < 0.7
    mask = torch.stack([T >= 67, T < 3, anywhere, T < 0, T >= 0, T == 199]).to(device)
    clean = [x.clone() for x in case.streams]
    for x in case.streams:
        x[~mask] = float("nan")
    case.padding_order = padding_order(mask, W)
    actual = twice(case)
    case.streams, pieces = clean, [row.nonzero().flatten() for row in mask]
    check(actual, case.expected(pieces), limits(dtype)[: len(actual)], NAMES)


@DTYPE
@pytest.mark.parametrize("widths", [(1, 3, 5), (2048, 1024, 136), (130, 130, 130)])
def test_numbers_of_channels(device, check, dtype, widths):
    run(check, Case(device, dtype, 100, widths, B=2))


def packed_projection(case):
    """The same case, its tensors views of one projection: q, k, v and b of a token next to each other."""
    parts = [*case.streams, case.b]
    views = torch.cat(parts, -1).split([x.shape[-1] for x in parts], -1)
    case.streams, case.b = list(views[:3]), views[3]
    case.gradients[:3] = torch.cat(case.gradients[:3], -1).split([x.shape[-1] for x in case.gradients[:3]], -1)
    return case


@DTYPE
@pytest.mark.parametrize("widths", [(256, 256, 512), (100, 33, 7)], ids=["aligned", "odd"])
def test_views_of_a_packed_projection_are_read_in_place(device, dtype, widths):
    case = Case(device, dtype, 300, widths, B=2, heads=8)
    expected = case.actual()
    actual = packed_projection(case).actual()
    # Odd strides forbid wide loads: another kernel, and the composed form is vectorised in other places.
    exact = widths == (256, 256, 512) and device.type == "cuda"
    assert_close(actual, expected, 0.0 if exact else limits(dtype), NAMES)


def test_memory_is_that_of_the_results(cuda):
    case = packed_projection(Case(cuda, HALF, 4096, (512, 512, 512), states=False))
    inputs = [*case.streams, case.b, *case.weights]
    with torch.no_grad():
        case.call(inputs)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = case.call(inputs)
    size = sum(x.numel() * x.element_size() for x in results)
    assert torch.cuda.max_memory_allocated() - before < size + 2**16


def test_a_gradient_of_some_results(device, check):
    case = Case(device, HALF, 100)
    for kept in ((0,), (3,), (5,), (2, 6)):
        one = Case(device, HALF, 100)
        one.gradients = [g if i in kept else g.zero_() for i, g in enumerate(one.gradients)]
        inputs = [x.detach().requires_grad_() for x in case.inputs]
        results = case.call(inputs)
        actual = torch.autograd.grad(
            [results[i] for i in kept], inputs, [case.gradients[i] for i in kept], allow_unused=True, materialize_grads=True
        )
        check(list(actual), one.expected()[7:], limits(HALF)[7:], NAMES[7:])


def loss(*inputs):
    results = delta_rule_prologue(*inputs[:4], inputs[4:], beta_scale=2.0, output_final_state=True)
    return sum(x.float().square().sum() for x in (*results[:4], *results[4]))


def gradients(function, device, T):
    inputs = Case(device, HALF, T, (128, 128, 256), B=2, states=False).inputs
    inputs = [x.detach().requires_grad_() for x in inputs]
    value = function(*inputs)
    return [value.detach(), *torch.autograd.grad(value, inputs)]


def test_compile_fullgraph_any_length(cuda):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    for T in (70, 300, 33, 1000):
        assert_close(gradients(compiled, cuda, T), gradients(loss, cuda, T), 1e-2, range(8))
    assert counter.frame_count == 1


@pytest.mark.parametrize("compiled", [False, True])
def test_activation_checkpointing(device, compiled):
    torch._dynamo.reset()
    function = lambda *inputs: checkpoint(loss, *inputs, use_reentrant=False)  # noqa: E731
    if compiled:
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_close(gradients(function, device, 200), gradients(loss, device, 200), 1e-6, range(8))


@pytest.mark.parametrize("bounds", [None, [0, 0, 1, 130, 290]])
def test_graph_capture(cuda, bounds):
    """Forward and backward, replayed on inputs that were not there at capture, other boundaries too."""
    case = Case(cuda, HALF, 300, (128, 128, 256), bounds=bounds)
    case.actual()  # compiles
    inputs = [x.clone().requires_grad_() for x in case.inputs]

    def forward_backward():
        results = case.call(inputs)
        return [*results, *torch.autograd.grad(results, inputs, case.gradients)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        forward_backward()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = forward_backward()
    other = Case(cuda, HALF, 300, (128, 128, 256), bounds=bounds and [0, 64, 65, 200, 300])
    other.streams = [x.flip(1) for x in other.streams]
    with torch.no_grad():
        for x, y in zip(inputs, other.inputs):
            x.copy_(y)
        if bounds:
            case.cu_seqlens.copy_(other.cu_seqlens)
    graph.replay()
    assert same([x.detach() for x in results], other.actual())


def test_another_stream(cuda):
    """Inputs that a slow kernel of the same stream still writes."""
    case = Case(cuda, HALF, 500, (128, 128, 256))
    expected, streams = case.actual(), case.streams
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        case.streams = [torch.full_like(x, float("nan")) for x in streams]
        torch.cuda._sleep(50_000_000)
        for x, y in zip(case.streams, streams):
            x.copy_(y)
        actual = case.actual()
    stream.synchronize()
    assert same(actual, expected)


def test_a_device_that_is_not_current(cuda):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    expected = Case(cuda, HALF, 300).actual()
    assert same([x.to(cuda) for x in Case(torch.device("cuda", 1), HALF, 300).actual()], expected)


@pytest.mark.parametrize("bounds", [None, [0, 0, 1, 130, 290]])
def test_nothing_waits_for_the_device(cuda, bounds, monkeypatch):
    monkeypatch.delenv("DELTANET_CHECK", raising=False)
    case = Case(cuda, HALF, 300, bounds=bounds)
    expected = case.actual()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        actual = case.actual()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert same(actual, expected)


def test_a_new_length_batch_or_number_of_sequences_compiles_nothing(cuda):
    from triton import knobs

    names, widths = [], (256, 256, 512)
    with knobs.runtime.scope():
        knobs.runtime.jit_post_compile_hook = lambda **details: names.append(details["repr"]) and None
        for bounds in (None, [0, 100, 300]):
            Case(cuda, HALF, 300, widths, bounds=bounds, heads=16).actual()
        del names[:]
        for B, T in ((1, 1), (2, 16), (3, 63), (1, 4096), (16, 1024)):
            Case(cuda, HALF, T, widths, B=B, heads=5).actual()
        for bounds in ([0, 1], [0, 0, 0, 5], list(range(0, 2001, 20))):
            Case(cuda, HALF, bounds[-1] + 3, widths, bounds=bounds, heads=5).actual()
    assert not names


def test_inputs_that_span_more_than_two_to_the_31_elements(cuda):
    buffer = torch.empty(67_000, 33_000, device=cuda, dtype=HALF)
    views = [buffer[None, :, i * 128 : (i + 1) * 128].normal_() for i in range(3)]
    case = Case(cuda, HALF, 67_000, (128,) * 3, states=False)
    case.streams = [x.clone(memory_format=torch.contiguous_format) for x in views]
    expected = case.actual()
    case.streams = views
    assert views[0].stride(1) * views[0].shape[1] > 2**31
    assert same(case.actual(), expected)


def test_tensors_of_more_than_two_to_the_31_elements(cuda):
    """The last row as when computed alone."""
    torch.cuda.empty_cache()
    B, T, D = 66, 16_384, 2048
    q = torch.empty(B, T, D, device=cuda, dtype=HALF).normal_()
    rest = [x.expand(B, -1, -1).contiguous() for x in Case(cuda, HALF, T, (8, 8, 8), states=False).streams[:2]]
    weights = [torch.randn(x.shape[2], 1, 4, device=cuda, dtype=HALF) for x in (q, *rest)]

    def compute(*streams):
        x = streams[0].detach().requires_grad_()
        results = delta_rule_prologue(x, *streams[1:], None, weights)
        return results.q.detach()[-1], torch.autograd.grad(results.q, x, streams[0])[0][-1]

    assert same(compute(q, *rest), compute(*(x[-1:] for x in (q, *rest))))


@pytest.mark.parametrize("options", [{}, {"attention_mask": True}, {"packed": True}], ids=["plain", "padded", "packed"])
def test_model_is_that_of_the_composed_form(cuda, monkeypatch, options):
    """Loss and gradients of a model in float32, and the logits of a prefill with a cache."""
    torch.manual_seed(0)
    model = DeltaNetForCausalLM(tiny_config(hidden_size=128)).to(cuda)
    ids = torch.randint(1, 61, (1 if "packed" in options else 2, 70), device=cuda)
    arguments = {"input_ids": ids, "labels": ids}
    if "packed" in options:
        arguments["cu_seq_lens_q"] = torch.tensor([0, 20, 21, 70], device=cuda)
    if "attention_mask" in options:
        arguments["attention_mask"] = (torch.arange(70, device=cuda) >= torch.tensor([[0], [9]], device=cuda)).long()

    def compute():
        model.zero_grad()
        out = model(**arguments, use_cache=False)
        out.loss.backward()
        with torch.no_grad():
            cached = model(ids, use_cache=True)
        return [out.loss.detach(), cached.logits, *(p.grad.clone() for p in model.parameters())]

    fused = compute()
    monkeypatch.setattr(module, "_is_fused", lambda *_: False)
    for a, b in zip(fused, compute()):
        assert relative_error(a, b) < 2e-5
