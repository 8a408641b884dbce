"""Bits per byte: how well a model, or a compressor, predicts a text, whatever its tokenizer."""

import lzma
import math
from collections.abc import Iterable

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .blocks import document_ids


@torch.no_grad()
def bits_per_byte(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: list[str], window: int) -> float:
    """Bits that the model needs for the documents, divided by their bytes in UTF-8.

    Every token is predicted once. A document begins with the BOS token and is read in windows of at most `window` tokens,
    each begun by the token before it; the last window is filled up with tokens already read. lm-eval's
    `loglikelihood_rolling` does the same and gives the same number.
    """
    nats = 0.0
    for document in documents:
        ids = torch.tensor(document_ids(document, tokenizer), device=model.device)
        for start in range(1, len(ids), window):
            end = min(start + window, len(ids))
            begin = max(0, end - window - 1)
            logits = model(ids[None, begin : end - 1], use_cache=False).logits[0, start - 1 - begin :]
            nats += torch.nn.functional.cross_entropy(logits.float(), ids[start:end], reduction="sum").item()
    return nats / math.log(2) / sum(len(document.encode()) for document in documents)


def compressed_bits_per_byte(documents: Iterable[str], known: Iterable[str] = ()) -> float:
    """Bits per byte that the documents add to an xz archive of the `known` text: a yardstick for a model trained on it."""
    before, text = ("".join(texts).encode() for texts in (known, documents))
    sizes = [len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) for data in (before, before + text)]
    return 8 * (sizes[1] - sizes[0]) / len(text)
