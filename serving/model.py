"""DeltaNet for vLLM's engine: the model of `modeling_deltanet.py`, its layers sharded and its states vLLM's."""

from collections.abc import Iterable

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid
from vllm.model_executor.models.utils import maybe_prefix
from vllm.sequence import IntermediateTensors

from ..configuration_deltanet import DELTA_LAYER_TYPE, DeltaNetConfig
from ..mixer_deltanet import DeltaNetRMSNorm
from .attention import DeltaNetAttention
from .mixer import DeltaNetMixer, state_dtypes, state_shapes
from .options import check_kernels
from .weights import load


class DeltaNetMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: DeltaNetConfig, prefix: str):
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        options = {"bias": False, "return_bias": False}
        self.gate_up_proj = MergedColumnParallelLinear(width, [inner, inner], **options, prefix=f"{prefix}.gate_up_proj")
        self.down_proj = RowParallelLinear(inner, width, **options, prefix=f"{prefix}.down_proj")
        self.act_fn = SiluAndMul()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_up_proj(x)))


class DeltaNetBlock(nn.Module):
    """x += mixer(norm(x)); x += SwiGLU(norm(x))."""

    def __init__(self, config: DeltaNetConfig, layer_idx: int, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        self.is_delta = config.layer_types[layer_idx] == DELTA_LAYER_TYPE
        self.attn_norm = DeltaNetRMSNorm(config.hidden_size, config.norm_eps)
        if self.is_delta:
            self.attn = DeltaNetMixer(config, vllm_config, f"{prefix}.attn")
        else:
            self.attn = DeltaNetAttention(config, layer_idx, vllm_config, f"{prefix}.attn")
        self.mlp_norm = DeltaNetRMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = DeltaNetMLP(config, f"{prefix}.mlp")

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        normed = self.attn_norm(hidden_states)
        hidden_states = hidden_states + (self.attn(normed) if self.is_delta else self.attn(positions, normed))
        return hidden_states + self.mlp(self.mlp_norm(hidden_states))


@support_torch_compile
class DeltaNetModel(nn.Module):
    """The stack of blocks, from token ids or embeddings to normalised hidden states."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, prefix=f"{prefix}.embed_tokens")
        self.layers = nn.ModuleList(
            DeltaNetBlock(config, i, vllm_config, f"{prefix}.layers.{i}") for i in range(config.num_hidden_layers)
        )
        self.norm = DeltaNetRMSNorm(config.hidden_size, config.norm_eps)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[tokens] of all requests of a step -> [tokens, hidden_size]."""
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        for layer in self.layers:
            hidden_states = layer(positions, hidden_states)
        return self.norm(hidden_states)


class DeltaNetForCausalLM(nn.Module, HasInnerState, IsHybrid):
    """What vLLM loads. Pure models are hybrids without attention layers to it, which sizes their states the same way."""

    packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"]}

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        self.config = config = vllm_config.model_config.hf_config
        check_kernels(config, vllm_config.model_config.dtype, torch.device(vllm_config.device_config.device_type))
        self.model = DeltaNetModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, prefix=maybe_prefix(prefix, "lm_head"))
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig):
        return state_shapes(vllm_config)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig):
        return state_dtypes(vllm_config)

    @classmethod
    def get_mamba_state_copy_func(cls):
        raise NotImplementedError("States are copied for prefix caching, which is off for DeltaNet.")

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return load(self, self.config, weights)
