"""The language models that are compared: tied embeddings, and the same number of parameters within two per cent."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, Mamba2Config, PreTrainedConfig, PreTrainedModel

from deltanet import DeltaNetConfig

from ..synthetic.models import CAUSAL
from .chunked_mamba2 import use_chunked_form

_NO_SPECIAL_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


@dataclass(frozen=True)
class Size:
    """What all models share. A Mamba2 block has no MLP, so that there are more of them."""

    width: int = 384
    layers: int = 8
    intermediate: int = 1024
    heads: int = 3  # of the delta rule and of the hybrids' attention: 128 channels each
    transformer_heads: int = 6
    window: int = 128
    mamba2_layers: int = 14


def _deltanet(size: Size, vocab: int, **changes) -> DeltaNetConfig:
    return DeltaNetConfig(
        vocab_size=vocab,
        hidden_size=size.width,
        num_hidden_layers=size.layers,
        num_heads=size.heads,
        intermediate_size=size.intermediate,
        tie_word_embeddings=True,
        **_NO_SPECIAL_TOKENS,
        **changes,
    )


def _transformer(size: Size, vocab: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.transformer_heads,
        intermediate_size=size.intermediate,
        tie_word_embeddings=True,
        **_NO_SPECIAL_TOKENS,
    )


def _mamba2(size: Size, vocab: int) -> Mamba2Config:
    head_dim = min(64, size.width)
    return Mamba2Config(
        vocab_size=vocab,
        hidden_size=size.width,
        num_hidden_layers=size.mamba2_layers,
        head_dim=head_dim,
        num_heads=2 * size.width // head_dim,
        n_groups=1,
        initializer_range=0.02,  # of the embedding, as in Mamba's own code
        tie_word_embeddings=True,
        **_NO_SPECIAL_TOKENS,
    )


CONFIGURATIONS = {
    "deltanet": _deltanet,
    "no-convolution": lambda size, vocab: _deltanet(size, vocab, use_short_conv=False),
    "elu-sum": lambda size, vocab: _deltanet(size, vocab, qk_activation="elu", qk_norm="sum"),
    "sliding-window": lambda size, vocab: _deltanet(size, vocab).with_sliding_window(size.window),
    "global-attention": lambda size, vocab: _deltanet(size, vocab).with_global_attention(),
    "transformer": _transformer,
    "mamba2": _mamba2,
}
LABELS = {
    "deltanet": "DeltaNet",
    "no-convolution": "DeltaNet without short convolution",
    "elu-sum": "DeltaNet with L1 norm and 1 + ELU",
    "sliding-window": "DeltaNet + sliding-window attention",
    "global-attention": "DeltaNet + two global attention layers",
    "transformer": "Transformer (Llama blocks)",
    "mamba2": "Mamba2",
}


def build(name: str, size: Size, vocab: int, seed: int = 0) -> PreTrainedModel:
    """A seeded model in float32 on the CPU.

    Raises:
        KeyError: `name` is none of `CONFIGURATIONS`.
    """
    config: PreTrainedConfig = CONFIGURATIONS[name](size, vocab)
    torch.manual_seed(seed)
    attention = {"attn_implementation": CAUSAL} if name in ("global-attention", "transformer") else {}
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **attention)
    if name == "mamba2":
        use_chunked_form(model)
    return model


def parameters(model: nn.Module) -> int:
    """A tied weight counts once."""
    return sum(parameter.numel() for parameter in model.parameters())
