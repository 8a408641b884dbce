"""Compiling a model's fused kernels before they are needed, several at a time."""

import time
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from .kernels.devices import processors
from .layout_deltanet import TokenLayout, packed_layout, padding_layout
from .mixer_deltanet import DeltaNetMixer

_COMPILERS = 8  # threads: the compiler works outside of Python's lock


class WarmupMixin:
    """`warmup`, for models with delta-rule layers."""

    def warmup(self, training: bool = False) -> float:
        """
        Compile the kernels of the delta-rule blocks that a server will need, and return how many seconds that took.

        Covered are prompts of any length and batch, padded or not, their continuation, decoding and packed sequences; with
        `training` gradients as well. Nothing of the model changes. Where no kernel is compiled (not on a GPU, or no
        delta-rule layer) nothing happens. Compiled kernels stay in Triton's cache on disk for later processes.
        """
        begin = time.perf_counter()
        block = next((x for x in self.modules() if isinstance(getattr(x, "attn", None), DeltaNetMixer)), None)
        if block is None or block.attn.o_proj.weight.device.type != "cuda":
            return 0.0
        cases = [(batch, length, kind) for batch, length in _shapes(block.attn) for kind in ("plain", "padded", "packed")]
        with ThreadPoolExecutor(_COMPILERS) as pool:
            list(pool.map(lambda case: _run(self.config, block, *case, training), cases))
        torch.cuda.synchronize(block.attn.o_proj.weight.device)
        return time.perf_counter() - begin


def _shapes(mixer: DeltaNetMixer) -> set[tuple[int, int]]:
    """Batches that fill the card, that do not, and one so long that it may be cut into spans."""
    device = mixer.o_proj.weight.device
    programs = mixer.b_proj.out_features if mixer.use_beta else mixer.v_proj.out_features // mixer.head_v_dim
    programs *= -(-mixer.head_v_dim // 64)
    return {(-(-processors(device) // programs), 64), (1, 64), (1, 128 * 64)}


def _run(config, block: nn.Module, batch: int, length: int, kind: str, training: bool) -> None:
    weight = block.attn.o_proj.weight
    with torch.cuda.device(weight.device):
        batch, length = (1, batch * length) if kind == "packed" else (batch, length)
        x = torch.zeros(batch, length, config.hidden_size, dtype=weight.dtype, device=weight.device)
        layout = _layout(kind, batch, length, config.conv_size, x.device)
        with torch.no_grad():
            block(x, layout)
            if kind != "packed":  # which takes no cache
                cache = DynamicCache(config=config)
                for tokens, part in ((x, layout), (x, layout), (x[:, :1], TokenLayout())):
                    block(tokens, part, cache=cache)
        if training:
            x.requires_grad_()
            o = block(x, layout)
            torch.autograd.grad(o, [x, *(p for p in block.parameters() if p.requires_grad)], torch.zeros_like(o))


def _layout(kind: str, batch: int, length: int, width: int, device: torch.device) -> TokenLayout:
    if kind == "packed":
        return packed_layout(torch.tensor([0, length // 2, length], device=device), length)[0]
    mask = torch.ones(batch, length, dtype=torch.long, device=device)
    return padding_layout(mask, length, width) if kind == "padded" else TokenLayout()


__all__ = ["WarmupMixin"]
