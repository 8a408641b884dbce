"""Linear layers with their surroundings: shared inputs, SwiGLU's product, the loss without logits, plain layers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from models import tiny_model, token_ids
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

from deltanet import fused_deltanet
from deltanet.fused_deltanet import LanguageModelHead, linear_cross_entropy, plain_weight, project, swiglu_linear
from deltanet.kernels import swiglu as operation
from deltanet.kernels.cross_entropy import cross_entropy_


def relative(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


def with_gradients(function, tensors, gradient):
    tensors = [x.detach().clone().requires_grad_() for x in tensors]
    result = function(*tensors)
    return [result.detach(), *torch.autograd.grad(result, tensors, gradient.to(result.dtype))]


class TestSharedInput:
    @staticmethod
    def layers(dtype=torch.float32):
        torch.manual_seed(0)
        return [nn.Linear(48, width, bias=False, dtype=dtype) for width in (9, 48, 2)]

    @staticmethod
    def results(function, x, layers, used=(0, 1, 2)):
        x = x.detach().clone().requires_grad_()
        ys = function(x, *layers)
        loss = sum((ys[i].double() ** 2).sum() for i in used)
        return [*ys, *torch.autograd.grad(loss, [x, *(layers[i].weight for i in used)])]

    @staticmethod
    def composed(x, *layers):
        return [layer(x) for layer in layers]

    @pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
    @pytest.mark.parametrize("used", [(0, 1, 2), (1,), (0, 2)])
    def test_results_and_gradients(self, dtype, bound, used):
        x, layers = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(0)).to(dtype), self.layers(dtype)
        exact = [copy.deepcopy(layer).double() for layer in layers]
        expected = self.results(self.composed, x.double(), exact, used)
        for actual, e in zip(self.results(project, x, layers, used), expected, strict=True):
            assert actual.dtype == dtype and actual.shape == e.shape and relative(actual, e) < bound

    def test_one_sum_in_the_place_of_many(self):
        x, layers = torch.randn(5, 48, requires_grad=True), self.layers()
        ys = project(x, *layers)
        assert len({y.grad_fn for y in ys}) == 1 and type(ys[0].grad_fn).__name__ == "_ProjectBackward"
        layers[1].register_forward_hook(lambda *_: None)
        assert len({y.grad_fn for y in project(x, *layers)}) == 3

    def test_frozen_weights_and_inputs(self):
        layers = self.layers()
        layers[0].requires_grad_(False)
        x = torch.randn(5, 48)
        sum(y.sum() for y in project(x, *layers)).backward()
        assert layers[0].weight.grad is None and all(layer.weight.grad is not None for layer in layers[1:])
        with torch.no_grad():
            assert all(y.grad_fn is None for y in project(x.requires_grad_(), *layers))

    def test_autocast(self):
        x, layers = torch.randn(5, 48), self.layers()
        with torch.autocast("cpu", torch.bfloat16):
            pairs = zip(*(self.results(function, x, layers) for function in (project, self.composed)))
            assert all(a.dtype == e.dtype and relative(a, e.double()) < 1e-2 for a, e in pairs)

    def test_dtypes_that_do_not_fit_are_refused_as_ever(self):
        with pytest.raises(RuntimeError, match="dtype"):
            project(torch.randn(5, 48, dtype=torch.float64), *self.layers())


class TestSwiGLU:
    @pytest.mark.parametrize(
        "dtype, bound", [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 6e-3), (torch.float16, 8e-4)]
    )
    @pytest.mark.parametrize("shape", [(2, 5, 48), (3, 7)])
    def test_results_and_gradients(self, dtype, bound, shape):
        generator = torch.Generator().manual_seed(0)
        tensors = [3 * torch.randn(shape, generator=generator) for _ in range(2)]
        tensors.append(torch.randn(9, shape[-1], generator=generator))
        tensors = [x.to(dtype) for x in tensors]
        gradient = torch.randn(*shape[:-1], 9, generator=generator).to(dtype)

        def fused(gate, up, weight):
            down = nn.Linear(shape[-1], 9, bias=False)
            del down.weight
            down.weight = weight  # a plain tensor, as FSDP2 has it within a forward
            return swiglu_linear(gate, up, down)

        def composed(gate, up, weight):
            return F.linear(F.silu(gate) * up, weight)

        expected = with_gradients(composed, [x.double() for x in tensors], gradient.double())
        for actual, exact in zip(with_gradients(fused, tensors, gradient), expected):
            assert actual.dtype == dtype and relative(actual, exact) < bound

    def test_the_product_is_not_kept(self):
        gate, up = (torch.randn(4, 6, requires_grad=True) for _ in range(2))
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            swiglu_linear(gate, up, nn.Linear(6, 3, bias=False))
        assert [tuple(x.shape) for x in kept] == [(4, 6), (4, 6), (3, 6)]

    def test_a_frozen_weight_gets_no_gradient(self):
        down = nn.Linear(6, 3, bias=False).requires_grad_(False)
        gate = torch.randn(4, 6, requires_grad=True)
        swiglu_linear(gate, torch.ones(4, 6), down).sum().backward()
        assert down.weight.grad is None and gate.grad.abs().sum() > 0


class TestLoss:
    @pytest.fixture(autouse=True)
    def several_parts(self, monkeypatch):
        monkeypatch.setattr(fused_deltanet, "LOGITS_AT_ONCE", 61 * 4)

    @staticmethod
    def inputs(dtype=torch.float64):
        generator = torch.Generator().manual_seed(0)
        head = LanguageModelHead(16, 61, bias=False, dtype=dtype)
        with torch.no_grad():
            head.weight.copy_(torch.randn(61, 16, generator=generator))
        labels = torch.randint(0, 61, (2, 9), generator=generator)
        labels[0, 3] = labels[1, -1] = -100
        return head, torch.randn(2, 9, 16, generator=generator).to(dtype), labels

    @staticmethod
    def reference(hidden, weight, labels, **arguments):
        logits = F.linear(hidden, weight)
        return ForCausalLMLoss(logits, None, logits.shape[-1], shift_labels=labels, **arguments)

    @pytest.mark.parametrize("items", [None, 7, torch.tensor(11)])
    @pytest.mark.parametrize("kind", ["plain", "hooked", "divided"])
    def test_is_the_loss_of_transformers(self, items, kind, monkeypatch):
        head, hidden, labels = self.inputs(torch.float32)
        calls = []
        hidden.requires_grad_()
        expected = self.reference(hidden, head.weight, labels, num_items_in_batch=items)
        gradients = torch.autograd.grad(3 * expected, (hidden, head.weight))
        if kind != "plain":
            head.register_forward_hook(lambda *_: calls.append(1))
        monkeypatch.setattr(fused_deltanet, "_is_divided", lambda head: kind == "divided")
        actual = linear_cross_entropy(head, hidden, labels, num_items_in_batch=items)
        assert actual.item() == pytest.approx(expected.item(), rel=1e-6)
        for a, e in zip(torch.autograd.grad(3 * actual, (hidden, head.weight)), gradients):
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-6)
        assert kind != "divided" or len(calls) == 1

    def test_is_as_exact_as_the_logits_allow_in_bfloat16(self):
        head, hidden, labels = self.inputs(torch.bfloat16)
        exact = [hidden.double().requires_grad_(), head.weight.double().detach().requires_grad_()]
        loss = F.cross_entropy((exact[0] @ exact[1].T).flatten(0, 1), labels.flatten())
        expected = [loss.detach(), *torch.autograd.grad(loss, exact)]
        errors = []
        for function in (lambda x, w: self.reference(x, w, labels), lambda x, w: linear_cross_entropy(head, x, labels)):
            x = hidden.clone().requires_grad_()
            result = function(x, head.weight)
            found = [result.detach(), *torch.autograd.grad(result, (x, head.weight))]
            errors.append([relative(a, e) for a, e in zip(found, expected)])
        assert all(mine < 1.2 * theirs for mine, theirs in zip(errors[1], errors[0])), errors

    def test_a_probable_token_keeps_its_gradient(self):
        """1 - p is 4e-4 here, which p in bfloat16 cannot show."""
        head = nn.Linear(1, 2, bias=False, dtype=torch.bfloat16)
        with torch.no_grad():
            head.weight.copy_(torch.tensor([[8.0], [0.0]]))
        hidden = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
        linear_cross_entropy(head, hidden, torch.tensor([0])).backward()
        expected = torch.sigmoid(torch.tensor(8.0)).item() - 1
        assert head.weight.grad[0].item() == pytest.approx(expected, rel=1e-2)

    def test_ignored_rows_may_hold_anything(self):
        head, hidden, labels = self.inputs()
        hidden[0, 3] = float("nan")
        hidden.requires_grad_()
        linear_cross_entropy(head, hidden, labels).backward()
        assert head.weight.grad.isfinite().all() and hidden.grad.isfinite().all()
        assert hidden.grad[0, 3].abs().sum() == 0 and hidden.grad[0, 4].abs().sum() > 0

    def test_never_holds_all_logits(self):
        head, hidden, labels = self.inputs(torch.float32)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            linear_cross_entropy(head, hidden.requires_grad_(), labels)
        assert max(kept) < 18 * 61

    def test_without_gradients(self, monkeypatch):
        head, hidden, labels = self.inputs()
        expected = self.reference(hidden, head.weight, labels).item()
        monkeypatch.setattr(torch.Tensor, "scatter_", lambda *_: pytest.fail("a gradient was computed"))
        with torch.no_grad():
            assert linear_cross_entropy(head, hidden.requires_grad_(), labels).item() == pytest.approx(expected)

    def test_autocast(self):
        head, hidden, labels = self.inputs(torch.float32)
        hidden.requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            expected = self.reference(hidden, head.weight, labels)
            actual = linear_cross_entropy(head, hidden, labels)
        pairs = zip(*(torch.autograd.grad(loss, (hidden, head.weight)) for loss in (actual, expected)))
        assert actual.item() == pytest.approx(expected.item(), rel=1e-3)
        assert all(a.dtype == torch.float32 and relative(a, e.double()) < 1e-2 for a, e in pairs)


class TestModel:
    @pytest.mark.parametrize("kept", [0, 5, torch.tensor([0, 3, 8])])
    @pytest.mark.parametrize("tied", [False, True])
    def test_same_loss_and_gradients_without_logits(self, kept, tied):
        model = tiny_model(tie_word_embeddings=tied).train()
        ids = token_ids(2, 9)
        labels = ids.masked_fill(ids < 10, -100)
        results = {}
        for fuse in (False, True):
            model.zero_grad()
            model.config.fuse_linear_cross_entropy = fuse
            output = model(ids, labels=labels, logits_to_keep=kept, num_items_in_batch=6)
            output.loss.backward()
            assert (output.logits is None) == fuse
            results[fuse] = [output.loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]
        for a, e in zip(results[True], results[False]):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-6)

    def test_evaluation_and_other_losses_have_logits(self):
        model, ids = tiny_model(fuse_linear_cross_entropy=True), token_ids(2, 9)
        assert model(ids, labels=ids).logits.shape == (2, 9, 61)
        assert model.train()(ids).logits.shape == (2, 9, 61)
        model.loss_function = lambda logits, **_: logits.sum()
        output = model(ids, labels=ids)
        assert output.loss == output.logits.sum()

    def test_the_key_is_kept(self, tmp_path):
        tiny_model(fuse_linear_cross_entropy=True).save_pretrained(tmp_path)
        assert type(tiny_model()).from_pretrained(tmp_path).config.fuse_linear_cross_entropy is True

    def test_compiles(self):
        model, ids = tiny_model(fuse_linear_cross_entropy=True).train(), token_ids(2, 9)
        expected = model(ids, labels=ids).loss
        compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(ids, labels=ids).loss, expected)


class TestPlainLayers:
    def test_of_every_kind(self):
        def with_forward(layer):
            layer.forward = layer.forward
            return layer

        def hooked(layer):
            layer.register_forward_pre_hook(lambda *_: None)
            return layer

        linear = nn.Linear(4, 3, bias=False)
        assert plain_weight(linear) is linear.weight
        others = [nn.Linear(4, 3), nn.LazyLinear(3, bias=False), with_forward(nn.Linear(4, 3, bias=False))]
        others += [hooked(nn.Linear(4, 3, bias=False)), nn.utils.parametrizations.weight_norm(nn.Linear(4, 3, bias=False))]
        assert all(plain_weight(layer) is None for layer in others)


def test_norms_round_once_under_autocast():
    """To what the linear layers behind a norm round to anyway."""
    norm = tiny_model().model.norm
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    expected = norm(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(norm(x), expected.bfloat16())


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.float16, 1e-3)])
@pytest.mark.parametrize("shape", [(3, 16), (5, 1008), (2, 7)])
def test_kernels_of_swiglu(device, dtype, bound, shape):
    """The last shape is no multiple of the granule and takes PyTorch's operations."""
    gate, up, dz = (torch.randn(shape, generator=torch.Generator().manual_seed(i)).to(device, dtype) for i in range(3))
    assert (operation._runs_fused(gate)) == (gate.numel() % 16 == 0)
    expected = operation._backward(gate.double(), up.double(), dz.double())
    actual = operation.swiglu_backward(gate.T.contiguous().T, up, dz)
    for a, e in zip((*actual, operation.swiglu(gate, up)), (*expected, expected[2])):
        assert a.shape == gate.shape and relative(a, e) < bound


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.float16, 1e-3)])
@pytest.mark.parametrize("V", [61, 4096, 9001])
@pytest.mark.parametrize("gradient", [True, False])
def test_kernel_of_cross_entropy(device, dtype, bound, V, gradient):
    """One lane a block or several blocks, far-off logits, an ignored row, and a label that does not exist."""
    logits = 3 * torch.randn(5, V, generator=torch.Generator().manual_seed(0))
    logits[1] += 300
    logits[2, 7] = 40
    labels = torch.tensor([3, V - 1, 7, -100, V])
    given, exact = logits.to(device, dtype), logits.to(dtype).double().requires_grad_()
    expected = F.cross_entropy(exact[:4], labels[:4], reduction="none")
    losses = cross_entropy_(given, labels.to(device), -100, gradient)
    assert losses[4].isnan() and relative(losses[:4], expected.detach()) < 1e-6
    before = given if not gradient else torch.autograd.grad(expected.sum(), exact)[0]
    assert relative(given[:4], before[:4].double()) < bound
    assert not gradient or given[3].abs().sum() == 0
