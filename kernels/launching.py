"""Launching a Triton kernel with little work on the host.

Triton's own launch looks at every argument again to find the compiled kernel, which on a slow CPU takes 100 microseconds:
more than the kernels of a small batch. Here a compiled kernel is kept under what it was compiled for, and a `Prepared`
launch keeps all that is the same for every tensor of its shapes.
"""

import inspect
from typing import Callable, Optional

import torch
from torch import Tensor

try:  # Transformers wants every package that custom code imports outside of a `try`
    from triton import knobs
    from triton.runtime import driver
except ImportError as error:
    raise ImportError("the fused kernels need Triton") from error
try:
    from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST as NUMBER_OF_TYPE
except ImportError:  # another Triton than the one that `_direct` knows
    NUMBER_OF_TYPE = None

from .devices import triton_version

_compiled: dict = {}


class Prepared:
    """
    A kernel in a one-dimensional grid, ready but for its tensors, which are the first of its parameters.

    `numbers` are the parameters behind the tensors, `constants` the constexpr ones and `options` Triton's, both by name.
    Where there are `tiles`, as many of the first tensors are read through the copy engine and each tile makes the descriptor
    of one; such a launch is for tensors of one shape and layout. A launch belongs to one device. The kernel must not
    specialise on integers or floats.
    """

    def __init__(self, kernel, programs: int, numbers: tuple, constants: dict, options: dict, tiles: tuple = ()):
        self.kernel, self.programs, self.numbers, self.tiles = kernel, programs, numbers, tiles
        self.constants, self.options = constants, options
        self.ready: dict[tuple, Callable] = {}

    def __call__(self, *tensors: Optional[Tensor]) -> None:
        """Run on the current device, which is that of the tensors; None is a pointer that the kernel does not use."""
        pointers = [0 if x is None else x.data_ptr() for x in tensors]
        together = 0
        for pointer in pointers:
            together |= pointer
        # A kernel is compiled for dtypes, and for pointers that are multiples of 16 or are not.
        aligned = not together % 16 or tuple([not pointer % 16 for pointer in pointers])
        key = aligned, *[None if x is None else x.dtype for x in tensors]
        if (run := self.ready.get(key)) and not _is_watched():
            run(pointers)
        else:
            self._run_first(tensors, pointers, key)

    def _run_first(self, tensors, pointers: list[int], key: tuple) -> None:
        count, device = len(self.tiles), tensors[0].device
        described = [tile(x) for tile, x in zip(self.tiles, tensors)]
        arguments = (*described, *tensors[count:], *self.numbers)
        if device.type != "cuda":
            self.kernel[(self.programs,)](*arguments, **self.constants, **self.options)
            return
        shapes = tuple([tuple(x.block_shape) for x in described])
        traits = (id(self.kernel), device.index, key, shapes, *map(_width, self.numbers))
        traits += (*self.constants.values(), *self.options.values())
        if traits not in _compiled:
            _compiled[traits] = self.kernel[(self.programs,)](*arguments, **self.constants, **self.options)
            return
        compiled, values = _compiled[traits], [self.constants[x] for x in self.kernel.arg_names[len(arguments) :]]
        run = _direct(compiled, self.programs, device.index, described, (*self.numbers, *values))
        if run and not _is_watched():
            self.ready[key] = run
            run(pointers)
        else:
            compiled[(self.programs, 1, 1)](*arguments, *values)


def _width(number: int | float):
    """What a kernel is compiled for of a number: an integer's width, as its value never is."""
    return -(2**31) <= number < 2**31 if isinstance(number, int) else float


def _is_watched() -> bool:
    """Whether a profiler wants to hear of every launch; Triton 3.6 knows how to tell it."""
    return bool(knobs.runtime.launch_enter_hook.calls or knobs.runtime.launch_exit_hook.calls)


def _direct(compiled, programs: int, device: int, described: list, values: tuple) -> Optional[Callable[[list[int]], None]]:
    """
    A function of the pointers that does what `compiled[grid](*arguments)` does, past what Triton prepares anew each time: a
    few microseconds instead of tens.

    None where this is not the Triton whose inside is known here, or where the kernel needs more than this.
    """
    launcher = compiled.run
    if triton_version() != (3, 6) or torch.version.hip is not None:
        return None
    if launcher.global_scratch_size or launcher.profile_scratch_size:
        return None
    layouts, launch = [], launcher.launch
    if described:
        meta = compiled.metadata.tensordesc_meta
        if not meta or None in meta:
            return None
        layouts = [_copy_engine_layout(*pair) for pair in zip(described, meta)]
        # It hides in a function that looks for descriptors among all arguments.
        launch = inspect.getclosurevars(launch).nonlocals["launcher"]
    fill, stream = driver.active.utils.fill_tma_descriptor, driver.active.get_current_stream
    before = (compiled.function, launcher.launch_cooperative_grid, launcher.launch_pdl, None, None, compiled.packed_metadata)
    count = len(layouts)

    def run(pointers: list[int]) -> None:
        maps = [x for pointer, (how, sizes) in zip(pointers, layouts) for x in (fill(pointer, *how), *sizes)]
        launch(programs, 1, 1, stream(device), *before, None, None, None, *maps, *pointers[count:], *values)

    return run


def _copy_engine_layout(x, meta: dict) -> tuple[tuple, tuple]:
    """What the driver wants to know of a descriptor besides its pointer, and the numbers that follow it in a launch."""
    kind = NUMBER_OF_TYPE[meta["elem_type"]]
    how = (meta["swizzle"], meta["elem_size"], kind, meta["block_size"], x.shape, x.strides, 0)
    return how, (*x.shape, *x.strides)
