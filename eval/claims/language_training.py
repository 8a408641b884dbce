"""Trains one language model on text, and then to recall facts, as all others that it is compared with."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from ...fused_deltanet import linear_cross_entropy
from ..synthetic.recall_tasks import IGNORE
from ..synthetic.recording import RecordedStep
from ..synthetic.training import rate_factor
from .needles import Words, exercise
from .text_measures import last_hidden

PROBE = 5
"""Steps after which, and for which, the time of a step is measured before a run goes on: those before compile and record."""


class OutOfTime(Exception):
    """The time of the whole command is up."""


class TooSlow(Exception):
    """A run would take longer than it may."""

    def __init__(self, step_ms: float, steps: int):
        seconds = step_ms * steps / 1e3
        super().__init__(f"a step takes {step_ms:.0f} ms, the {steps} steps of a run would take {seconds:.0f} s")
        self.step_ms = step_ms


def training_tokens(stream: np.ndarray, settings, seed: int) -> np.ndarray:
    """All text of a run, int32 [steps, batch, length], the same for every model: blocks of the stream [N] in random order,
    epoch after epoch."""
    rng = np.random.default_rng(seed)
    blocks = stream[: len(stream) // settings.length * settings.length].reshape(-1, settings.length)
    needed = settings.steps * settings.batch
    order = np.concatenate([rng.permutation(len(blocks)) for _ in range(-(-needed // len(blocks)))])[:needed]
    return blocks[order].astype(np.int32).reshape(settings.steps, settings.batch, settings.length)


def recall_exercises(stream: np.ndarray, words: Words, settings, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Tokens and labels, int32 [steps, rows, length], of each of `exercise_lengths`, the same for every model.

    Text from anywhere in the stream [N], with 1 to `most_facts` facts in up to as many mentions as fill `most_mentioned` of
    it, small numbers more often; steps have as many tokens as those on text.
    """
    rng = np.random.default_rng(seed)
    stages = []
    for length, steps in zip(settings.exercise_lengths, settings.exercise_steps):
        most = int(settings.most_mentioned * length) // words.size
        rows = settings.batch * settings.length // length
        starts = rng.integers(0, len(stream) - length + 1, steps * rows)
        pairs = np.empty((2, steps * rows, length), np.int32)
        for row, start in enumerate(starts):
            count = round(min(settings.most_facts, most // 2) ** rng.random())
            mentions = round(2 * count * (most / (2 * count)) ** rng.random())
            pairs[:, row] = exercise(stream[start : start + length], words, rng, count, mentions)
        stages.append(tuple(pairs.reshape(2, steps, rows, length)))
    return stages


def next_token_loss(model: PreTrainedModel, ids: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
    """The mean loss of ids [B, T], or of the `labels` [B, T] that are not `IGNORE`, computed alike for every model, without
    holding all logits."""
    labels = ids if labels is None else labels
    return linear_cross_entropy(model.lm_head, last_hidden(model, ids)[:, :-1], labels[:, 1:].long(), ignore_index=IGNORE)


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Weights to `dtype`. Buffers stay: rotary frequencies in bfloat16 would be wrong from a few hundred tokens on."""
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)


class MasterWeights:
    """AdamW over float32 copies of a model's weights, which themselves become `dtype`."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, weight_decay: float, betas: tuple, clip: float):
        self.weights, self.clip = list(model.parameters()), clip
        self.masters = [weight.detach().to(torch.float32, copy=True) for weight in self.weights]
        cast(model, dtype)
        for master in self.masters:
            master.grad = torch.zeros_like(master)
        groups = [
            {"params": [master for master in self.masters if (master.ndim > 1) == decayed], "weight_decay": decay}
            for decayed, decay in ((True, weight_decay), (False, 0.0))
        ]
        device = self.masters[0].device
        self.rate = torch.zeros((), device=device)  # where a recorded step reads it
        self.optimizer = torch.optim.AdamW(groups, self.rate, betas, fused=True, capturable=device.type == "cuda")

    @torch.no_grad()
    def step(self) -> None:
        """One step of the learning rate `rate` by the weights' gradients."""
        torch._foreach_copy_([master.grad for master in self.masters], [weight.grad for weight in self.weights])
        nn.utils.clip_grad_norm_(self.masters, self.clip)
        self.optimizer.step()
        torch._foreach_copy_(self.weights, self.masters)


def train(model: PreTrainedModel, tokens: torch.Tensor, settings, evaluate, deadline: float) -> dict:
    """
    Train in bfloat16 with float32 master weights (in float32 on a CPU).

    Args:
        model: in float32, on its device.
        tokens: [steps, batch, length] on the same device.
        settings: see `language.Settings`.
        evaluate: called `settings.evaluations` times; what it returns is kept.
        deadline: on the clock of `time.monotonic`.

    Returns `curve` of (tokens, evaluation), `step_ms` and `train_s` without evaluations and the first steps, and whether the
    steps were `recorded` as a CUDA graph.

    Raises:
        OutOfTime, TooSlow: nothing is to be kept of the run.
    """
    dtype = torch.bfloat16 if tokens.is_cuda else torch.float32
    weights = MasterWeights(model, dtype, settings.weight_decay, settings.betas, settings.clip)
    rates = _rates(settings.steps, settings)
    model.train()
    marks = {round(settings.steps * (index + 1) / settings.evaluations) for index in range(settings.evaluations)}
    curve, clock = [], _Clock(tokens.is_cuda)
    step_on = RecordedStep(partial(_step, model, weights), str(tokens.device))
    for step, (batch, rate) in enumerate(zip(tokens, rates)):
        if time.monotonic() > deadline:
            raise OutOfTime
        weights.rate.fill_(rate)
        step_on(batch)
        clock.step()
        if step + 1 == 2 * PROBE and clock.milliseconds() * settings.steps > settings.longest_s * 1e3:
            raise TooSlow(clock.milliseconds(), settings.steps)
        if step + 1 in marks:
            with clock.paused():
                curve.append(((step + 1) * batch.numel(), evaluate(model.eval())))
                model.train()
    figures = {"curve": curve, "step_ms": clock.milliseconds(), "train_s": clock.seconds()}
    return {**figures, "recorded": step_on.is_recorded}


def train_recall(model: PreTrainedModel, stages: Sequence[tuple[torch.Tensor, torch.Tensor]], settings, deadline) -> float:
    """
    Train on the tokens and labels of `recall_exercises`, on the model's device, stage after stage, with float32 masters of
    weights of the model's own dtype. Returns the seconds it took.

    Raises:
        OutOfTime: nothing is to be kept of the run.
    """
    began = time.monotonic()
    weights = MasterWeights(model, model.dtype, settings.weight_decay, settings.betas, settings.clip)
    rates = _rates(sum(settings.exercise_steps), settings)
    model.train()
    for tokens, labels in stages:
        step_on = RecordedStep(partial(_step, model, weights), str(tokens.device))
        for *batch, rate in zip(tokens, labels, rates):
            if time.monotonic() > deadline:
                raise OutOfTime
            weights.rate.fill_(rate)
            step_on(*batch)
    if tokens.is_cuda:
        torch.cuda.synchronize()
    return time.monotonic() - began


def _step(model: PreTrainedModel, weights: MasterWeights, *batch: torch.Tensor) -> None:
    model.zero_grad()
    next_token_loss(model, *batch).backward()
    weights.step()


def _rates(steps: int, settings) -> Iterator[float]:
    rate, schedule = settings.learning_rate, {"warmup": settings.warmup, "final_factor": settings.final_factor}
    return (rate * rate_factor(step, steps, 1, rate, schedule) for step in range(steps))


class _Clock:
    """Times steps without the pauses, and leaves out the first `PROBE`, which compile."""

    def __init__(self, is_cuda: bool):
        self.wait = torch.cuda.synchronize if is_cuda else lambda: None
        self.steps, self.taken, self.began = 0, 0.0, None

    def step(self) -> None:
        self.steps += 1
        if self.steps == PROBE:
            self.wait()
            self.began = time.monotonic()

    def seconds(self) -> float:
        self.wait()
        return self.taken + (time.monotonic() - self.began if self.began else 0.0)

    def milliseconds(self) -> float:
        return self.seconds() * 1e3 / max(1, self.steps - PROBE)

    @contextmanager
    def paused(self):
        taken = self.seconds()
        yield
        self.wait()
        if self.began:
            self.taken, self.began = taken, time.monotonic()
