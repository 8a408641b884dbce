"""What vLLM asks of a DeltaNet before it builds one: sizes of the cache, defaults, and options that are refused."""

import os

import torch
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
from vllm.transformers_utils.model_arch_config_convertor import (
    MODEL_ARCH_CONFIG_CONVERTORS,
    ModelArchConfigConvertorBase,
)

from ..configuration_deltanet import DeltaNetConfig
from ..kernels.delta_rule import fused_kernels_missing

PREFIX_CACHING = (
    "False: vLLM would go on from copies of recurrent states at the ends of blocks, and the tokens that followed were not "
    "always those of `generate`"
)


class Sizes(ModelArchConfigConvertorBase):
    """Heads of the key-value cache, which are those of the softmax layers and not `num_heads` of the delta rule."""

    def get_total_num_attention_heads(self) -> int:
        specs = self.hf_config.attention_specs.values()
        return next((spec["num_heads"] for spec in specs), self.hf_config.num_heads)

    def get_total_num_kv_heads(self) -> int:
        specs = self.hf_config.attention_specs.values()
        return next((spec["num_kv_heads"] or spec["num_heads"] for spec in specs), self.hf_config.num_heads)


class Options(VerifyAndUpdateConfig):
    """vLLM's hook for the options of an engine."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Set defaults; raises `ValueError` naming what cannot be served."""
        cache_config = vllm_config.cache_config
        if cache_config.mamba_ssm_cache_dtype == "auto":
            cache_config.mamba_ssm_cache_dtype = "float32"
        check_engine(vllm_config)
        check_checkpoint(vllm_config.model_config.hf_config, vllm_config.parallel_config.tensor_parallel_size)


def _require(condition: bool, name: str, value, allowed: str) -> None:
    if not condition:
        raise ValueError(f"DeltaNet in vLLM: `{name}` is {value!r}; allowed: {allowed}.")


def check_engine(vllm_config: VllmConfig) -> None:
    cache, model = vllm_config.cache_config, vllm_config.model_config
    _require(not cache.enable_prefix_caching, "enable_prefix_caching", True, PREFIX_CACHING)
    dtype = cache.mamba_ssm_cache_dtype
    _require(dtype in ("float32", "bfloat16"), "mamba_ssm_cache_dtype", dtype, "'auto' (float32), 'float32', 'bfloat16'")
    speculative = vllm_config.speculative_config
    method = None if speculative is None else speculative.method
    _require(speculative is None, "speculative_config.method", method, "None: a recurrent state cannot take tokens back")
    _require(model.quantization is None, "quantization", model.quantization, "None: quantised weights were not tested")


def check_checkpoint(config: DeltaNetConfig, ranks: int) -> None:
    """Options of a checkpoint that Transformers runs and vLLM cannot."""
    _require(config.conv_size > 1 or not config.use_short_conv, "conv_size", config.conv_size, "at least 2")
    shared = f"multiples of tensor_parallel_size = {ranks}"
    _require(config.num_heads % ranks == 0, "num_heads", config.num_heads, shared)
    heads = {(spec["num_heads"], spec["num_kv_heads"] or spec["num_heads"]) for spec in config.attention_specs.values()}
    one = "one `num_heads` and one `num_kv_heads` for all attention layers, whose caches share pages"
    _require(len(heads) < 2, "attn", sorted(heads), one)
    for num_heads, num_kv_heads in heads:
        _require(num_heads % ranks == 0, "attn.num_heads", num_heads, shared)
        fits = num_kv_heads % ranks == 0 or ranks % num_kv_heads == 0
        _require(fits, "attn.num_kv_heads", num_kv_heads, f"multiples and divisors of tensor_parallel_size = {ranks}")


def check_kernels(config: DeltaNetConfig, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse to serve from a GPU without the fused kernels, unless DELTANET_BACKEND chooses an implementation.

    For the processes that own a GPU; to ask for its properties elsewhere would take memory there.
    """
    if device.type == "cpu":
        return
    key_dim = int(config.hidden_size * config.expand_k) // config.num_heads
    reason = fused_kernels_missing(device, dtype, key_dim)
    if reason and not os.environ.get("DELTANET_BACKEND"):
        raise RuntimeError(
            f"DeltaNet in vLLM: the fused kernels of the delta rule cannot run ({reason}). DELTANET_BACKEND=torch in the "
            "environment serves with the much slower PyTorch implementation."
        )


def register_options(model_type: str, architecture: str) -> None:
    MODELS_CONFIG_MAP[architecture] = Options
    MODEL_ARCH_CONFIG_CONVERTORS[model_type] = Sizes
    _turn_prefix_caching_off(architecture)


def _turn_prefix_caching_off(architecture: str) -> None:
    """vLLM turns it on for hybrids where the user says nothing, and has no hook that sees whether the user did."""
    supported = ModelConfig.is_prefix_caching_supported
    if not hasattr(supported.fget, "without_deltanet"):

        def is_prefix_caching_supported(self) -> bool:
            return self.architecture != architecture and supported.fget(self)

        is_prefix_caching_supported.without_deltanet = supported
        ModelConfig.is_prefix_caching_supported = property(is_prefix_caching_supported)
