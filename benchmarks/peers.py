"""Who is compared: one function (q, k, v, beta, cu_seqlens) -> o for each peer, the L2 norm of q and k inside.

    ours         chunk_delta_rule of this package
    recurrent    recurrent_delta_rule of this package
    fla          chunk_delta_rule of flash-linear-attention (PyPI fla-core)
    flashqla     chunk_gated_delta_rule of FlashQLA (PyPI flash-qla) with the gate at one: g = log 1 = 0
    sdpa         causal softmax attention of PyTorch, which has no norm and no beta

A peer is imported when it is asked for: both packages are slow to import, and neither is a dependency.
"""

import functools
import random
from typing import Callable, Optional

import torch
import torch.nn.functional as F

NAMES = ("ours", "fla", "flashqla", "sdpa")
TUNES_ITSELF = ("fla", "flashqla")
"""Peers that compile and try many variants at the first call of a shape."""


def unsupported(peer: str, D: int, sequences: Optional[int]) -> Optional[str]:
    """Why a peer cannot run a shape, or None."""
    if peer == "flashqla" and D != 128:
        return "FlashQLA has head size 128 only"
    if peer == "sdpa" and sequences:
        return "scaled_dot_product_attention takes no packed sequences"
    return None


def load(peer: str) -> Callable:
    """The function of a peer.

    Raises:
        ImportError, ValueError: its package is missing or does not support this device.
    """
    return _LOADERS[peer]()


def _ours():
    from ..kernels.delta_rule import chunk_delta_rule

    return lambda q, k, v, beta, cu: chunk_delta_rule(q, k, v, beta, use_qk_l2norm_in_kernel=True, cu_seqlens=cu)[0]


def _recurrent():
    from ..kernels.delta_rule import recurrent_delta_rule

    return lambda q, k, v, beta, cu: recurrent_delta_rule(q, k, v, beta, use_qk_l2norm_in_kernel=True, cu_seqlens=cu)[0]


def _fla():
    from fla.ops.delta_rule import chunk_delta_rule

    return lambda q, k, v, beta, cu: chunk_delta_rule(q, k, v, beta, use_qk_l2norm_in_kernel=True, cu_seqlens=cu)[0]


def _flashqla():
    from flash_qla import chunk_gated_delta_rule

    @functools.lru_cache(maxsize=1)
    def gate(shape, device):
        return torch.zeros(shape, device=device)

    def rule(q, k, v, beta, cu):
        g = gate(beta.shape, beta.device)
        return chunk_gated_delta_rule(q, k, v, g, beta, use_qk_l2norm_in_kernel=True, cu_seqlens=cu)[0]

    return rule


def _sdpa():
    def rule(q, k, v, beta, cu):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    return rule


_LOADERS = {"ours": _ours, "recurrent": _recurrent, "fla": _fla, "flashqla": _flashqla, "sdpa": _sdpa}


def shorten_tuning(warmup_ms: int, repeat_ms: int) -> None:
    """Let Triton's autotuner spend less on each variant than its 25 and 100 ms: a peer has hundreds of them."""
    import triton.testing
    from triton.runtime.autotuner import Autotuner

    def bench(call, quantiles):
        return triton.testing.do_bench(call, warmup=warmup_ms, rep=repeat_ms, quantiles=quantiles)

    Autotuner.do_bench = property(lambda self: bench)


def compile_only(seed: int) -> None:
    """Let Triton's autotuner run every variant once, in an order of its own, and time none.

    Several processes with different seeds and one cache on disk share the compilation among them.
    """
    from triton.runtime.autotuner import Autotuner

    order, prune = random.Random(seed), Autotuner.prune_configs

    def shuffled(self, kwargs):
        configs = list(prune(self, kwargs))
        order.shuffle(configs)
        return configs

    def bench(call, quantiles):
        call()
        return [1.0, 1.0, 1.0]

    Autotuner.prune_configs = shuffled
    Autotuner.do_bench = property(lambda self: bench)
