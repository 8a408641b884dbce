"""Cross-entropy in Triton; `cross_entropy.py` says what it computes."""

try:  # Transformers wants every package that custom code imports outside of a `try`
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the fused kernels need Triton") from error

BLOCK = 4096


@triton.jit(do_not_specialize=["ignore_index"])
def cross_entropy_kernel(
    logits, labels, losses, ignore_index, V: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):
    """One row: the running maximum and sum of every lane, then the gradient. Rows are contiguous."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * V
    label = tl.load(labels + row)
    is_ignored = label == ignore_index
    is_inside = (label >= 0) & (label < V)
    # Before any of this row is overwritten: the reductions below wait for all threads.
    target = tl.load(logits + label, mask=is_inside, other=float("nan")).to(tl.float32)
    i = tl.arange(0, BLOCK)
    most = tl.full([BLOCK], -1e30, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        x = tl.load(logits + start + i, mask=start + i < V, other=float("-inf")).to(tl.float32)
        greater = tl.maximum(most, x, propagate_nan=tl.PropagateNan.ALL)
        total = total * tl.exp(most - greater) + tl.exp(x - greater)
        most = greater
    highest = tl.max(most, 0)
    sum_of_row = tl.sum(total * tl.exp(most - highest), 0)
    # In this order large logits that are all alike cost no digits.
    tl.store(losses + row, tl.where(is_ignored, 0.0, highest - target + tl.log(sum_of_row)))
    if GRADIENT:
        for start in range(0, V, BLOCK):
            inside = start + i < V
            x = tl.load(logits + start + i, mask=inside, other=float("-inf")).to(tl.float32)
            p = tl.exp(x - highest) / sum_of_row - tl.where(start + i == label, 1.0, 0.0)
            p = tl.where(is_ignored, 0.0, p)
            tl.store(logits + start + i, p.to(logits.dtype.element_ty), mask=inside)


def launch(logits, labels, losses, ignore_index: int, gradient: bool) -> None:
    """logits [R, V] contiguous, labels [R] and losses [R]."""
    V = logits.shape[1]
    arguments = {"V": V, "GRADIENT": gradient, "BLOCK": min(BLOCK, triton.next_power_of_2(V)), "num_warps": 8}
    cross_entropy_kernel[(len(logits),)](logits, labels, losses, ignore_index, **arguments)
