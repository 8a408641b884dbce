"""One training run, and its accuracy on the labelled positions."""

import math
import time
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from .models import build_model
from .recall_tasks import IGNORE
from .recording import RecordedStep
from .tasks import Task

SOLVED = 0.99
_BINS = 32
# Steps between two looks at the clock, each of which waits for the device.
_CHECK = 50
_UNTIMED = 10


def train(
    task: Task,
    data,
    model_text: str,
    width: int,
    rate: float,
    decay: float,
    seed: int,
    device: str,
    label: str | None = None,
    deadline: float = math.inf,
) -> dict:
    """
    Train a model on a task until it is solved (test accuracy above 0.99), the epochs end or the time does.

    Args:
        task: with the training settings that hold.
        data: what `make_data` returns.
        model_text: see `models.parse_model`.
        width, rate, decay, seed: the point of the sweep.
        device: where to train; on a GPU in bfloat16 with float32 weights, as MAD and the state tracking papers do.
        label: text before the progress bar; no bar without.
        deadline: value of `time.time()` at which to stop.

    Returns `accuracy`, `loss` and `by_position` (last position and accuracy of each of up to 32 ranges) of the last
    evaluation, `best` accuracy, `scaled` (the best with guessing at 0), `curve` of (epoch, accuracy), `complete` (not cut
    off by the deadline), `steps`, `step_ms`, `recorded` (as a CUDA graph), `parameters` and `seconds`.
    """
    began = time.time()
    train_set, test_set = (_with_positions(*(part.to(device) for part in pair), device) for pair in (data[:2], data[2:]))
    length = max(data[0].shape[1], data[2].shape[1])
    model = build_model(model_text, task.vocab, **{**task.model, "width": width, "seed": seed, "length": length}).to(device)
    optimizer = _optimizer(model, rate, decay, device)
    step = RecordedStep(lambda *batch: _step(model, optimizer, *batch, device), device)
    run = _fit(model, optimizer, step, train_set, test_set, task.training, rate, seed, device, label, deadline)
    best = max(accuracy for _, accuracy in run["curve"])
    chance = task.chance or 1 / data[3][data[3] != IGNORE].unique().numel()
    return {
        **run,
        "best": best,
        "scaled": (best - chance) / (1 - chance),
        "recorded": step.is_recorded,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": time.time() - began,
    }


def _fit(model, optimizer, step, train_set, test_set, settings, rate, seed, device, label, deadline) -> dict:
    """Train on whole batches, with an evaluation every `evaluate_every` steps, or each epoch (20 times if there is one)."""
    order = torch.Generator().manual_seed(seed)
    batch, epochs = min(settings["batch_size"], len(train_set[0])), settings["epochs"]
    steps = len(train_set[0]) // batch
    every = settings.get("evaluate_every", steps if epochs > 1 else max(1, steps // 20))
    clock, run, total = _Clock(device), {"curve": []}, epochs * steps
    with tqdm(total=total, desc=label, leave=False, disable=label is None) as progress:
        for index in range(total):
            if index % steps == 0:
                rows = torch.randperm(len(train_set[0]), generator=order).to(device)
            optimizer.param_groups[0]["lr"].fill_(rate * rate_factor(index, steps, epochs, rate, settings))
            chosen = rows[index % steps * batch :][:batch]
            step(*(part[chosen] for part in train_set))
            progress.update()
            late = index % _CHECK == 0 and clock.now() > deadline
            last = late or index + 1 == total
            clock.count()
            if last or (index + 1) % every == 0:
                with clock.stopped():
                    run |= evaluate(model, *test_set, settings.get("test_batch_size", batch), device)
                run["curve"].append(((index + 1) / steps, run["accuracy"]))
                progress.set_postfix(accuracy=f"{run['accuracy']:.3f}", loss=f"{run['loss']:.3f}")
                if last or run["accuracy"] > SOLVED:
                    break
    complete = not late or index + 1 == total or run["accuracy"] > SOLVED
    return {**run, "complete": complete, "steps": index + 1, "step_ms": clock.step_ms()}


class _Clock:
    """Time of a step, without the evaluations and the first steps, which compile and record."""

    def __init__(self, device: str):
        self.device, self.steps, self.spent = device, 0, 0.0
        self.since = self.now()

    def now(self) -> float:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)
        return time.time()

    def count(self) -> None:
        self.steps += 1
        if self.steps == _UNTIMED:
            self.since, self.spent = self.now(), 0.0

    @contextmanager
    def stopped(self):
        self.spent += self.now() - self.since
        yield
        self.since = self.now()

    def step_ms(self) -> float:
        self.spent += self.now() - self.since
        return 1e3 * self.spent / (self.steps - _UNTIMED if self.steps > _UNTIMED else self.steps)


def rate_factor(step: int, steps: int, epochs: int, rate: float, settings: dict) -> float:
    """
    The learning rate's share at a step: cosine from epoch to epoch, or from step to step where there is one epoch, down to
    `final_factor` of the rate or to `final_rate`, after a linear rise over the share `warmup` of all steps.
    """
    total = epochs * steps
    warmup = int(settings.get("warmup", 0) * total)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup) if epochs == 1 else step // steps / epochs
    floor = settings["final_rate"] / rate if "final_rate" in settings else settings.get("final_factor", 0.0)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


@torch.no_grad()
def evaluate(model, inputs: Tensor, positions: Tensor, targets: Tensor, batch: int, device: str) -> dict:
    """
    `accuracy`: the share of asked positions with the right most likely token, and by ranges of positions; `loss`: its mean.

    Args:
        inputs: [N, T].
        positions, targets: [N, P], as `asked` returns.
    """
    model.eval()
    length = inputs.shape[1]
    right, total = torch.zeros(2, length, dtype=torch.float64, device=inputs.device)
    loss = 0.0
    for start in range(0, len(inputs), batch):
        places, target = positions[start : start + batch], targets[start : start + batch].long()
        logits = _logits(model, inputs[start : start + batch], places, device)
        known = target != IGNORE
        hit = (logits.argmax(-1) == target) & known
        right.index_add_(0, places.flatten(), hit.flatten().double())
        total.index_add_(0, places.flatten(), known.flatten().double())
        loss += F.cross_entropy(logits[known].float(), target[known], reduction="sum").item()
    size = -(-length // _BINS)
    ranges = zip(range(size, length + size, size), right.split(size), total.split(size))
    shares = [(min(end, length), (hits.sum() / count.sum()).item()) for end, hits, count in ranges if count.sum() > 0]
    return {"accuracy": (right.sum() / total.sum()).item(), "loss": loss / total.sum().item(), "by_position": shares}


def asked(labels: Tensor) -> tuple[Tensor, Tensor]:
    """
    Where labels [N, T] ask for something: positions, int64 [N, P], P the most of any row, and the labels there. A row with
    fewer ends in position 0 and `IGNORE`.
    """
    marked = labels != IGNORE
    rows, columns = marked.nonzero(as_tuple=True)
    rank = (marked.cumsum(1) - 1)[rows, columns]
    shape = len(labels), int(marked.sum(1).max())
    positions, targets = columns.new_zeros(shape), labels.new_full(shape, IGNORE)
    positions[rows, rank], targets[rows, rank] = columns, labels[rows, columns]
    return positions, targets


def _with_positions(inputs, labels, device):
    return inputs, *asked(labels)


def _optimizer(model, rate: float, decay: float, device: str):
    """AdamW with its rate in a tensor, where a recorded step reads it."""
    rate = torch.tensor(rate, device=device)
    return torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay, fused=True, capturable=rate.is_cuda)


def _step(model, optimizer, inputs, positions, targets, device: str) -> None:
    model.train()
    optimizer.zero_grad()
    logits = _logits(model, inputs, positions, device)
    F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten().long()).backward()
    optimizer.step()


def _logits(model, inputs, positions, device: str):
    """Logits [N, P, vocab] at the asked positions only: at all of them they would be most of the work."""
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=device.startswith("cuda")):
        hidden = model.base_model(input_ids=inputs.long(), use_cache=False).last_hidden_state
        chosen = hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))
        return model.get_output_embeddings()(chosen)
