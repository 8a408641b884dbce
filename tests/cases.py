"""One call of the delta rule on any device: its inputs, what a rule makes of them, and what is right in float64."""

import torch
from oracle import delta_rule_batched, state, tokens

from deltanet.kernels.delta_rule import chunk_delta_rule
from deltanet.kernels.reference import chunk_backward, chunk_forward

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RECURRENCE = 130
"""Up to this length the recurrence and its autograd are the reference, beyond it the chunked form in float64, which
`test_gpu_delta_rule.py` compares with the recurrence."""


class Case:
    """q, k, v in `dtype`, beta and initial states in float32, and random gradients of both results in their dtypes."""

    def __init__(
        self, device, dtype, T, K=128, V=128, B=1, H=2, keys="silu", beta=None, bounds=None, l2=True, beta_dtype=None,
        scale=None,
    ):  # fmt: skip
        *qkv, b = tokens(B, T, H, K, V, keys, beta)
        sequences = B if bounds is None else len(bounds) - 1
        self.inputs = [*(x.to(device, dtype) for x in qkv), b.to(device, beta_dtype or torch.float32)]
        self.inputs.append(state(sequences, H, K, V).to(device))
        self.cu_seqlens = None if bounds is None else torch.tensor(bounds, device=device)
        self.l2, self.scale = l2, scale
        g = torch.Generator().manual_seed(2)
        self.gradients = [
            torch.randn(B, T, H, V, generator=g).to(device, dtype),
            torch.randn(sequences, H, K, V, generator=g).to(device),
        ]

    def call(self, rule, inputs):
        q, k, v, beta, h0 = inputs
        return rule(q, k, v, beta, self.scale, h0, True, self.l2, self.cu_seqlens)

    def actual(self, rule=chunk_delta_rule):
        """o, final state and the gradients of q, k, v, beta and the initial state."""
        inputs = [x.detach().requires_grad_() for x in self.inputs]
        results = self.call(rule, inputs)
        return [*(x.detach() for x in results), *torch.autograd.grad(results, inputs, self.gradients)]

    def expected(self):
        exact = [x.double() for x in self.inputs]
        gradients = [x.double() for x in self.gradients]
        if exact[0].shape[1] > RECURRENCE:
            return self._chunked(exact, gradients)
        exact = [x.requires_grad_() for x in exact]
        q, k, v, beta, h0 = exact
        results = delta_rule_batched(q, k, v, beta, self.scale, h0, self.l2, self.cu_seqlens)
        # A pack of empty sequences uses none of its tokens.
        gradients = torch.autograd.grad(results, exact, gradients, allow_unused=True, materialize_grads=True)
        return [*(x.detach() for x in results), *gradients]

    def _chunked(self, exact, gradients):
        q, k, v, beta, h0 = exact
        scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale
        o, final_state, *saved = chunk_forward(q, k, v, beta, scale, h0, True, self.l2, self.cu_seqlens)
        return [o, final_state, *chunk_backward(*gradients, q, k, v, beta, *saved, scale, h0, self.l2, self.cu_seqlens)]


def limits(dtype, keys="silu", beta=None):
    """Relative L2 errors to stay within, for o and the final state and for the gradients."""
    forward, gradient = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (1e-2, 1.5e-2), torch.float16: (2e-3, 2e-3)}[dtype]
    if keys == "identical":
        forward = gradient = {torch.float32: 5e-5, torch.bfloat16: 3e-2, torch.float16: 6e-3}[dtype]
    elif beta is not None and beta > 1:
        forward = gradient = {torch.float32: 5e-5, torch.bfloat16: 5e-2, torch.float16: 2e-2}[dtype]
    return [forward] * 2 + [gradient] * 5
