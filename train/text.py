"""The public-domain English that is shipped in `data/` (its README.md states the source and the licence)."""

import re
from pathlib import Path

DATA = Path(__file__).parent / "data"
SPLITS = ("train", "heldout")

_CHAPTER = re.compile(r"^(?=Chapter \d+$)", re.MULTILINE)


def shipped_chapters(split: str) -> list[str]:
    """The chapters of one split, in reading order; whole novels are in one split or the other."""
    if split not in SPLITS:
        raise ValueError(f"`split` is {split!r}; allowed: {', '.join(map(repr, SPLITS))}.")
    novels = [path.read_text(encoding="utf-8") for path in sorted(DATA.glob(f"{split}-*.txt"))]
    return [chapter.strip() for novel in novels for chapter in _CHAPTER.split(novel) if chapter.strip()]
