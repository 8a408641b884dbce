"""What the fused kernels ask of a device, and what a device has."""

import contextlib
import functools
import os
from typing import Optional

import torch
from torch import Tensor

BACKENDS = ("torch", "recurrent", "triton")

# Bytes of shared memory that a program must be able to have: 16-bit keys of more than 128 need all that Hopper gives,
# float32 keys of more than 64 what an A100 does. float32 keys of more than 128 fit nowhere.
_LONG_KEYS, _LONG_FLOAT32_KEYS = 227 * 1024, 160 * 1024


def forced_backend() -> str:
    """What DELTANET_BACKEND asks for, or nothing; raises ValueError where that is no implementation."""
    forced = os.environ.get("DELTANET_BACKEND", "")
    if forced and forced not in BACKENDS:
        raise ValueError(f"DELTANET_BACKEND is {forced!r}; it may be one of {', '.join(BACKENDS)}, or unset")
    return forced


@functools.cache
def triton_refuses() -> str:
    """Why no Triton kernel can run; empty where they may."""
    version = triton_version()
    if version is None:
        return "Triton is not installed"
    return "" if version >= (3, 6) else f"Triton {version[0]}.{version[1]} is older than 3.6"


def fused_kernels_refuse(device: torch.device, dtype: torch.dtype, K: int) -> str:
    """Why the fused kernels cannot run for queries of `dtype` and head size K on `device`; empty where they can."""
    if dtype == torch.float64:
        return "the Triton kernels do not take float64"
    if device.type != "cuda":
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return "" if interpreted else f"the Triton kernels do not run on {device.type} without TRITON_INTERPRET=1"
    return _gpu_refuses(device, dtype, K)


@functools.cache
def _gpu_refuses(device: torch.device, dtype: torch.dtype, K: int) -> str:
    if dtype == torch.float32 and K > 128:
        return "float32 with heads of more than 128 does not fit the shared memory of the Triton kernels"
    if torch.version.hip is not None:
        return "float32 needs products that Triton has on NVIDIA GPUs only" if dtype == torch.float32 else ""
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the Triton kernels need an NVIDIA GPU of compute capability 8.0 or newer"
    needed = _LONG_KEYS if K > 128 else _LONG_FLOAT32_KEYS if K > 64 and dtype == torch.float32 else 0
    if shared_memory(device) < needed:
        return f"{dtype} with heads of {K} does not fit the {shared_memory(device)} bytes of shared memory of this GPU"
    return ""


_NO_CHANGE = contextlib.nullcontext()


def on_device(x: Tensor):
    """Triton launches on the current device; this makes it that of x."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return _NO_CHANGE
    return torch.cuda.device(x.device)


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; of the interpreter, one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may have; the interpreter knows no bound."""
    if device.type != "cuda":
        return 1 << 20
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)


@functools.cache
def has_copy_engine(device: torch.device) -> bool:
    """Whether the kernels for Hopper run: compute capability 9, and the Triton whose Gluon they are written in."""
    if device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] != 9:
        return False
    return triton_version() == (3, 6)


@functools.cache
def triton_version() -> Optional[tuple[int, ...]]:
    """Major and minor version of Triton, None where it is not installed."""
    try:
        import triton
    except ImportError:
        return None
    return tuple(int(part) for part in triton.__version__.split(".")[:2])


def runs_fused(x: Tensor) -> bool:
    """Whether a small fused kernel, one that is no part of the delta rule itself, takes tensors like x."""
    if forced_backend() in ("torch", "recurrent") or x.numel() == 0:
        return False
    return not (triton_refuses() or fused_kernels_refuse(x.device, x.dtype, K=1))
