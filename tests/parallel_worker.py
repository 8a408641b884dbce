"""What both processes of test_parallel.py compute: the models that the test saved, split by Transformers' plans."""

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from launching import join, report
from models import token_ids
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import deltanet  # noqa: F401

MODELS = ("pure", "sliding")
LEARNING_RATE = 0.1


def load(kind, **sizes):
    return AutoModelForCausalLM.from_pretrained(f"./{kind}", distributed_config=DistributedConfig(**sizes))


def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def gradients(model):
    return {name: whole(parameter.grad).detach().clone() for name, parameter in model.named_parameters()}


def greedy(model):
    return model.generate(token_ids(2, 9), max_new_tokens=6, do_sample=False)


def tensor_parallel(kind):
    model, ids = load(kind, tp_size=2, tp_plan="auto"), token_ids(2, 70)
    found = step(model, ids)
    local = {name: tuple(x.to_local().shape if isinstance(x, DTensor) else x.shape) for name, x in model.named_parameters()}
    model.save_pretrained(f"tensor-{kind}")
    return {**found, "shapes": local, "tokens": greedy(model)}


def pipeline_parallel(kind):
    model = load(kind, pp_size=2).eval()
    with torch.no_grad():
        return {"logits": model(token_ids(2, 70)).logits, "tokens": greedy(model)}


def sharded_by_plan(kind, rank):
    """One step of SGD on this process's row, by the model's own FSDP plan; then the model is saved."""
    model = load(kind, fsdp_size=2)
    found = step(model, token_ids(2, 70)[rank : rank + 1])
    torch.optim.SGD(model.parameters(), lr=LEARNING_RATE).step()
    model.save_pretrained(f"fsdp-{kind}")
    return found


def sharded_by_hand(kind, rank):
    """The same with `fully_shard` on the blocks, and a checkpoint of which every process writes and reads its part."""
    model, other = divided(kind), divided(kind)
    found = step(model, token_ids(2, 70)[rank : rank + 1])
    torch.optim.SGD(model.parameters(), lr=LEARNING_RATE).step()
    checkpoint.save(model.state_dict(), checkpoint_id=f"hand-{kind}")
    state = other.state_dict()
    found["changed"] = not all(torch.equal(whole(a), whole(b)) for a, b in zip(state.values(), model.state_dict().values()))
    checkpoint.load(state, checkpoint_id=f"hand-{kind}")
    other.load_state_dict(state)
    found["read"] = all(torch.equal(whole(a), whole(b)) for a, b in zip(other.parameters(), model.parameters()))
    return found


def divided(kind):
    model = AutoModelForCausalLM.from_pretrained(f"./{kind}")
    for block in model.model.layers:
        fully_shard(block)
    # As accelerate does.
    fully_shard([model.model.norm, model.lm_head], reshard_after_forward=False)
    fully_shard(model)
    return model


def step(model, ids):
    """Logits in evaluation, and the loss and gradients of training."""
    with torch.no_grad():
        logits = whole(model.eval()(ids, use_cache=False).logits)
    loss = whole(model.train()(ids, labels=ids).loss)
    loss.backward()
    model.eval()
    return {"loss": loss.detach(), "logits": logits, "gradients": gradients(model)}


def main():
    rank, _ = join()
    found = {}
    for kind in MODELS:
        found["tensor", kind] = tensor_parallel(kind)
        found["pipeline", kind] = pipeline_parallel(kind)
        found["plan", kind] = sharded_by_plan(kind, rank)
        found["hand", kind] = sharded_by_hand(kind, rank)
        dist.barrier()
    try:
        load("odd", tp_size=2, tp_plan="auto")
    except ValueError as error:
        found["odd"] = str(error)
    report(found)


if __name__ == "__main__":
    main()
