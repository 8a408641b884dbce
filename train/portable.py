"""Checkpoints that do not depend on how many processes wrote them, nor on whether FSDP divided the model among them."""

from collections.abc import Iterator
from contextlib import contextmanager
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
        with self._whole_optimizer(gather=True):
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with self._whole_optimizer(gather=False):
            super()._load_optimizer_and_scheduler(checkpoint)

    @contextmanager
    def _whole_optimizer(self, gather: bool) -> Iterator[None]:
        """While it lasts, a Trainer without FSDP reads and writes the whole state."""
        if not self.is_fsdp_enabled:
            yield
            return
        optimizer = self.optimizer
        self.optimizer, self.is_fsdp_enabled = _WholeOptimizer(self.model, optimizer.optimizer, gather), False
        try:
            yield
        finally:
            self.optimizer, self.is_fsdp_enabled = optimizer, True


class _WholeOptimizer:
    """The state of an optimizer over a divided model; parameters have numbers, as in an optimizer's own state.

    All processes must make it, since gathering takes all of them.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, gather: bool):
        self.model, self.optimizer = model, optimizer
        names = {parameter: name for name, parameter in model.named_parameters()}
        self.names = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
        self.state = self._gathered() if gather else {}

    def _gathered(self) -> dict[str, Any]:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        whole = get_optimizer_state_dict(self.model, self.optimizer, options=options)
        if not whole:
            return {}
        number = {name: i for i, name in enumerate(self.names)}
        groups = [{**group, "params": [number[name] for name in group["params"]]} for group in whole["param_groups"]]
        return {"state": {number[name]: state for name, state in whole["state"].items()}, "param_groups": groups}

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        groups = [{**group, "params": [self.names[i] for i in group["params"]]} for group in state["param_groups"]]
        whole = {"state": {self.names[i]: entry for i, entry in state["state"].items()}, "param_groups": groups}
        set_optimizer_state_dict(self.model, self.optimizer, whole, options=StateDictOptions(full_state_dict=True))
