"""One decoding step of a delta layer on any device: its inputs, and what is right in float64, apart from the package."""

import torch

from deltanet.kernels.decode_step import decode_step

RESULTS = ("o", "state", "q_past", "k_past", "v_past")
LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float64: 1e-12}


class Step:
    """Inputs of `decode_step`; `rows` names the states of the rows among `slots` ones, None stands for one each."""

    def __init__(
        self, device="cpu", dtype=torch.float32, B=2, H=2, K=16, V=16, width=4, beta=True, gate=True, beta_scale=1.0,
        state_dtype=None, rows=None, slots=None, seed=0,
    ):  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
        here = lambda x, dtype=dtype: x.to(device, dtype)  # noqa: E731
        N, channels = slots or B, (H * K, H * K, H * V)
        self.shape = (B, N, H, K, V, width)
        self.tokens = dict(zip("qkv", (here(draw(B, D)) for D in channels)))
        self.tokens["beta"] = here(draw(B, H)) if beta else None
        self.tokens["gate"] = here(draw(B, H * V)) if gate else None
        self.conv_states = [here(draw(N, D, width - 1)) for D in channels]
        self.conv_weights = [here(draw(D, 1, width)) for D in channels]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.state = here(draw(N, H, K, V), state_dtype or wide)
        self.norm_weight = here(torch.rand(V, generator=generator) + 0.5)
        self.options = {"norm_eps": 1e-5, "beta_scale": beta_scale}
        self.rows = None if rows is None else torch.tensor(rows, device=device)

    @property
    def arguments(self) -> dict:
        held = {name: getattr(self, name) for name in ("conv_states", "state", "conv_weights", "norm_weight")}
        return {**self.tokens, **held, **self.options, "state_indices": self.rows}

    def held(self) -> list[torch.Tensor]:
        return [self.state, *self.conv_states]

    def actual(self) -> list[torch.Tensor]:
        """o and the states after the step, which has changed them."""
        with torch.no_grad():
            return [decode_step(**self.arguments), *self.held()]

    def expected(self) -> list[torch.Tensor]:
        """The same in float64; call it before the step."""
        B, N, H, K, V, _ = self.shape
        state, *past = (x.double().clone() for x in self.held())
        weights, norm_weight = [w.double()[:, 0] for w in self.conv_weights], self.norm_weight.double()
        outputs = []
        for b, n in enumerate(range(B) if self.rows is None else self.rows.tolist()):
            if n < 0:
                outputs.append(state.new_zeros(H * V))
                continue
            x = []
            for i, name in enumerate("qkv"):
                window = torch.cat([past[i][n], self.tokens[name][b, :, None].double()], 1)
                y = (window * weights[i]).sum(1)
                past[i][n] = window[:, 1:]
                x.append((y / (1 + (-y).exp())).view(H, -1))
            outputs.append(self._head(b, x, state[n], norm_weight))
        return [torch.stack(outputs), state, *past]

    def _head(self, b, x, S, norm_weight):
        (q, k), v = (z / (z.square().sum(-1, keepdim=True) + 1e-6).sqrt() for z in x[:2]), x[2]
        beta, gate = self.tokens["beta"], self.tokens["gate"]
        strength = self.options["beta_scale"] * (1.0 if beta is None else 1 / (1 + (-beta[b].double()).exp()))
        error = v - torch.einsum("hkv,hk->hv", S, k)
        S += torch.einsum("hk,hv->hkv", k, error * torch.as_tensor(strength).view(-1, 1).to(error))
        o = torch.einsum("hkv,hk->hv", S, q) * q.shape[-1] ** -0.5
        o = o / (o.square().mean(-1, keepdim=True) + self.options["norm_eps"]).sqrt() * norm_weight
        if gate is not None:
            g = gate[b].double().view_as(o)
            o = o * (g / (1 + (-g).exp()))
        return o.flatten()


def limit_of(step: Step) -> list[float]:
    """Relative errors to stay within: of o by the dtype, of the state by its own, of the inputs kept none."""
    dtype, held = step.tokens["q"].dtype, step.state.dtype
    return [LIMITS[dtype], max(LIMITS[dtype], LIMITS[held]), *[0.0] * 3]
