"""Documents as one stream of tokens, cut into blocks of a fixed length."""

from collections.abc import Iterable

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase


def document_ids(document: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a document behind the tokenizer's BOS token, which stands for nothing before it."""
    return [tokenizer.bos_token_id, *tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]]


def token_stream(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Token ids [N] of all documents in turn, each begun by the BOS token."""
    return torch.tensor([token for document in documents for token in document_ids(document, tokenizer)])


class TokenBlocks(Dataset):
    """Blocks of `length` tokens of a stream [N], as inputs and labels of a causal model; a shorter rest is left out.

    Raises:
        ValueError: the stream is shorter than one block.
    """

    def __init__(self, ids: torch.Tensor, length: int):
        count = len(ids) // length
        if count == 0:
            raise ValueError(f"`ids` has {len(ids)} tokens; allowed: at least `length` = {length}.")
        self.blocks = ids[: count * length].view(count, length)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.blocks[index], "labels": self.blocks[index]}
