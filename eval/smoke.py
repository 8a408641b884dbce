"""The smoke suite's documents, cut from held-out English text: the same text gives the same documents."""

import random
import re
from pathlib import Path

from .errors import EvaluationError

SHIPPED_TEXT = Path(__file__).parent.parent / "train" / "data"
_PASSAGE_WORDS = 60
_CONTINUATION_WORDS = 12
CHOICES = 4
_KEYS = ("harbour", "orchard", "lantern", "meadow", "chapel", "saddle", "ribbon", "kettle", "garden", "violin")


def held_out_text(data: Path | None) -> str:
    """The text of `data/smoke.txt`, or of the files `heldout-*.txt` that the package ships for its first training run."""
    files = [data / "smoke.txt"] if data else sorted(SHIPPED_TEXT.glob("heldout-*.txt"))
    if not files or not all(file.is_file() for file in files):
        wanted = files[0] if files else SHIPPED_TEXT / "heldout-*.txt"
        raise EvaluationError(f"the smoke suite needs a text file at {wanted}; --data DIR reads DIR/smoke.txt instead")
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


def smoke_documents(text: str) -> dict[str, list[dict]]:
    """Documents of each smoke task, by task name; every task type of lm-eval is among them."""
    passages = _passages(text)
    if len(passages) < CHOICES:
        found = f"the smoke text gives {len(passages)} passages of {_PASSAGE_WORDS} words"
        raise EvaluationError(f"{found}; at least {CHOICES} are needed")
    return {
        "smoke_perplexity": [{"passage": " ".join(passages[i : i + 4])} for i in range(0, len(passages), 4)][:32],
        "smoke_last_word": _last_words(text)[:64],
        "smoke_choice": _continuations(passages)[:256],
        "smoke_needle": _needles(passages)[:32],
    }


def _sentences(text: str) -> list[list[str]]:
    return [sentence.split() for sentence in re.split(r"(?<=[.!?])\s+", " ".join(text.split()))]


def _passages(text: str) -> list[str]:
    """Runs of whole sentences, each the shortest of at least 60 words; an incomplete one at the end is left out."""
    passages, words = [], []
    for sentence in _sentences(text):
        words += sentence
        if len(words) >= _PASSAGE_WORDS:
            passages.append(" ".join(words))
            words = []
    return passages


def _last_words(text: str) -> list[dict]:
    """For every sentence that ends in a long word which the 60 words before have too: those words, and that word."""
    documents, words = [], []
    for sentence in _sentences(text):
        words = [*words[-_PASSAGE_WORDS:], *sentence]
        context, word = words[-_PASSAGE_WORDS - 1 : -1], re.sub(r"\W+$", "", words[-1])
        repeated = re.search(rf"\b{re.escape(word)}\b", " ".join(context))
        if len(words) > _PASSAGE_WORDS and len(word) >= 4 and word.isalpha() and repeated:
            documents.append({"context": " ".join(context), "word": word})
    return documents


def _continuations(passages: list[str]) -> list[dict]:
    """A passage's beginning with its own ending among three endings from distant passages."""
    split = [passage.split() for passage in passages]
    endings = [" ".join(words[-_CONTINUATION_WORDS:]) for words in split]
    documents = []
    for index, words in enumerate(split):
        label, step = index % CHOICES, len(split) // CHOICES
        choices = [endings[(index + (place - label) * step) % len(split)] for place in range(CHOICES)]
        documents.append({"context": " ".join(words[:-_CONTINUATION_WORDS]), "choices": choices, "label": label})
    return documents


def _needles(passages: list[str]) -> list[dict]:
    """A sentence with a number between two passages, asked for after the second."""
    generator = random.Random(0)
    documents = []
    for index, (before, after) in enumerate(zip(passages[::2], passages[1::2])):
        question, value = f"The number of the {_KEYS[index % len(_KEYS)]} is", str(generator.randint(1000, 9999))
        documents.append({"prompt": f"{before} {question} {value}. {after} {question}", "value": value})
    return documents
