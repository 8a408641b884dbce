"""What surrounds the delta rule in a model, on a GPU in 16 bits: norms, SwiGLU, the loss, memory of a training step."""

import pytest
import torch
import torch.nn.functional as F
from models import tiny_model, token_ids
from torch import nn
from transformers import DynamicCache

from deltanet import mixer_deltanet
from deltanet.benchmarks import model_peers
from deltanet.fused_deltanet import linear_cross_entropy, project
from deltanet.kernels import devices, prompt
from deltanet.kernels import swiglu as operation
from deltanet.kernels.cross_entropy import cross_entropy_
from deltanet.kernels.rms_norm import LEAST, rms_norm
from deltanet.mixer_deltanet import DeltaNetRMSNorm

pytestmark = pytest.mark.gpu
HALF = torch.bfloat16


def relative(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def random(device, *shape, dtype=HALF, seed=0):
    return torch.randn(shape, device=device, generator=torch.Generator(device).manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [HALF, torch.float16])
@pytest.mark.parametrize("shape", [(3, 1000, 2048), (5, 333, 2500), (2, 5000, 4, 128), (2, 77, 4, 128), (5, 64)], ids=str)
def test_norm_rounds_like_the_composition(cuda, dtype, shape):
    """One rounding of the same float32 value, save that the mean of squares is summed in another order. The last two shapes
    are left to PyTorch."""
    norm, x = DeltaNetRMSNorm(shape[-1], 1e-6).to(cuda, dtype), random(cuda, *shape, dtype=dtype).requires_grad_()
    with torch.no_grad():
        norm.weight.copy_(1 + 0.3 * random(cuda, shape[-1], seed=1))
    gradient = random(cuda, *shape, dtype=dtype, seed=2)
    actual = norm(x)
    expected = F.rms_norm(x.double(), norm.weight.shape, norm.weight.double(), 1e-6)
    composed = F.rms_norm(x.float(), norm.weight.shape, norm.weight.float(), 1e-6).to(dtype)
    assert ("_RMSNorm" if x.numel() >= LEAST else "FusedRmsNorm") in type(actual.grad_fn).__name__
    assert (actual != composed).float().mean() < 1e-3
    rounding = torch.finfo(dtype).eps / 2
    assert ((actual.double() - expected).abs() <= 1.01 * rounding * expected.abs() + 1e-7).all()
    found = torch.autograd.grad(actual, (x, norm.weight), gradient)
    exact = torch.autograd.grad(expected, (x, norm.weight), gradient.double())
    assert all(relative(a, e) < rounding for a, e in zip(found, exact))


@pytest.mark.parametrize("dtypes", [[HALF] * 3, [torch.float32, HALF, torch.float32]], ids=["bfloat16", "autocast"])
@pytest.mark.parametrize("shape", [(3, 1000, 2048), (2, 5000, 4, 128), (5, 333, 2500), (2, 100, 8192)], ids=str)
def test_norm_of_a_sum(cuda, nan_in_fresh_memory, dtypes, shape):
    """Against float64, the gradient of the sum included; and bit for bit twice."""
    x, update, weight = (random(cuda, *part, seed=i).to(dtypes[i]) for i, part in enumerate((shape, shape, shape[-1:])))
    gradients = random(cuda, *shape, seed=3), random(cuda, *shape, seed=4).to(dtypes[0])
    inputs = [t.requires_grad_() for t in (x, update, weight)]
    runs = []
    for _ in range(2):
        results = rms_norm(x, weight, 1e-6, update, HALF)
        runs.append([t.detach() for t in (*results, *torch.autograd.grad(results, inputs, gradients))])
    assert all(torch.equal(a, b) for a, b in zip(*runs))
    exact = [t.detach().double().requires_grad_() for t in inputs]
    total = exact[0] + exact[1]
    total = total + (runs[0][1].double() - total).detach()
    expected = F.rms_norm(total, weight.shape, exact[2], 1e-6), total
    expected = *expected, *torch.autograd.grad(expected, exact, [g.double() for g in gradients])
    assert torch.equal(runs[0][1], (x + update).detach())
    assert all(relative(a, e) < torch.finfo(HALF).eps / 2 for a, e in zip(runs[0], expected))


def test_shared_input(cuda):
    """Sums inside of products round less often than sums of products."""
    x = random(cuda, 2, 500, 256).requires_grad_()
    layers = [nn.Linear(256, width, bias=False, device=cuda, dtype=HALF) for width in (256, 300, 4)]
    gradients = [random(cuda, 2, 500, layer.out_features, seed=layer.out_features) for layer in layers]
    inputs = [x, *(layer.weight for layer in layers)]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    expected = torch.autograd.grad([exact[0] @ w.T for w in exact[1:]], exact, [g.double() for g in gradients])
    theirs = torch.autograd.grad([layer(x) for layer in layers], inputs, gradients)
    ours = torch.autograd.grad(project(x, *layers), inputs, gradients)
    assert all(relative(a, e) <= 1.02 * relative(b, e) for a, b, e in zip(ours, theirs, expected))


@pytest.mark.parametrize("dtype", [HALF, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(2, 100, 5632), (3, 7, 48), (3, 7)])
def test_swiglu(cuda, dtype, shape):
    gate, up, dz = (random(cuda, *shape, dtype=dtype, seed=seed) for seed in range(3))
    expected = operation._backward(gate.double(), up.double(), dz.double())
    rounding = torch.finfo(dtype).eps
    found = (*operation.swiglu_backward(gate, up, dz), operation.swiglu(gate, up))
    assert all(relative(a, e) < rounding for a, e in zip(found, (*expected, expected[2])))


@pytest.mark.parametrize("dtype", [HALF, torch.float16, torch.float32])
@pytest.mark.parametrize("V", [50, 32000, 50257])
def test_cross_entropy(cuda, dtype, V):
    logits, labels = 4 * random(cuda, 300, V, dtype=dtype), torch.randint(V, (300,), device=cuda)
    labels[7] = -100
    exact = logits.double().requires_grad_()
    losses = F.cross_entropy(exact, labels, reduction="none")
    (expected,) = torch.autograd.grad(losses.sum(), exact)
    assert relative(cross_entropy_(logits, labels, -100, gradient=False), losses.detach()) < 1e-5
    assert relative(cross_entropy_(logits, labels, -100, gradient=True), losses.detach()) < 1e-5
    assert relative(logits, expected) < max(1e-5, torch.finfo(dtype).eps / 2)
    assert (logits[7] == 0).all()


def test_loss_without_logits(cuda):
    head = nn.Linear(256, 32000, bias=False, device=cuda, dtype=HALF)
    hidden, labels = random(cuda, 3000, 256).requires_grad_(), torch.randint(32000, (3000,), device=cuda)
    labels[5:9] = -100
    exact = [hidden.detach().double().requires_grad_(), head.weight.detach().double().requires_grad_()]
    expected = F.cross_entropy(exact[0] @ exact[1].T, labels)
    composed = F.cross_entropy(head(hidden).float(), labels)
    gradients = torch.autograd.grad(expected, exact)
    theirs = [relative(a, e) for a, e in zip(torch.autograd.grad(composed, (hidden, head.weight)), gradients)]
    actual = linear_cross_entropy(head, hidden, labels)
    ours = [relative(a, e) for a, e in zip(torch.autograd.grad(actual, (hidden, head.weight)), gradients)]
    assert actual.item() == pytest.approx(expected.item(), rel=1e-4)
    assert all(a < 1.2 * b for a, b in zip(ours, theirs)), (ours, theirs)


def test_memory_of_a_training_step(cuda, record_property):
    """16,384 tokens in the 1.3B model, gradients included: flash-linear-attention needs 31.6 GiB."""
    model = model_peers.build("ours", "1.3B", "cuda").train()
    ids = torch.randint(32000, (1, 16384), device=cuda)
    torch.cuda.reset_peak_memory_stats()
    model(ids, labels=ids).loss.backward()
    peak = torch.cuda.max_memory_allocated() / 2**30
    record_property("peak_gib", peak)
    assert peak < 31.6


def prompt_of(device, dtype, **options):
    model = tiny_model(hidden_size=256, num_heads=2, intermediate_size=256, **options).to(device, dtype)

    def read(ids, mask=None):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            return model(ids, attention_mask=mask, past_key_values=cache, logits_to_keep=1).logits, cache

    return read


@pytest.mark.parametrize("T, padded", [(1, False), (300, False), (300, True), (9000, False)])
def test_a_prompt_has_the_bits_of_the_operations(device, monkeypatch, T, padded):
    """9,000 tokens are cut into spans."""
    if device.type == "cpu":
        if devices.forced_backend() != "triton":
            pytest.skip("needs the fused kernels")
        T = min(T, 70)
    read, ids = prompt_of(device, HALF if device.type == "cuda" else torch.float32), token_ids(2, T).to(device)
    mask = torch.ones_like(ids) if padded else None
    if padded:
        mask[0, : T // 3] = 0
    calls, run = [], mixer_deltanet.delta_rule_prompt
    monkeypatch.setattr(mixer_deltanet, "delta_rule_prompt", lambda *x, **y: calls.append(1) or run(*x, **y))
    first, again = read(ids, mask), read(ids, mask)
    assert len(calls) == 4
    monkeypatch.setattr(mixer_deltanet, "takes_prompt", lambda *_: False)
    plain = read(ids, mask)
    for logits, cache in (first, again):
        assert torch.equal(logits, plain[0])
        for layer, other in zip(cache.layers, plain[1].layers):
            assert torch.equal(layer.recurrent_states[0], other.recurrent_states[0])
            assert all(torch.equal(layer.conv_states[i], other.conv_states[i]) for i in range(3))
            assert int(layer.get_seq_length()) == int(other.get_seq_length()) == T


def test_a_prompt_waits_for_nothing(cuda):
    read, ids = prompt_of(cuda, HALF), token_ids(1, 300).to(cuda)
    read(ids)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        read(ids)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_kept_launches_go_past_triton(cuda):
    """With the Triton whose inside is known; another one would launch as it always does, which takes longer."""
    if devices.triton_version() != (3, 6) or torch.version.hip is not None:
        pytest.skip("needs Triton 3.6 and an NVIDIA GPU")
    read, ids = prompt_of(cuda, HALF), token_ids(1, 333).to(cuda)
    for _ in range(3):
        read(ids)
    plan = next(plan for plan in prompt._plans.values() if plan.rule.T == 333)
    launches = [plan.prologue.run, *plan.rule.launches.values()]
    assert len(launches) == 3 and all(launch.ready for launch in launches)
