"""Gradient checkpointing that computes a block again in the backward pass, except its most expensive operation."""

import functools

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from ..kernels.delta_rule import NAMESPACE

_MIXING = {
    NAMESPACE: ("chunk_delta_rule", "recurrent_delta_rule"),
    "aten": (
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_flash_attention",
    ),
}
"""Operators that mix tokens, by namespace: their results are kept."""


def _policy(context, operator, *arguments, **keywords) -> CheckpointPolicy:
    is_mixing = isinstance(operator, torch._ops.OpOverload) and operator._opname in _MIXING.get(operator.namespace, ())
    return CheckpointPolicy.MUST_SAVE if is_mixing else CheckpointPolicy.PREFER_RECOMPUTE


KEEP_MIXING = {
    "use_reentrant": False,
    "context_fn": functools.partial(create_selective_checkpoint_contexts, _policy),
}
"""For `model.gradient_checkpointing_enable(KEEP_MIXING)`: of a block, its input and the result of its delta rule (or of its
attention) are kept, about three numbers for each of its outputs; projections, convolutions and SwiGLU run twice."""
