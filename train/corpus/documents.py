"""Cleaning, deduplication and the split of the corpus, by whole documents."""

import hashlib
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

SPLITS = ("train", "validation", "test")
LEAST_CHARACTERS = 400
"""Of a document: what is shorter has no context to learn from."""
LEAST_COMPARED = 60
"""Characters of a paragraph from which on a second occurrence is a copy and no coincidence."""

_QUOTES = {"\u2018": "'", "\u2019": "'", "\u2032": "'", "\u201c": '"', "\u201d": '"'}
_HYPHENS = dict.fromkeys("\u2010\u2011\u2212", "-")
_INVISIBLE = dict.fromkeys("\u00ad\u200b\ufeff\u00b6", "")  # the last one links to headings
_PLAIN = str.maketrans(_QUOTES | _HYPHENS | _INVISIBLE)
_SENTENCE = re.compile(r"[.!?:;\])][\"')\]]*$")
_BOILERPLATE = re.compile(
    r"(New|Changed|Deprecated|Added) (in|since) version|(See|Refer) [^.]*\.$|Copyright|Last (updated|modified)|"
    r"\[ ?As (delivered|prepared)",
)


@dataclass(frozen=True)
class Document:
    source: str
    name: str
    text: str

    @property
    def size(self) -> int:
        """Bytes in UTF-8."""
        return len(self.text.encode())


def clean(paragraph: str) -> str:
    """In NFKC, with plain quotation marks and hyphens, and one space between words."""
    return " ".join(unicodedata.normalize("NFKC", paragraph.translate(_PLAIN)).translate(_PLAIN).split())


def is_sentence(paragraph: str) -> bool:
    """Whether a paragraph of documentation is prose: a whole sentence, mostly of letters, and no boilerplate."""
    letters = sum(character.isalpha() and character.isascii() or character == " " for character in paragraph)
    ends = _SENTENCE.search(paragraph) and len(paragraph) >= 40
    return bool(ends) and letters >= 0.85 * len(paragraph) and not _BOILERPLATE.match(paragraph)


class Deduplicator:
    """Keeps a paragraph where it first occurs, over all documents; letters and digits decide what is the same.

    `known` is text of which nothing may come back.
    """

    def __init__(self, known: Iterable[str] = ()):
        self.seen = set()
        for text in known:
            self.first(text.split("\n\n"))

    def first(self, paragraphs: list[str]) -> list[str]:
        return [paragraph for paragraph in paragraphs if self._is_first(paragraph)]

    def _is_first(self, paragraph: str) -> bool:
        if len(paragraph) < LEAST_COMPARED:
            return True
        key = hashlib.blake2b(re.sub(r"[\W_]+", "", paragraph.lower()).encode(), digest_size=12).digest()
        if key in self.seen:
            return False
        self.seen.add(key)
        return True


def document(source: str, name: str, paragraphs: Iterable[str], prose: bool, copies: Deduplicator) -> Document | None:
    """The document of what is left of the paragraphs, or `None` where that is too little."""
    paragraphs = [paragraph for paragraph in map(clean, paragraphs) if any(map(str.isalpha, paragraph))]
    kept = [paragraph for paragraph in paragraphs if not _BOILERPLATE.match(paragraph) and (prose or is_sentence(paragraph))]
    text = "\n\n".join(copies.first(kept))
    return Document(source, name, text) if len(text) >= LEAST_CHARACTERS else None


def split(documents: list[Document], held_out: int) -> dict[str, list[Document]]:
    """Whole documents for training, and of each source its share of `held_out` bytes for validation and as much for test.

    A hash of a document's name decides, so that the parts of a source do not depend on other sources.

    Raises:
        ValueError: a source has fewer than three documents.
    """
    parts = {name: [] for name in SPLITS}
    total = sum(document.size for document in documents)
    for source in dict.fromkeys(document.source for document in documents):
        rest = sorted((d for d in documents if d.source == source), key=lambda d: hashlib.sha256(d.name.encode()).digest())
        if len(rest) < 3:
            raise ValueError(f"`{source}` has {len(rest)} documents; allowed: three and more, one for each part.")
        share = held_out * sum(document.size for document in rest) / total
        for part in ("test", "validation"):
            taken = _take(rest, share)
            parts[part] += taken
            rest = [document for document in rest if document not in taken]
        parts["train"] += rest
    return parts


def _take(documents: list[Document], share: float) -> list[Document]:
    """The first documents that `share` bytes hold, passing over larger ones; at least one."""
    taken, size = [], 0
    for document in documents:
        if size + document.size <= share:
            taken.append(document)
            size += document.size
    return taken or [min(documents, key=lambda document: document.size)]
