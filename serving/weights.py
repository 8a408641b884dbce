"""Where the tensors of a checkpoint go. Serving saves nothing, so the layouts of 2024 are read as well."""

import re
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from ..configuration_deltanet import DELTA_LAYER_TYPE, DeltaNetConfig


class Place(NamedTuple):
    """A parameter of the served model, and the part of it that the tensor is."""

    parameter: str
    shard: int | str | None = None


_DELTA = {
    "q_proj": Place("in_proj", 0),
    "k_proj": Place("in_proj", 1),
    "v_proj": Place("in_proj", 2),
    "g_proj": Place("in_proj", 3),
    "b_proj": Place("b_proj"),
    "q_conv1d": Place("conv1d", 0),
    "k_conv1d": Place("conv1d", 1),
    "v_conv1d": Place("conv1d", 2),
    "o_norm": Place("o_norm"),
    "o_proj": Place("o_proj"),
}
_QKV = {"q_proj": Place("qkv_proj", "q"), "k_proj": Place("qkv_proj", "k"), "v_proj": Place("qkv_proj", "v")}
_SOFTMAX = {**_QKV, "o_proj": Place("o_proj")}
_MLP = {"gate_proj": Place("gate_up_proj", 0), "up_proj": Place("gate_up_proj", 1), "down_proj": Place("down_proj")}
_NORMS = {"attn_norm": Place("attn_norm"), "mlp_norm": Place("mlp_norm")}
_NORM_OF_2024 = re.compile(r"(layers\.\d+\.)(attn|mlp)\.norm\.weight$")


def places(config: DeltaNetConfig) -> dict[str, Place]:
    """Every tensor of a checkpoint, by the reference's name, and its place in the served model."""
    result = {"model.embeddings.weight": Place("model.embed_tokens.weight"), "model.norm.weight": Place("model.norm.weight")}
    if not config.tie_word_embeddings:
        result["lm_head.weight"] = Place("lm_head.weight")
    for layer, kind in enumerate(config.layer_types):
        prefix = f"model.layers.{layer}"
        result |= _under(prefix, _NORMS) | _under(f"{prefix}.mlp", _MLP)
        if kind == DELTA_LAYER_TYPE:
            absent = _absent(config)
            result |= _under(f"{prefix}.attn", {name: place for name, place in _DELTA.items() if name not in absent})
        else:
            result |= _under(f"{prefix}.attn", _SOFTMAX)
            if config.attention_specs[layer]["qkv_bias"]:
                result |= _under(f"{prefix}.attn", _QKV, "bias")
    return result


def _under(prefix: str, table: dict[str, Place], kind: str = "weight") -> dict[str, Place]:
    return {
        f"{prefix}.{name}.{kind}": Place(f"{prefix}.{place.parameter}.{kind}", place.shard) for name, place in table.items()
    }


def _absent(config: DeltaNetConfig) -> set[str]:
    """Modules of a delta-rule layer that this configuration does without."""
    convolutions = () if config.use_short_conv else ("q_conv1d", "k_conv1d", "v_conv1d")
    return {*convolutions, *["b_proj"] * (not config.use_beta), *["g_proj"] * (not config.use_gate)}


def todays_name(name: str) -> str:
    """The reference's name today of a tensor that the reference wrote in 2024, or Transformers with plain names."""
    return _NORM_OF_2024.sub(r"\1\2_norm.weight", name).replace("model.embed_tokens.", "model.embeddings.")


def load(model: nn.Module, config: DeltaNetConfig, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
    """
    Fill this rank's parameters from named tensors; returns the names of the parameters.

    Raises `ValueError` naming the tensors that the checkpoint lacks or has too many.
    """
    expected, parameters = places(config), dict(model.named_parameters())
    missing, unknown = set(expected), []
    for name, tensor in weights:
        name = todays_name(name)
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if name not in expected:
            unknown.append(name)
            continue
        parameter, shard = expected[name]
        missing.discard(name)
        if name.endswith(".mlp.gate_proj.weight") and len(tensor) == 2 * config.intermediate_size:
            # Until February 2025 it held up_proj as well, its second half.
            missing.discard(name.replace("gate_proj", "up_proj"))
            shard = None
        loader = getattr(parameters[parameter], "weight_loader", default_weight_loader)
        loader(parameters[parameter], tensor, *(() if shard is None else (shard,)))
    if missing or unknown:
        names = _list("Missing", missing) + _list("Unknown", unknown)
        raise ValueError(f"The checkpoint does not fit its configuration. {names}")
    return {place.parameter for place in expected.values()}


def _list(what: str, names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"{what}: {', '.join(names[:4])}{more}. " if names else ""
