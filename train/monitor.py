"""What is said while a model trains: a line of status, and the end of a run whose numbers are no longer numbers."""

import datetime
import time
from pathlib import Path

import torch
from transformers import Trainer, TrainerCallback

from .finished import last_checkpoint
from .flops import peak_flops, product_parameters, training_flops


class Throughput(TrainerCallback):
    """Tokens a second since the last question, the share of the devices' arithmetic that they use, and the memory."""

    def __init__(self, devices: int = 1):
        self.tokens, self.flops_per_token = 0, 0.0
        peak = peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
        self.peak = peak and peak * devices

    def on_train_begin(self, args, state, control, **kwargs):
        self.last = (self.tokens, time.perf_counter())

    def figures(self) -> dict[str, float]:
        """`tokens_per_second`, and on a GPU `mfu` (`flops.training_flops`) and the peak `memory_gib` since the last time."""
        now = time.perf_counter()
        rate = (self.tokens - self.last[0]) / (now - self.last[1])
        self.last = (self.tokens, now)
        figures = {"tokens_per_second": rate}
        if self.peak:
            figures["mfu"] = rate * self.flops_per_token / self.peak
        if torch.cuda.is_available():
            figures["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
            torch.cuda.reset_peak_memory_stats()
        return figures


class StatusLine(TrainerCallback):
    """One line a log: step, loss, learning rate, what `Throughput` says, time gone and time left."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.begin = (state.global_step, time.perf_counter())

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in (logs or {}) or not state.is_world_process_zero:
            return
        gone = time.perf_counter() - self.begin[1]
        left = gone / (state.global_step - self.begin[0]) * (state.max_steps - state.global_step)
        gone, left = (datetime.timedelta(seconds=round(seconds)) for seconds in (gone, left))
        step = f"step {state.global_step:>{len(str(state.max_steps))}}/{state.max_steps}"
        share = f"{state.global_step / state.max_steps:7.2%}"
        numbers = f"loss {float(logs['loss']):.4f} | lr {logs['learning_rate']:.2e}"
        forms = {"tokens_per_second": "{:,.0f} tokens/s", "mfu": "MFU {:.1%}", "memory_gib": "{:.1f} GiB"}
        numbers = " | ".join([numbers, *(form.format(logs[name]) for name, form in forms.items() if name in logs)])
        print(f"{step} {share} | {numbers} | {gone} gone, {left} left", flush=True)


class NotFinite(ArithmeticError):
    """A loss or a gradient is NaN or infinite."""


class GuardedTrainer(Trainer):
    """A Trainer with a status line, which raises `NotFinite` before a loss or gradients that are not finite change weights.

    Each batch says under "block" which blocks of the data it holds. The check waits for the device once a step.
    """

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        self.seen, self.throughput = [], Throughput(self.args.world_size)
        self.add_callback(_Guard(self.seen))
        self.add_callback(self.throughput)
        self.add_callback(StatusLine())

    def training_step(self, model, inputs, num_items_in_batch=None):
        blocks = inputs.pop("block")
        # Nobody looks at the logits here; a checkpoint is left as its next user expects it.
        config, fused = self.model.config, self.model.config.fuse_linear_cross_entropy
        config.fuse_linear_cross_entropy = True
        try:
            loss = super().training_step(model, inputs, num_items_in_batch)
        finally:
            config.fuse_linear_cross_entropy = fused
        self.seen.append((loss, blocks))
        self._count(inputs["input_ids"])
        return loss

    def _count(self, ids: torch.Tensor) -> None:
        if not self.throughput.tokens:
            parameters = product_parameters(self.model)
            self.throughput.flops_per_token = training_flops(self.model.config, parameters, ids.shape[-1])
        self.throughput.tokens += ids.numel() * self.args.world_size

    def log(self, logs, *arguments, **keywords):
        super().log({**logs, **self.throughput.figures()} if "loss" in logs else logs, *arguments, **keywords)


class _Guard(TrainerCallback):
    def __init__(self, seen: list[tuple[torch.Tensor, torch.Tensor]]):
        self.seen = seen

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        values = torch.stack([norm, *(loss.to(norm) for loss, _ in self.seen)])
        if not values.isfinite().all():
            self._stop(state.global_step + 1, values.tolist(), Path(args.output_dir))
        self.seen.clear()

    def _stop(self, step: int, values: list[float], output: Path) -> None:
        norm, *losses = values
        bad = [(loss, blocks.tolist()) for loss, (_, blocks) in zip(losses, self.seen) if not abs(loss) < float("inf")]
        if bad:
            what = f"the loss is {bad[0][0]} in the batch of blocks {bad[0][1]}"
        else:
            blocks = [block for _, blocks in self.seen for block in blocks.tolist()]
            what = f"the norm of the gradients is {norm} after a finite loss, in the batch of blocks {blocks}"
        checkpoint = last_checkpoint(output)
        good = f"the last good checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint yet"
        raise NotFinite(f"Stopped at step {step}: {what}; {good}. The weights were not changed by this step.")
