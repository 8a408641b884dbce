"""RMSNorm with the residual sum: the kernels in Triton's interpreter and compiled for Hopper, and PyTorch's operations."""

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from compiling import PROCESSORS, compile_launch, recording, resources, specialisations
from models import tiny_model, token_ids
from oracle import assert_close, with_gradients

from deltanet.kernels import rms_norm as operation
from deltanet.kernels.rms_norm import rms_norm

HALF, FLOAT16, FULL = torch.bfloat16, torch.float16, torch.float32
EPS = 1e-5
NAMES = ("y", "total", "dx", "dupdate", "dweight")
# Dtypes of x, of the update and of the weight, that of the result, and the error of a rounding.
KINDS = {
    "float32": ([FULL] * 3, FULL, 2e-6),
    "float16": ([FLOAT16] * 3, FLOAT16, 6e-4),
    "bfloat16": ([HALF] * 3, HALF, 4e-3),
    "autocast": ([FULL, FLOAT16, FULL], FLOAT16, 6e-4),
}


def inputs(shape, dtypes, device="cpu"):
    """x, the update and the weight; rows of different sizes, one of zeros."""
    generator = torch.Generator().manual_seed(0)
    x, update = (torch.randn(shape, generator=generator) * torch.logspace(-3, 2, shape[-2])[:, None] for _ in range(2))
    x[..., 0, :] = update[..., 0, :] = 0
    weight = 1 + 0.5 * torch.randn(shape[-1], generator=generator)
    return [t.to(device, dtype) for t, dtype in zip((x, update, weight), dtypes)]


def check(tensors, with_update, dtype, limit):
    """Results and gradients against float64, with a gradient that the total brings along, and without one."""
    rounded = (tensors[0] + tensors[1] * with_update).double()

    def exact(x, update, weight):
        total = x + update * with_update
        total = total + (rounded - total).detach()  # what is normed is the sum as it is rounded
        return total / (total.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight, total

    def actual(x, update, weight):
        y, total = rms_norm(x, weight, EPS, update if with_update else None, dtype)
        assert y.dtype == dtype and total.dtype == x.dtype
        return y, total

    for results in (2, 1):
        found, expected = (
            with_gradients(lambda *t, run=run, wanted=results: run(*t)[:wanted], given)
            for run, given in ((actual, tensors), (exact, [t.double() for t in tensors]))
        )
        assert_close(found, expected, limit, NAMES[:results] + NAMES[2:])


@pytest.mark.parametrize("with_update", [True, False])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "autocast"])
def test_composed(kind, with_update):
    dtypes, result, limit = KINDS[kind]
    tensors = inputs((2, 37, 48), dtypes)
    assert not operation._runs_fused(tensors[0], tensors[2])
    # The update's and the norm's gradients are rounded before they are added.
    check(tensors, with_update, result, 2 * limit)


@pytest.mark.interpreter
@pytest.mark.parametrize("with_update", [True, False])
@pytest.mark.parametrize("shape", [(2, 37, 128), (3, 100), (1, 5, 2048), (3, 2500)], ids=str)
@pytest.mark.parametrize("kind", ["float32", "float16", "autocast"])
def test_kernels(monkeypatch, nan_in_fresh_memory, device, shape, kind, with_update):
    """Rows that fill their tile and do not, and more rows than programs take at once."""
    monkeypatch.setattr(operation, "LEAST", 0)
    dtypes, result, limit = KINDS[kind]
    tensors = inputs(shape, dtypes, device)
    assert operation._runs_fused(tensors[0], tensors[2])
    check(tensors, with_update, result, limit)


@pytest.mark.interpreter
def test_what_is_not_wanted_is_not_computed(monkeypatch, device):
    """Views, frozen weights, results that nobody uses, and no gradients at all."""
    monkeypatch.setattr(operation, "LEAST", 0)
    x, update, weight = inputs((6, 128), [FULL] * 3, device)
    x, update = x.T.contiguous().T.requires_grad_(), update.T.contiguous().T
    y, total = rms_norm(x, weight, EPS, update)
    expected = F.rms_norm(x + update, weight.shape, weight, EPS)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x), torch.autograd.grad(expected.sum(), x))
    (dx,) = torch.autograd.grad(rms_norm(x, weight, EPS, update)[1].sum(), x)
    assert (dx == 1).all() and weight.grad is None
    with torch.no_grad():
        y, total = rms_norm(x, weight, EPS)
    assert total is x and y.grad_fn is None
    torch.testing.assert_close(y, F.rms_norm(x, weight.shape, weight, EPS))


@pytest.mark.interpreter
def test_a_model_of_them(monkeypatch):
    """Loss and all gradients, with the kernels and without; also when blocks are computed again in the backward pass."""
    ids, results = token_ids(2, 9), []
    for least, checkpointing in ((2**20, False), (0, False), (0, True)):
        monkeypatch.setattr(operation, "LEAST", least)
        model = tiny_model("global").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        loss = model(ids, labels=ids).loss
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    names = ["loss", *(name for name, _ in model.named_parameters())]
    for found in results[1:]:
        assert_close(found, results[0], 2e-4, names)  # the norm of q and k takes away most of their gradient


def launches(monkeypatch, rows, N, dtypes):
    from deltanet.kernels import rms_norm_kernels

    monkeypatch.setattr(operation, "processors", lambda device: PROCESSORS)
    with recording(rms_norm_kernels) as found:
        x, update, weight = (torch.empty(shape, dtype=dtype) for shape, dtype in zip(((rows, N), (rows, N), (N,)), dtypes))
        y, total, scales = operation._forward(x, update, weight, EPS, x.dtype, update.dtype, keep=True)
        operation._backward(y, total, total, weight, scales, wants_weight=True)
    return found


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
class TestForHopper:
    @pytest.mark.parametrize("dtypes", [[HALF] * 3, [FULL, HALF, FULL]], ids=["bfloat16", "autocast"])
    @pytest.mark.parametrize("N", [128, 2048, 8192])
    def test_resources(self, monkeypatch, tmp_path, N, dtypes):
        """The gradient's programs of up to 2,048 numbers a row are all on the card at once."""
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        found = launches(monkeypatch, 16384, N, dtypes)
        assert [x.kernel.__name__.split("_")[2] for x in found] == ["kernel", "gradient", "sum"]
        for launch, bound in zip(found, (80, 96 if N <= 2048 else 255, 64)):
            used = resources(compile_launch(launch))
            assert used.stack == 0 and used.registers <= bound, f"{launch.kernel.__name__}: {used}"

    def test_other_numbers_of_rows_need_no_other_code(self, monkeypatch):
        keys = []
        for rows in (1, 16, 16384):
            found = launches(monkeypatch, rows, 2048, [HALF] * 3)
            assert not any(map(specialisations, found))
            keys.append([x.key for x in found])
        assert keys[0] == keys[1] == keys[2]
