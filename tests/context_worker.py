"""What every process of test_context_parallel.py computes: its own segment of seeded sequences, on two and four ranks."""

import torch
import torch.distributed as dist
from launching import join, report
from models import tiny_model, token_ids
from oracle import tokens

from deltanet.cache_deltanet import CACHE_NAME
from deltanet.context_parallel_deltanet import segment_of
from deltanet.kernels.context_parallel import context_parallel_delta_rule, neighbouring_inputs, segment
from deltanet.kernels.short_conv import short_convolution

# Name to (rows, tokens of all ranks, bounds of packed sequences or none). The bounds: sequences that cover several
# segments, begin or end at the edge of one, are empty, or lie inside one; and unused tokens at the end.
CASES = {
    "rows": (2, 300, None),
    "short": (1, 12, None),
    "pack": (1, 280, [0, 3, 139, 139, 150, 210, 211, 280]),
    "edges": (1, 280, [0, 70, 72, 140, 280]),
    "one": (1, 280, [0, 280]),
    "tail": (1, 280, [0, 20, 100]),
}
H, K, V, WIDTH = 2, 8, 5, 4


def rule_inputs(name):
    """q, k, v, beta and the gradient of o, of all ranks; float64, beta up to 2 and keys without normalisation."""
    rows, length, bounds = CASES[name]
    q, k, v, beta = tokens(rows, length, H, K, V, dtype=torch.float64)
    do = torch.randn(v.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return [q, k * 1.5, v, beta * 2, do], None if bounds is None else torch.tensor(bounds)


def convolution_inputs(name):
    rows, length, bounds = CASES[name]
    g = torch.Generator().manual_seed(4)
    x, dy = (torch.randn(rows, length, 6, generator=g, dtype=torch.float64) for _ in range(2))
    weight = torch.randn(6, 1, WIDTH, generator=g, dtype=torch.float64)
    return x, weight, dy, None if bounds is None else torch.tensor(bounds)


def with_gradients(function, inputs, gradient):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    result = function(*inputs)
    return [result.detach(), *torch.autograd.grad(result, inputs, gradient)]


def rule(name, group):
    inputs, cu_seqlens = rule_inputs(name)
    *own, do = (segment_of(x, group) for x in inputs)
    place = segment(group, do.shape[1], cu_seqlens)
    return with_gradients(lambda q, k, v, b: context_parallel_delta_rule(q, k, v, b, place, None, False, True)[0], own, do)


def convolution(name, group):
    x, weight, dy, cu_seqlens = convolution_inputs(name)
    place = segment(group, dy.shape[1] // dist.get_world_size(group), cu_seqlens)

    def run(x, weight):
        state, _ = neighbouring_inputs(x, WIDTH, place)
        return short_convolution(x, weight, activation="silu", initial_state=state, cu_seqlens=place.cu_seqlens)[0]

    return with_gradients(run, [segment_of(x, group), weight], segment_of(dy, group))


MODELS = {
    "plain": {},
    "checkpointing": {"gradient_checkpointing": True},
    "no convolution": {"model": {"use_short_conv": False, "qk_norm": "sum", "qk_activation": "elu"}},
    "padded": {"pad": 5},
    "cu_seq_lens_q": {"bounds": [0, 7, 30, 41, 44, 60]},
    "position_ids": {"bounds": [0, 7, 30, 41, 44, 64]},
    "seq_idx": {"bounds": [0, 16, 32, 64]},
}


def model_inputs(name):
    """Arguments of a forward over 64 tokens, of all ranks, and the gradient-checked model."""
    case = MODELS[name]
    ids, arguments = token_ids(1 if "bounds" in case else 2, 64), {}
    labels = ids.clone()
    labels[:, 20:25] = -100
    if "pad" in case:
        arguments["attention_mask"] = torch.ones_like(ids)
        for row, columns in ((0, slice(None, case["pad"])), (1, slice(-case["pad"], None))):
            arguments["attention_mask"][row, columns] = 0
            labels[row, columns] = -100
    if "bounds" in case:
        cu_seqlens = torch.tensor(case["bounds"])
        sequence = torch.searchsorted(cu_seqlens[1:], torch.arange(64), right=True)
        labels[:, cu_seqlens[-1] :] = -100
        values = {
            "cu_seq_lens_q": cu_seqlens,
            "seq_idx": sequence[None],
            "position_ids": (torch.arange(64) - cu_seqlens[sequence.clamp(max=len(cu_seqlens) - 1)])[None],
        }
        arguments[name] = values[name]
    model = tiny_model(**case.get("model", {}))
    if case.get("gradient_checkpointing"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model, {"input_ids": ids, "labels": labels, **arguments}


def step(model, arguments):
    """(loss in training, logits in evaluation); gradients are in the model."""
    inputs = {name: value for name, value in arguments.items() if name != "labels"}
    with torch.no_grad():
        logits = model.eval()(**inputs, use_cache=False).logits
    loss = model.train()(**arguments).loss
    loss.backward()
    return loss.detach(), logits


def train(name, group):
    """(loss, logits, gradients averaged over the processes)."""
    model, arguments = model_inputs(name)
    model.set_context_parallel(group)
    own = {key: value if key == "cu_seq_lens_q" else segment_of(value, group) for key, value in arguments.items()}
    loss, logits = step(model, own)
    for tensor in (loss, *(parameter.grad for parameter in model.parameters())):
        dist.all_reduce(tensor.div_(dist.get_world_size(group)), group=group)
    return loss, logits, {n: p.grad for n, p in model.named_parameters()}


PROMPT = 66


def generated(group):
    """Tokens that follow a prompt of which all processes read 64 tokens together, each of them a part."""
    model, ids = tiny_model().eval(), token_ids(2, PROMPT)
    model.set_context_parallel(group)
    with torch.no_grad():
        output = model(segment_of(ids[:, :64], group), use_cache=True, logits_to_keep=1)
    model.set_context_parallel(None)
    cache = output[CACHE_NAME]
    return int(cache.get_seq_length()), model.generate(ids, max_new_tokens=5, do_sample=False, **{CACHE_NAME: cache})


def refusals(group):
    """Messages of what is refused, by name."""
    rank = dist.get_rank(group)
    model, ids = tiny_model().eval(), token_ids(2, 16)
    model.set_context_parallel(group)
    attempts = {
        "cache": lambda: model(ids, use_cache=True, attention_mask=torch.ones_like(ids)),
        "generate": lambda: model.generate(ids, max_new_tokens=2),
        "shapes": lambda: model(ids[:, : 16 - rank]),
        "too short": lambda: model(ids[:, :2]),
        "uneven": lambda: segment_of(ids[:, :15], group),
    }
    found = {}
    for name, attempt in attempts.items():
        try:
            attempt()
        except ValueError as error:
            found[name] = str(error)
    return found


def main():
    rank, size = join()
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    groups = {4: dist.group.WORLD, 2: halves[rank // 2]}
    found = {}
    for ranks, group in groups.items():
        found.update({("rule", name, ranks): rule(name, group) for name in CASES})
        found.update({("convolution", name, ranks): convolution(name, group) for name in CASES})
        found.update({("model", name, ranks): train(name, group) for name in MODELS})
        found["generated", ranks] = generated(group)
    found["refusals"] = refusals(groups[4])
    report(found)


if __name__ == "__main__":
    main()
