"""Checkpoints that do not depend on how many processes wrote them, nor on whether FSDP divided the model among them."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from .monitor import GuardedTrainer


class PortableTrainer(GuardedTrainer):
    """
    Under FSDP2, as without it, a checkpoint holds the whole weights as safetensors and the whole state of the optimizer as
    one process would write it. Reading divides them again.
    """

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        if self.is_fsdp_enabled:
            self._keep_gradients_in_float32()

    def _keep_gradients_in_float32(self) -> None:
        """As without FSDP: accelerate would round their sums, and the loss, to the dtype of the arithmetic."""
        from torch.distributed.fsdp import MixedPrecisionPolicy

        dtype = torch.bfloat16 if self.args.bf16 else None
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        self.accelerator.state.fsdp_plugin.mixed_precision_policy = policy

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self.is_fsdp_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        files = sorted(Path(resume_from_checkpoint).glob("model*.safetensors"))
        weights = {name: x for file in files for name, x in load_file(file).items()}
        # Past the hooks of `load_state_dict`: the name in memory.
        weights = {name.replace(".embeddings.", ".embed_tokens."): x for name, x in weights.items()}
        # A tied head is not in the file.
        set_model_state_dict(self.model, weights, options=StateDictOptions(full_state_dict=True, strict=False))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            return super()._save_optimizer_and_scheduler(output_dir)
        state = whole_state(self.model, self.optimizer.optimizer)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.is_fsdp_enabled or checkpoint is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        states = [
            torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True)
            for name in (OPTIMIZER_NAME, SCHEDULER_NAME)
        ]
        divide_state(self.model, self.optimizer.optimizer, states[0])
        self.lr_scheduler.load_state_dict(states[1])


def whole_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of an optimizer over a divided model as its own `state_dict` would be without the division: on the first
    process and on its CPU, nothing on the others. All must call it.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    whole = get_optimizer_state_dict(model, optimizer, options=options)
    if not whole:
        return {}
    number = {name: i for i, name in enumerate(_names(model, optimizer))}
    groups = [{**group, "params": [number[name] for name in group["params"]]} for group in whole["param_groups"]]
    return {"state": {number[name]: entry for name, entry in whole["state"].items()}, "param_groups": groups}


def divide_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Give an optimizer over a divided model this process's share of a whole state. All must call it."""
    names = _names(model, optimizer)
    groups = [{**group, "params": [names[i] for i in group["params"]]} for group in state["param_groups"]]
    whole = {"state": {names[i]: entry for i, entry in state["state"].items()}, "param_groups": groups}
    set_optimizer_state_dict(model, optimizer, whole, options=StateDictOptions(full_state_dict=True))


def _names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Of the parameters, in the order by which an optimizer numbers them."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
