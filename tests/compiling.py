"""What the kernels become on a Hopper GPU, found out without one.

A call over meta tensors, for the chunk kernels a forward and a backward pass, runs the package's own host code, its kernels
replaced by recorders; what they were given is then compiled for sm_90a, and the resources are read from the code that came
out.
"""

import collections
import contextlib
import multiprocessing
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple
from unittest import mock

import torch

PROCESSORS, SHARED_MEMORY = 132, 227 * 1024  # of an H100, and what one of its programs may have
POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip


class Plan(NamedTuple):
    """One call with gradients; sequences = 0 is a dense batch, otherwise a pack; `hopper` allows the Gluon kernels."""

    dtype: torch.dtype
    B: int
    T: int
    H: int
    K: int
    V: int
    sequences: int = 0
    hopper: bool = True


class Resources(NamedTuple):
    """Registers of a thread, bytes of its stack (what did not fit in registers), bytes of shared memory of a program."""

    registers: int
    stack: int
    shared: int


class Launch(NamedTuple):
    kernel: object
    values: dict
    options: dict

    @property
    def name(self) -> str:
        marks = [name.lower() for name in ("STORE", "FORWARD", "REVERSE") if self.values.get(name)]
        return "_".join([self.kernel.__name__, *marks, f"{self.values.get('BV', 0)}x{self.options.get('num_warps', 4)}"])

    @property
    def key(self) -> tuple:
        """Equal for launches that one compiled kernel serves."""
        dtypes = [str(x.dtype) if isinstance(x, torch.Tensor) else descriptor_type(x) for x in self.values.values()]
        return self.kernel.__name__, *dtypes, *self.constants.items(), *sorted(self.options.items())

    @property
    def constants(self) -> dict:
        """What the code is compiled for: constexpr parameters, and pointers that are not given."""
        constexpr = [parameter.name for parameter in self.kernel.params if parameter.is_constexpr]
        return {name: x for name, x in self.values.items() if x is None or name in constexpr}


def descriptor_type(x) -> str | None:
    """How Triton writes the type of a host-side descriptor of Gluon; None of anything else."""
    if not hasattr(x, "block_shape"):
        return None
    return f"tensordesc<{POINTERS[x.base.dtype][1:]}{list(x.block_shape)},{x.layout!r}>"


class _Recorder:
    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return self.record

    def record(self, *arguments, **named):
        names = self.kernel.arg_names
        values = dict(zip(names, arguments)) | {name: x for name, x in named.items() if name in names}
        options = {name: x for name, x in named.items() if name not in names}
        self.launches.append(Launch(self.kernel, values, options))


@contextlib.contextmanager
def recording(module, **device):
    """The list that fills with what the host code of `module` launches, on meta tensors and for a `device` of these
    figures."""
    found = []
    with contextlib.ExitStack() as stack:
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            stack.enter_context(mock.patch.object(module, name, _Recorder(getattr(module, name), found)))
        # What is kept from call to call holds kernels.
        for name in [name for name in ("keep_plan", "launch") if hasattr(getattr(module, name, None), "cache_clear")]:
            stack.enter_context(mock.patch.object(module, name, getattr(module, name).__wrapped__))
        for name, value in device.items():
            stack.enter_context(mock.patch.object(module, name, lambda _, value=value: value))
        stack.enter_context(torch.device("meta"))
        yield found


def launches(plan: Plan) -> list[Launch]:
    """What a forward and a backward pass launch, with the L2 norm, an initial and a final state."""
    from deltanet.kernels import chunk

    with recording(chunk, processors=PROCESSORS, shared_memory=SHARED_MEMORY, has_copy_engine=plan.hopper) as found:
        B, T, H = plan.B, plan.T, plan.H
        q, v = torch.empty(B, T, H, plan.K, dtype=plan.dtype), torch.empty(B, T, H, plan.V, dtype=plan.dtype)
        beta, h0 = torch.empty(B, T, H), torch.empty(plan.sequences or B, H, plan.K, plan.V)
        bounds = torch.empty(plan.sequences + 1, dtype=torch.int64) if plan.sequences else None
        _, _, *saved = chunk.chunk_forward(q, q, v, beta, 1.0, h0, True, True, bounds)
        chunk.chunk_backward(v, h0, q, q, v, beta, *saved, 1.0, h0, True, bounds)
    return list({launch.key: launch for launch in found}.values())


def specialisations(launch: Launch) -> list[str]:
    """Parameters whose value or address would make Triton compile again: 1, a multiple of 16, an odd start."""
    found = []
    for parameter in launch.kernel.params:
        value = launch.values[parameter.name]
        if isinstance(value, torch.Tensor):
            if value.storage_offset() * value.itemsize % 16:
                found.append(parameter.name)
        elif descriptor_type(value):
            continue
        elif parameter.name not in launch.constants and not parameter.do_not_specialize:
            found.append(parameter.name)
    return found


def _source(launch: Launch):
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    signature, attributes = {}, {}
    for place, (name, x) in enumerate(launch.values.items()):
        if name in launch.constants:
            signature[name] = "constexpr"
        elif descriptor_type(x):
            signature[name] = descriptor_type(x)
        elif isinstance(x, torch.Tensor):
            signature[name], attributes[place,] = POINTERS[x.dtype], [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if isinstance(x, float) else "i32"
            if x % 16 == 0 and not launch.kernel.params[place].do_not_specialize:
                attributes[place,] = [["tt.divisibility", 16]]
    source = GluonASTSource if launch.kernel.is_gluon() else ASTSource
    return source(fn=launch.kernel, signature=signature, constexprs=launch.constants, attrs=attributes)


def compile_launch(launch: Launch):
    """Compile for sm_90a with the assembler that Triton brings along."""
    import triton
    from triton.backends.compiler import GPUTarget

    return triton.compile(_source(launch), target=GPUTarget("cuda", 90, 32), options=launch.options)


def resources(compiled) -> Resources:
    from triton.knobs import nvidia

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    return Resources(registers, stack, compiled.metadata.shared)


def _compile(plan: Plan, index: int) -> Resources:
    return resources(compile_launch(launches(plan)[index]))  # kernels cannot be sent to another process, but are found again


def compile_plans(plans: list[Plan], processes: int = 2) -> dict[Plan, dict[str, Resources]]:
    """The resources of every launch of every plan; launches that share a kernel are compiled once."""
    tasks, results = {}, collections.defaultdict(dict)
    # A fork would take along the threads of this process.
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        for plan in plans:
            for index, launch in enumerate(launches(plan)):
                if launch.key not in tasks:
                    tasks[launch.key] = pool.submit(_compile, plan, index)
                results[plan][launch.name] = tasks[launch.key]
        return {plan: {name: task.result() for name, task in tasks.items()} for plan, tasks in results.items()}
