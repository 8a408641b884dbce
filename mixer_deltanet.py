"""
The delta-rule layer of DeltaNet, the paper's section 3.3, with the norm and the short convolution it uses.

`modeling_deltanet.py` has the formulas; the delta rule itself is in `kernels/delta_rule.py`.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache

from .cache_deltanet import delta_cache_layer, prefetch_next_layer
from .configuration_deltanet import DeltaNetConfig
from .kernels.context_parallel import context_parallel_delta_rule, neighbouring_inputs
from .kernels.delta_rule import chunk_delta_rule, delta_rule_step, recurrent_delta_rule
from .kernels.reference import compute_dtype
from .kernels.short_conv import short_convolution, short_convolution_step
from .layout_deltanet import TokenLayout


class DeltaNetRMSNorm(nn.Module):
    """RMSNorm over the last dimension, in float32 with one rounding at the end (the reference rounds there too)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = compute_dtype(x.dtype)
        return F.rms_norm(x.to(dtype), self.weight.shape, self.weight.to(dtype), self.eps).to(x.dtype)


class DeltaNetShortConvolution(nn.Conv1d):
    """Depthwise causal convolution, its weight [D, 1, W] used nowhere else (offloading and sharding rely on that)."""

    def __init__(self, dim: int, width: int, activation: str | None):
        super().__init__(dim, dim, width, groups=dim, bias=False)
        self.activation = activation

    def forward(
        self, x: torch.Tensor, state: torch.Tensor | None, layout: TokenLayout, output_state: bool, in_place: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x [B, T, D] -> (y [B, T, D], state [B, D, W - 1] or `None`); `in_place` updates `state` for a single token."""
        weight = self.weight.to_local() if hasattr(self.weight, "to_local") else self.weight
        if in_place:
            return short_convolution_step(x[:, 0], weight, None, self.activation, state)[:, None], None
        order = layout.order
        if order is not None and state is None and not output_state:
            # Nothing precedes or follows, so zeros in place of padding are exact and cheaper than stepping over it.
            x, order = x.masked_fill(~layout.real[..., None], 0), None
        return short_convolution(
            x,
            weight,
            activation=self.activation,
            initial_state=state,
            output_final_state=output_state,
            cu_seqlens=layout.cu_seqlens,
            padding_order=order,
        )


class DeltaNetMixer(nn.Module):
    """The layer; parameter names are the reference's."""

    def __init__(self, config: DeltaNetConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.qk_activation, self.qk_norm = config.qk_activation, config.qk_norm
        self.use_short_conv, self.use_beta, self.use_gate = config.use_short_conv, config.use_beta, config.use_gate
        self.beta_scale = 2.0 if config.allow_neg_eigval else 1.0
        self.delta_rule = chunk_delta_rule if config.attn_mode == "chunk" else recurrent_delta_rule
        hidden_size, num_heads = config.hidden_size, config.num_heads
        key_dim, value_dim = int(hidden_size * config.expand_k), int(hidden_size * config.expand_v)
        self.head_k_dim, self.head_v_dim = key_dim // num_heads, value_dim // num_heads

        self.q_proj = nn.Linear(hidden_size, key_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, key_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, value_dim, bias=False)
        if config.use_beta:
            self.b_proj = nn.Linear(hidden_size, num_heads, bias=False)
        if config.use_short_conv:
            qk_silu = "silu" if config.qk_activation == "silu" else None
            self.q_conv1d = DeltaNetShortConvolution(key_dim, config.conv_size, qk_silu)
            self.k_conv1d = DeltaNetShortConvolution(key_dim, config.conv_size, qk_silu)
            self.v_conv1d = DeltaNetShortConvolution(value_dim, config.conv_size, "silu")
        if config.use_gate:
            self.g_proj = nn.Linear(hidden_size, value_dim, bias=False)
        self.o_norm = DeltaNetRMSNorm(self.head_v_dim, config.norm_eps)
        self.o_proj = nn.Linear(value_dim, hidden_size, bias=False)

    def forward(
        self, hidden_states: torch.Tensor, layout: TokenLayout, past_key_values: Cache | None = None
    ) -> torch.Tensor:
        """hidden_states [B, T, hidden_size] -> the same shape."""
        cache = delta_cache_layer(past_key_values, self.layer_idx)
        conv_states, state = [None] * 3, None
        if cache is not None:
            prefetch_next_layer(past_key_values, self.layer_idx, hidden_states.device)
            conv_states, state = cache.read(hidden_states)
        is_step = state is not None and hidden_states.shape[1] == 1 and layout.real is None and not torch.is_grad_enabled()

        q, k, v, conv_states = self._project(hidden_states, conv_states, layout, cache is not None, is_step)
        beta = self._writing_strength(hidden_states, k.shape[2], layout)
        use_l2 = self.qk_norm == "l2"
        if is_step:
            o = delta_rule_step(q[:, 0], k[:, 0], v[:, 0], beta[:, 0], state, use_qk_l2norm_in_kernel=use_l2)[:, None]
            cache.advance(1)
        elif layout.segment is not None:
            o, final_state = context_parallel_delta_rule(q, k, v, beta, layout.segment, None, cache is not None, use_l2)
            if cache is not None:
                cache.write(conv_states, final_state, hidden_states.shape[1] * layout.segment.size)
        else:
            o, final_state = self.delta_rule(
                q, k, v, beta, None, state, cache is not None, use_l2, cu_seqlens=layout.cu_seqlens
            )
            if cache is not None:
                cache.write(conv_states, final_state, hidden_states.shape[1])

        o = self.o_norm(o)
        if self.use_gate:
            o = o * F.silu(self.g_proj(hidden_states)).unflatten(-1, (-1, self.head_v_dim))
        return self.o_proj(o.flatten(-2))

    def _project(self, hidden_states, conv_states, layout, output_state, is_step):
        """Queries, keys [B, T, H, K] and values [B, T, H, V] ready for the delta rule, and the convolutions' new states."""
        streams = [self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)]
        new_states = [None, None, None]
        if self.use_short_conv:
            convolutions = (self.q_conv1d, self.k_conv1d, self.v_conv1d)
            if layout.segment is not None:
                streams, conv_states, last_states = self._continued(streams, layout)
                output_state = False
            for i, convolution in enumerate(convolutions):
                streams[i], new_states[i] = convolution(streams[i], conv_states[i], layout, output_state, is_step)
            new_states = new_states if layout.segment is None else last_states
        else:
            activated = (0, 1, 2) if self.qk_activation == "silu" else (2,)
            streams = [F.silu(x) if i in activated else x for i, x in enumerate(streams)]
        q, k = (self._feature_map(x.unflatten(-1, (-1, self.head_k_dim)), layout) for x in streams[:2])
        return q, k, streams[2].unflatten(-1, (-1, self.head_v_dim)), new_states

    def _continued(self, streams: list[torch.Tensor], layout: TokenLayout):
        """Inputs of the convolutions, zero at padding; their states, which the process before hands on; and their states
        behind the last token of all processes. One exchange for the three."""
        if layout.real is not None:
            streams = [x.masked_fill(~layout.real[..., None], 0) for x in streams]
        width, sizes = self.q_conv1d.kernel_size[0], [x.shape[-1] for x in streams]
        edges = torch.cat([x[:, max(0, x.shape[1] - width) :] for x in streams], -1)
        return streams, *(x.split(sizes, 1) for x in neighbouring_inputs(edges, width, layout.segment))

    def _feature_map(self, x: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
        """Activations other than SiLU, and the normalisation by the sum; the L2 norm is the operation's own."""
        if self.qk_activation == "relu":
            x = F.relu(x)
        elif self.qk_activation == "elu":
            x = F.elu(x) + 1
        if self.qk_norm == "sum":
            total = x.to(compute_dtype(x.dtype)).sum(-1, keepdim=True)
            if layout.real is not None:
                # Features of tokens that do not exist are zero and would become NaN, which a zero beta does not stop.
                total = total.masked_fill(~layout.real[..., None, None], 1)
            x = (x / total).to(x.dtype)
        return x

    def _writing_strength(self, hidden_states: torch.Tensor, num_heads: int, layout: TokenLayout) -> torch.Tensor:
        """Beta, [B, T, H] in float32 (float64 in a float64 model), zero at padding; H is this rank's share of the heads."""
        dtype = compute_dtype(hidden_states.dtype)
        if self.use_beta:
            beta = self.b_proj(hidden_states).to(dtype).sigmoid() * self.beta_scale
        else:
            beta = hidden_states.new_full((*hidden_states.shape[:2], num_heads), self.beta_scale, dtype=dtype)
        return beta if layout.real is None else beta.masked_fill(~layout.real[..., None], 0)


__all__ = ["DeltaNetMixer", "DeltaNetRMSNorm", "DeltaNetShortConvolution"]
