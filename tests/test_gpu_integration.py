"""The fused kernels inside PyTorch: compilation, checkpointing, graphs, streams, devices, memory beyond 2³¹ elements."""

import functools

import pytest
import torch
import torch._dynamo.testing
from cases import Case, limits
from oracle import assert_close
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from deltanet.kernels import delta_rule as module
from deltanet.kernels.delta_rule import chunk_delta_rule, recurrent_delta_rule

pytestmark = pytest.mark.gpu
HALF = torch.bfloat16
L2 = {"use_qk_l2norm_in_kernel": True}


class Layer(torch.nn.Module):
    """A rule between a projection and a nonlinearity, as in a model."""

    def __init__(self, device):
        super().__init__()
        torch.manual_seed(0)
        self.projection = torch.nn.Linear(128, 128, device=device, dtype=HALF)

    def forward(self, q, k, v, beta, cu_seqlens=None):
        o, S = chunk_delta_rule(
            self.projection(q), k, v, beta, output_final_state=True, cu_seqlens=cu_seqlens, **L2
        )
        return torch.nn.functional.silu(o.float()).sum() + S.square().sum()


def gradients(function, device, T=300, **options):
    x = [z.detach().requires_grad_() for z in Case(device, HALF, T).inputs[:4]]
    loss = function(*x, **options)
    return [loss.detach(), *torch.autograd.grad(loss, x)]


def same(actual, expected):
    return all(map(torch.equal, actual, expected))


def test_the_fused_kernels_run(cuda, monkeypatch):
    """Otherwise every test here would pass on the fallback."""
    monkeypatch.delenv("DELTANET_BACKEND", raising=False)
    for dtype in (HALF, torch.float16, torch.float32):
        assert module.implementation(torch.empty(1, device=cuda, dtype=dtype)).name == "triton"
    assert module.implementation(torch.empty(1, device=cuda, dtype=torch.float64)).name == "torch"


def test_compile_fullgraph_any_length(cuda):
    torch._dynamo.reset()
    layer, counter = Layer(cuda), torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for T in (70, 300, 33, 1000):
        assert_close(gradients(compiled, cuda, T), gradients(layer, cuda, T), 2e-2)
    bounds = torch.tensor([0, 64, 65, 300], device=cuda)
    packed = gradients(compiled, cuda, cu_seqlens=bounds)
    assert_close(packed, gradients(layer, cuda, cu_seqlens=bounds), 2e-2)
    assert counter.frame_count == 2


def keep_rule(ctx, op, *args, **kwargs):
    rule = getattr(torch.ops, module.NAMESPACE).chunk_delta_rule.default
    return CheckpointPolicy.MUST_SAVE if op == rule else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("selective", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_activation_checkpointing(device, selective, compiled):
    torch._dynamo.reset()
    layer, options = Layer(device), {"use_reentrant": False}
    if selective:
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, keep_rule)
    function = lambda *x: checkpoint(layer, *x, **options)  # noqa: E731
    if compiled:
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
        assert_close(gradients(function, device), gradients(layer, device), 1e-6)
    else:
        assert same(gradients(function, device), gradients(layer, device))


@pytest.mark.parametrize("bounds", [None, [0, 0, 1, 130, 290]])
def test_graph_capture(cuda, bounds):
    """Forward, and forward with backward, replayed on inputs that were not there at capture, other boundaries too."""
    case = Case(cuda, HALF, 300, bounds=bounds)
    case.actual()  # compiles
    inputs = [x.clone().requires_grad_() for x in case.inputs]
    case.inputs = inputs

    def forward_backward():
        results = case.call(chunk_delta_rule, inputs)
        return [*results, *torch.autograd.grad(results, inputs, case.gradients)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        forward_backward()
    torch.cuda.current_stream().wait_stream(side)
    graphs, results = (torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()), []
    with torch.cuda.graph(graphs[0]), torch.no_grad():
        results += case.call(chunk_delta_rule, inputs)
    with torch.cuda.graph(graphs[1]):
        results += forward_backward()
    other = Case(cuda, HALF, 300, bounds=bounds and [0, 64, 65, 200, 300], keys="gaussian", beta=0.5)
    with torch.no_grad():
        for x, y in zip([*inputs, *case.gradients], [*other.inputs, *other.gradients]):
            x.copy_(y)
        if bounds:
            case.cu_seqlens.copy_(other.cu_seqlens)
    for graph in graphs:
        graph.replay()
    expected = other.actual()
    assert same([x.detach() for x in results], [*expected[:2], *expected])


def test_autocast_leaves_the_precision_alone(device):
    case = Case(device, torch.float32, 200)
    expected = case.actual()
    with torch.autocast(device.type, dtype=HALF):
        assert same(case.actual(), expected)


def test_another_stream(cuda):
    """Inputs that a slow kernel of the same stream still writes."""
    case = Case(cuda, HALF, 500)
    expected, inputs = case.actual(), case.inputs
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        case.inputs = [torch.full_like(x, float("nan")) for x in inputs]
        torch.cuda._sleep(50_000_000)
        for x, y in zip(case.inputs, inputs):
            x.copy_(y)
        actual = case.actual()
    stream.synchronize()
    assert same(actual, expected)


def test_a_device_that_is_not_current(cuda):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    expected, case = Case(cuda, HALF, 300).actual(), Case(torch.device("cuda", 1), HALF, 300)
    assert torch.cuda.current_device() == 0
    assert same([x.to(cuda) for x in case.actual()], expected)


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


@pytest.fixture
def compilations(cuda):
    """Names of the Triton kernels compiled, or read from the cache on disk, since the test began."""
    from triton import knobs

    names = []
    with knobs.runtime.scope():
        knobs.runtime.jit_post_compile_hook = lambda **details: names.append(details["repr"]) and None
        yield names


@pytest.mark.parametrize("dtype, D", [(HALF, 128), (torch.float32, 32)])
def test_a_new_length_batch_or_number_of_heads_compiles_nothing(cuda, compilations, dtype, D):
    for B, T, H in ((1, 100, 1), (8, 1024, 16), (1, 16384, 2)):  # few blocks, many, and few with a long row
        Case(cuda, dtype, T, D, D, B, H).actual()
    for bounds in ([0, 100, 300], [0, 100, 16384], list(range(0, 301))):
        Case(cuda, dtype, bounds[-1], D, D, bounds=bounds).actual()
    del compilations[:]
    for B, T, H in ((1, 1, 1), (2, 16, 1), (3, 63, 7), (1, 64, 16), (5, 1000, 3), (1, 4096, 32), (1, 9000, 1), (9, 2048, 8)):
        Case(cuda, dtype, T, D, D, B, H).actual()
    for bounds, T in (([0, 1], 1), ([0, 0, 0, 5], 16), (list(range(0, 2001, 20)), 2048), ([0, 9000], 9001)):
        Case(cuda, dtype, T, D, D, H=3, bounds=bounds).actual()
    assert not compilations


def far_apart(device, T, stride, D):
    """q, k, v [1, T, 1, D] in one buffer, `stride` elements from token to token, and a copy of them."""
    buffer = torch.empty(T, stride, device=device, dtype=HALF)
    views = [buffer[:, i * D : (i + 1) * D].unflatten(1, (1, D))[None] for i in range(3)]
    generator = torch.Generator(device).manual_seed(0)
    for view in views:
        view.normal_(generator=generator)
    return views, [view.clone(memory_format=torch.contiguous_format) for view in views]


def test_inputs_that_span_more_than_two_to_the_31_elements(cuda):
    views, copies = far_apart(cuda, 67_000, 33_000, 64)
    assert views[0].stride(1) * views[0].shape[1] > 2**31
    beta = torch.rand(1, 67_000, 1, device=cuda)
    run = lambda q, k, v: gradients_of(q, k, v, beta)  # noqa: E731
    assert same(run(*views), run(*copies))


def gradients_of(*x):
    x = [z.detach().requires_grad_() for z in x]
    o, S = chunk_delta_rule(*x, output_final_state=True, **L2)
    return [o.detach(), S.detach(), *torch.autograd.grad((o, S), x, (torch.ones_like(o), torch.ones_like(S)))]


@pytest.mark.parametrize(
    "dtype, B, T, H, K, V",
    [
        (HALF, 8, 16_500, 64, 64, 256),  # v, o and their gradients have more than 2³¹ elements
        (torch.float16, 1100, 64, 64, 16, 16),  # more than 65,535 rows of heads
        (torch.float16, 2, 270_000, 64, 16, 16),  # the saved inverse has more than 2³¹ elements
    ],
    ids=["values", "heads", "inverse"],
)
def test_tensors_of_more_than_two_to_the_31_elements(cuda, dtype, B, T, H, K, V):
    """The last row and head as when computed alone."""
    torch.cuda.empty_cache()
    g = torch.Generator(cuda).manual_seed(0)
    q, k, v = (torch.empty(B, T, H, D, device=cuda, dtype=dtype).normal_(generator=g) for D in (K, K, V))
    x = (q, k, v, torch.rand(B, T, H, device=cuda, generator=g))
    o, S, *rest = gradients_of(*x)
    actual = [o[-1:, :, -1:], S[-1:, -1:], *(z[-1:, :, -1:] for z in rest)]
    expected = gradients_of(*(z[-1:, :, -1:].contiguous() for z in x))
    assert_close(actual, expected, limits(dtype))


@pytest.mark.parametrize("rule", [chunk_delta_rule, recurrent_delta_rule])
def test_values_are_checked_on_request(device, monkeypatch, rule):
    monkeypatch.setenv("DELTANET_CHECK", "1")
    q, k, v, beta, _ = Case(device, HALF, 20).inputs
    with pytest.raises(ValueError, match="beta contains NaN"):
        rule(q, k, v, torch.full_like(beta, float("nan")))
    for bounds, message in (([1, 20], "starts with 1"), ([0, 9, 5, 20], "decreases"), ([0, 21], "there are 20 tokens")):
        with pytest.raises(ValueError, match=message):
            rule(q, k, v, beta, cu_seqlens=torch.tensor(bounds, device=device))


def test_bad_inputs(device):
    q, k, v, beta, h0 = Case(device, HALF, 20).inputs
    wide = torch.zeros(1, 20, 2, 257, device=device, dtype=HALF)
    bad = [
        ({"q": q.float()}, TypeError, "k is torch.bfloat16 and q torch.float32"),
        ({"q": wide, "k": wide}, ValueError, "head size 257; at most 256"),
        ({"beta": beta.double()}, TypeError, "beta is torch.float64"),
        ({"initial_state": h0.to(HALF)}, TypeError, "initial_state is torch.bfloat16"),
    ]
    if device.type == "cuda":
        bad.append(({"cu_seqlens": torch.tensor([0, 20])}, ValueError, "cu_seqlens is on cpu and q on cuda"))
    for changes, error, message in bad:
        with pytest.raises(error, match=message):
            chunk_delta_rule(**{"q": q, "k": k, "v": v, "beta": beta, **changes})
