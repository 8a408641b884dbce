"""Weight-only int8 by torchao, through `quantization_config`: what is quantized, how well, and that it generates."""

import pytest
import torch
from models import KINDS, tiny_model, token_ids
from torch import nn
from transformers import AutoModelForCausalLM

from deltanet.fused_deltanet import plain_weight

pytest.importorskip("torchao", reason="needs torchao")


@pytest.fixture(params=KINDS)
def models(request, tmp_path):
    """A model and the same with int8 weights."""
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    model = tiny_model(request.param, use_gate=True)
    model.save_pretrained(tmp_path)
    config = TorchAoConfig(Int8WeightOnlyConfig())
    return model, AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map="cpu")


def test_the_layers_are_quantized_to_half_a_step(models):
    """All linear layers but the head; embedding, convolutions and norms keep their dtype."""
    exact, quantized = (dict(model.named_modules()) for model in models)
    linear = {name for name, module in exact.items() if type(module) is nn.Linear} - {"lm_head"}
    weights = {name: module.weight for name, module in quantized.items() if hasattr(module, "weight")}
    assert {name for name, weight in weights.items() if type(weight) is not nn.Parameter} == linear
    for name in linear:
        assert plain_weight(quantized[name]) is None
        weight = exact[name].weight
        step = weight.abs().amax(1, keepdim=True) / 127
        assert ((weights[name].dequantize() - weight).abs() <= 0.51 * step).all()
    assert all(torch.equal(weights[name], exact[name].weight) for name in weights.keys() - linear)


def test_generates_what_the_rounded_weights_say(models):
    exact, quantized = models
    with torch.no_grad():
        for name, module in quantized.named_modules():
            if isinstance(module, nn.Linear) and name != "lm_head":
                exact.get_submodule(name).weight.copy_(module.weight.dequantize())
    ids = token_ids(2, 9)
    torch.testing.assert_close(quantized(ids).logits, exact(ids).logits, rtol=1e-4, atol=1e-4)
    arguments = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(quantized.generate(ids, **arguments), exact.generate(ids, **arguments))
