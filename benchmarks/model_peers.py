"""Whole models that are compared, of the same sizes, in bfloat16 with random weights made on the device.

    ours     DeltaNetForCausalLM of this package
    fla      DeltaNetForCausalLM of flash-linear-attention (PyPI flash-linear-attention, fla-core, einops)
    llama    LlamaForCausalLM of Transformers with PyTorch's scaled_dot_product_attention

A peer is imported when it is asked for. Variants change how ours is trained, see `VARIANTS`.
"""

import hashlib
import importlib.metadata
import pathlib
from typing import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel

from ..configuration_deltanet import DeltaNetConfig
from ..train.checkpointing import KEEP_MIXING

NAMES = ("ours", "llama", "fla")
"""In the order in which they are measured: the last compiles for minutes."""

ROOT = pathlib.Path(__file__).parents[1]
SIZES = {
    "340M": {"hidden_size": 1024, "num_hidden_layers": 24, "num_heads": 8, "intermediate_size": 2816},
    "1.3B": {"hidden_size": 2048, "num_hidden_layers": 24, "num_heads": 16, "intermediate_size": 5632},
    "tiny": {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2, "intermediate_size": 64},
}
SIZES |= {f"{name} thin": {**size, "num_hidden_layers": 1} for name, size in SIZES.items()}  # the same kernels, to compile
VOCABULARY = 32000


def version(peer: str) -> str:
    """What was measured: the release of a package, or a checksum of this package's code."""
    if peer != "ours":
        package = {"fla": "fla-core", "llama": "transformers"}[peer]
        try:
            return f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            return f"{package} missing"
    files = sorted([*ROOT.glob("*_deltanet.py"), *ROOT.glob("kernels/*.py")])
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def flops_config(peer: str, size: str) -> PreTrainedConfig:
    """The configuration that says how many operations a token costs; fla's model is ours in this respect."""
    fields = {"vocab_size": VOCABULARY, **SIZES[size]}
    if peer != "llama":
        return DeltaNetConfig(**fields)
    heads = fields.pop("num_heads")
    return LlamaConfig(**fields, num_attention_heads=heads, max_position_embeddings=131072, attn_implementation="sdpa")


def build(peer: str, size: str, device: str, variant: str = "") -> PreTrainedModel:
    """A model with random weights in bfloat16, in evaluation mode, that never ends a text by itself.

    Raises:
        ImportError, ValueError: a package is missing or does not support this device.
    """
    config, model_class = flops_config(peer, size), LlamaForCausalLM
    if peer == "ours":
        from ..modeling_deltanet import DeltaNetForCausalLM as model_class

        config.fuse_linear_cross_entropy = True
    elif peer == "fla":
        from fla.models import DeltaNetConfig as FlaConfig
        from fla.models import DeltaNetForCausalLM as model_class

        config = FlaConfig(vocab_size=VOCABULARY, **SIZES[size])
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = model_class(config).eval()
    finally:
        torch.set_default_dtype(default)
    return VARIANTS[variant](model)


def _checkpointed(model: PreTrainedModel, **arguments) -> PreTrainedModel:
    model.gradient_checkpointing_enable(arguments or {"use_reentrant": False})
    return model


def _with_logits(model: PreTrainedModel) -> PreTrainedModel:
    model.config.fuse_linear_cross_entropy = False
    return model


def _without_logits(model: PreTrainedModel) -> PreTrainedModel:
    model.config.fuse_cross_entropy, model.config.fuse_linear_cross_entropy = False, True
    return model


def _compiled(model: PreTrainedModel) -> PreTrainedModel:
    model.compile()
    return model


def _int8(model: PreTrainedModel) -> PreTrainedModel:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig(), lambda module, name: isinstance(module, torch.nn.Linear) and name != "lm_head")
    return model


VARIANTS: dict[str, Callable[[PreTrainedModel], PreTrainedModel]] = {
    "": lambda model: model,
    "autocast": lambda model: model.float(),
    "checkpointed": lambda model: _checkpointed(model, **KEEP_MIXING),
    "checkpointed-whole": _checkpointed,
    "logits": _with_logits,
    "no-logits": _without_logits,
    "compiled": _compiled,
    "int8": _int8,
}
TRAINING_VARIANTS = {
    "ours": ("autocast", "checkpointed", "checkpointed-whole", "logits", "compiled"),
    "llama": ("compiled",),
    "fla": ("no-logits",),
}
"""Ways to train besides the usual one (the empty name), which has weights in bfloat16 and what a peer fuses by default: with
weights in float32 under autocast, as the recipes do; with gradient checkpointing that keeps the delta rule's result, and
that keeps nothing; with all logits at once; with fla's loss that holds none, which takes the least memory; compiled by
`torch.compile`. `int8` has weights of eight bits by torchao, to generate."""
