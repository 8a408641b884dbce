"""Context parallelism on two and four processes with gloo against one process: the rule, the convolution, the model."""

import pytest
import torch
from context_worker import CASES, MODELS, PROMPT, convolution_inputs, model_inputs, rule_inputs, step, with_gradients
from launching import launch
from models import tiny_model, token_ids
from oracle import assert_close, delta_rule_batched, relative_error

from deltanet.kernels.short_conv import short_convolution

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
sizes = pytest.mark.parametrize("ranks", [2, 4])


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of four processes found; on two ranks, processes 2 and 3 repeat what 0 and 1 did."""
    return launch("context_worker", 4, tmp_path_factory.mktemp("context"))


def side_by_side(found, key, index, ranks, dim=1):
    return torch.cat([one[key][index] for one in found[:ranks]], dim)


@sizes
@pytest.mark.parametrize("name", CASES)
def test_rule(found, name, ranks):
    """Against the recurrence over all tokens, in float64, and its autograd."""
    (*inputs, do), cu_seqlens = rule_inputs(name)
    expected = with_gradients(lambda *x: delta_rule_batched(*x, l2=True, cu_seqlens=cu_seqlens)[0], inputs, do)
    actual = [side_by_side(found, ("rule", name, ranks), i, ranks) for i in range(5)]
    assert_close(actual, expected, 1e-12, ("o", "dq", "dk", "dv", "dbeta"))


@sizes
@pytest.mark.parametrize("name", CASES)
def test_convolution(found, name, ranks):
    x, weight, dy, cu_seqlens = convolution_inputs(name)
    run = lambda x, weight: short_convolution(x, weight, activation="silu", cu_seqlens=cu_seqlens)[0]  # noqa: E731
    expected = with_gradients(run, [x, weight], dy)
    key = ("convolution", name, ranks)
    actual = [*(side_by_side(found, key, i, ranks) for i in range(2)), sum(one[key][2] for one in found[:ranks])]
    assert_close(actual, expected, 1e-13, ("y", "dx", "dweight"))


@sizes
@pytest.mark.parametrize("name", MODELS)
def test_model(found, name, ranks):
    """Loss, logits and gradients of training: labels cross the segments' edges, and boundaries come in every form."""
    model, arguments = model_inputs(name)
    real = arguments.get("attention_mask", torch.ones_like(arguments["input_ids"])).bool()
    if name == "cu_seq_lens_q":
        real[:, arguments[name][-1] :] = False
    loss, logits = step(model, arguments)
    key = ("model", name, ranks)
    assert all(torch.equal(one[key][0], found[0][key][0]) for one in found[:ranks])
    assert found[0][key][0].item() == pytest.approx(loss.item(), rel=1e-6)
    assert relative_error(side_by_side(found, key, 1, ranks)[real], logits[real]) <= 1e-5
    errors = {n: relative_error(found[0][key][2][n], p.grad) for n, p in model.named_parameters()}
    assert max(errors.values()) <= 2e-5, errors


@sizes
def test_generate_behind_a_shared_prompt(found, ranks):
    expected = tiny_model().generate(token_ids(2, PROMPT), max_new_tokens=5, do_sample=False)
    for one in found[:ranks]:
        length, tokens = one["generated", ranks]
        assert length == 64 and torch.equal(tokens, expected)


def test_what_is_refused(found):
    for one in found:
        refused = one["refusals"]
        assert "With context parallelism a forward can begin a cache, by `use_cache=True` without" in refused["cache"]
        assert refused["generate"] == refused["cache"]
        assert "[[2, 16], [2, 15], [2, 14], [2, 13]]; allowed: the same on every process" in refused["shapes"]
        assert "x has 2 tokens; a segment has at least 3, for a convolution of width 4" in refused["too short"]
        assert "`x` has 15 tokens; allowed: multiples of 4" in refused["uneven"]


@pytest.mark.parametrize("kind, layers", [("sliding", "sliding_attention"), ("global", "full_attention")])
def test_hybrids_are_refused(kind, layers):
    with pytest.raises(ValueError, match=f"layers of {layers}, which would see one segment only"):
        tiny_model(kind).set_context_parallel(object())
