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


def is_plain(inputs: tuple) -> bool:
    """Whether an operator need not be one for these inputs: nobody takes its gradient, traces, transforms or watches it."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state() is not None:
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    if not _PLAIN.issuperset(map(type, tensors)):
        return False
    return not (torch.is_grad_enabled() and any([x.requires_grad for x in tensors]))


_PLAIN = {Tensor, torch.nn.Parameter}


def register(namespace: str, name: str, schema: str, run: Callable, fake: Callable, save: Callable, differentiate: Callable):
    """The operator `name`, which does `run`; `fake` makes tensors like its results.

    `save(ctx, inputs, output)` and `differentiate(ctx, *gradients)` are the two halves of its gradient, as in
    `torch.autograd.Function`.

    Returns a function of the operator's inputs, which calls it, or `run` itself where that is all that a call would do:
    torch's dispatch of one takes longer than to launch two kernels.
    """
    op = registered(namespace, name)
    if op is None:
        op = _register(namespace, name, schema, run, fake, save, differentiate)

    def call(*inputs):
        return run(*inputs) if is_plain(inputs) else op(*inputs)

    return call


def _register(namespace, name, schema, run, fake, save, differentiate):
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
