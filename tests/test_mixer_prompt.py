"""A prompt inside the layer in three launches: the same bits as the operations one by one, and when it is taken."""

import weakref

import pytest
import torch
from models import tiny_model, token_ids
from transformers import DynamicCache

from deltanet import mixer_deltanet
from deltanet.kernels import prompt as module
from deltanet.kernels.prompt import delta_rule_prompt, takes_prompt

pytest.importorskip("triton")
interpreter = pytest.mark.interpreter
OPTIONS = [
    {},
    {"allow_neg_eigval": True, "use_gate": True, "conv_size": 3},
    {"expand_k": 0.5, "expand_v": 2.0, "conv_size": 2},
]
NOT_COVERED = [
    {"qk_activation": "relu"}, {"qk_norm": "sum"}, {"use_short_conv": False}, {"use_beta": False},
    {"attn_mode": "fused_recurrent"}, {"conv_size": 5},
]  # fmt: skip


@pytest.fixture
def prompts(monkeypatch):
    """The calls of `delta_rule_prompt` by the mixer."""
    calls, run = [], mixer_deltanet.delta_rule_prompt
    monkeypatch.setattr(mixer_deltanet, "delta_rule_prompt", lambda *a, **k: calls.append(1) or run(*a, **k))
    return calls


def read(model, parts, mask=None, cache=None):
    """Logits of the parts of a prompt, one after the other, and the cache."""
    cache, seen, logits = DynamicCache(config=model.config) if cache is None else cache, 0, []
    with torch.no_grad():
        for part in parts:
            seen += part.shape[1]
            given = {} if mask is None else {"attention_mask": mask[:, :seen]}
            logits.append(model(part, past_key_values=cache, **given).logits)
    return torch.cat(logits, 1), cache


def both_ways(monkeypatch, model, *arguments):
    fused = read(model, *arguments)
    with monkeypatch.context() as patch:
        patch.setattr(mixer_deltanet, "takes_prompt", lambda *_: False)
        return fused, read(model, *arguments)


def assert_same(fused, plain):
    assert torch.equal(fused[0], plain[0])
    for layer, other in zip(fused[1].layers, plain[1].layers):
        assert torch.equal(layer.recurrent_states[0], other.recurrent_states[0])
        assert all(torch.equal(layer.conv_states[i], other.conv_states[i]) for i in range(3))
        assert layer.get_seq_length() == other.get_seq_length()


@interpreter
@pytest.mark.parametrize("dtype, options", [(torch.float16, OPTIONS[0]), *((torch.float32, x) for x in OPTIONS)], ids=str)
def test_the_same_bits_as_the_operations(monkeypatch, prompts, dtype, options):
    model, ids = tiny_model(num_hidden_layers=1, **options).to(dtype), token_ids(1, 70)
    assert_same(*both_ways(monkeypatch, model, [ids[:, :66], ids[:, 66:]]))
    assert len(prompts) == 2 * model.config.num_hidden_layers


@interpreter
def test_padding(monkeypatch, prompts):
    """Left, right, inside, and a row of nothing else."""
    model, ids, mask = tiny_model(num_hidden_layers=1), token_ids(4, 20), torch.ones(4, 20, dtype=torch.long)
    mask[0, :7] = mask[1, 15:] = mask[2, 3:9] = mask[3] = 0
    fused, plain = both_ways(monkeypatch, model, [ids[:, :12], ids[:, 12:]], mask)
    real = mask.bool()
    assert_same((fused[0][real], fused[1]), (plain[0][real], plain[1]))
    assert len(prompts) == 2 * model.config.num_hidden_layers


@interpreter
@pytest.mark.parametrize("options", NOT_COVERED, ids=str)
def test_other_options_take_the_operations(prompts, options):
    read(tiny_model(num_hidden_layers=1, **options), [token_ids(1, 3)])
    assert not prompts


@interpreter
def test_gradients_hooks_packing_and_autocast_take_the_operations(prompts):
    model, ids = tiny_model(num_hidden_layers=1), token_ids(1, 9)
    model(ids).logits.sum().backward()
    with torch.no_grad():
        model(ids, cu_seq_lens_q=torch.tensor([0, 4, 9]))
        with torch.autocast("cpu", torch.float16):
            model(ids)
        for block in model.model.layers:
            block.attn.k_conv1d.register_forward_hook(lambda *_: None)
        model(ids)
    assert not prompts


@interpreter
def test_strided_projections_and_changed_layouts():
    """Views of one packed projection, then tensors of the same shapes that lie elsewhere: each its own plan."""
    g = torch.Generator().manual_seed(0)
    packed = torch.randn(2, 30, 3 * 32 + 3, generator=g)
    weights = [torch.randn(32, 1, 4, generator=g) for _ in range(3)]
    views = lambda x: [*x[..., :96].split(32, -1), x[..., 96:98]]  # noqa: E731
    with torch.no_grad():
        strided, dense = (
            delta_rule_prompt(parts, weights) for parts in (views(packed), [x.contiguous() for x in views(packed)])
        )
    assert torch.equal(strided.o, dense.o) and torch.equal(strided.state, dense.state)


@interpreter
def test_nothing_holds_projections_during_the_delta_rule(monkeypatch):
    held, apply_rule = [], module._Plan.apply_rule

    def watched(plan, *arguments):
        held.extend(reference() is not None for reference in references)
        return apply_rule(plan, *arguments)

    monkeypatch.setattr(module._Plan, "apply_rule", watched)
    projections = [torch.randn(1, 5, n) for n in (16, 16, 16, 1)]
    references = [weakref.ref(x) for x in projections]
    with torch.no_grad():
        delta_rule_prompt(projections, [torch.randn(16, 1, 4) for _ in range(3)])
    assert held == [False] * 4


@interpreter
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda p, w, o: p.__setitem__(3, p[3][:, :3]), r"b has shape .* and q .*; \[B, T\] must be equal"),
        (lambda p, w, o: p.__setitem__(1, p[1][..., :8]), "weight has shape"),
        (lambda p, w, o: p.__setitem__(2, p[2].half()), "v is torch.float16 and q torch.float32"),
        (lambda p, w, o: o.update(conv_states=[torch.zeros(1, 16, 2)] * 3), "initial_state has shape"),
        (lambda p, w, o: o.update(state=torch.zeros(1, 1, 16, 8)), "initial_state has shape"),
    ],
)
def test_errors(change, message):
    projections, weights, options = [torch.randn(1, 6, n) for n in (16, 16, 16, 1)], [torch.randn(16, 1, 4)] * 3, {}
    change(projections, weights, options)
    with torch.no_grad(), pytest.raises((TypeError, ValueError), match=message):
        delta_rule_prompt(projections, weights, **options)


@interpreter
def test_plans_are_few(monkeypatch):
    monkeypatch.setattr(module, "_MOST_PLANS", 3)
    weights = [torch.randn(16, 1, 4)] * 3
    for T in range(1, 9):
        with torch.no_grad():
            delta_rule_prompt([torch.randn(1, T, n) for n in (16, 16, 16, 1)], weights)
    assert len(module._plans) <= 3


@interpreter
def test_weights_of_two_dtypes_take_the_operations(prompts):
    model = tiny_model(num_hidden_layers=1)
    model.model.layers[0].attn.k_conv1d.double()
    read(model, [token_ids(1, 3)])
    assert not prompts


def test_without_kernels_nothing_is_taken():
    with torch.no_grad():
        assert not takes_prompt(torch.zeros(1, 3, 16), 16, [torch.zeros(16, 1, 4)] * 3)
