"""A training step as a CUDA graph: a small model's kernels take less time than their launches."""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

_WARMUP = 3  # eager steps that compile kernels and create the optimizer's state
logger = logging.getLogger(__name__)


class RecordedStep:
    """
    Calls `step(*batch)`; on a GPU the fourth call records it and every later one replays the record on its own batch.

    Args:
        step: reads nothing but its arguments and what stays in place (weights, optimizer state), returns nothing, never
            waits for the device and depends on no values.
        device: of the batches, all of the first batch's shapes.
    """

    def __init__(self, step: Callable[..., None], device: str):
        self.step, self.calls = step, 0
        self.graph, self.batch = None, None
        self.stream = torch.cuda.Stream(device) if device.startswith("cuda") else None

    @property
    def is_recorded(self) -> bool:
        return self.graph is not None

    def __call__(self, *batch: Tensor) -> None:
        self.calls += 1
        if self.stream is None:
            self.step(*batch)
            return
        if self.calls == _WARMUP + 1:
            self._record(batch)
        if self.graph is None:
            self._aside(batch)
            return
        for own, given in zip(self.batch, batch):
            own.copy_(given)
        self.graph.replay()

    def _aside(self, batch) -> None:
        """On the stream of the recording, as PyTorch asks for the steps before it."""
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            self.step(*batch)
        current.wait_stream(self.stream)

    def _record(self, batch) -> None:
        graph, own = torch.cuda.CUDAGraph(), [part.clone() for part in batch]
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                self.step(*own)
        except RuntimeError as error:
            logger.warning("The training step cannot be recorded and runs launch by launch: %s", error)
            return
        self.graph, self.batch = graph, own
