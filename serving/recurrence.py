"""A delta layer between its projections, for a batch of requests whose states lie in slots. Knows nothing of vLLM."""

import torch
import torch.nn.functional as F

from ..configuration_deltanet import DeltaNetConfig
from ..kernels.decode_step import decode_step
from ..kernels.delta_rule import chunk_delta_rule, delta_rule_step, recurrent_delta_rule
from ..kernels.reference import compute_dtype
from ..kernels.short_conv import short_convolution, short_convolution_step
from ..mixer_deltanet import DeltaNetRMSNorm

NULL_SLOT = 0
"""Belongs to no request; rows that only fill up a CUDA graph name it."""


class Recurrence:
    """
    From the projections of tokens to what the output projection is given, for `num_heads` of the heads.

    `qkv` is [tokens, H * (2 K + V)], queries, keys and values side by side; `b` [tokens, H], `None` where nothing is
    projected to beta; `gate` [tokens, H * V] or `None`; `weight` [H * (2 K + V), 1, W] the convolutions, `None` without;
    `norm` that of the outputs, which are [tokens, H * V]. `states` has the shapes of `state_shapes` behind a dimension of
    slots, any strides.
    """

    def __init__(self, config: DeltaNetConfig, num_heads: int):
        self.num_heads = num_heads
        self.head_k_dim = int(config.hidden_size * config.expand_k) // config.num_heads
        self.head_v_dim = int(config.hidden_size * config.expand_v) // config.num_heads
        self.keys, self.values = num_heads * self.head_k_dim, num_heads * self.head_v_dim
        self.conv_size = config.conv_size if config.use_short_conv else None
        self.qk_activation, self.qk_norm = config.qk_activation, config.qk_norm
        self.use_l2 = config.qk_norm == "l2"
        self.beta_scale = 2.0 if config.allow_neg_eigval else 1.0
        self.is_fusable = config.use_short_conv and config.qk_activation == "silu" and self.use_l2
        self.delta_rule = chunk_delta_rule if config.attn_mode == "chunk" else recurrent_delta_rule
        # Channels that share an activation.
        self.streams = [(slice(None), "silu")]
        if config.qk_activation != "silu":
            self.streams = [(slice(2 * self.keys), None), (slice(2 * self.keys, None), "silu")]

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of one sequence: the recurrent state [H, K, V] and, with convolutions, theirs [H * (2 K + V), W - 1]."""
        recurrent = (self.num_heads, self.head_k_dim, self.head_v_dim)
        return (recurrent,) if self.conv_size is None else (recurrent, (2 * self.keys + self.values, self.conv_size - 1))

    def decode(
        self, qkv, b, gate, weight, norm: DeltaNetRMSNorm, states: tuple[torch.Tensor, ...], slots: torch.Tensor
    ) -> torch.Tensor:
        """One more token of each request, whose states in `slots` [N] are updated in place; rows of `NULL_SLOT` are zero."""
        rows = slots.where(slots != NULL_SLOT, -1)
        if self.is_fusable:
            parts = [self.keys, self.keys, self.values]
            return decode_step(
                *qkv.split(parts, 1),
                b,
                gate,
                states[1].split(parts, 1),
                states[0],
                weight.split(parts),
                norm.weight,
                norm_eps=norm.eps,
                beta_scale=self.beta_scale,
                state_indices=rows,
            )
        beta = self._writing_strength(qkv, b)
        if weight is not None:
            pasts = states[1][slots]
            steps = (
                short_convolution_step(qkv[:, part], weight[part], None, activation, pasts[:, part])
                for part, activation in self.streams
            )
            qkv = torch.cat(list(steps), -1)
            states[1][slots] = pasts
        q, k, v = self._features(qkv)
        o = delta_rule_step(q, k, v, beta, states[0], use_qk_l2norm_in_kernel=self.use_l2, state_indices=rows)
        return _finished(o, gate, norm)

    def prefill(self, qkv, b, gate, weight, norm: DeltaNetRMSNorm, states, slots, known, cu_seqlens) -> torch.Tensor:
        """
        Tokens of requests that have any number of new ones, packed between `cu_seqlens` [N + 1].

        `known` [N] is False where a request begins: its slot then holds what the last user left, NaN included.
        """
        before = [_zero_unless(known, state[slots]) for state in states]
        after = []
        if weight is not None:
            qkv, rows = self._convolve(qkv, weight, before[1], cu_seqlens)
            after.append(rows)
        q, k, v = (x[None] for x in self._features(qkv))
        beta = self._writing_strength(qkv, b)
        state = before[0].to(beta.dtype)
        o, state = self.delta_rule(q, k, v, beta[None], None, state, True, self.use_l2, cu_seqlens)
        for target, new in zip(states, [state, *after]):
            target[slots] = new.to(target.dtype)
        return _finished(o[0], gate, norm)

    def _writing_strength(self, qkv: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
        """Beta, [tokens, H] in float32."""
        dtype = compute_dtype(qkv.dtype)
        if b is None:
            return qkv.new_full((len(qkv), self.num_heads), self.beta_scale, dtype=dtype)
        return b.to(dtype).sigmoid() * self.beta_scale

    def _convolve(self, qkv, weight, states, cu_seqlens):
        outputs, after = [], []
        for part, activation in self.streams:
            rows, state = short_convolution(
                qkv[None, :, part],
                weight[part],
                activation=activation,
                initial_state=states[:, part],
                output_final_state=True,
                cu_seqlens=cu_seqlens,
            )
            outputs.append(rows[0])
            after.append(state)
        return torch.cat(outputs, -1), torch.cat(after, 1)

    def _features(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[T, D] behind the convolutions -> q, k [T, H, K] and v [T, H, V]; the L2 norm is the operation's own."""
        if self.conv_size is None:
            streams = (F.silu(qkv[:, part]) if activation else qkv[:, part] for part, activation in self.streams)
            qkv = torch.cat(list(streams), -1)
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)) for x in qkv.split([self.keys, self.keys, self.values], -1))
        return self._feature_map(q), self._feature_map(k), v

    def _feature_map(self, x: torch.Tensor) -> torch.Tensor:
        if self.qk_activation == "relu":
            x = F.relu(x)
        elif self.qk_activation == "elu":
            x = F.elu(x) + 1
        if self.qk_norm == "sum":
            x = (x / x.float().sum(-1, keepdim=True)).to(x.dtype)
        return x


def _finished(o: torch.Tensor, gate: torch.Tensor | None, norm: DeltaNetRMSNorm) -> torch.Tensor:
    """Outputs of the delta rule [tokens, H, V], normalised and gated."""
    o = norm(o)
    return (o if gate is None else o * F.silu(gate).view_as(o)).flatten(-2)


def _zero_unless(known: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    return states.where(known.view(-1, *[1] * (states.dim() - 1)), 0)
