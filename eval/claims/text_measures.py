"""Perplexities of a stream of tokens, in windows of one length or another."""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel


def last_hidden(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """What the head reads for ids [B, T], in the head's dtype: Mamba2's residual stream is float32."""
    hidden = model.base_model(input_ids=ids.long(), use_cache=False).last_hidden_state
    return hidden.to(model.get_output_embeddings().weight.dtype)


@torch.no_grad()
def token_losses(model: PreTrainedModel, stream: np.ndarray, length: int, tokens_at_once: int) -> torch.Tensor:
    """Nats [windows, length - 1] of all tokens but the first in windows of the stream [N]; a shorter rest is left out."""
    windows = torch.from_numpy(stream[: len(stream) // length * length].reshape(-1, length))
    losses = []
    for rows in windows.split(max(1, tokens_at_once // length)):
        ids = rows.to(model.device).long()
        logits = model.lm_head(last_hidden(model, ids)[:, :-1])
        nats = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        losses.append(nats.view(len(ids), -1))
    return torch.cat(losses)


def perplexity(model: PreTrainedModel, stream: np.ndarray, length: int, tokens_at_once: int) -> float:
    return math.exp(token_losses(model, stream, length, tokens_at_once).mean().item())


def context_perplexities(
    model: PreTrainedModel, stream: np.ndarray, lengths: Sequence[int], tokens_at_once: int
) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """(length, perplexity) of the same text in windows of each length, and (end, perplexity) of the tokens from each power
    of two to the next, `end`, in the longest windows."""
    text = stream[: len(stream) // max(lengths) * max(lengths)]
    by_length, by_position, begin = [], [], 0
    for length in lengths:
        losses = token_losses(model, text, length, tokens_at_once)
        by_length.append((length, math.exp(losses.mean().item())))
    end = 128
    while begin < losses.shape[1]:
        by_position.append((end, math.exp(losses[:, begin:end].mean().item())))
        begin, end = end, 2 * end
    return by_length, by_position
