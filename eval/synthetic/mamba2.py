"""Transformers' Mamba2 with its scan as a masked matrix product, to train on short sequences without other packages."""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer


class MatrixMamba2Mixer(Mamba2Mixer):
    """
    The same function of the same weights, in the "dual form" of Dao and Gu, 2024 (section 4): quadratic in the length, but
    all of it matrix products. Without `mamba_ssm` Transformers' chunked scan sums over products that it writes to memory.
    """

    def forward(self, hidden_states: Tensor, **options) -> Tensor:
        """hidden_states [B, T, width] -> the same shape.

        Raises:
            NotImplementedError: a mask or a cache is given.
        """
        if any(options.get(name) is not None for name in ("attention_mask", "cache_params", "cache")):
            raise NotImplementedError("Mamba2 in its matrix form takes neither a mask nor a cache")
        length, inner = hidden_states.shape[1], self.num_heads * self.head_dim
        gate, mixed, dt = self.in_proj(hidden_states).split([inner, self.conv_dim, self.num_heads], -1)
        mixed = self.act(self.conv1d(mixed.transpose(1, 2))[..., :length]).transpose(1, 2)
        x, B, C = mixed.split([inner, *2 * [self.n_groups * self.ssm_state_size]], -1)
        x = x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)  # [B, H, T, P]
        B, C = (y.unflatten(-1, (self.n_groups, self.ssm_state_size)).transpose(1, 2) for y in (B, C))  # [B, G, T, N]

        dt = F.softplus(dt.float() + self.dt_bias).clamp(*self.time_step_limit).transpose(1, 2)  # [B, H, T]
        y = self.scan(x, B, C, dt) + self.D[:, None, None] * x
        return self.out_proj(self.norm(y.transpose(1, 2).flatten(2), gate).to(hidden_states.dtype))

    def scan(self, x: Tensor, B: Tensor, C: Tensor, dt: Tensor) -> Tensor:
        """x [B, H, ..., T, P], B and C [B, G, ..., T, N], dt [B, H, ..., T] -> y as x, from an empty state."""
        scores = (C @ B.mT)[:, :, None] * decay(self.log_rate(dt)).to(x.dtype).unflatten(1, (self.n_groups, -1))
        return scores.flatten(1, 2) @ (x * dt.to(x.dtype)[..., None])

    def log_rate(self, dt: Tensor) -> Tensor:
        """dt [B, H, ...] -> of the share of the state that each token leaves, float32."""
        return dt * -self.A_log.float().exp().view(-1, *[1] * (dt.ndim - 2))


def use_matrix_form(model) -> None:
    """Change the mixers of a Mamba2 model to `MatrixMamba2Mixer`, in place; their weights stay."""
    for module in model.modules():
        if type(module) is Mamba2Mixer:
            module.__class__ = MatrixMamba2Mixer


def decay(log_rate: Tensor) -> Tensor:
    """Lower triangular [..., T, T]: what of token s is left at token t, exp(log_rate[s + 1] + ... + log_rate[t])."""
    total = log_rate.cumsum(-1)
    causal = torch.ones(2 * log_rate.shape[-1:], dtype=torch.bool, device=log_rate.device).tril()
    return (total[..., :, None] - total[..., None, :]).masked_fill(~causal, -torch.inf).exp()
