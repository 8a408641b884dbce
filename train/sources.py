"""Documents to be tokenised, always in one order: text, JSON lines and Parquet files, or a data set of `datasets`."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from .text import shipped_chapters

SUFFIXES = (".txt", ".jsonl", ".parquet")


class FileSource:
    """Documents of files: one a `.txt` file, one a line of `.jsonl`, one a row of `.parquet`; the latter two in `field`.

    Raises:
        ValueError: there is no file, or one of another kind.
    """

    def __init__(self, paths: list[Path], field: str = "text"):
        self.field = field
        self.paths = [file for path in map(Path, paths) for file in self._files(path)]
        if not self.paths:
            raise ValueError(f"`files` is {[str(path) for path in paths]}; allowed: at least one {', '.join(SUFFIXES)}.")
        self.size = sum(path.stat().st_size for path in self.paths)

    @staticmethod
    def _files(path: Path) -> list[Path]:
        if path.is_dir():
            return sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES)
        if not path.is_file() or path.suffix not in SUFFIXES:
            reason = "is none of these" if path.is_file() else "does not exist"
            raise ValueError(f"`files`: {path} {reason}; allowed: directories and {', '.join(SUFFIXES)}.")
        return [path]

    def identity(self) -> dict[str, Any]:
        """What must not change between an interruption and its continuation."""
        return {"field": self.field, "files": [[str(path), path.stat().st_size] for path in self.paths]}

    def documents(self, skip: int) -> Iterator[tuple[str, float]]:
        """Every document that is not empty, after the first `skip`, with its share of `size` in bytes."""
        yield from islice(((text, size) for path in self.paths for text, size in self._read(path) if text), skip, None)

    def _read(self, path: Path) -> Iterator[tuple[str, float]]:
        try:
            if path.suffix == ".txt":
                yield path.read_text(encoding="utf-8"), path.stat().st_size
            elif path.suffix == ".jsonl":
                yield from self._read_lines(path)
            else:
                yield from self._read_rows(path)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 ({error}); convert it.") from error

    def _read_lines(self, path: Path) -> Iterator[tuple[str, float]]:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    try:
                        row = json.loads(line)
                    except json.JSONDecodeError as error:
                        raise ValueError(f"{path}, line {number} is no JSON ({error}).") from error
                    yield _text(row, self.field, f"{path}, line {number}"), len(line)

    def _read_rows(self, path: Path) -> Iterator[tuple[str, float]]:
        from pyarrow.parquet import ParquetFile

        with ParquetFile(path) as file:
            names = file.schema_arrow.names
            if self.field not in names:
                raise ValueError(f"`field` is {self.field!r}; allowed in {path}: {', '.join(map(repr, names))}.")
            share = path.stat().st_size / max(1, file.metadata.num_rows)
            for batch in file.iter_batches(columns=[self.field], batch_size=1024):
                for row in batch.to_pylist():
                    yield _text(row, self.field, str(path)), share


class DatasetSource:
    """Documents of a data set that `datasets.load_dataset` finds, streamed; `revision` pins what a name stands for."""

    size = None

    def __init__(self, name: str, config: str | None, split: str, field: str = "text", revision: str | None = None):
        self.arguments = {"path": name, "name": config, "split": split, "revision": revision}
        self.field = field

    def identity(self) -> dict[str, Any]:
        return {"field": self.field, **self.arguments}

    def documents(self, skip: int) -> Iterator[tuple[str, float]]:
        from datasets import load_dataset

        rows = load_dataset(**self.arguments, streaming=True)
        for row in rows.filter(lambda row: _text(row, self.field, "the data set") != "").skip(skip):
            yield row[self.field], 0.0


class ShippedSource:
    """The chapters of the shipped training text."""

    def __init__(self):
        self.chapters = shipped_chapters("train")
        self.size = sum(len(chapter.encode()) for chapter in self.chapters)

    def identity(self) -> dict[str, Any]:
        return {"shipped": "train", "size": self.size}

    def documents(self, skip: int) -> Iterator[tuple[str, float]]:
        yield from ((chapter, len(chapter.encode())) for chapter in self.chapters[skip:])


def _text(row: Any, field: str, place: str) -> str:
    if not isinstance(row, dict) or not isinstance(row.get(field), str):
        fields = [name for name, value in row.items() if isinstance(value, str)] if isinstance(row, dict) else []
        raise ValueError(f"`field` is {field!r}, which {place} has no text under; it has text under: {fields}.")
    return row[field]
