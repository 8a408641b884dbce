"""The softmax attention of hybrids, over vLLM's paged key-value cache."""

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.rotary_embedding import get_rope

from ..configuration_deltanet import DeltaNetConfig


class DeltaNetAttention(nn.Module):
    """The layer of `attention_deltanet.py`: RoPE, grouped key-value heads, with or without a window."""

    def __init__(self, config: DeltaNetConfig, layer_idx: int, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        spec, width = config.attention_specs[layer_idx], config.hidden_size
        num_heads, num_kv_heads = spec["num_heads"], spec["num_kv_heads"] or spec["num_heads"]
        head_dim = width // num_heads
        sizes, bias = (width, head_dim, num_heads, num_kv_heads), spec["qkv_bias"]
        self.qkv_proj = QKVParallelLinear(*sizes, bias=bias, return_bias=False, prefix=f"{prefix}.qkv_proj")
        self.o_proj = RowParallelLinear(width, width, bias=False, return_bias=False, prefix=f"{prefix}.o_proj")
        self.rotary_emb = get_rope(
            head_dim,
            max_position=vllm_config.model_config.max_model_len,
            rope_parameters={"rope_type": "default", "rope_theta": float(spec["rope_theta"] or 10000.0)},
        )
        self.attn = Attention(
            self.qkv_proj.num_heads,
            head_dim,
            head_dim**-0.5,
            num_kv_heads=self.qkv_proj.num_kv_heads,
            cache_config=vllm_config.cache_config,
            per_layer_sliding_window=spec["window_size"],
            prefix=f"{prefix}.attn",
        )
        self.sizes = [n * head_dim for n in (self.attn.num_heads, self.attn.num_kv_heads, self.attn.num_kv_heads)]

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """positions [tokens], hidden_states [tokens, hidden_size] -> the same shape."""
        q, k, v = self.qkv_proj(hidden_states).split(self.sizes, -1)
        q, k = self.rotary_emb(positions, q, k)
        return self.o_proj(self.attn(q, k, v))
