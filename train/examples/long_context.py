"""
Training on rows too long for one GPU: all GPUs share the tokens of each row, and by FSDP2 the weights too.

    torchrun --nproc-per-node 8 -m deltanet.train.examples.long_context MODEL SHARDS OUTPUT [--length 262144] [--steps 100]

SHARDS is what `deltanet.train.prepare` made. Trainer gives each process rows of its own and cannot do this; the loop is
what it takes: every process gets its segment of the row, and FSDP averages the gradients, which is what the loss of a
context-parallel model is scaled for.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from deltanet.context_parallel_deltanet import segment_of
from deltanet.train.shards import ShardBlocks, TokenShards


def train(model_name: str, data: str, output: str, length: int, steps: int, learning_rate: float = 3e-4) -> list[float]:
    """The loss of each step, the same on every process of the default group; the first saves the model."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    shards = TokenShards(Path(data))
    rows = ShardBlocks(shards, length)
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32).to(device).train()
    model.set_context_parallel(dist.group.WORLD)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01)

    losses = []
    for step in range(steps):
        tokens = segment_of(rows[step % len(rows)]["input_ids"][None].to(device), dist.group.WORLD)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(_mean(loss.detach()))
        if dist.get_rank() == 0:
            print(f"step {step + 1}/{steps} | loss {losses[-1]:.4f}", flush=True)

    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        model.save_pretrained(output, state_dict=weights)
        shards.tokenizer.save_pretrained(output)
    dist.barrier()
    return losses


def _mean(loss: torch.Tensor) -> float:
    dist.all_reduce(loss)
    return loss.item() / dist.get_world_size()


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("data", metavar="SHARDS")
    parser.add_argument("output")
    parser.add_argument("--length", type=int, default=262144, help="tokens of a row (%(default)s)")
    parser.add_argument("--steps", type=int, default=100)
    arguments = parser.parse_args()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()
    train(**{"model_name" if name == "model" else name: value for name, value in vars(arguments).items()})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
