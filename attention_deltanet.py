"""The softmax attention of the hybrid models: the layer, its rotary embeddings and its masks."""

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward

from .cache_deltanet import CACHE_NAME
from .configuration_deltanet import DeltaNetConfig
from .fused_deltanet import project
from .kernels.reference import compute_dtype


class DeltaNetAttention(nn.Module):
    """Softmax attention with RoPE, optional sliding window and grouped key-value heads."""

    def __init__(self, config: DeltaNetConfig, layer_idx: int):
        super().__init__()
        spec = config.attention_specs[layer_idx]
        num_heads = spec["num_heads"]
        num_kv_heads = spec["num_kv_heads"] or num_heads
        self.config, self.layer_idx, self.is_causal = config, layer_idx, True
        self.head_dim = config.hidden_size // num_heads
        self.rope = (self.head_dim, float(spec["rope_theta"] or 10000.0))
        self.num_key_value_groups = num_heads // num_kv_heads
        self.sliding_window = spec["window_size"]
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=spec["qkv_bias"])
        self.k_proj = nn.Linear(config.hidden_size, num_kv_heads * self.head_dim, bias=spec["qkv_bias"])
        self.v_proj = nn.Linear(config.hidden_size, num_kv_heads * self.head_dim, bias=spec["qkv_bias"])
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_embeddings: dict[tuple, tuple[torch.Tensor, torch.Tensor]],
        past_key_values: Cache | None = None,
        packed: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        hidden_states [B, T, hidden_size] -> (the same shape, attention weights or `None`).

        `packed` [1, T] is False behind the last of several packed sequences, where the result and all gradients are zero.
        """
        projected = project(hidden_states, self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x in projected)
        if packed is not None:
            # Flash attention never writes these rows, neither of its result nor of its gradients.
            q, k, v = (x.masked_fill(~packed[:, None, :, None], 0) for x in (q, k, v))
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings[self.rope])
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        scaling = self.head_dim**-0.5
        window = self.sliding_window
        o, weights = attention(self, q, k, v, attention_mask, scaling=scaling, sliding_window=window, **kwargs)
        if packed is not None:
            o = o.masked_fill(~packed[:, :, None, None], 0)
        return self.o_proj(o.flatten(-2)), weights


def rotary_embedding(position_ids: torch.Tensor, head_dim: int, theta: float, dtype: torch.dtype):
    """Cosine and sine of RoPE for positions [B, T], each [B, T, head_dim]; computed in float32."""
    exponents = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=compute_dtype(dtype)) / head_dim
    angles = position_ids[..., None] * theta**-exponents
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def attention_masks(
    config: DeltaNetConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    past_key_values: Cache | None,
    position_ids: torch.Tensor | None,
) -> dict[str, torch.Tensor | None]:
    """Masks of a hybrid's attention layers by layer type, in the form the attention implementation wants.

    Without mask and cache, restarts in `position_ids` [B, T] part packed sequences.
    """
    makers = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
    arguments = {
        "config": config,
        "inputs_embeds": inputs_embeds,
        "attention_mask": attention_mask,
        CACHE_NAME: past_key_values,
        "position_ids": position_ids,
    }
    return {kind: make(**arguments) for kind, make in makers.items() if kind in config.layer_types}


__all__ = ["DeltaNetAttention", "attention_masks", "rotary_embedding"]
