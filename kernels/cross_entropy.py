"""Cross-entropy of rows of logits, the gradient written over the logits.

The kernel reads the logits twice and writes them once, whatever their dtype: in bfloat16 6 bytes each, where PyTorch's
operations, which need a float32 copy, move about 20. Arithmetic is float32 (float64 for float64), rounded once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .devices import on_device, runs_fused
from .reference import compute_dtype


def cross_entropy_(logits: Tensor, labels: Tensor, ignore_index: int, gradient: bool) -> Tensor:
    """Losses [R] of logits [R, V] and labels [R], in float32 (float64 for float64), zero at `ignore_index`.

    With `gradient`, the logits become the gradient of the sum of the losses: softmax minus one at the label, zero in
    ignored rows. The fused kernel gives NaN for a label outside of 0 to V - 1, where PyTorch's operations raise.
    """
    if not runs_fused(logits):
        return _composed(logits, labels, ignore_index, gradient)
    from .cross_entropy_kernel import launch

    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    with on_device(logits):
        launch(logits, labels.contiguous(), losses, ignore_index, gradient)
    return losses


def _composed(logits, labels, ignore_index, gradient) -> Tensor:
    ignored = labels == ignore_index
    label = labels.masked_fill(ignored, 0)[:, None]
    log_p = F.log_softmax(logits, dim=-1, dtype=compute_dtype(logits.dtype))
    found = log_p.gather(1, label)
    if gradient:
        # p - 1 of a probable token, small, would be lost in the rounding of p.
        logits.copy_(log_p.exp_()).scatter_(1, label, found.expm1().to(logits.dtype)).masked_fill_(ignored[:, None], 0)
    return -found[:, 0].masked_fill(ignored, 0)
