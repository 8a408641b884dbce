"""Tensor parallelism, FSDP2 and pipeline parallelism on two processes with gloo, each against one process."""

import pytest
import torch
from launching import launch
from models import tiny_model, token_ids
from oracle import relative_error
from parallel_worker import LEARNING_RATE, MODELS, greedy, step
from safetensors.torch import load_file

pytest.importorskip("transformers.distributed")
pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
kinds = pytest.mark.parametrize("kind", MODELS)


def make_model(kind):
    return tiny_model(kind, num_heads=4, use_gate=True, vocab_size=62)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("parallel")


@pytest.fixture(scope="module")
def found(folder):
    for kind in MODELS:
        make_model(kind).save_pretrained(folder / kind)
    tiny_model(vocab_size=62, hidden_size=48, num_heads=3).save_pretrained(folder / "odd")
    return launch("parallel_worker", 2, folder)


@pytest.fixture(scope="module", params=MODELS)
def single(request):
    """A model after a backward in one process: (kind, model, what `step` gives)."""
    model = make_model(request.param)
    return request.param, model, step(model, token_ids(2, 70))


def assert_gradients(actual, model, limit=2e-5):
    errors = {name: relative_error(actual[name], parameter.grad) for name, parameter in model.named_parameters()}
    assert max(errors.values()) <= limit, errors


class TestTensorParallel:
    def test_logits_and_gradients(self, found, single):
        kind, model, output = single
        for one in found:
            actual = one["tensor", kind]
            assert relative_error(actual["logits"], output["logits"]) <= 1e-5
            assert actual["loss"].item() == pytest.approx(output["loss"].item(), rel=1e-6)
            assert_gradients(actual["gradients"], model)

    def test_every_process_holds_its_heads(self, found, single):
        """Half of every projection, of the convolutions' channels and of the writing strengths; norms are whole."""
        kind, model, _ = single
        for one in found:
            shapes = one["tensor", kind]["shapes"]
            for name, parameter in model.named_parameters():
                if name.startswith("model.layers"):
                    share = 1 if "norm" in name else 2
                    assert share * torch.Size(shapes[name]).numel() == parameter.numel(), name

    @kinds
    def test_generate(self, found, kind):
        for one in found:
            assert torch.equal(one["tensor", kind]["tokens"], greedy(make_model(kind)))

    def test_heads_that_cannot_be_divided(self, found):
        expected = "`tp_size` is 2; allowed: divisors of the numbers of heads, 3."
        assert [one["odd"] for one in found] == [expected] * 2

    @kinds
    def test_save(self, found, folder, kind):
        """What is saved is what was loaded, bit for bit, under the names on disk."""
        saved, original = (load_file(folder / name / "model.safetensors") for name in (f"tensor-{kind}", kind))
        assert saved.keys() == original.keys()
        assert all(torch.equal(saved[name], original[name]) for name in original)


class TestFSDP:
    """Two rows, one on each process; FSDP averages the gradients of their means."""

    @pytest.mark.parametrize("how", ["plan", "hand"])
    def test_losses_and_gradients(self, found, single, how):
        kind, model, output = single
        losses = [one[how, kind]["loss"].item() for one in found]
        assert sum(losses) / 2 == pytest.approx(output["loss"].item(), rel=1e-6)
        logits = torch.cat([one[how, kind]["logits"] for one in found])
        assert relative_error(logits, output["logits"]) <= 1e-6
        for one in found:
            assert_gradients(one[how, kind]["gradients"], model)

    @kinds
    def test_divided_checkpoint(self, found, kind):
        assert all(one["hand", kind]["changed"] and one["hand", kind]["read"] for one in found)

    def test_save_after_a_step(self, found, folder, single):
        kind, model, _ = single
        trained = make_model(kind)
        with torch.no_grad():
            for parameter, source in zip(trained.parameters(), model.parameters()):
                parameter -= LEARNING_RATE * source.grad
        loaded = type(trained).from_pretrained(folder / f"fsdp-{kind}")
        for (name, a), b in zip(loaded.named_parameters(), trained.parameters()):
            assert relative_error(a.detach(), b.detach()) <= 1e-6, name


class TestPipelineParallel:
    @kinds
    def test_logits(self, found, kind):
        with torch.no_grad():
            expected = make_model(kind)(token_ids(2, 70)).logits
        assert all(torch.equal(one["pipeline", kind]["logits"], expected) for one in found)

    @kinds
    def test_generate(self, found, kind):
        assert all(torch.equal(one["pipeline", kind]["tokens"], greedy(make_model(kind))) for one in found)
