"""One call of the prologue on any device: its inputs, what it makes of them, and what is right in float64."""

import torch

from deltanet.kernels.prologue import delta_rule_prologue

NAMES = (
    *("q", "k", "v", "beta", "q_final", "k_final", "v_final", "dq", "dk", "dv", "db"),
    *("dq_weight", "dk_weight", "dv_weight", "dq_state", "dk_state", "dv_state"),
)
FORWARD = 7
"""How many of NAMES are results; the others are gradients."""


class Case:
    """Projections of `widths` channels and `heads` of b, weights, initial states, and random gradients of all results."""

    def __init__(self, device, dtype, T, widths=(20, 32, 40), W=4, B=1, heads=3, bounds=None, states=True, beta_scale=2.0):
        g = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(shape, generator=g).to(device, dtype)  # noqa: E731
        sequences = B if bounds is None else len(bounds) - 1
        self.streams, self.b = [draw(B, T, D) for D in widths], draw(B, T, heads)
        self.weights = [draw(D, 1, W) for D in widths]
        self.states = [draw(sequences, D, W - 1) for D in widths] if states else [None] * 3
        self.beta_scale = beta_scale
        self.cu_seqlens = None if bounds is None else torch.tensor(bounds, device=device)
        self.padding_order = None
        finals = [draw(sequences, D, W - 1) for D in widths]
        self.gradients = [*(draw(B, T, D) for D in widths), draw(B, T, heads).float(), *finals]

    @property
    def inputs(self):
        return [*self.streams, self.b, *self.weights, *(state for state in self.states if state is not None)]

    def call(self, inputs):
        """The seven results for other inputs of the same kinds."""
        states = inputs[7:] or [None] * 3
        *results, finals = delta_rule_prologue(
            *inputs[:4], inputs[4:7], beta_scale=self.beta_scale, initial_states=states, output_final_state=True,
            cu_seqlens=self.cu_seqlens, padding_order=self.padding_order,
        )  # fmt: skip
        return [*results, *finals]

    def actual(self):
        inputs = [x.detach().requires_grad_() for x in self.inputs]
        results = self.call(inputs)
        return [*(x.detach() for x in results), *torch.autograd.grad(results, inputs, self.gradients)]

    def expected(self, pieces=None):
        """In float64, written apart from the package: sequence by sequence, sums over shifted rows. `pieces` are the
        tokens of each batch row that are no padding."""
        inputs = [x.detach().double().requires_grad_() for x in self.inputs]
        states = inputs[7:] or [x.new_zeros(len(g), x.shape[2], g.shape[2]) for x, g in zip(inputs, self.gradients[4:])]
        convolved = [self._convolve(*x, pieces) for x in zip(inputs[:3], inputs[4:7], states)]
        results = [y for y, _ in convolved] + [self.beta_scale / (1 + (-inputs[3]).exp())] + [last for _, last in convolved]
        gradients = torch.autograd.grad(
            results, inputs, [g.double() for g in self.gradients], allow_unused=True, materialize_grads=True
        )
        return [*(x.detach() for x in results), *gradients]

    def _convolve(self, x, weight, state, pieces):
        places = [(b, slice(None) if pieces is None else pieces[b]) for b in range(len(x))]
        if self.cu_seqlens is not None:
            bounds = self.cu_seqlens.tolist()
            places = [(0, slice(start, end)) for start, end in zip(bounds, bounds[1:])]
        y, finals = torch.zeros_like(x), []
        for (b, tokens), past in zip(places, state):
            row, W = x[b, tokens], weight.shape[-1]
            padded = torch.cat([past.mT, row])
            z = sum(padded[j : j + len(row)] * weight[:, 0, j] for j in range(W))
            y[b, tokens] = z / (1 + (-z).exp())
            finals.append(padded[len(row) :].mT)
        return y, torch.stack(finals)


def limits(dtype):
    """Relative L2 errors of results and gradients: a rounding of each, and float32 arithmetic."""
    forward, gradient = {torch.float32: (2e-6, 2e-6), torch.float16: (5e-4, 5e-4), torch.bfloat16: (4e-3, 4e-3)}[dtype]
    return [forward] * FORWARD + [gradient] * (len(NAMES) - FORWARD)
