"""Transformers' Mamba2 in chunks, all matrix products: what its own packages compute, for sequences of any length."""

import torch.nn.functional as F
from torch import Tensor
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from ..synthetic.mamba2 import MatrixMamba2Mixer, decay

CHUNK = 128


class ChunkedMamba2Mixer(MatrixMamba2Mixer):
    """The matrix form within chunks, a state between them (Dao and Gu, 2024, section 6)."""

    def scan(self, x: Tensor, B: Tensor, C: Tensor, dt: Tensor) -> Tensor:
        """x [B, H, T, P], B and C [B, G, T, N], dt [B, H, T] -> y as x."""
        length, heads = x.shape[2], self.num_heads // self.n_groups
        rest = -length % CHUNK
        x, B, C = (F.pad(y, (0, 0, 0, rest)).unflatten(2, (-1, CHUNK)) for y in (x, B, C))
        dt = F.pad(dt, (0, rest)).unflatten(2, (-1, CHUNK))  # of padding zero: it writes nothing and forgets nothing
        y = super().scan(x, B, C, dt)

        seen = self.log_rate(dt).cumsum(-1)  # [B, H, chunks, CHUNK]
        B, C = (z.repeat_interleave(heads, 1) for z in (B, C))
        written = ((seen[..., -1:] - seen).exp() * dt).to(x.dtype)[..., None]
        states = (B.mT @ (x * written)).to(seen.dtype)  # [B, H, chunks, N, P], what each chunk adds
        after = (decay(seen[..., -1]) @ states.flatten(-2)).unflatten(-1, states.shape[-2:])
        entering = F.pad(after[:, :, :-1], (0, 0, 0, 0, 1, 0)).to(x.dtype)
        y = y + seen.exp().to(x.dtype)[..., None] * (C @ entering)
        return y.flatten(2, 3)[:, :, :length]


def use_chunked_form(model) -> None:
    """Change the mixers of a Mamba2 model to `ChunkedMamba2Mixer`, in place; their weights stay."""
    for module in model.modules():
        if isinstance(module, Mamba2Mixer):
            module.__class__ = ChunkedMamba2Mixer
