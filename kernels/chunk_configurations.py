"""Tile shapes and launch options of the chunk kernels: a table, so that nothing is tuned while a program runs.

A key is what a compiled kernel depends on anyway: the kernel, the head sizes, the width of the dtype. T, B and H only
choose between two columns, `wide` where sequences and heads alone fill the card and `narrow` where they do not.
Measured on an H100 (README.md here). A card with less shared memory takes at most 32 columns and two stages, which is
untested, as is AMD.
"""

from typing import NamedTuple, Optional

# Shared memory that the tables below may ask for, in bytes: what Hopper gives to one program.
_HOPPER = 227 * 1024


class Launch(NamedTuple):
    """Columns of V a program takes, Triton's warps and stages, and a bound on the registers of a thread."""

    columns: int
    warps: int
    stages: int
    registers: Optional[int] = None


def _same(*launch: Optional[int]) -> tuple[Launch, Launch]:
    return Launch(*launch), Launch(*launch)


# kernel -> padded K -> (wide, narrow), for 16-bit inputs.
_HALF = {
    "inverse": {size: _same(0, 4, 1, 128) for size in (64, 128, 256)},
    "output": {
        64: (Launch(64, 4, 3), Launch(32, 4, 3)),
        128: (Launch(64, 4, 2), Launch(32, 4, 3)),
        256: (Launch(64, 4, 1), Launch(32, 4, 2)),
    },
    "scan": {
        64: (Launch(64, 4, 2), Launch(32, 4, 3)),
        128: (Launch(64, 4, 2), Launch(32, 4, 3)),
        256: (Launch(64, 8, 2), Launch(32, 4, 2)),
    },
    "gradient": {64: _same(32, 4, 3), 128: _same(16, 4, 3), 256: _same(16, 4, 4)},
}

# The Gluon kernels for Hopper take 16-bit keys of 33 to 128.
_GLUON = {
    kernel: {size: (Launch(64, 4, 2), Launch(32, 4, 2)) for size in (64, 128)} for kernel in ("output", "scan")
}

# For float32 inputs: tiles of twice the size, products in three tf32 passes. K = 256 is for the interpreter alone.
_FULL = {
    "inverse": {size: _same(0, 4, 1) for size in (64, 128, 256)},
    "output": {64: _same(32, 4, 2), 128: _same(16, 4, 2), 256: _same(16, 8, 1)},
    "scan": {64: _same(32, 4, 2), 128: _same(16, 4, 2), 256: _same(16, 8, 1)},
    "gradient": {64: _same(16, 4, 2), 128: _same(16, 8, 2), 256: _same(16, 8, 1)},
}


def launch(
    kernel: str, K: int, V: int, itemsize: int, narrow: bool, shared_memory: int, gluon: bool = False
) -> Launch:
    """The launch of a kernel ("inverse", "output", "scan" or "gradient", the second and third perhaps in their Gluon
    form) for head sizes K and V, and inputs of `itemsize` bytes, on a card whose programs may have `shared_memory` bytes."""
    table = (_FULL if itemsize == 4 else _HALF)[kernel]
    if gluon:
        table = _GLUON.get(kernel, table)
    chosen = table[min(size for size in table if size >= K)][narrow]
    if shared_memory < _HOPPER:
        chosen = chosen._replace(columns=min(chosen.columns, 32), stages=min(chosen.stages, 2))
    return chosen._replace(columns=min(chosen.columns, max(16, 1 << (V - 1).bit_length())))
