"""Linear layers together with what surrounds them, so that less has to be kept for the backward pass.

`project` adds up the gradients of an input that several layers share inside of their products. `swiglu_linear` keeps the two
inputs of SwiGLU's product and computes the product again. `linear_cross_entropy` never holds the logits of all tokens. They
use a layer's weight outside of the layer, which only a plain layer allows: one that is sharded, quantized, adapted or hooked
is called as a module instead, with the same result.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from .kernels.cross_entropy import cross_entropy_
from .kernels.reference import compute_dtype
from .kernels.swiglu import swiglu, swiglu_backward

LOGITS_AT_ONCE = 2**27
"""Logits that `linear_cross_entropy` holds at most: 256 MiB in bfloat16, 4,096 tokens of 32,000 ids. Each time that it holds
others, the gradient of the head is read and written in float32."""
ROWS = 256
"""Tokens of a product come in multiples of so many, in which its tiles have no partly empty last row."""


class LanguageModelHead(nn.Linear):
    """A linear layer that can give a function of its input and its weight instead of their product."""

    def forward(self, hidden: Tensor, function: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
        return super().forward(hidden) if function is None else function(hidden, self.weight)


def plain_weight(layer: nn.Module) -> Tensor | None:
    """The weight of a linear layer that does nothing but multiply by it, or `None` of any other module."""
    if type(layer) not in (nn.Linear, LanguageModelHead) or type(layer.weight) not in (Tensor, nn.Parameter):
        return None
    hooked = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or "forward" in vars(layer)
    return None if layer.bias is not None or hooked or "_hf_hook" in vars(layer) else layer.weight


def project(x: Tensor, *layers: nn.Module) -> list[Tensor]:
    """[layer(x) for layer in layers] for x [..., D]."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return [layer(x) for layer in layers]
    weights = [plain_weight(layer) for layer in layers]
    if any(weight is None or weight.device != x.device for weight in weights):
        return [layer(x) for layer in layers]
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, *weights = (t.to(dtype) for t in (x, *weights))
    return list(_Project.apply(x, *weights))


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *weights):
        ctx.save_for_backward(x, *weights)
        ctx.set_materialize_grads(False)
        return tuple(F.linear(x, weight) for weight in weights)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):
        x, *weights = ctx.saved_tensors
        dx, dweights = None, [None] * len(weights)
        # The last first: where it is the smallest, its product costs what it writes, and is read within larger ones.
        for i in reversed([i for i, dy in enumerate(dys) if dy is not None]):
            dy = dys[i].flatten(0, -2)
            if ctx.needs_input_grad[0]:
                dx = dy @ weights[i] if dx is None else dx.addmm_(dy, weights[i])
            if ctx.needs_input_grad[1 + i]:
                dweights[i] = dy.mT @ x.flatten(0, -2)
        return None if dx is None else dx.view_as(x), *dweights


def swiglu_linear(gate: Tensor, up: Tensor, down: nn.Module) -> Tensor:
    """down(silu(gate) * up) for gate and up [..., I]."""
    if torch.compiler.is_compiling():
        return down(F.silu(gate) * up)
    if not torch.is_grad_enabled() and type(gate) is type(up) is Tensor:
        return down(swiglu(gate, up))
    weight = plain_weight(down)
    if weight is None or weight.device != gate.device:
        return down(F.silu(gate) * up)
    # Under autocast the projections have its dtype and the weight has not.
    return _SwiGLULinear.apply(gate, up, weight.to(gate.dtype))


class _SwiGLULinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, weight):
        ctx.save_for_backward(gate, up, weight)
        return F.linear(swiglu(gate, up), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        gate, up, weight = ctx.saved_tensors
        dgate, dup, z = swiglu_backward(gate, up, dy @ weight)
        dweight = dy.flatten(0, -2).mT @ z.flatten(0, -2) if ctx.needs_input_grad[2] else None
        return dgate, dup, dweight


def linear_cross_entropy(
    head: nn.Module,
    hidden: Tensor,
    shift_labels: Tensor,
    num_items_in_batch: int | Tensor | None = None,
    ignore_index: int = -100,
    **_,
) -> Tensor:
    """The loss of `head(hidden)` for hidden [..., D] and labels [...], with a part of the logits at a time.

    The arguments are those of Transformers' `ForCausalLMLoss`, what it knows besides is ignored here as it is there. The
    sum is divided by `num_items_in_batch`, or by the number of labels other than `ignore_index`. A plain head's gradients
    are computed in the forward pass already, for other heads the logits are computed again in the backward pass.
    """
    hidden, labels = hidden.flatten(0, -2), shift_labels.flatten().to(hidden.device)
    total, weight = partial(_total, labels=labels, ignore_index=ignore_index), plain_weight(head)
    if weight is not None and weight.device == hidden.device:
        total = total(hidden, weight)
    elif isinstance(head, LanguageModelHead) and _is_divided(head):
        total = head(hidden, total)
    else:
        total = _total_in_parts(head, hidden, labels, ignore_index, head.out_features)
    items = (labels != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
    return total / (items.to(total.device) if isinstance(items, Tensor) else items)


def _is_divided(head: nn.Module) -> bool:
    """Whether FSDP2 puts the weight together for the time of the head's own forward, of which there may be one only: up to
    torch 2.11 it takes the weight away in the backward pass of the first."""
    return torch.distributed.is_available() and isinstance(head, torch.distributed.fsdp.FSDPModule)


def _total(hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    # In float16 the gradient of a logit is too small to be rounded before the loss scaler's factor.
    if dtype == torch.float16 or torch.compiler.is_compiling():
        return _total_in_parts(lambda x: F.linear(x, weight), hidden, labels, ignore_index, len(weight))
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()
    return _LinearCrossEntropy.apply(hidden.to(dtype), weight.to(dtype), labels, ignore_index)


def _total_in_parts(head: Callable[[Tensor], Tensor], hidden, labels, ignore_index: int, vocabulary: int) -> Tensor:
    rows = _rows(vocabulary)
    parts = zip(hidden.split(rows), labels.split(rows))
    return sum(checkpoint(_summed, head, x, y, ignore_index, use_reentrant=False) for x, y in parts)


def _rows(vocabulary: int) -> int:
    """Tokens whose logits are held at once."""
    rows = max(1, LOGITS_AT_ONCE // vocabulary)
    return rows - rows % ROWS if rows > ROWS else rows


def _summed(head, hidden, labels, ignore_index):
    logits = head(hidden)
    return F.cross_entropy(logits.to(compute_dtype(logits.dtype)), labels, ignore_index=ignore_index, reduction="sum")


class _LinearCrossEntropy(torch.autograd.Function):
    """The summed loss; its gradients for a gradient of one are ready after the forward pass."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, ignore_index):
        exact = compute_dtype(hidden.dtype)
        total = hidden.new_zeros((), dtype=exact)
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        dhidden = torch.empty_like(hidden) if wants_hidden else None
        dweight = torch.zeros_like(weight, dtype=exact) if wants_weight else None
        rows = _rows(len(weight))
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), rows):
                part = slice(start, start + rows)
                ignored = (labels[part] == ignore_index)[:, None]
                x = hidden[part].masked_fill(ignored, 0)
                logits = x @ weight.mT
                total += cross_entropy_(logits, labels[part], ignore_index, wants_hidden or wants_weight).sum()
                if wants_hidden:
                    dhidden[part] = logits @ weight
                if wants_weight:
                    dweight += logits.mT @ x
        ctx.save_for_backward(dhidden, dweight)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, dtotal):
        dhidden, dweight = ctx.saved_tensors
        dhidden = None if dhidden is None else dhidden * dtotal.to(dhidden.dtype)
        return dhidden, None if dweight is None else (dweight * dtotal).to(ctx.dtype), None, None


__all__ = ["LanguageModelHead", "linear_cross_entropy", "plain_weight", "project", "swiglu_linear"]
