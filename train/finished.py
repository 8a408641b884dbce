"""Results that appear under their name only when they are whole."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def finished_directory(path: Path) -> Iterator[Path]:
    """Yield an empty directory beside `path`; when the block ends without an error, it is flushed to disk and renamed to
    `path`, in place of a directory that was there. An error, an interruption or a kill leaves `path` as it was.
    """
    path = Path(path)
    partial, replaced = (path.with_name(f"{path.name}.{suffix}") for suffix in ("partial", "replaced"))
    for leftover in (partial, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for folder, _, files in os.walk(partial):
            for name in (*files, "."):
                _flush(os.path.join(folder, name))
        if path.exists():
            path.rename(replaced)
        partial.rename(path)
        _flush(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)


def remove_directory(path: Path) -> None:
    """Remove a directory; an interruption leaves nothing under its name, and the next `finished_directory` the rest."""
    partial = path.with_name(f"{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    path.rename(partial)
    shutil.rmtree(partial)


def write_whole(path: Path, data: bytes | memoryview) -> None:
    """Write a file that appears under its name, or replaces the one that is there, only when it is whole and on disk."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_bytes(data)
        _flush(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    _flush(path.parent)


def require_space(path: Path, needed: int) -> None:
    """Raise `OSError` unless the disk of `path` has room for `needed` bytes."""
    folder = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"The disk of {folder} has {free / 1e9:.1f} GB free; about {needed / 1e9:.1f} GB are needed.")


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole `checkpoint-N` of a Trainer in `folder`, if any.

    The Trainer writes `trainer_state.json` last: a checkpoint whose writing was interrupted has none that can be read.
    """
    checkpoints = {int(path.name.rpartition("-")[2]): path for path in Path(folder).glob("checkpoint-[0-9]*")}
    for _, checkpoint in sorted(checkpoints.items(), reverse=True):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
            return checkpoint
        except (OSError, ValueError):
            continue
    return None


def _flush(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
