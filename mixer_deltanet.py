"""
The delta-rule layer of DeltaNet, the paper's section 3.3, with the norm and the short convolution it uses.

`modeling_deltanet.py` has the formulas; the delta rule itself is in `kernels/delta_rule.py`.
"""

from typing import Any, Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache

from .cache_deltanet import delta_cache_layer, prefetch_next_layer
from .configuration_deltanet import DeltaNetConfig
from .fused_deltanet import project
from .kernels.context_parallel import context_parallel_delta_rule, neighbouring_inputs
from .kernels.decode_step import decode_step
from .kernels.delta_rule import chunk_delta_rule, delta_rule_step, recurrent_delta_rule
from .kernels.prologue import delta_rule_prologue
from .kernels.prompt import delta_rule_prompt, takes_prompt
from .kernels.reference import compute_dtype
from .kernels.rms_norm import rms_norm
from .kernels.short_conv import short_convolution_step
from .layout_deltanet import TokenLayout


def local(weight: torch.Tensor) -> torch.Tensor:
    """This rank's part of a weight."""
    return weight if type(weight) is nn.Parameter or not hasattr(weight, "to_local") else weight.to_local()


class DeltaNetRMSNorm(nn.Module):
    """RMSNorm over the last dimension, in float32 with one rounding at the end (the reference rounds there too).

    Under autocast it rounds to autocast's dtype, as the linear layers behind it would, each for itself.
    """

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: torch.Tensor, update: torch.Tensor | None = None, with_total: bool = False):
        """norm(x), or norm(x + update); `with_total` also what was normed, which costs no pass over memory of its own."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        y, total = rms_norm(x, self.weight, self.eps, update, dtype)
        return (y, total) if with_total else y


class DeltaNetShortConvolution(nn.Conv1d):
    """Depthwise causal convolution, its weight [D, 1, W] used nowhere else (offloading and sharding rely on that)."""

    def __init__(self, dim: int, width: int):
        super().__init__(dim, dim, width, groups=dim, bias=False)

    def forward(self, convolve: Callable[[torch.Tensor], Any]) -> Any:
        """`convolve(weight)`: whatever puts the weight in place for the time of a forward has done so."""
        return convolve(local(self.weight))


_BETWEEN_PROJECTIONS = (
    ("q_conv1d", DeltaNetShortConvolution),
    ("k_conv1d", DeltaNetShortConvolution),
    ("v_conv1d", DeltaNetShortConvolution),
    ("o_norm", DeltaNetRMSNorm),
)


class DeltaNetMixer(nn.Module):
    """The layer; parameter names are the reference's."""

    def __init__(self, config: DeltaNetConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.qk_activation, self.qk_norm = config.qk_activation, config.qk_norm
        qk_silu = "silu" if config.qk_activation == "silu" else None
        self.activations = (qk_silu, qk_silu, "silu")
        self.use_short_conv, self.use_beta, self.use_gate = config.use_short_conv, config.use_beta, config.use_gate
        self.is_fusable = config.use_short_conv and config.qk_activation == "silu" and config.qk_norm == "l2"
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
            self.q_conv1d = DeltaNetShortConvolution(key_dim, config.conv_size)
            self.k_conv1d = DeltaNetShortConvolution(key_dim, config.conv_size)
            self.v_conv1d = DeltaNetShortConvolution(value_dim, config.conv_size)
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
        weights = None if torch.is_grad_enabled() else self._weights_between(hidden_states)
        is_step = state is not None and hidden_states.shape[1] == 1 and layout.real is None and not torch.is_grad_enabled()
        if is_step and weights is not None:
            return self._fused_step(hidden_states, weights, cache, conv_states, state)
        if weights is not None and self._takes_prompt(hidden_states, weights, layout):
            o = self._fused_prompt(hidden_states, weights, layout, cache, conv_states, state)
        else:
            o = self._composed(hidden_states, layout, cache, conv_states, state, is_step)
        o = self.o_norm(o)
        if self.use_gate:
            o = o * F.silu(self.g_proj(hidden_states)).unflatten(-1, (-1, self.head_v_dim))
        return self.o_proj(o.flatten(-2))

    def _composed(self, hidden_states, layout, cache, conv_states, state, is_step):
        """The outputs [B, T, H, V] of the delta rule, one operation after the other."""
        q, k, v, beta, conv_states = self._project(hidden_states, conv_states, layout, cache is not None, is_step)
        use_l2 = self.qk_norm == "l2"
        if is_step:
            o = delta_rule_step(q[:, 0], k[:, 0], v[:, 0], beta[:, 0], state, use_qk_l2norm_in_kernel=use_l2)[:, None]
            cache.advance(1)
        elif layout.segment is not None:
            o, final_state = context_parallel_delta_rule(q, k, v, beta, layout.segment, None, cache is not None, use_l2)
            if cache is not None:
                cache.write(conv_states, final_state, hidden_states.shape[1] * layout.segment.size)
        else:
            state = None if state is None else state.to(beta.dtype)
            o, final_state = self.delta_rule(
                q, k, v, beta, None, state, cache is not None, use_l2, cu_seqlens=layout.cu_seqlens
            )
            if cache is not None:
                cache.write(conv_states, final_state, hidden_states.shape[1])
        return o

    def _weights_between(self, hidden_states: torch.Tensor) -> list[torch.Tensor] | None:
        """The weights of the three convolutions and of the output norm, for operations that do what these modules would.

        None where that may not be: they must be our own, watched by nobody, and their weights here, which an offloaded
        module's are during its own forward only.
        """
        if not self.is_fusable:
            return None
        device, modules, weights = hidden_states.device, self._modules, []
        for name, kind in _BETWEEN_PROJECTIONS:
            module = modules[name]
            if type(module) is not kind or module._forward_hooks or module._forward_pre_hooks:
                return None
            weight = module.weight
            if weight.device != device:
                return None
            weights.append(local(weight))
        return weights

    def _takes_prompt(self, hidden_states: torch.Tensor, weights: list[torch.Tensor], layout: TokenLayout) -> bool:
        is_usual = self.use_beta and self.delta_rule is chunk_delta_rule and layout.cu_seqlens is layout.segment is None
        return is_usual and takes_prompt(hidden_states, self.head_k_dim, weights[:3])

    def _fused_prompt(self, hidden_states, weights, layout, cache, conv_states, state):
        """As `_composed`, for a prompt of which no gradient is wanted."""
        o, conv_states, state = delta_rule_prompt(
            [self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states), self.b_proj(hidden_states)],
            weights[:3],
            beta_scale=self.beta_scale,
            conv_states=conv_states,
            state=None if state is None else state.float(),
            padding_order=layout.order,
        )
        if cache is not None:
            cache.write(conv_states, state, hidden_states.shape[1])
        return o

    def _fused_step(self, hidden_states, weights, cache, conv_states, state):
        """`forward` for one token with a state and no padding, all states updated in place."""
        o = decode_step(
            self.q_proj(hidden_states)[:, 0],
            self.k_proj(hidden_states)[:, 0],
            self.v_proj(hidden_states)[:, 0],
            self.b_proj(hidden_states)[:, 0] if self.use_beta else None,
            self.g_proj(hidden_states)[:, 0] if self.use_gate else None,
            conv_states,
            state,
            weights[:3],
            weights[3],
            norm_eps=self.o_norm.eps,
            beta_scale=self.beta_scale,
        )
        cache.advance(1)
        return self.o_proj(o[:, None])

    def _project(self, hidden_states, conv_states, layout, output_state, is_step):
        """Queries, keys [B, T, H, K], values [B, T, H, V] and beta [B, T, H] ready for the delta rule, and the new states of
        the convolutions, none where a single token has updated them in place."""
        layers = [self.q_proj, self.k_proj, self.v_proj, *([self.b_proj] if self.use_beta else [])]
        streams = project(hidden_states, *layers)
        b, beta, new_states = streams.pop() if self.use_beta else None, None, [None] * 3
        if not self.use_short_conv:
            streams = [F.silu(x) if activation else x for x, activation in zip(streams, self.activations)]
        elif is_step:
            streams = self._with_kernels(lambda weights: self._step(streams, weights, conv_states))
        else:
            last_states = None
            if layout.segment is not None:
                streams, conv_states, last_states = self._continued(streams, layout)
                output_state = False
            *streams, beta, new_states = self._with_kernels(
                lambda weights: delta_rule_prologue(
                    *streams,
                    b,
                    weights,
                    beta_scale=self.beta_scale,
                    activations=self.activations,
                    initial_states=conv_states,
                    output_final_state=output_state,
                    cu_seqlens=layout.cu_seqlens,
                    padding_order=layout.order,
                )
            )
            new_states = last_states or new_states
        q, k = (self._feature_map(x.unflatten(-1, (-1, self.head_k_dim)), layout) for x in streams[:2])
        v = streams[2].unflatten(-1, (-1, self.head_v_dim))
        return q, k, v, self._writing_strength(b, beta, v, layout), new_states

    def _with_kernels(self, run: Callable[[list[torch.Tensor]], Any]) -> Any:
        """`run(weights)` of the three convolutions, within the forward of each, see `DeltaNetShortConvolution`."""
        return self.q_conv1d(lambda q: self.k_conv1d(lambda k: self.v_conv1d(lambda v: run([q, k, v]))))

    def _step(self, streams, weights, conv_states):
        """One token; `conv_states` are updated in place."""
        rows = zip(streams, weights, self.activations, conv_states)
        return [short_convolution_step(x[:, 0], w, None, activation, state)[:, None] for x, w, activation, state in rows]

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

    def _writing_strength(self, b, beta, v: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
        """Beta, [B, T, H] in float32 (float64 in a float64 model), zero at padding; H is this rank's share of the heads."""
        dtype = compute_dtype(v.dtype)
        if not self.use_beta:
            beta = v.new_full(v.shape[:3], self.beta_scale, dtype=dtype)
        elif beta is None:
            beta = b.to(dtype).sigmoid() * self.beta_scale
        return beta if layout.real is None else beta.masked_fill(~layout.real[..., None], 0)


__all__ = ["DeltaNetMixer", "DeltaNetRMSNorm", "DeltaNetShortConvolution"]
