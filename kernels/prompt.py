"""A prompt through a delta layer where no gradient is wanted: convolutions, SiLU, beta and the delta rule in three launches.

The kernels are those of `delta_rule_prologue` and `chunk_delta_rule`, and the results the same to the bit. What differs is
the host, which the two operations keep busy for longer than the device takes for a few thousand tokens: here everything
that follows from shapes is checked and prepared once, for all layers and calls that share them.
"""

import functools
import os
from typing import NamedTuple, Optional, Sequence

import torch
from torch import Tensor

from .checks import check_inputs, check_values
from .delta_rule import implementation
from .devices import forced_backend, on_device
from .operators import is_plain
from .prologue import WIDTHS
from .prologue import _is_fused as prologue_is_fused
from .short_conv import PaddingOrder, check_convolution


class Prompt(NamedTuple):
    """o [B, T, H, V] in the dtype of the projections, the convolutions' states [B, D, W - 1] of q, k and v, and the state
    [B, H, K, V] float32, all behind the last token."""

    o: Tensor
    conv_states: list[Tensor]
    state: Tensor


def takes_prompt(x: Tensor, K: int, weights: Sequence[Tensor]) -> bool:
    """Whether `delta_rule_prompt` runs for projections of x, heads of K and convolutions with these weights: not for
    gradients, under autocast or where operators must be seen, and only where the fused kernels would run anyway."""
    if torch.is_grad_enabled() or not is_plain((x, *weights)) or torch.is_autocast_enabled(x.device.type):
        return False
    if not weights[0].dtype == weights[1].dtype == weights[2].dtype:
        return False
    interpreted = not x.is_cuda and os.environ.get("TRITON_INTERPRET")
    return _is_fused(x.device, x.dtype, K, weights[0].shape[-1], forced_backend(), interpreted)


@functools.cache
def _is_fused(device: torch.device, dtype: torch.dtype, K: int, W: int, forced: str, interpreted) -> bool:
    """What the two operations would choose, and log; `forced` and `interpreted` are there because they look at these."""
    if W not in WIDTHS or not prologue_is_fused(device, dtype, ""):
        return False
    return implementation(torch.empty(0, K, dtype=dtype, device=device)).name == "triton"


def delta_rule_prompt(
    projections: list[Tensor],
    weights: Sequence[Tensor],
    *,
    beta_scale: float = 1.0,
    conv_states: Sequence[Optional[Tensor]] = (None, None, None),
    state: Optional[Tensor] = None,
    padding_order: Optional[PaddingOrder] = None,
) -> Prompt:
    """A prompt of a delta layer with SiLU, L2 norm and short convolutions, or a part of one that goes on from given states.

    Args:
        projections: q and k [B, T, H * K], v [B, T, H * V] and b [B, T, H], of one dtype, any strides. They are taken out of
            the list: the delta rule begins when their memory is free.
        weights: of the convolutions of q, k and v, [D, 1, W] each and of one dtype.
        beta_scale: multiplies sigmoid(b).
        conv_states, state: behind the tokens before, as returned; either all or none of them.
        padding_order: padded tokens write nothing, as in `delta_rule_prologue`, and their outputs are to be ignored.

    `takes_prompt` must have said yes. Raises TypeError, ValueError like the two operations whose work this does.
    """
    q, k, v, b = projections
    rows = tuple([(x.shape, x.stride(), x.data_ptr() % 16) for x in (q, k, v)])
    key = (rows, (b.shape, b.stride()), q.dtype, q.device, weights[0].shape[-1], padding_order is not None, beta_scale)
    plan = _plans.get(key)
    if plan is None or not q.dtype == k.dtype == v.dtype:
        _check(q, k, v, b, weights, conv_states, state, padding_order)
        if len(_plans) >= _MOST_PLANS:
            _plans.clear()
        plan = _plans[key] = _Plan(*key)
    with on_device(q):
        del q, k, v, b
        *streams, beta, conv_states = plan.prepare(projections, weights, conv_states, padding_order)
        check_values(streams[0], beta, None)
        o, state = plan.apply_rule(streams, beta, state)
    return Prompt(o, conv_states, state)


def _check(q, k, v, b, weights, conv_states, state, padding_order) -> None:
    for x, weight, past in zip((q, k, v), weights, conv_states, strict=True):
        check_convolution(x, weight, "silu", past, None, padding_order)
    if b.dim() != 3 or b.shape[:2] != q.shape[:2]:
        raise ValueError(f"b has shape {tuple(b.shape)} and q {tuple(q.shape)}; [B, T] must be equal")
    check_inputs(*(x.unflatten(-1, (b.shape[2], -1)) for x in (q, k, v)), b, state, None)


class _Plan:
    """The plans of both operations, for projections that lie as `rows` say."""

    def __init__(self, rows, b_rows, dtype, device, W, is_padded, beta_scale):
        from .chunk import Batch, Rows, outputs
        from .chunk import keep_plan as plan_of_rule
        from .prologue_launch import keep_plan as plan_of_prologue

        (B, T, H), widths = b_rows[0], [shape[-1] for shape, *_ in rows]
        self.shapes, self.beta_shape = [(B, T, H, width // H) for width in widths], b_rows[0]
        self.device = device
        self.prologue = plan_of_prologue("forward", rows, b_rows, dtype, device, W, None, is_padded, beta_scale)
        strides = [(T * width, width, width // H, 1) for width in widths]
        of_results = tuple(Rows(*x, 0, dtype.itemsize) for x in zip(self.shapes, strides))
        self.rule = plan_of_rule(of_results, dtype, device, None, False)
        self.outputs, self.batch = outputs, Batch
        self.scale = self.shapes[0][-1] ** -0.5

    def prepare(self, projections, weights, conv_states, padding_order) -> tuple:
        """q, k and v [B, T, H, D], beta and the new states of the convolutions."""
        *streams, b = projections
        projections.clear()
        streams = [x if x.stride(-1) == 1 else x.contiguous() for x in streams]
        conv_states = [None if past is None else past.contiguous() for past in conv_states]
        q, k, v = [x.new_empty(shape) for x, shape in zip(streams, self.shapes)]
        beta = torch.empty(self.beta_shape, dtype=torch.float32, device=self.device)
        finals = self.prologue.states(conv_states, streams)
        order = (None, None) if padding_order is None else (padding_order.gather, padding_order.padded)
        self.prologue.run(*streams, *weights, q, k, v, *conv_states, *finals, b, beta, None, None, *order)
        if padding_order is not None:
            beta.masked_fill_(padding_order.absent, 0)
        return q, k, v, beta, finals

    def apply_rule(self, streams: list[Tensor], beta: Tensor, state: Optional[Tensor]) -> tuple[Tensor, Tensor]:
        return self.outputs(self.batch(streams, self.rule), beta, self.scale, state, True, True)[:2]


_plans: dict[tuple, _Plan] = {}
_MOST_PLANS = 256  # every length of a prompt makes one
