"""The states of a server in slots, with the fused kernels on a GPU; vLLM itself is not needed."""

import copy

import pytest
import torch
from models import tiny_config

from deltanet.mixer_deltanet import DeltaNetRMSNorm
from deltanet.serving.recurrence import NULL_SLOT, Recurrence

pytestmark = pytest.mark.gpu

LIMITS = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2.5e-2}
"""Relative, against float64 on the same inputs; 16-bit convolutions round what the delta rule is given."""
LENGTHS = [1, 2, 63, 64, 65, 300, 1000]
DECODED = 20
SLOTS = 12


class Server:
    """A recurrence with slots of NaN, projections of requests [tokens, D], and a float64 twin of both."""

    def __init__(self, dtype, device, head_dim, lengths):
        generator = torch.Generator().manual_seed(0)
        self.recurrence = Recurrence(tiny_config(hidden_size=4 * head_dim, num_heads=4), 4)
        shape, channels = self.recurrence.state_shapes[0], self.recurrence.state_shapes[1][0]
        self.weight = (torch.randn(channels, 1, 4, generator=generator) / 2).to(dtype).to(device)
        self.qkv = [torch.randn(n + DECODED, channels, generator=generator).to(dtype).to(device) for n in lengths]
        self.b = [torch.randn(n + DECODED, 4, generator=generator).to(dtype).to(device) for n in lengths]
        self.norm = DeltaNetRMSNorm(head_dim, 1e-5).requires_grad_(False).to(device, dtype)
        torch.nn.init.normal_(self.norm.weight, 1, 0.2, generator=torch.Generator(device).manual_seed(0))
        # A page of bytes for each slot, so that neither state is contiguous over slots.
        sizes = 4 * torch.Size(shape).numel(), dtype.itemsize * channels * 3
        pages = torch.full((SLOTS, sum(sizes) + 128), 0xFF, dtype=torch.uint8, device=device)
        states, convolutions = (part for part in pages[:, : sum(sizes)].split(sizes, 1))
        self.states = states.view(torch.float32).view(SLOTS, *shape), convolutions.view(dtype).view(SLOTS, channels, 3)
        self.slots = torch.arange(len(lengths), dtype=torch.int32, device=device) + 2

    def expected(self, i):
        """Of request i, in one piece."""
        double = {"dtype": torch.float64, "device": "cpu"}
        states = tuple(torch.zeros(2, *shape, **double) for shape in self.recurrence.state_shapes)
        qkv, b, weight = (x.to(**double) for x in (self.qkv[i], self.b[i], self.weight))
        norm = copy.deepcopy(self.norm).to(**double)
        layout = (torch.tensor([1]), torch.tensor([False]), torch.tensor([0, len(qkv)]))
        return self.recurrence.prefill(qkv, b, None, weight, norm, states, *layout)

    def prefill(self, pieces, known):
        """`pieces` are (start, stop) of the requests."""
        parts = [(x[start:stop], y[start:stop]) for x, y, (start, stop) in zip(self.qkv, self.b, pieces)]
        qkv, b = (torch.cat(list(x)) for x in zip(*parts))
        counts = torch.tensor([b - a for a, b in pieces], device=qkv.device)
        bounds = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
        known = torch.full((len(pieces),), known, device=qkv.device)
        o = self.recurrence.prefill(qkv, b, None, self.weight, self.norm, self.states, self.slots, known, bounds)
        return o.split(counts.tolist())

    def inputs_of_step(self, step):
        rows = [(x[step - DECODED], y[step - DECODED]) for x, y in zip(self.qkv, self.b)]
        return [torch.stack(list(x)) for x in zip(*rows)]

    def decode(self, qkv, b, slots):
        return self.recurrence.decode(qkv, b, None, self.weight, self.norm, self.states, slots)


def relative_error(actual, expected):
    return ((actual.double().cpu() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_prompts_in_two_pieces_and_decoding_over_pages(device, dtype, head_dim):
    if dtype == torch.float32 and head_dim == 256:
        pytest.skip("the kernels do not take float32 heads of 256")
    server = Server(dtype, device, head_dim, LENGTHS)
    halves = [(n + 1) // 2 for n in LENGTHS]
    outputs = [[o] for o in server.prefill([(0, half) for half in halves], known=False)]
    second = server.prefill([(half, n) for half, n in zip(halves, LENGTHS)], known=True)
    for step in range(DECODED):
        decoded = server.decode(*server.inputs_of_step(step), server.slots)
        for i, row in enumerate(decoded):
            outputs[i].append(row[None])
    for i, parts in enumerate(outputs):
        parts.insert(1, second[i])
        assert relative_error(torch.cat(parts), server.expected(i)) < LIMITS[dtype], LENGTHS[i]


def test_a_captured_step_with_rows_to_spare_continues_the_states(cuda):
    server = Server(torch.bfloat16, cuda, 128, [5, 70])
    outputs = [[o] for o in server.prefill([(0, 5), (0, 70)], known=False)]
    qkv, b = (torch.cat([x, x]) for x in server.inputs_of_step(0))
    slots = torch.full((4,), NULL_SLOT, dtype=torch.int32, device=cuda)

    def step():
        return server.decode(qkv, b, slots)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()  # of no request: every row is to spare
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = step()
    slots[:2] = server.slots
    for number in range(DECODED):
        for target, new in zip((qkv, b), server.inputs_of_step(number)):
            target[:2] = new
        graph.replay()
        for i in range(2):
            outputs[i].append(o[i : i + 1].clone())
        assert (o[2:] == 0).all()
    for i, parts in enumerate(outputs):
        assert relative_error(torch.cat(parts), server.expected(i)) < LIMITS[torch.bfloat16]
