"""Recall from text: facts of a key and a value, a token each, hidden in real text and asked for later.

A mention is ` (key value)`. Each key has a few values of its own, and which of them holds is drawn anew for every sequence,
so that no weight can know it. Where a key comes again, its value follows from the first mention. A model finds it by
looking for one of the key's values. With values that any key may have it would have to find the key, and then what follows:
attention does not learn that in a short training, and nothing could be compared.
"""

import re
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..synthetic.recall_tasks import IGNORE
from .text_measures import last_hidden

_WORD = re.compile(r"Ġ[A-Za-z]{3,}")
KEYS = 64
VALUES = 8
"""Of each key: few words together, so that a short training sees each of them often."""
MORE_FREQUENT = 512
"""Whole words that come more often than those: these shall not fill the text, but a rare word's embedding would not train.
All rare tokens are pushed the same way by a tied head, and a model that cannot tell them apart learns no facts."""
ASKED = 8
"""The most questions at the end of a passage."""


@dataclass(frozen=True)
class Words:
    """Ids of a mention's parts."""

    opening: np.ndarray
    keys: np.ndarray  # [K]
    values: np.ndarray  # [K, VALUES]
    closing: np.ndarray

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, stream: np.ndarray) -> "Words":
        """
        Of a byte-level tokenizer and the tokens [N] that a model reads before.

        Raises:
            ValueError: the vocabulary has too few whole words for one key.
        """
        pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        counts = np.bincount(stream, minlength=len(pieces))
        words = np.array([index for index, piece in enumerate(pieces) if _WORD.fullmatch(piece)], dtype=int)
        words = words[np.argsort(-counts[words], kind="stable")]
        if len(words) <= VALUES:
            raise ValueError(f"`tokenizer` has {len(words)} pieces that are whole words; allowed: {VALUES + 1} and more.")
        count = min(KEYS, len(words) // (VALUES + 1)) * (VALUES + 1)
        table = words[min(MORE_FREQUENT, len(words) - count) :][:count].reshape(-1, VALUES + 1)
        marks = (np.array(tokenizer.encode(text, add_special_tokens=False)) for text in (" (", ")"))
        opening, closing = marks
        return cls(opening, table[:, 0], table[:, 1:], closing)

    @property
    def size(self) -> int:
        """Tokens of a mention."""
        return len(self.opening) + 2 + len(self.closing)

    @property
    def value_offset(self) -> int:
        """Of the value in a mention; the key stands before it."""
        return len(self.opening) + 1

    def facts(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Mentions [count, size] of different keys.

        Raises:
            ValueError: there are fewer keys than `count`.
        """
        if count > len(self.keys):
            raise ValueError(f"`count` is {count}; allowed: at most {len(self.keys)}, the number of keys.")
        chosen = rng.choice(len(self.keys), count, replace=False)
        values = self.values[chosen, rng.integers(0, self.values.shape[1], count)]
        pairs = np.stack([self.keys[chosen], values], 1)
        repeat = lambda mark: np.tile(mark, (count, 1))  # noqa: E731
        return np.concatenate([repeat(self.opening), pairs, repeat(self.closing)], 1)


def exercise(
    text: np.ndarray, words: Words, rng: np.random.Generator, count: int, mentions: int
) -> tuple[np.ndarray, np.ndarray]:
    """`text` [T] with `count` facts in so many `mentions` at random places, as long as before, to train on.

    Returns the tokens [T] and the labels [T]: the value of every mention but a fact's first, else `IGNORE`.
    """
    order = rng.permutation(np.concatenate([np.arange(count), rng.integers(0, count, mentions - count)]))
    tokens, starts = _insert(text, words.facts(rng, count)[order], rng, len(text))
    again = np.delete(starts, np.unique(order, return_index=True)[1]) + words.value_offset
    labels = np.full_like(tokens, IGNORE)
    labels[again] = tokens[again]
    return tokens, labels


def ask(
    text: np.ndarray, words: Words, rng: np.random.Generator, count: int, asked: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`text` with `count` facts at random places and `asked` of them once more at its end, as long as before.

    Returns the tokens [T], where the values asked for stand [asked], and how far behind their first mention [asked].
    """
    facts = words.facts(rng, count)
    again = rng.permutation(count)[:asked]
    body = len(text) - len(again) * words.size
    tokens, starts = _insert(text, facts, rng, body)
    queries = body + np.arange(len(again)) * words.size
    return np.concatenate([tokens, facts[again].ravel()]), queries + words.value_offset, queries - starts[again]


def _insert(text, mentions, rng, length) -> tuple[np.ndarray, np.ndarray]:
    """The mentions [M, size] at random places of the text's beginning, `length` tokens together, and where they start."""
    room = length - mentions.size
    if room < 0:
        raise ValueError(f"{len(mentions)} mentions do not fit into {length} tokens; allowed: fewer facts, or longer texts.")
    places = np.sort(rng.integers(0, room + 1, len(mentions)))
    tokens = np.insert(text[:room], np.repeat(places, mentions.shape[1]), mentions.ravel())
    return tokens, places + np.arange(len(mentions)) * mentions.shape[1]


@torch.no_grad()
def recall(
    model: PreTrainedModel,
    text: np.ndarray,
    words: Words,
    length: int,
    facts: int,
    sequences: int,
    tokens_at_once: int,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Ask for up to `ASKED` facts in each of so many passages of `length` tokens from `text`.

    Returns whether the most likely word of the whole vocabulary was right [asked], and the distances [asked]. Other models
    of the same tokenizer are asked the same.
    """
    rng = np.random.default_rng([seed, length, facts])
    right, distances = [], []
    rows = max(1, tokens_at_once // length)
    for first in range(0, sequences, rows):
        starts = rng.integers(0, len(text) - length + 1, min(rows, sequences - first))
        asked = [ask(text[start : start + length], words, rng, facts, min(facts, ASKED)) for start in starts]
        ids, places = (torch.from_numpy(np.stack(part)).to(model.device) for part in list(zip(*asked))[:2])
        hidden = last_hidden(model, ids)
        before = (places - 1)[..., None].expand(-1, -1, hidden.shape[-1])
        answers = model.lm_head(hidden.gather(1, before)).argmax(-1)
        right.append((answers == ids.gather(1, places)).flatten().cpu().numpy())
        distances += [distance for *_, distance in asked]
    return np.concatenate(right), np.concatenate(distances)
