"""Launching a Triton kernel with little work on the host.

Triton's own launch looks at every argument again to find the compiled kernel, which on a slow CPU takes 100 microseconds:
more than the kernels of a small batch. Here a compiled kernel is kept under what it was compiled for.
"""

from torch import Tensor

_compiled: dict = {}


def _traits(x):
    """What a kernel is compiled for: a tensor's dtype and alignment, an integer's width, as its value never is."""
    if isinstance(x, Tensor):
        return x.dtype, x.data_ptr() % 16 == 0
    if isinstance(x, int):
        return -(2**31) <= x < 2**31
    if x is None or isinstance(x, float):
        return type(x)
    return x.base.dtype, *x.block_shape  # a descriptor for the copy engine


def enqueue(kernel, programs: int, arguments: tuple, constants: dict, options: dict) -> None:
    """Run `kernel` in a one-dimensional grid on the current device: `arguments` in the order of its parameters, then its
    constexpr parameters and Triton's options by name. The kernel must not specialise on integers or floats."""
    tensor = next(x for x in arguments if isinstance(x, Tensor))
    if tensor.device.type != "cuda":
        kernel[(programs,)](*arguments, **constants, **options)
        return
    traits = tuple([_traits(x) for x in arguments])
    key = (id(kernel), tensor.device.index, traits, *constants.values(), *options.values())
    if key not in _compiled:
        compiled = kernel[(programs,)](*arguments, **constants, **options)
        _compiled[key] = compiled, [constants[name] for name in kernel.arg_names[len(arguments) :]]
        return
    compiled, values = _compiled[key]
    compiled[(programs, 1, 1)](*arguments, *values)
