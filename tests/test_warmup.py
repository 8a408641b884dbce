"""`model.warmup()`: afterwards nothing is left to compile, and the model is what it was."""

import pytest
import torch
from models import KINDS, tiny_model, token_ids
from transformers import DynamicCache

from deltanet import DeltaNetConfig, DeltaNetForCausalLM
from deltanet.cache_deltanet import CACHE_NAME


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_happens_where_nothing_is_compiled(kind):
    model = tiny_model(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert model.warmup(training=True) == 0.0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.fixture
def compilations(cuda):
    from triton import knobs

    names, before = [], knobs.runtime.jit_post_compile_hook
    knobs.runtime.jit_post_compile_hook = lambda **details: names.append(details["repr"]) and None
    yield names
    knobs.runtime.jit_post_compile_hook = before


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [2, 16])
def test_nothing_is_left_to_compile(cuda, compilations, heads):
    torch.manual_seed(0)
    sizes = {"hidden_size": heads * 64, "num_hidden_layers": 2, "num_heads": heads, "vocab_size": 61}
    with cuda:
        model = DeltaNetForCausalLM(DeltaNetConfig(**sizes)).eval().to(torch.bfloat16)
    print(f"warmup {model.warmup(training=True):.1f} s, {len(compilations)} kernels")
    assert compilations and all(parameter.grad is None for parameter in model.parameters())
    del compilations[:]
    for batch, length in ((1, 100), (40, 70), (1, 9000), (3, 1)):
        ids = token_ids(batch, length).to(cuda)
        mask = torch.ones_like(ids)
        mask[:1, : length // 3] = 0
        with torch.no_grad():
            cache = DynamicCache(config=model.config)
            for part in (ids, ids, ids[:, :1]):
                model(part, **{CACHE_NAME: cache})
            model(ids, attention_mask=mask)
        model.train()(ids, labels=ids).loss.backward()
        model.eval()
    packed = token_ids(1, 300).to(cuda)
    model(packed, cu_seq_lens_q=torch.tensor([0, 7, 250, 300], device=cuda), use_cache=False, labels=packed).loss.backward()
    assert not compilations
