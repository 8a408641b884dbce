"""What both processes of test_parallel.py compute: the models that the test saved, split by Transformers' plans."""

import torch
import torch.distributed as dist
from launching import join, report
from models import token_ids
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import deltanet  # noqa: F401

MODELS = ("pure", "sliding")
FSDP_LEARNING_RATE = 0.1


def load(kind, **sizes):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_pretrained(f"./{kind}", distributed_config=DistributedConfig(**sizes))


def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def gradients(model):
    return {name: whole(parameter.grad).detach().clone() for name, parameter in model.named_parameters()}


def greedy(model):
    return model.generate(token_ids(2, 9), max_new_tokens=6, do_sample=False)


def tensor_parallel(kind):
    model, ids = load(kind, tp_size=2, tp_plan="auto"), token_ids(2, 70)
    output = model(ids, labels=ids)
    output.loss.backward()
    local = {name: tuple(x.to_local().shape if isinstance(x, DTensor) else x.shape) for name, x in model.named_parameters()}
    found = {
        "logits": whole(output.logits).detach(),
        "loss": whole(output.loss).detach(),
        "gradients": gradients(model),
        "shapes": local,
        "tokens": greedy(model.eval()),
    }
    model.save_pretrained(f"tensor-{kind}")
    return found


def pipeline_parallel(kind):
    model = load(kind, pp_size=2).eval()
    with torch.no_grad():
        return {"logits": model(token_ids(2, 70)).logits, "tokens": greedy(model)}


def sharded_by_plan(kind, rank):
    """One step of SGD on this process's row, by the model's own FSDP plan; then the model is saved."""
    model, ids = load(kind, fsdp_size=2), token_ids(2, 70)[rank : rank + 1]
    found = _step(model, ids)
    model.save_pretrained(f"fsdp-{kind}")
    return found


def sharded_by_hand(kind, rank):
    """The same with `fully_shard` on the blocks, and a state dictionary that both processes write and read again."""
    model = AutoModelForCausalLM.from_pretrained(f"./{kind}")
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    return _step(model, token_ids(2, 70)[rank : rank + 1])


def _step(model, ids):
    output = model(ids, labels=ids)
    output.loss.backward()
    found = {"loss": output.loss.detach(), "logits": output.logits.detach(), "gradients": gradients(model)}
    torch.optim.SGD(model.parameters(), lr=FSDP_LEARNING_RATE).step()
    return found


def main():
    rank, _ = join()
    found = {}
    for kind in MODELS:
        found["tensor", kind] = tensor_parallel(kind)
        found["pipeline", kind] = pipeline_parallel(kind)
        found["plan", kind] = sharded_by_plan(kind, rank)
        found["hand", kind] = sharded_by_hand(kind, rank)
        dist.barrier()
    report(found)


if __name__ == "__main__":
    main()
