"""Against flash-linear-attention on a GPU, where it is installed: never less exact, and the same model."""

import pytest
import torch
from cases import Case
from oracle import relative_error, relative_errors
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from deltanet import DeltaNetConfig, DeltaNetForCausalLM, DeltaNetModel

pytestmark = pytest.mark.gpu
HALF = torch.bfloat16


@pytest.fixture(scope="module")
def fla():
    """The package, with the first variants of its kernels only: its own search for the fastest takes minutes."""
    fla = pytest.importorskip("fla")
    from triton.runtime.autotuner import Autotuner

    patch, prune = pytest.MonkeyPatch(), Autotuner.prune_configs
    patch.setattr(Autotuner, "prune_configs", lambda self, arguments: list(prune(self, arguments))[:2])
    yield fla
    patch.undo()
    # It has registered its own classes for the same model type.
    AutoConfig.register(DeltaNetConfig.model_type, DeltaNetConfig, exist_ok=True)
    AutoModel.register(DeltaNetConfig, DeltaNetModel, exist_ok=True)
    AutoModelForCausalLM.register(DeltaNetConfig, DeltaNetForCausalLM, exist_ok=True)


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("keys, beta", [("silu", None), ("gaussian", None), ("correlated", 1.0), ("silu", 1.9)])
def test_error_is_not_above_the_peer(cuda, check, fla, D, keys, beta):
    from fla.ops.delta_rule import chunk_delta_rule

    case = Case(cuda, HALF, 1000, D, D, B=2, keys=keys, beta=beta)
    expected = case.expected()
    theirs = relative_errors(case.actual(chunk_delta_rule), expected)
    # A state in float32 that differs by less than this from float64 is as good as another.
    check(case.actual(), expected, [max(1.1 * error, 1e-5) for error in theirs.values()])


def logits_and_gradients(model, ids, do):
    logits = model(ids, use_cache=False).logits
    model.zero_grad()
    logits.backward(do.to(logits.dtype))
    return {"logits": logits.detach(), **{name: p.grad for name, p in model.named_parameters()}}


@pytest.mark.parametrize("options", [{}, {"use_gate": True, "allow_neg_eigval": True}], ids=["plain", "gated"])
def test_model_is_the_peers(cuda, record_property, fla, options, tmp_path):
    """bfloat16 logits and gradients of both against ours in float32 on a CPU, all from one set of weights."""
    from fla.models import DeltaNetForCausalLM as Peer

    torch.manual_seed(0)
    fields = {"vocab_size": 500, "hidden_size": 256, "num_heads": 4, "num_hidden_layers": 3, "initializer_range": 0.1}
    ours = DeltaNetForCausalLM(DeltaNetConfig(**fields, **options)).to(HALF)
    ours.save_pretrained(tmp_path)
    exact = DeltaNetForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    peer = Peer.from_pretrained(tmp_path, dtype=HALF)
    ids = torch.randint(500, (2, 300), generator=torch.Generator().manual_seed(1))
    do = torch.randn(2, 300, 500, generator=torch.Generator().manual_seed(2)).to(HALF)
    expected = logits_and_gradients(exact, ids, do.float())
    figures = {}
    for name, model in (("ours", ours), ("peer", peer)):
        actual = logits_and_gradients(model.to(cuda), ids.to(cuda), do.to(cuda))
        actual = {key.replace("model.embeddings.", "model.embed_tokens."): value.cpu() for key, value in actual.items()}
        pairs = [(actual[key].double(), value.double()) for key, value in expected.items()]
        figures[f"{name} logits"] = relative_error(*pairs[0])
        figures[f"{name} gradients"] = relative_error(*(torch.cat([x.flatten() for x in y]) for y in zip(*pairs[1:])))
    record_property("errors", figures)
    assert figures["ours logits"] <= min(1.1 * figures["peer logits"], 0.05), figures
    assert figures["ours gradients"] <= min(1.1 * figures["peer gradients"], 0.1), figures
