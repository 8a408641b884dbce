"""kernels/short_conv.py against a sum written out in float64, row by row."""

import pytest
import torch
import torch._dynamo
from oracle import assert_close, with_gradients
from torch._dynamo.testing import CompileCounterWithBackend

from deltanet.kernels.short_conv import padding_order, short_convolution, short_convolution_step

NAMES = ("y", "final_state", "dx", "dweight", "dbias", "dstate")
WIDTHS = pytest.mark.parametrize("width", [1, 2, 3, 4, 8])


def one_row(x, weight, bias, activation, state):
    """[T, D] and [D, W - 1] -> y, final state."""
    rows, (T, W) = torch.cat([state.mT, x]), (len(x), weight.shape[-1])
    y = torch.zeros_like(x) if bias is None else bias.expand_as(x)
    for j in range(W):
        y = y + rows[j : j + T] * weight[:, 0, j]
    return (y * torch.sigmoid(y) if activation == "silu" else y), rows[T:].mT


def expected_rows(x, weight, bias, state, activation, pieces):
    """y and final states where `pieces` holds, for each state, its row and the tokens of the row that belong to it."""
    y, states = [list(row) for row in x * 0], []
    for n, (b, tokens) in enumerate(pieces):
        out, last = one_row(x[b, tokens], weight, bias, activation, state[n])
        for t, value in zip(tokens.tolist(), out):
            y[b][t] = value
        states.append(last)
    return torch.stack([torch.stack(row) for row in y]), torch.stack(states)


def make(B, T, D, width, states=None, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    shapes = ((B, T, D), (D, 1, width), (D,), (B if states is None else states, D, width - 1))
    return [torch.randn(shape, generator=g).to(dtype) for shape in shapes]


def compare(inputs, pieces, activation="silu", limit=2e-6, **options):
    call = lambda x, w, b, s: short_convolution(x, w, b, activation, s, True, **options)  # noqa: E731
    actual = with_gradients(call, inputs)
    expected = with_gradients(lambda *i: expected_rows(*i, activation, pieces), [x.double() for x in inputs])
    assert [x.dtype for x in actual] == [inputs[0].dtype] * 2 + [x.dtype for x in inputs]
    assert_close(actual, expected, limit, NAMES)
    return actual


def whole(B, T):
    return [(b, torch.arange(T)) for b in range(B)]


@WIDTHS
@pytest.mark.parametrize("T", [1, 2, 3, 15, 65])
def test_convolution_and_gradients(T, width):
    compare(make(2, T, 6, width), whole(2, T))


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("dtype, limit", [(torch.float16, 2e-3), (torch.bfloat16, 1e-2), (torch.float64, 2e-7)])
def test_dtypes(dtype, limit, activation):
    compare(make(2, 15, 6, 4, dtype=dtype), whole(2, 15), activation, limit)


def test_half_precision_rounds_once():
    inputs = make(2, 33, 16, 4, dtype=torch.bfloat16)
    y, _ = short_convolution(*inputs[:3], "silu", inputs[3])
    expected, _ = expected_rows(*(x.float() for x in inputs), "silu", whole(2, 33))
    assert torch.equal(y, expected.bfloat16()) or (y.float() - expected).norm() / expected.norm() < 2**-9


def test_without_bias_or_state():
    x, weight, bias, state = make(2, 9, 6, 4)
    y, final_state = short_convolution(x, weight, activation="silu")
    assert final_state is None
    assert_close([y], expected_rows(x, weight, bias * 0, state * 0, "silu", whole(2, 9))[:1], 1e-6, NAMES)


def test_gradcheck():
    inputs = [x.requires_grad_() for x in make(1, 7, 3, 4, 3, torch.float64)]
    cu_seqlens = torch.tensor([0, 0, 2, 6])
    call = lambda x, w, b, s: short_convolution(x, w, b, "silu", s, True, cu_seqlens)  # noqa: E731
    assert torch.autograd.gradcheck(call, inputs) and torch.autograd.gradgradcheck(call, inputs)


def test_strided_input():
    x, weight, bias, state = make(2, 9, 6, 4)
    strided = torch.stack([x, x], -1).transpose(0, 1)[..., 0].transpose(0, 1)
    assert not strided.is_contiguous()
    actual = short_convolution(strided, weight, bias, "silu", state.mT.contiguous().mT, True)
    assert all(map(torch.equal, actual, short_convolution(x, weight, bias, "silu", state, True)))


@WIDTHS
@pytest.mark.parametrize("bounds, T", [([0, 0, 1, 12, 14], 14), ([0, 3, 5], 9), ([0, 0], 2), ([0, 1, 2, 3, 3], 4)])
def test_packed_equals_separate(bounds, T, width):
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    pieces = [(0, torch.arange(start, end)) for start, end in zip(bounds, bounds[1:])]
    actual = compare(make(1, T, 6, width, len(pieces)), pieces, cu_seqlens=cu_seqlens)
    assert not actual[0][:, bounds[-1] :].any() and not actual[2][:, bounds[-1] :].any()


def test_nothing_crosses_a_boundary():
    x, weight, bias, _ = make(1, 12, 6, 4)
    cu_seqlens = torch.tensor([0, 5, 9])
    clean, _ = short_convolution(x, weight, bias, cu_seqlens=cu_seqlens)
    x[:, :5] = x[:, 9:] = float("nan")
    dirty, _ = short_convolution(x, weight, bias, cu_seqlens=cu_seqlens)
    assert torch.equal(dirty[:, 5:], clean[:, 5:])


PADDING = {
    "left": [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]],
    "right": [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]],
    "interior": [[1, 0, 1, 0, 1], [0, 1, 1, 0, 0], [1, 1, 0, 0, 1]],
    "all": [[0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]],
}


@WIDTHS
@pytest.mark.parametrize("side", PADDING)
def test_padding_is_as_if_cut_out(side, width):
    mask = torch.tensor(PADDING[side])
    pieces = [(b, row.nonzero().flatten()) for b, row in enumerate(mask)]
    actual = compare(make(3, 5, 6, width), pieces, padding_order=padding_order(mask.bool(), width))
    assert not actual[0][mask == 0].any() and not actual[2][mask == 0].any()
    assert torch.equal(actual[1][mask.sum(1) == 0], make(3, 5, 6, width)[3][mask.sum(1) == 0])


def test_padding_may_hold_anything():
    inputs, mask = make(2, 5, 6, 4), torch.tensor([[0, 1, 0, 1, 1], [1, 1, 1, 0, 0]])
    call = lambda *i: short_convolution(*i[:3], "silu", i[3], True, padding_order=padding_order(mask, 4))  # noqa: E731
    clean = with_gradients(call, inputs)
    inputs[0][mask == 0] = float("nan")
    assert all(map(torch.equal, clean, with_gradients(call, inputs)))


@WIDTHS
@pytest.mark.parametrize("split", [1, 2, 5, 8])
def test_any_split_and_steps_continue(split, width):
    x, weight, bias, state = make(2, 9, 6, width)
    y, final_state = short_convolution(x, weight, bias, "silu", state, True)
    first, state = short_convolution(x[:, :split], weight, bias, "silu", state, True)
    second, end = short_convolution(x[:, split:], weight, bias, "silu", state, True)
    steps = [short_convolution_step(x[:, t], weight, bias, "silu", state) for t in range(split, 9)]
    assert_close([torch.cat([first, second], 1), torch.stack(steps, 1)], [y, y[:, split:]], 1e-6, ("y", "steps"))
    assert torch.equal(end, final_state) and torch.equal(state, final_state)


def test_final_state_owns_its_memory():
    x, weight, _, state = make(2, 9, 6, 4)
    _, final_state = short_convolution(x, weight, None, None, state, True)
    assert final_state.is_contiguous() and final_state.untyped_storage().nbytes() == final_state.numel() * 4


def test_step_keeps_the_dtype_of_x_and_differentiates():
    x, weight, bias, state = make(2, 1, 6, 4, dtype=torch.bfloat16)
    x, weight = x[:, 0].requires_grad_(), weight.requires_grad_()
    y = short_convolution_step(x, weight, bias, "silu", state)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and not state.requires_grad
    assert x.grad.isfinite().all() and weight.grad.any()
    assert torch.equal(state[..., -1], x.detach())


def test_compile_fullgraph_any_length():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter, dynamic=True)
    def convolve(x, weight, state, cu_seqlens, order):
        packed = short_convolution(x[:1], weight, None, "silu", None, True, cu_seqlens)
        return *packed, *short_convolution(x, weight, None, "silu", state, True, padding_order=order)

    for T in (5, 9, 70):
        x, weight, _, state = make(2, T, 6, 4)
        mask = torch.arange(T).expand(2, -1) > 1
        cu_seqlens = torch.tensor([0, 2, T - 1])
        call = lambda x, w, s: convolve(x, w, s, cu_seqlens, padding_order(mask, 4))  # noqa: B023, E731
        eager = lambda x, w, s: (  # noqa: E731
            *short_convolution(x[:1], w, None, "silu", None, True, cu_seqlens),  # noqa: B023
            *short_convolution(x, w, None, "silu", s, True, padding_order=padding_order(mask, 4)),  # noqa: B023
        )
        inputs = [x, weight, state]
        assert_close(with_gradients(call, inputs), with_gradients(eager, inputs), 1e-6, range(7))
    assert counter.frame_count == 1


def test_compile_fullgraph_step_and_order():
    torch._dynamo.reset()
    step = torch.compile(short_convolution_step, fullgraph=True, backend="aot_eager")
    x, weight, bias, state = make(2, 3, 6, 4)
    same = state.clone()
    for t in range(3):
        y = step(x[:, t], weight, bias, "silu", state)
        torch.testing.assert_close(y, short_convolution_step(x[:, t], weight, bias, "silu", same))
    assert torch.equal(state, same)
    mask = torch.tensor(PADDING["interior"])
    compiled = torch.compile(padding_order, fullgraph=True, backend="aot_eager")(mask, 4)
    assert all(map(torch.equal, compiled, padding_order(mask, 4)))


def test_export_with_dynamic_length():
    class Convolution(torch.nn.Module):
        def forward(self, x, weight):
            return short_convolution(x, weight, None, "silu", None, True)

    x, weight, _, _ = make(2, 9, 6, 4)
    shapes = {"x": {1: torch.export.Dim("T", min=2, max=4096)}, "weight": None}
    program = torch.export.export(Convolution(), (x, weight), dynamic_shapes=shapes)
    x, *_ = make(2, 31, 6, 4)
    assert_close(program.module()(x, weight), short_convolution(x, weight, None, "silu", None, True), 1e-6, NAMES)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"x": torch.zeros(2, 6)}, ValueError, r"x has shape \(2, 6\); it must be \[B, T, D\]"),
        ({"x": torch.zeros(2, 0, 6)}, ValueError, "no dimension empty"),
        ({"weight": torch.zeros(5, 1, 4)}, ValueError, r"weight has shape .* with D = 6"),
        ({"activation": "gelu"}, ValueError, "activation is 'gelu'; it may be None or 'silu'"),
        ({"initial_state": torch.zeros(2, 6, 4)}, ValueError, r"initial_state has shape .* = \[2, 6, 3\]"),
        ({"cu_seqlens": torch.tensor([0, 9])}, ValueError, "batch size 2; it must be 1"),
        ({"x": torch.zeros(1, 9, 6), "cu_seqlens": torch.tensor([0])}, ValueError, r"cu_seqlens has shape \(1,\)"),
        ({"x": torch.zeros(1, 9, 6), "cu_seqlens": torch.tensor([0.0, 9])}, TypeError, "cu_seqlens is torch.float32"),
        ({"x": torch.zeros(1, 9, 6), "cu_seqlens": torch.tensor([0, 5, 3])}, ValueError, "cu_seqlens decreases"),
        ({"x": torch.zeros(1, 9, 6), "cu_seqlens": torch.tensor([2, 8])}, ValueError, "cu_seqlens starts with 2"),
        ({"x": torch.zeros(1, 9, 6), "cu_seqlens": torch.tensor([0, 10])}, ValueError, "ends at 10; there are 9"),
        ({"x": torch.zeros(1, 9, 6, dtype=torch.int64)}, TypeError, "x is torch.int64"),
        ({"padding_order": padding_order(torch.ones(2, 8), 4)}, ValueError, r"is for \[B, T\] = \(2, 8\) and width 4"),
        ({"padding_order": padding_order(torch.ones(2, 9), 3)}, ValueError, "width 3; x has .* weight width 4"),
    ],
)
def test_errors(changes, error, message):
    x, weight, _, _ = make(2, 9, 6, 4)
    with pytest.raises(error, match=message):
        short_convolution(**{"x": x, "weight": weight, **changes})


def test_more_errors():
    x, weight, _, state = make(1, 9, 6, 4)
    order = padding_order(torch.ones(1, 9), 4)
    with pytest.raises(ValueError, match="padding_order and cu_seqlens exclude each other"):
        short_convolution(x, weight, cu_seqlens=torch.tensor([0, 9]), padding_order=order)
    with pytest.raises(ValueError, match=r"mask has shape \(3,\); it must be \[B, T\]"):
        padding_order(torch.ones(3), 4)
    with pytest.raises(ValueError, match=r"state has shape .* = \[1, 6, 3\]"):
        short_convolution_step(x[:, 0], weight, None, None, state[..., :2])
    with pytest.raises(ValueError, match=r"x has shape .* they must be \[B, D\] and \[D, 1, W\]"):
        short_convolution_step(x, weight, None, None, state)
