"""How many floating-point operations a token of training costs, and how many a device can do: what MFU is made of."""

from transformers import PreTrainedConfig, PreTrainedModel

from ..configuration_deltanet import DELTA_LAYER_TYPE, DeltaNetConfig

CHUNK = 64
"""Tokens in a chunk of the delta rule's kernels."""

PEAK_FLOPS = {"H100": 989.4e12, "H200": 989.4e12, "H800": 989.4e12, "B200": 2.25e15, "A100": 312e12, "L40S": 362e12}
"""Dense bfloat16 products with float32 sums, a second, from the data sheets (SXM where there are several)."""


def peak_flops(device_name: str) -> float | None:
    """The data sheet's rate of a device by what `torch.cuda.get_device_name` calls it, or `None` where it is not known."""
    return next((rate for name, rate in PEAK_FLOPS.items() if name in device_name), None)


def product_parameters(model: PreTrainedModel) -> int:
    """The number of parameters used in matrix products: all but the embedding, unless the head shares it."""
    embedding = 0 if model.config.tie_word_embeddings else model.get_input_embeddings().weight.numel()
    return model.num_parameters() - embedding


def training_flops(config: PreTrainedConfig, parameters: int, length: int) -> float:
    """Operations a token for forward and backward in sequences of `length` tokens: 6 N + 3 M.

    N are the `product_parameters`, M the operations that mix tokens in a forward pass (`mixing_flops`). What gradient
    checkpointing computes again is not counted, as is the custom.
    """
    return 6 * parameters + 3 * mixing_flops(config, length)


def mixing_flops(config: PreTrainedConfig, length: int) -> float:
    """Operations a token of all layers' delta rule or softmax attention, forward, projections apart.

    A head of the delta rule in chunks of C tokens reads the state twice and writes it once (6 K V), and multiplies within
    the chunk K K', Q K' (4 C K), T U and P V' (4 C V); the inverse in T is left out. Causal attention over a mean of n
    tokens costs 4 n for each channel of the queries.
    """
    total = 0.0
    for layer, kind in enumerate(_layer_types(config)):
        if kind == DELTA_LAYER_TYPE:
            K, V = (int(config.hidden_size * expand) // config.num_heads for expand in (config.expand_k, config.expand_v))
            total += config.num_heads * (6 * K * V + 4 * CHUNK * (K + V))
        else:
            window = min(length, config.attention_specs[layer]["window_size"] or length) if _is_ours(config) else length
            total += 4 * config.hidden_size * window * (1 - window / (2 * length))
    return total


def _layer_types(config: PreTrainedConfig) -> list[str]:
    return config.layer_types if _is_ours(config) else ["full_attention"] * config.num_hidden_layers


def _is_ours(config: PreTrainedConfig) -> bool:
    return config.model_type == DeltaNetConfig.model_type
