"""Bits per byte: how well a model, or a compressor, predicts a text, whatever its tokenizer."""

import lzma
import math
from collections.abc import Iterable, Iterator

import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .blocks import document_ids

NOT_COUNTED = -100


@torch.no_grad()
def bits_per_byte(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: list[str], window: int, batch: int = 1
) -> float:
    """Bits that the model needs for the documents, divided by their bytes in UTF-8.

    Every token is predicted once. A document begins with the BOS token and is read in windows of at most `window` tokens,
    each begun by the token before it; the last window is filled up with tokens already read. lm-eval's
    `loglikelihood_rolling` does the same and gives the same number. One forward reads `batch` windows.
    """
    windows = [pair for document in documents for pair in _windows(document_ids(document, tokenizer), window)]
    windows.sort(key=lambda pair: len(pair[0]))
    nats = 0.0
    for first in range(0, len(windows), batch):
        # What fills a row up comes after all that counts, so that a causal model does not see it.
        ids, labels = (
            pad_sequence(rows, batch_first=True, padding_value=filling).to(model.device)
            for rows, filling in zip(zip(*windows[first : first + batch]), (0, NOT_COUNTED))
        )
        logits = model(ids, use_cache=False).logits.float()
        nats += cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=NOT_COUNTED, reduction="sum").item()
    return nats / math.log(2) / sum(len(document.encode()) for document in documents)


def _windows(ids: list[int], window: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and what follows each of them, which counts in one window only."""
    ids = torch.tensor(ids)
    for start in range(1, len(ids), window):
        end = min(start + window, len(ids))
        begin = max(0, end - window - 1)
        labels = ids[begin + 1 : end].clone()
        labels[: start - 1 - begin] = NOT_COUNTED
        yield ids[begin : end - 1], labels


def compressed_bits_per_byte(documents: Iterable[str], known: Iterable[str] = ()) -> float:
    """Bits per byte that the documents add to an xz archive of the `known` text: a yardstick for a model trained on it."""
    before, text = ("".join(texts).encode() for texts in (known, documents))
    sizes = [len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) for data in (before, before + text)]
    return 8 * (sizes[1] - sizes[0]) / len(text)
