"""Markdown of tables and pictures for `eval/RESULTS.md`."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

PAGE = Path(__file__).parents[1] / "RESULTS.md"


def table(heads: Sequence[str], rows: Iterable[Sequence]) -> str:
    """A table, or the empty string where there are no rows."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines) if len(lines) > 2 else ""


def image(path: Path, caption: str) -> str:
    """The picture by its path from the page, or the empty string where it is missing."""
    return f"![{caption}]({Path(os.path.relpath(path, PAGE.parent)).as_posix()})" if path.is_file() else ""


def not_run(command: str) -> str:
    return f"Not run yet: `{command}`."
