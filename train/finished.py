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
