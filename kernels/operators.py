"""Operators of torch, registered by schema: `torch.library.custom_op` does the same at twice the cost of a call on the host.

An operator may be loaded under another module name already: pytest loads a package's root twice, and two Hub repositories
may hold the same copy. To register it again would free the one that the first copy still calls.
"""

import functools
from typing import Callable, Optional

import torch
from torch import Tensor


def registered(namespace: str, name: str):
    """The operator, when it exists already, else None."""
    operators = getattr(torch.ops, namespace)
    return getattr(operators, name).default if hasattr(operators, name) else None


@functools.cache
def _library(namespace: str) -> torch.library.Library:
    return torch.library.Library(namespace, "FRAGMENT")


def register(namespace: str, name: str, schema: str, run: Callable, fake: Callable, save: Callable, differentiate: Callable):
    """The operator `name`, which does `run`; `fake` makes tensors like its results.

    `save(ctx, inputs, output)` and `differentiate(ctx, *gradients)` are the two halves of its gradient, as in
    `torch.autograd.Function`.
    """
    library = _library(namespace)
    library.define(name + schema)
    library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
    op = registered(namespace, name)

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            with torch._C._AutoDispatchBelowAutograd():
                output = op(*inputs)
            save(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx, *gradients):
            return differentiate(ctx, *gradients)

    def autograd(*inputs):
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
            return Differentiable.apply(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*inputs)

    library.impl(name, autograd, "Autograd")
    return op


def save_nothing(ctx, inputs, output) -> None:
    """For an operator that `refuse`s to be differentiated."""


def refuse(name: str, ctx, *gradients: Optional[Tensor]):
    raise RuntimeError(f"{name} is differentiable once: its gradient has no gradient of its own")
