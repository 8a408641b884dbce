"""The tasks by name, with the published sizes and training settings, and their data."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from . import recall_tasks, state_tracking


@dataclass(frozen=True)
class Task:
    """
    Attributes:
        make: generator, called as `make(rng, examples, train, **sizes)`.
        vocab: number of token ids.
        sizes: arguments of the generator; `test_sizes` are others in testing.
        examples, test_examples: how many are drawn.
        training: published settings where the source states them, and ours where it does not (`source` says which).
        model: published model sizes, arguments of `build_model`.
        chance: accuracy of guessing, where it is not one over the number of labels in use.
    """

    make: Callable
    vocab: int
    source: str
    sizes: dict = field(default_factory=dict)
    test_sizes: dict = field(default_factory=dict)
    examples: int = 12800
    test_examples: int = 1280
    training: dict = field(default_factory=dict)
    model: dict = field(default_factory=dict)
    chance: float | None = None

    def resized(self, **changes) -> "Task":
        """Another number of examples, epochs, a batch size or another field of `training` (those that are not `None`)."""
        own = {key: value for key, value in changes.items() if value is not None and hasattr(self, key)}
        training = {key: value for key, value in changes.items() if value is not None and not hasattr(self, key)}
        return replace(self, **own, training={**self.training, **training})


_ZOOLOGY = {"batch_size": 128, "epochs": 64, "learning_rates": [1e-4, 4.642e-4, 2.154e-3, 1e-2], "weight_decays": [0.1]}
_MAD_GRID = {"learning_rates": [1e-4, 5e-4, 1e-3], "weight_decays": [0.0, 0.1]}
_MAD = {"batch_size": 128, "epochs": 200, "final_rate": 1e-6, **_MAD_GRID}
_SCHEDULE = {"warmup": 0.1, "final_factor": 1e-3}
_PARITY = {"batch_size": 256, "epochs": 1, "learning_rates": [1e-3], "weight_decays": [0.0], **_SCHEDULE}
_S3 = {"batch_size": 2048, "epochs": 100, "learning_rates": [1e-3], "weight_decays": [0.01]}
_MAD_MODEL = {"width": 128, "layers": 2}
_STATE_MODEL = {"width": 128, "layers": 2, "deltanet": {"num_heads": 4}}
_SHORT = {"shortest": 3, "longest": 40}
_LONGER = {"shortest": 40, "longest": 256}

TASKS = {
    "mqar": Task(
        recall_tasks.multi_query_recall,
        8192,
        "Zoology, Figure 2, its hardest setting; DeltaNet with 2 heads and no convolution",
        {"vocab": 8192, "length": 512, "pairs": 64},
        examples=100_000,
        test_examples=3000,
        training=_ZOOLOGY,
        model={"width": 64, "layers": 2, "mlp": False, "dropout": 0.1, "tied": True, "deltanet": {"use_short_conv": False}},
    ),
    "in_context_recall": Task(recall_tasks.in_context_recall, 16, "MAD, baseline", training=_MAD, model=_MAD_MODEL),
    "noisy_recall": Task(
        recall_tasks.in_context_recall,
        32,
        "MAD, baseline",
        {"vocab": 32, "noise_vocab": 16, "noise": 0.2},
        training=_MAD,
        model=_MAD_MODEL,
    ),
    "fuzzy_recall": Task(recall_tasks.fuzzy_recall, 16, "MAD, baseline", training=_MAD, model=_MAD_MODEL),
    "memorization": Task(recall_tasks.memorization, 256, "MAD, baseline", examples=256, training=_MAD, model=_MAD_MODEL),
    "selective_copying": Task(recall_tasks.selective_copying, 16, "MAD, baseline", training=_MAD, model=_MAD_MODEL),
    "parity": Task(
        state_tracking.parity,
        3,
        "Grazzi et al. 2024 by the configuration of Beck et al. 2024: 20,000 steps",
        _SHORT,
        _LONGER,
        examples=256 * 20_000,
        test_examples=8192,
        training=_PARITY,
        model=_STATE_MODEL,
    ),
    "modular_arithmetic": Task(
        state_tracking.modular_arithmetic,
        10,
        "definition of Beck et al. 2024; training as for parity (ours)",
        _SHORT,
        _LONGER,
        examples=256 * 20_000,
        test_examples=8192,
        training=_PARITY,
        model=_STATE_MODEL,
    ),
    "s3": Task(
        state_tracking.s3,
        6,
        "Siems et al. 2025 (DeltaProduct); number of examples ours",
        {"length": 128},
        {"length": 512},
        examples=100_000,
        training=_S3,
        model={**_STATE_MODEL, "layers": 1},
    ),
    "s3_swaps": Task(
        state_tracking.s3,
        6,
        "as s3, transpositions only",
        {"length": 128, "swaps_only": True},
        {"length": 512},
        examples=100_000,
        training=_S3,
        model={**_STATE_MODEL, "layers": 1},
        # Half of the group can be the product of a given number of swaps.
        chance=1 / 3,
    ),
}


def check_sizes(name: str, task: Task) -> None:
    """
    Raises:
        ValueError: the generator does not know a size or cannot make sequences of these.
    """
    for train, sizes in ((True, task.sizes), (False, {**task.sizes, **task.test_sizes})):
        try:
            task.make(np.random.default_rng(0), 2, train, **sizes)
        except (TypeError, ValueError) as error:
            raise ValueError(f"task {name!r} with {sizes}: {error}") from error


def make_data(task: Task, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Training inputs and labels and test inputs and labels, int32; no test sequence is a training sequence.

    Raises:
        ValueError: the task has too few different sequences to keep the two apart.
    """
    train_seed, test_seed = np.random.SeedSequence(seed).spawn(2)
    inputs, labels = _compact(task.make(np.random.default_rng(train_seed), task.examples, True, **task.sizes))
    rng = np.random.default_rng(test_seed)
    kept, found = [], 0
    for _ in range(20):
        drawn = task.make(rng, task.test_examples, False, **{**task.sizes, **task.test_sizes})
        drawn = _compact(drawn)
        fresh = ~_also_in(drawn[0], inputs)
        kept.append((drawn[0][fresh], drawn[1][fresh]))
        found += int(fresh.sum())
        if found >= task.test_examples:
            test = [np.concatenate(parts)[: task.test_examples] for parts in zip(*kept)]
            return tuple(torch.from_numpy(part) for part in (inputs, labels, *test))
    raise ValueError("nearly every test sequence is a training sequence too; use fewer examples or longer sequences")


def _compact(arrays):
    return tuple(array.astype(np.int32) for array in arrays)


def _also_in(test: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Which test rows are training rows, up to padding at the end. Only the few test rows are kept in a table."""
    rows = {}
    for index, key in enumerate(map(_key, test)):
        rows.setdefault(key, []).append(index)
    found = np.zeros(len(test), bool)
    for key in map(_key, train):
        if key in rows:
            found[rows[key]] = True
    return found


def _key(row: np.ndarray) -> bytes:
    return row.tobytes().rstrip(b"\0")
