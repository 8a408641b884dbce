"""
Captured decoding steps: what one token costs a host that launches hundreds of small kernels is paid once, at capture.

A `DecodeStep` owns static tensors, among them one set of states for a batch, and a recording of the model's forward of one
token over them. While a cache is lent to it, the cache's layers hold the step's tensors in place of their own, so that
replaying the step and reordering beams both work on the cache itself; when the loan ends the cache gets its own tensors
back, with what was computed. A step therefore serves every later cache of the same shapes, and no cache keeps its tensors.
"""

import copy
import threading
from collections.abc import Callable
from operator import getitem, is_
from typing import NamedTuple

import torch
from torch import nn
from transformers.cache_utils import Cache

# Transformers leaves these hooks on a model after the first request for hidden states; they do nothing unless asked.
_HARMLESS_HOOKS = "transformers.utils.output_capturing"
# Modules that do nothing but what a recording repeats; this package's own are added to them.
_KNOWN_MODULES = ("torch.nn.modules.", "transformers.activations.", __name__.rpartition(".")[0] + ".")


class RecordedOnCuda:
    """The work of `function`, which takes nothing and returns a tensor, as a CUDA graph for the current stream.

    The function runs twice before, which compiles and loads what cannot be compiled or loaded while recording.
    """

    def __init__(self, function: Callable[[], torch.Tensor], device: torch.device):
        self.graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
        # The outer context restores the stream after a recording that failed, which the inner one does not.
        with torch.cuda.device(device), torch.cuda.stream(current):
            for _ in range(2):
                self.result = function()
            stream, keeper = _place_to_record(current)
            # Other threads may go on allocating.
            options = {"pool": keeper.pool(), "stream": stream, "capture_error_mode": "thread_local"}
            try:
                with torch.cuda.graph(self.graph, **options):
                    # Not in the memory of the recordings, which the next one to be replayed may overwrite.
                    self.result.copy_(function())
            except RuntimeError:
                _end_recording(current)
                raise

    def replay(self) -> torch.Tensor:
        """Do the work again, on the tensors it was recorded with; the result is overwritten by the next call."""
        self.graph.replay()
        return self.result


_places: dict[tuple, tuple] = {}


def _place_to_record(current: "torch.cuda.Stream") -> tuple["torch.cuda.Stream", "torch.cuda.CUDAGraph"]:
    """The stream to record on and a graph that keeps the memory of all recordings that are replayed on `current`.

    They share it, for one is replayed after the other. The workspace of cuBLAS belongs to it too: one outside could be
    freed under the recordings, which `torch.compile` does, and one for several streams would be used by all at once.
    """
    key = (current.device, current.cuda_stream)
    if key not in _places:
        stream, keeper = torch.cuda.Stream(current.device), torch.cuda.CUDAGraph()
        with torch.cuda.graph(keeper, stream=stream, capture_error_mode="thread_local"):
            torch.zeros(1, device=current.device)
        _places[key] = stream, keeper
    return _places[key]


def _end_recording(current: "torch.cuda.Stream") -> None:
    """After a recording that failed: its memory still waits for more of it, and so does the generator of random numbers,
    which one that succeeds, elsewhere, sets free."""
    _places.pop((current.device, current.cuda_stream), None)
    with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=torch.cuda.Stream(current.device)):
        torch.zeros(1, device=current.device)


RECORDERS = {"cuda": RecordedOnCuda}
"""What records a step, by type of device."""

_COUNT = "cumulative_length"
Slots = list[tuple[dict, object]]
"""Places that hold a cache's tensors: a dictionary and a key each."""


def cache_slots(cache: Cache) -> Slots:
    """The states of every delta-rule layer, and its count of tokens."""
    slots = []
    for layer in cache.layers:
        for states in (layer.conv_states, layer.recurrent_states):
            slots += [(states, index) for index, state in states.items() if state is not None]
        slots.append((vars(layer), _COUNT))
    return slots


def layout(cache: Cache) -> tuple:
    """Shape, dtype and strides of everything in `cache_slots`."""
    tensors = [holder[name] for holder, name in cache_slots(cache)]
    return tuple((tensor.shape, tensor.dtype, tensor.stride()) for tensor in tensors)


class Survey(NamedTuple):
    """What `survey` found out about a model."""

    obstacle: str  # why its forward cannot be recorded, empty where it can
    weights: tuple = ()  # address and layout of every weight; a recording belongs to these


def survey(model: nn.Module) -> Survey:
    """Look at every module and weight of a model once, reading no values."""
    if torch.nn.modules.module._has_any_global_hook():
        return Survey("hooks for all modules are registered")
    weights, device = [], None
    for name, module in _modules(model):
        if obstacle := _obstacle_in(module, is_root=module is model):
            return Survey(f"{f'module `{name}`' if name else 'the model'} {obstacle}")
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            for part in _parts(tensor):
                device = device or part.device
                if type(part) not in (torch.Tensor, nn.Parameter) or part.device != device:
                    return Survey(f"`{name}` has a weight that is a {type(part).__name__} on {part.device}")
                weights.append((part.data_ptr(), part.dtype, part.shape, part.stride()))
    return Survey("", tuple(weights))


def _modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """As `named_modules`, level by level, in a third of the time: every call of `generate` asks."""
    found, seen = [("", model)], {model}
    for prefix, parent in found:  # which grows meanwhile
        for name, module in parent._modules.items():
            if module is not None and module not in seen:
                seen.add(module)
                found.append((f"{prefix}.{name}" if prefix else name, module))
    return found


def _parts(tensor: torch.Tensor | None) -> list[torch.Tensor]:
    """What holds a weight's values: itself, or the tensors inside of a quantized one. One that is sharded stays whole."""
    if tensor is None:
        return []
    if not hasattr(tensor, "__tensor_flatten__") or hasattr(tensor, "to_local"):
        return [tensor]
    return [part for name in tensor.__tensor_flatten__()[0] for part in _parts(getattr(tensor, name))]


def _obstacle_in(module: nn.Module, is_root: bool) -> str:
    if module._forward_hooks or module._forward_pre_hooks or "_hf_hook" in vars(module):
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if "_hf_hook" in vars(module) or any(getattr(x, "__module__", None) != _HARMLESS_HOOKS for x in hooks):
            return "has hooks"
    kind = type(module)
    if not is_root and not f"{kind.__module__}.".startswith(_KNOWN_MODULES):
        return f"is a {kind.__module__}.{kind.__qualname__}"
    if module._compiled_call_impl is not None or "forward" in vars(module):
        return "has a forward of its own"
    return "is in training mode" if module.training else ""


class DecodeStep:
    """A recording of `forward(model, ids [B, 1], past_key_values=...)`, its static tensors, and the key it is found by."""

    def __init__(self, forward: Callable, model: nn.Module, cache: Cache, input_ids: torch.Tensor, key: tuple):
        self.key, device = key, input_ids.device
        # Tensors made under `torch.inference_mode` could not be updated outside of it.
        with torch.inference_mode(False), torch.no_grad():
            self.ids = torch.zeros(input_ids.shape, dtype=torch.long, device=device)
            counts = torch.zeros(len(cache.layers), dtype=torch.long, device=device)
            twin = Cache(layers=copy.deepcopy(cache.layers))
            for layer in twin.layers:
                # On the host, which a recording leaves out: one addition for all layers replaces one for each.
                layer.cumulative_length = torch.zeros((), dtype=torch.long)

            def step() -> torch.Tensor:
                outputs = forward(model, self.ids, past_key_values=twin, use_cache=True, logits_to_keep=1)
                counts.add_(1)
                return outputs.logits

            self.recording = RECORDERS[device.type](step, device)
        count = iter(counts[i] for i in range(len(counts)))
        self.tensors = [next(count) if name == _COUNT else holder[name] for holder, name in cache_slots(twin)]
        self.reordering = None  # beam search alone needs it

    def run(self, input_ids: torch.Tensor) -> torch.Tensor:
        """ids [B, 1] -> logits [B, 1, vocabulary], the caller's own."""
        self.ids.copy_(input_ids)
        return self.recording.replay().clone()

    def record_reordering(self) -> None:
        """Record `reorder`: four launches a layer, which a host takes longer for than for the token itself."""
        states = [tensor for tensor in self.tensors if tensor.ndim > 0]
        with torch.inference_mode(False), torch.no_grad():
            # An order that changes nothing, because recording runs the function.
            self.rows = torch.arange(len(self.ids), device=self.ids.device)

            def reorder() -> torch.Tensor:
                for state in states:
                    state.copy_(state.index_select(0, self.rows))
                return self.rows

            self.reordering = RECORDERS[self.ids.device.type](reorder, self.ids.device)

    def reorder(self, rows: torch.Tensor) -> None:
        """Row b of every state becomes what row rows[b] was."""
        self.rows.copy_(rows)
        self.reordering.replay()


class Loan:
    """A cache whose layers hold the tensors of a step until `end`."""

    def __init__(self, cache: Cache, step: DecodeStep):
        self.cache, self.step = cache, step
        self.holders, self.names = zip(*cache_slots(cache))
        self.own = list(map(getitem, self.holders, self.names))
        torch._foreach_copy_(step.tensors, self.own)
        for holder, name, tensor in zip(self.holders, self.names, step.tensors):
            holder[name] = tensor

    def is_intact(self) -> bool:
        """Whether the cache still holds the step's tensors and a prompt: a change of batch size or a reset ends that."""
        held = map(getitem, self.holders, self.names)
        return self.cache.layers[0].has_previous_state[0] and all(map(is_, held, self.step.tensors))

    def end(self) -> None:
        """Give the cache its own tensors back, with the step's values, except where it has taken others meanwhile."""
        own, values = [], []
        for holder, name, tensor, lent in zip(self.holders, self.names, self.own, self.step.tensors):
            if holder[name] is lent:
                holder[name] = tensor
                own.append(tensor)
                values.append(lent)
        if own:
            torch._foreach_copy_(own, values)


class DecodeGraphs:
    """
    The captured decoding steps of a model between calls of `generate`, each for one batch size.

    Copies and pickles of a model take no steps along. A step keeps one set of states of its batch allocated, for the 1.3B
    model in bfloat16 24.8 MiB a sequence, its logits, and a graph; what a token computes in between is shared by all steps.

    Attributes:
        enabled: False decodes eagerly, as does DELTANET_DECODE_GRAPHS=0 in the environment.
        limit: how many unused steps are kept; the one unused for longest goes first.
    """

    def __init__(self, enabled: bool = True, limit: int = 4):
        self.enabled, self.limit = enabled, limit
        self.failures: dict[tuple, str] = {}  # keys that could not be captured, and why
        self._idle: list[DecodeStep] = []
        self._lock = threading.Lock()

    def __reduce__(self):
        return type(self), (self.enabled, self.limit)

    def __len__(self) -> int:
        return len(self._idle)

    def take(self, key: tuple) -> DecodeStep | None:
        """A kept step for `key`, which is then the caller's; those for other weights, `key[0]`, are dropped."""
        with self._lock:
            self._idle = [step for step in self._idle if step.key[0] == key[0]]
            for index, step in enumerate(self._idle):
                if step.key == key:
                    return self._idle.pop(index)
        return None

    def give_back(self, step: DecodeStep) -> None:
        with self._lock:
            self._idle = [*self._idle, step][-self.limit :] if self.limit > 0 else []

    def release(self) -> None:
        """Free the memory of all unused steps, and try again what could not be captured."""
        with self._lock:
            self._idle.clear()
            self.failures.clear()


__all__ = ["RECORDERS", "DecodeGraphs", "DecodeStep", "Loan", "Survey", "layout", "survey"]
