"""One training run, and its accuracy on the labelled positions."""

import math
import time

import torch
import torch.nn.functional as F
from tqdm import tqdm

from .models import build_model
from .recall_tasks import IGNORE
from .tasks import Task

SOLVED = 0.99


def train(task: Task, data, model_text: str, width: int, rate: float, decay: float, seed: int, device: str, label: str):
    """
    Train a model on a task until it is solved (test accuracy above 0.99) or the epochs end.

    Args:
        task: with the training settings that hold.
        data: what `make_data` returns.
        model_text: see `models.parse_model`.
        width, rate, decay, seed: the point of the sweep.
        device: where to train; on a GPU in bfloat16 with float32 weights, as MAD and the state tracking papers do.
        label: text before the progress bar.

    Returns `accuracy` and `loss` of the last evaluation, `best` accuracy, `scaled` (the best with guessing at 0), `curve` of
    (epoch, accuracy), `parameters` and `seconds`.
    """
    began = time.time()
    data = [part.to(device) for part in data]
    length = max(data[0].shape[1], data[2].shape[1])
    model = build_model(model_text, task.vocab, **{**task.model, "width": width, "seed": seed, "length": length}).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay)
    curve = _fit(model, optimizer, data, task.training, rate, seed, device, label)
    best = max(accuracy for _, accuracy, _ in curve)
    chance = task.chance or 1 / data[3][data[3] != IGNORE].unique().numel()
    return {
        "accuracy": curve[-1][1],
        "loss": curve[-1][2],
        "best": best,
        "scaled": (best - chance) / (1 - chance),
        "curve": [(epoch, accuracy) for epoch, accuracy, _ in curve],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": time.time() - began,
    }


def _fit(model, optimizer, data, settings: dict, rate: float, seed: int, device: str, label: str) -> list[tuple]:
    """Train and evaluate after every epoch (20 times where there is one); (epoch, accuracy, loss) of each evaluation."""
    inputs, labels, test_inputs, test_labels = data
    order = torch.Generator().manual_seed(seed)
    batch, epochs = min(settings["batch_size"], len(inputs)), settings["epochs"]
    steps = math.ceil(len(inputs) / batch)
    every = steps if epochs > 1 else max(1, steps // 20)
    curve = []
    with tqdm(total=epochs * steps, desc=label, leave=False) as progress:
        for step in range(epochs * steps):
            if step % steps == 0:
                rows = torch.randperm(len(inputs), generator=order).to(device)
            for group in optimizer.param_groups:
                group["lr"] = rate * rate_factor(step, steps, epochs, rate, settings)
            chosen = rows[step % steps * batch :][:batch]
            _step(model, optimizer, inputs[chosen], labels[chosen], device)
            progress.update()
            if (step + 1) % every == 0 or step + 1 == epochs * steps:
                accuracy, loss = evaluate(model, test_inputs, test_labels, batch, device)
                curve.append(((step + 1) / steps, accuracy, loss))
                progress.set_postfix(accuracy=f"{accuracy:.3f}", loss=f"{loss:.3f}")
                if accuracy > SOLVED:
                    break
    return curve


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
def evaluate(model, inputs, labels, batch: int, device: str) -> tuple[float, float]:
    """Share of labelled positions with the right most likely token, and the mean loss there."""
    model.eval()
    right = total = 0
    loss = 0.0
    for start in range(0, len(inputs), batch):
        target = labels[start : start + batch].long()
        logits = _logits(model, inputs[start : start + batch], device)
        asked = target != IGNORE
        right += (logits.argmax(-1)[asked] == target[asked]).sum().item()
        loss += F.cross_entropy(logits[asked].float(), target[asked], reduction="sum").item()
        total += asked.sum().item()
    return right / total, loss / total


def _step(model, optimizer, inputs, labels, device: str) -> None:
    model.train()
    logits, target = _logits(model, inputs, device), labels.long()
    asked = target != IGNORE
    F.cross_entropy(logits[asked].float(), target[asked]).backward()
    optimizer.step()
    optimizer.zero_grad()


def _logits(model, inputs, device: str):
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=device.startswith("cuda")):
        return model(input_ids=inputs.long(), use_cache=False).logits
