"""Small causal models by a short specification: DeltaNet and any other of Transformers beside it."""

import json

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from deltanet import DeltaNetConfig

from .mamba2 import use_matrix_form

# Causal attention for which Transformers builds no mask: in a recorded training step it would build one at full size, and
# PyTorch's fast kernels take none.
CAUSAL = "deltanet_causal_sdpa"
AttentionInterface.register(CAUSAL, sdpa_attention_forward)

# Fields that follow from the width, for models whose configuration needs more than the common names.
_SHAPES = {
    "delta_net": lambda width: {"num_heads": 2},
    "mamba2": lambda width: {
        "expand": 2,
        "head_dim": min(64, width),
        "num_heads": max(2, width // 32),
        "n_groups": 1,
        "use_cache": False,
    },
}
# Importing the configuration registers it with the Auto classes.
_ALIASES = {"deltanet": DeltaNetConfig.model_type}


def parse_model(text: str) -> tuple[str, dict]:
    """
    `type` or `type:field=value,...` as the model type and configuration fields; values are JSON, else text.

    Types are Transformers' (`llama`, `mamba2`, ...) and `deltanet`; `deltanet:allow_neg_eigval=true,use_short_conv=false`.
    """
    kind, _, fields = text.partition(":")
    pairs = [field.partition("=") for field in fields.split(",") if field]
    if any(not sign for _, sign, _ in pairs):
        raise ValueError(f"model {text!r}: fields are key=value, separated by commas")
    return _ALIASES.get(kind, kind), {key: _value(value) for key, _, value in pairs}


def build_model(
    text: str, vocab: int, width: int, layers: int, mlp=True, dropout=0.0, tied=False, deltanet=None, seed=0, length=512
):
    """
    A seeded causal language model.

    Args:
        text: see `parse_model`; its fields win over all others.
        vocab, width, layers: token ids, width of the residual stream, blocks.
        mlp: whether the blocks keep their MLP (Zoology's have none).
        dropout: on the embedding, in training.
        tied: share the embedding with the head.
        deltanet: a task's own fields for DeltaNet.
        seed: of the weights.
        length: positions that the model must be able to tell apart, where it counts them.

    Raises:
        ValueError: the model type is unknown or a field does not fit.
    """
    kind, fields = parse_model(text)
    if kind not in CONFIG_MAPPING:
        raise ValueError(f"model {text!r}: {kind!r} is no model type of Transformers; use deltanet, llama, mamba2, ...")
    shape = {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 256 * -(-width * 8 // 3 // 256)}
    if kind == "llama":
        shape["attn_implementation"] = CAUSAL
    shape = _SHAPES.get(kind, lambda width: shape)(width)
    shape |= (deltanet or {}) if kind == DeltaNetConfig.model_type else {}
    common = {"vocab_size": vocab, "hidden_size": width, "num_hidden_layers": layers, "tie_word_embeddings": tied}
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = AutoConfig.for_model(kind, **{**common, "max_position_embeddings": length, **special, **shape, **fields})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if kind == "mamba2":
        use_matrix_form(model)
    if not mlp:
        _remove_mlps(model)
    if dropout:
        layer = nn.Dropout(dropout)
        model.embedding_dropout = layer
        model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: layer(output))
    return model


class _Nothing(nn.Module):
    """An MLP that adds nothing to the residual stream."""

    def forward(self, hidden_states):
        return torch.zeros_like(hidden_states)


def _remove_mlps(model) -> None:
    for block in [module for module in model.modules() if isinstance(getattr(module, "mlp", None), nn.Module)]:
        block.mlp = _Nothing()


def _value(text: str):
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
