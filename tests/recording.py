"""Recorders of decoding steps that count: CUDA graphs, and for a CPU a stand-in."""

import time

import torch

from deltanet.graphs_deltanet import RecordedOnCuda


class Repeated:
    """Records nothing: `replay` calls the function again, on the same tensors and into the same result."""

    def __init__(self, function, device):
        function()
        self.function, self.result = function, function()

    def replay(self):
        with torch.no_grad():
            return self.result.copy_(self.function())


def counting(kind):
    """A subclass of a recorder with the number of recordings and of replays, and the seconds each recording took."""

    class Counting({"cpu": Repeated, "cuda": RecordedOnCuda}[kind]):
        recorded, replayed, seconds = 0, 0, []

        def __init__(self, function, device):
            start = time.perf_counter()
            super().__init__(function, device)
            Counting.recorded += 1
            Counting.seconds.append(time.perf_counter() - start)

        def replay(self):
            Counting.replayed += 1
            return super().replay()

    return Counting
