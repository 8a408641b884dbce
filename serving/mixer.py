"""The delta-rule layer over states that vLLM keeps in slots, as one operator that no compiler looks into."""

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import ColumnParallelLinear, MergedColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.utils import set_weight_attrs
from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE, direct_register_custom_op
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from ..configuration_deltanet import DeltaNetConfig
from ..mixer_deltanet import DeltaNetRMSNorm
from .metadata import Batch, BatchBackend
from .recurrence import NULL_SLOT, Recurrence


def state_shapes(vllm_config: VllmConfig) -> tuple[tuple[int, ...], ...]:
    """Of one sequence and layer on one rank."""
    config, ranks = vllm_config.model_config.hf_config, vllm_config.parallel_config.tensor_parallel_size
    return Recurrence(config, config.num_heads // ranks).state_shapes


def state_dtypes(vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
    """Of the states in `state_shapes`: what the engine was told, by default float32 and the model's dtype."""
    cache, model = vllm_config.cache_config, vllm_config.model_config
    recurrent = STR_DTYPE_TO_TORCH_DTYPE[cache.mamba_ssm_cache_dtype]
    if not model.hf_config.use_short_conv:
        return (recurrent,)
    told = cache.mamba_cache_dtype
    return recurrent, model.dtype if told == "auto" else STR_DTYPE_TO_TORCH_DTYPE[told]


class DeltaNetMixer(nn.Module, MambaBase):
    """The layer of `mixer_deltanet.py`: `in_proj` is q_proj, k_proj, v_proj and g_proj, `conv1d` the three convolutions,
    each a rank's share of the heads."""

    mamba_type = MambaAttentionBackendEnum.SHORT_CONV

    def __init__(self, config: DeltaNetConfig, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        self.prefix = prefix
        self.shapes, self.dtypes = state_shapes(vllm_config), state_dtypes(vllm_config)
        self.rank, self.ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        self.recurrence = Recurrence(config, config.num_heads // self.ranks)

        width, options = config.hidden_size, {"bias": False, "return_bias": False}
        keys, values = self.recurrence.keys * self.ranks, self.recurrence.values * self.ranks
        outputs = [keys, keys, values, *[values] * config.use_gate]
        self.in_proj = MergedColumnParallelLinear(width, outputs, **options, prefix=f"{prefix}.in_proj")
        self.b_proj = None
        if config.use_beta:
            self.b_proj = ColumnParallelLinear(width, config.num_heads, **options, prefix=f"{prefix}.b_proj")
        self.conv1d = None
        if config.use_short_conv:
            channels = self.shapes[1][0]
            self.conv1d = nn.Conv1d(channels, channels, config.conv_size, groups=channels, bias=False)
            set_weight_attrs(self.conv1d.weight, {"weight_loader": self._load_convolution})
        self.o_norm = DeltaNetRMSNorm(self.recurrence.head_v_dim, config.norm_eps)
        self.o_proj = RowParallelLinear(values, width, **options, prefix=f"{prefix}.o_proj")
        self._announce(vllm_config.compilation_config)

    def _announce(self, compilation_config) -> None:
        """To the operator, which finds the layer by its prefix, and to the splitting of CUDA graphs."""
        compilation_config.static_forward_context[self.prefix] = self
        splitting = compilation_config.splitting_ops
        if splitting and OPERATOR not in splitting:
            splitting.append(OPERATOR)

    def _load_convolution(self, parameter: torch.Tensor, weight: torch.Tensor, shard: int) -> None:
        """This rank's rows of the weight [D, 1, W] of q (shard 0), k (1) or v (2)."""
        start, rows = shard * self.recurrence.keys, len(weight) // self.ranks
        parameter.data[start : start + rows].copy_(weight[self.rank * rows : (self.rank + 1) * rows])

    def get_state_shape(self):
        return self.shapes

    def get_state_dtype(self):
        return self.dtypes

    def get_attn_backend(self):
        return BatchBackend

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden_size] -> the same shape."""
        output = torch.empty_like(hidden_states)
        torch.ops.vllm.deltanet_mixer(hidden_states, output, self.prefix)
        return output

    def run(self, hidden_states: torch.Tensor, output: torch.Tensor) -> None:
        """The operator, from the projections to `o_proj`. A compiler that fused parts of it would round differently, and
        in a state such differences grow from token to token."""
        batches = get_forward_context().attn_metadata
        batch = None if batches is None else batches.get(self.prefix)
        real = len(hidden_states) if batch is None else batch.num_decode_tokens + batch.num_prefill_tokens
        x, recurrence = hidden_states[:real], self.recurrence
        qkv, gate = self.in_proj(x).tensor_split([2 * recurrence.keys + recurrence.values], -1)
        b = None if self.b_proj is None else self.b_proj(x)
        recur = self._rehearse if batch is None else self._recur
        output[:real] = self.o_proj(recur((qkv, b, gate if gate.shape[-1] else None), batch))
        output[real:] = 0

    @property
    def _parameters_between(self) -> tuple[torch.Tensor | None, DeltaNetRMSNorm]:
        return None if self.conv1d is None else self.conv1d.weight, self.o_norm

    def _recur(self, projections: tuple[torch.Tensor | None, ...], batch: Batch) -> torch.Tensor:
        """Outputs of requests that decode, which vLLM puts first, and of parts of prompts."""
        decoded, parts = batch.num_decode_tokens, []
        if decoded:
            own = (None if x is None else x[:decoded] for x in projections)
            slots = batch.state_indices_tensor_d[:, 0]
            parts.append(self.recurrence.decode(*own, *self._parameters_between, self.kv_cache, slots))
        if batch.num_prefill_tokens:
            own = (None if x is None else x[decoded:] for x in projections)
            layout = (batch.state_indices_tensor_p, batch.has_initial_states_p, batch.query_start_loc_p)
            parts.append(self.recurrence.prefill(*own, *self._parameters_between, self.kv_cache, *layout))
        return torch.cat(parts)

    def _rehearse(self, projections: tuple[torch.Tensor | None, ...], _: None) -> torch.Tensor:
        """vLLM measures memory and compiles kernels before there are states: one prompt, nothing kept."""
        qkv = projections[0]
        slots = torch.full((1,), NULL_SLOT, device=qkv.device)
        states = [qkv.new_zeros((1, *shape), dtype=dtype) for shape, dtype in zip(self.shapes, self.dtypes)]
        bounds = torch.tensor([0, len(qkv)], dtype=torch.int32, device=qkv.device)
        layout = (slots, slots != NULL_SLOT, bounds)
        return self.recurrence.prefill(*projections, *self._parameters_between, states, *layout)


def deltanet_mixer(hidden_states: torch.Tensor, output: torch.Tensor, layer_name: str) -> None:
    get_forward_context().no_compile_layers[layer_name].run(hidden_states, output)


OPERATOR = "vllm::deltanet_mixer"
direct_register_custom_op(op_name="deltanet_mixer", op_func=deltanet_mixer, mutates_args=["output"])
