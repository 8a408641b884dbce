"""Units of `gpu_parallel` that run under torchrun: context and tensor parallelism against one device.

    torchrun --nproc-per-node 2 -m deltanet.benchmarks.parallel_worker UNIT ... [--device cuda] [--tiny] --scratch FOLDER

Every process computes the one-device figures too, each on its own device. The first prints a row a unit as JSON.
"""

import argparse
import json
import os
import pathlib
import statistics
import time

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from .. import DeltaNetConfig, DeltaNetForCausalLM
from ..context_parallel_deltanet import segment_of
from ..kernels.context_parallel import context_parallel_delta_rule, segment
from ..kernels.delta_rule import chunk_delta_rule
from .timing import synchronize

GRADIENTS = ("dq", "dk", "dv", "dbeta")
EXACT_LENGTH = 32768
"""The length at which both are compared with float64, which takes its time."""


class Sent:
    """Counts what this process receives of others in all-gathers."""

    def __init__(self):
        self.bytes, self.gather = 0, dist.all_gather_into_tensor

    def __enter__(self):
        dist.all_gather_into_tensor = self
        return self

    def __exit__(self, *_):
        dist.all_gather_into_tensor = self.gather

    def __call__(self, out, x, group=None):
        self.bytes += out.numel() * out.element_size() - x.numel() * x.element_size()
        return self.gather(out, x, group=group)


def milliseconds(work, device, repeats: int = 5) -> float:
    """Median wall time of a call that all processes make together, as the slowest of them sees it; two calls warm up.

    The number of calls is fixed, because processes that disagreed about it would wait for each other for ever."""
    times = []
    for _ in range(repeats + 2):
        synchronize(device)
        dist.barrier()
        start = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - start)
    slowest = torch.tensor(statistics.median(times[2:]) * 1e3, device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return slowest.item()


def peak_gib(work, device) -> float:
    """The most memory that a process had during a call of `work`, zero on a CPU."""
    if torch.device(device).type != "cuda":
        work()
        return 0.0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    work()
    peak = torch.tensor(torch.cuda.max_memory_allocated(device) / 2**30, device=device)
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    return peak.item()


def relative_error(actual, expected) -> float:
    """Relative L2 error of a tensor of which every process has a part."""
    sums = torch.stack([((actual.double() - expected.double()) ** 2).sum(), (expected.double() ** 2).sum()])
    dist.all_reduce(sums)
    return (sums[0] / sums[1]).sqrt().item()


def context(T: int, device, tiny: bool, **_) -> dict:
    """The delta rule of a 1.3B layer, B 1, bfloat16, forward and backward, the tokens divided among the devices."""
    H, D = (2, 16) if tiny else (16, 128)
    generator = torch.Generator(device).manual_seed(0)
    q, k, v, do = (torch.randn(1, T, H, D, device=device, dtype=torch.bfloat16, generator=generator) for _ in range(4))
    inputs = [*(x.requires_grad_() for x in (q, k, v)), torch.rand(1, T, H, device=device, generator=generator)]
    inputs[3].requires_grad_()
    own = [segment_of(x, None).detach().clone().requires_grad_() for x in inputs]
    place, own_do = segment(None, T // dist.get_world_size()), segment_of(do, None).contiguous()

    def one():
        o, _ = chunk_delta_rule(*inputs, use_qk_l2norm_in_kernel=True)
        return [o.detach(), *torch.autograd.grad(o, inputs, do)]

    def shared():
        o, _ = context_parallel_delta_rule(*own, place, use_qk_l2norm_in_kernel=True)
        return [o.detach(), *torch.autograd.grad(o, own, own_do)]

    with Sent() as sent:
        actual = shared()
    expected = [segment_of(x, None) for x in one()]
    names = ("o", *GRADIENTS)
    row = {"difference": dict(zip(names, map(relative_error, actual, expected)))}
    if T == EXACT_LENGTH or tiny:
        exact = [x.detach().double().requires_grad_() for x in inputs]
        o, _ = chunk_delta_rule(*exact, use_qk_l2norm_in_kernel=True)
        exact = [segment_of(x, None) for x in (o.detach(), *torch.autograd.grad(o, exact, do.double()))]
        row["error"] = dict(zip(names, map(relative_error, actual, exact)))
        row["error_one"] = dict(zip(names, map(relative_error, expected, exact)))
        del exact, o
    del actual, expected

    def forward(rule):
        with torch.no_grad():
            rule()

    rules = {
        "forward_ms": lambda: context_parallel_delta_rule(*own, place, use_qk_l2norm_in_kernel=True),
        "forward_one_ms": lambda: chunk_delta_rule(*inputs, use_qk_l2norm_in_kernel=True),
    }
    row.update({name: milliseconds(lambda: forward(rule), device) for name, rule in rules.items()})  # noqa: B023
    row["forward_backward_ms"], row["forward_backward_one_ms"] = (milliseconds(x, device) for x in (shared, one))
    return {"shape": f"B1_T{T}_H{H}_D{D}", "received_bytes": sent.bytes, **row}


def build(size: str, tiny: bool, **fields) -> DeltaNetConfig:
    if tiny:
        return DeltaNetConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_heads=2, **fields)
    return DeltaNetConfig.delta_net_340m(**fields) if size == "340m" else DeltaNetConfig.delta_net_1_3b(**fields)


def model(T: int, device, tiny: bool, **_) -> dict:
    """A training step's forward and backward of the 340M model over one row: autocast, gradient checkpointing."""
    torch.manual_seed(0)
    net = DeltaNetForCausalLM(build("340m", tiny)).to(device).train()
    net.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(0, net.config.vocab_size, (1, T), generator=torch.Generator().manual_seed(1)).to(device)
    row = {"shape": f"340M_B1_T{T}"}

    def step(tokens):
        net.zero_grad(set_to_none=True)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            loss = net(tokens, labels=tokens).loss
        loss.backward()
        return loss.detach()

    def gradient_norm():
        return torch.stack([p.grad.double().norm() for p in net.parameters()]).norm().item()

    net.set_context_parallel(dist.group.WORLD)
    own = segment_of(ids, None)
    with Sent() as sent:
        loss = step(own)
    dist.all_reduce(loss)
    for parameter in net.parameters():
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()
    row.update(loss=loss.item() / dist.get_world_size(), gradient_norm=gradient_norm(), received_bytes=sent.bytes)
    row["peak_gib"], row["ms"] = peak_gib(lambda: step(own), device), milliseconds(lambda: step(own), device, repeats=3)
    net.set_context_parallel(None)
    try:
        row.update(loss_one=step(ids).item(), gradient_norm_one=gradient_norm())
        row["peak_one_gib"] = peak_gib(lambda: step(ids), device)
        row["one_ms"] = milliseconds(lambda: step(ids), device, repeats=3)
    except torch.OutOfMemoryError:
        row["one_error"] = "out of memory"
    return row


def tensor(device, tiny: bool, scratch: pathlib.Path, **_) -> dict:
    """A 1.3B model of random weights by `tp_plan="auto"`: float32 for what is equal, bfloat16 for the speed."""
    folder, (batch, prompt, new) = scratch / "tensor", (2, 8, 8) if tiny else (8, 512, 64)
    if dist.get_rank() == 0:
        torch.manual_seed(0)
        DeltaNetForCausalLM(build("1.3b", tiny, initializer_range=0.05)).save_pretrained(folder)
    dist.barrier()
    ids = torch.randint(3, 64, (batch, prompt), generator=torch.Generator().manual_seed(1)).to(device)

    def load(dtype, parallel):
        plan = {"distributed_config": DistributedConfig(tp_size=dist.get_world_size(), tp_plan="auto")} if parallel else {}
        net = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **plan).eval()
        return net if parallel else net.to(device)

    def generate(net):
        return net.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False)

    row = {"shape": f"1.3B_B{batch}_T{prompt}_new{new}", "decoding": "eager"}

    @torch.no_grad()
    def measure(dtype, parallel):
        net, key = load(dtype, parallel), f"{str(dtype)[6:]}_{'two' if parallel else 'one'}"
        logits, tokens = net(ids, use_cache=False).logits, generate(net)
        row[f"{key}_prefill_ms"] = milliseconds(lambda: net(ids, use_cache=False), device)
        row[f"{key}_generate_ms"] = milliseconds(lambda: generate(net), device, repeats=1)
        row[f"{key}_peak_gib"] = peak_gib(lambda: generate(net), device)
        return logits, tokens[:, prompt:]

    for dtype in (torch.float32, torch.bfloat16):
        (expected, expected_tokens), (actual, tokens) = (measure(dtype, parallel) for parallel in (False, True))
        row[f"{str(dtype)[6:]}_logits_error"] = relative_error(actual, expected)
        row[f"{str(dtype)[6:]}_equal_tokens"] = (tokens == expected_tokens).float().mean().item()
    return row


UNITS = {"context": context, "model": model, "tensor": tensor}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("units", nargs="+", help="context-T, model-T or tensor")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--scratch", type=pathlib.Path, required=True)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    for unit in arguments.units:
        kind, _, length = unit.partition("-")
        T = int(length or 0) // (256 if arguments.tiny else 1)
        row = UNITS[kind](T=T, device=device, tiny=arguments.tiny, scratch=arguments.scratch)
        if dist.get_rank() == 0:
            print(json.dumps(row), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
