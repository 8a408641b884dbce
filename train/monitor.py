"""What is said while a model trains: a line of status, and the end of a run whose numbers are no longer numbers."""

import datetime
import time
from pathlib import Path

import torch
from transformers import Trainer, TrainerCallback

from .finished import last_checkpoint


class StatusLine(TrainerCallback):
    """One line a log: step, loss, learning rate, tokens a second since the last line, time gone and time left."""

    def __init__(self):
        self.tokens = 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.begin = (state.global_step, time.perf_counter())
        self.last = (self.tokens, self.begin[1])

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in (logs or {}) or not state.is_world_process_zero:
            return
        now = time.perf_counter()
        rate = (self.tokens - self.last[0]) / (now - self.last[1])
        self.last = (self.tokens, now)
        gone = now - self.begin[1]
        left = gone / (state.global_step - self.begin[0]) * (state.max_steps - state.global_step)
        gone, left = (datetime.timedelta(seconds=round(seconds)) for seconds in (gone, left))
        step = f"step {state.global_step:>{len(str(state.max_steps))}}/{state.max_steps}"
        share = f"{state.global_step / state.max_steps:7.2%}"
        numbers = f"loss {float(logs['loss']):.4f} | lr {logs['learning_rate']:.2e} | {rate:,.0f} tokens/s"
        print(f"{step} {share} | {numbers} | {gone} gone, {left} left", flush=True)


class NotFinite(ArithmeticError):
    """A loss or a gradient is NaN or infinite."""


class GuardedTrainer(Trainer):
    """A Trainer with a status line, which raises `NotFinite` before a loss or gradients that are not finite change weights.

    Each batch says under "block" which blocks of the data it holds. The check waits for the device once a step.
    """

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        self.seen, self.status = [], StatusLine()
        self.add_callback(_Guard(self.seen))
        self.add_callback(self.status)

    def training_step(self, model, inputs, num_items_in_batch=None):
        blocks = inputs.pop("block")
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.seen.append((loss, blocks))
        self.status.tokens += inputs["input_ids"].numel() * self.args.world_size
        return loss


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
