"""Seeded tiny models for the tests of the model, the cache and generation."""

import torch

from deltanet import DeltaNetConfig, DeltaNetForCausalLM

WINDOW = 5
_ATTENTION = {
    "pure": None,
    "sliding": {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "window_size": WINDOW},
    "global": {"layers": [1], "num_heads": 4, "num_kv_heads": 2},
}
KINDS = tuple(_ATTENTION)


def tiny_config(kind: str = "pure", **overrides) -> DeltaNetConfig:
    """Two or three layers of width 32; `initializer_range` is large, so that logits are far from flat."""
    fields = {
        "vocab_size": 61,
        "hidden_size": 32,
        "num_hidden_layers": 2 if kind == "pure" else 3,
        "num_heads": 2,
        "intermediate_size": 48,
        "initializer_range": 0.3,
        "max_position_embeddings": 128,
        "attn": _ATTENTION[kind],
        "pad_token_id": 0,
    }
    return DeltaNetConfig(**{**fields, **overrides})


def tiny_model(kind: str = "pure", model_class=DeltaNetForCausalLM, seed: int = 0, **overrides):
    """A float32 model in evaluation mode; norm weights are moved off one, where a forgotten weight would not show."""
    torch.manual_seed(seed)
    model = model_class(tiny_config(kind, **overrides)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def token_ids(batch: int, length: int, seed: int = 1, vocab_size: int = 61) -> torch.Tensor:
    """Random ids [batch, length] without the padding id 0."""
    return torch.randint(1, vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))
