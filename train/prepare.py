"""
Tokenises documents once, into shards that training maps into memory.

    python -m deltanet.train.prepare OUTPUT --tokenizer NAME FILE_OR_DIRECTORY...
    python -m deltanet.train.prepare OUTPUT --tokenizer NAME --dataset NAME [--config NAME] [--split train] [--revision ID]

Files are .txt (one document each), .jsonl or .parquet (`--field`); data sets are streamed. An interrupted run continues
behind its last finished shard when the same command is given again, with the result of an uninterrupted one.
"""

import argparse
import json
import multiprocessing
import os
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .finished import finished_directory, require_space, write_whole
from .quiet import quiet
from .shards import (
    FORMAT,
    INDEX,
    OFFSET,
    TOKENIZER,
    file_checksum,
    read_index,
    separator_id,
    token_dtype,
    tokenizer_checksum,
)
from .sources import DatasetSource, FileSource, ShippedSource
from .tokenization import train_tokenizer

Source = FileSource | DatasetSource | ShippedSource

BATCH_CHARACTERS = 2**20
SHARD_TOKENS = 2**26
BYTES_PER_TOKEN = 3
"""Of English text there are four to five, of other text and code fewer: an estimate on the side of too much space."""


def main() -> int:
    arguments = _parse_arguments()
    os.environ["TOKENIZERS_PARALLELISM"] = "false" if arguments.processes > 1 else "true"
    quiet()
    try:
        if arguments.dataset:
            source = DatasetSource(arguments.dataset, arguments.config, arguments.split, arguments.field, arguments.revision)
        else:
            source = FileSource(arguments.files, arguments.field)
        tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
        index = prepare(arguments.output, source, tokenizer, arguments.shard_tokens, arguments.processes)
    except (OSError, ValueError, BrokenProcessPool) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nStopped. Finished shards are kept; the same command goes on behind them.", file=sys.stderr)
        return 130
    counts = f"{_total(index, 'tokens'):,} tokens of {_total(index, 'documents'):,} documents"
    print(f"{arguments.output}: {counts}, {len(index['shards'])} shards.")
    return 0


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m deltanet.train.prepare", description=__doc__.split("\n\n")[0].strip())
    parser.add_argument("output", type=Path, help="directory of the shards")
    parser.add_argument("files", type=Path, nargs="*", help=".txt, .jsonl, .parquet, or directories of them")
    parser.add_argument("--tokenizer", required=True, help="directory, or id on the Hub")
    parser.add_argument("--dataset", help="name or directory for datasets.load_dataset, instead of files")
    parser.add_argument("--config", help="configuration of the data set")
    parser.add_argument("--split", default="train", help="split of the data set (%(default)s)")
    parser.add_argument("--revision", help="revision of the data set; pins what it is")
    parser.add_argument("--field", default="text", help="where rows have their text (%(default)s)")
    parser.add_argument("--shard-tokens", type=int, default=SHARD_TOKENS, help="least tokens of a shard (%(default)s)")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="that tokenise (%(default)s)")
    arguments = parser.parse_intermixed_args()
    if bool(arguments.files) == bool(arguments.dataset):
        parser.error("give either files or --dataset.")
    for name in ("shard_tokens", "processes"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(arguments, name)}; allowed: 1 and more.")
    return arguments


def prepare(
    output: Path,
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    shard_tokens: int = SHARD_TOKENS,
    processes: int = 1,
) -> dict[str, Any]:
    """Write the shards of a source into `output`, continuing an interrupted run, and return their index.

    A shard ends with the document that brings it to `shard_tokens`, so that the result depends on neither `processes` nor
    interruptions.

    Raises:
        ValueError: `output` holds something else, or there is not a single document.
        OSError: the disk has no room.
    """
    output = Path(output)
    index = _begin(output, source, tokenizer, shard_tokens)
    if index["complete"]:
        return index
    pending, count = [], 0
    documents = source.documents(skip=_total(index, "documents"))
    with tqdm(
        total=source.size, initial=_total(index, "bytes"), desc="Tokenising", unit="B", unit_scale=True, disable=None
    ) as bar:
        for ids, size in _tokenised(documents, output / TOKENIZER, np.dtype(index["dtype"]), processes):
            pending.append((ids, size))
            count += len(ids)
            bar.update(size)
            if count >= shard_tokens:
                _add_shard(output, index, pending)
                pending, count = [], 0
    if pending:
        _add_shard(output, index, pending)
    if not index["shards"]:
        raise ValueError(f"The documents for {output} are empty; allowed: at least one that is not.")
    index["complete"] = True
    _write_index(output, index)
    return index


def prepare_shipped(output: Path, vocab_size: int, shard_tokens: int = SHARD_TOKENS) -> dict[str, Any]:
    """Shards of the shipped text, with a tokenizer of `vocab_size` learnt from it."""
    source = ShippedSource()
    if (output / TOKENIZER).exists():
        tokenizer = AutoTokenizer.from_pretrained(output / TOKENIZER)
    else:
        tokenizer = train_tokenizer(source.chapters, vocab_size)
    return prepare(output, source, tokenizer, shard_tokens)


def _begin(output: Path, source: Source, tokenizer: PreTrainedTokenizerBase, shard_tokens: int) -> dict[str, Any]:
    """The index of a run that was interrupted or is finished, or of a new one, which then has a directory."""
    settings = {
        "format": FORMAT,
        "tokenizer_sha256": tokenizer_checksum(tokenizer),
        "vocab_size": len(tokenizer),
        "dtype": token_dtype(len(tokenizer)).str,
        "shard_tokens": shard_tokens,
        "source": source.identity(),
    }
    if not output.exists():
        require_space(output, (source.size or 0) // BYTES_PER_TOKEN * np.dtype(settings["dtype"]).itemsize)
        with finished_directory(output) as partial:
            tokenizer.save_pretrained(partial / TOKENIZER)
            _write_index(partial, {**settings, "complete": False, "shards": []})
    index = read_index(output)
    changed = [key for key, value in settings.items() if index.get(key) != value]
    if changed:
        raise ValueError(f"{output} was begun with another {', '.join(changed)}; remove it or choose another directory.")
    for leftover in output.glob("*.partial"):
        leftover.unlink()
    return index


def _tokenised(
    documents: Iterable[tuple[str, float]], tokenizer: Path, dtype: np.dtype, processes: int
) -> Iterator[tuple[np.ndarray, float]]:
    """Ids of every document behind the separator, in order, with the document's share of the source."""
    batches = _batches(documents)
    if processes == 1:
        _load_tokenizer(tokenizer, dtype)
        for batch in batches:
            yield from _tokenise(batch)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, spawn, _begin_worker, (tokenizer, dtype)) as pool:
        # A few batches ahead and no more: the source may be larger than memory.
        waiting = deque()
        try:
            for batch in batches:
                waiting.append(pool.submit(_tokenise, batch))
                if len(waiting) > 2 * processes:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _batches(documents: Iterable[tuple[str, float]]) -> Iterator[list[tuple[str, float]]]:
    batch, characters = [], 0
    for text, size in documents:
        batch.append((text, size))
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


_worker: dict[str, Any] = {}


def _begin_worker(path: Path, dtype: np.dtype) -> None:
    _load_tokenizer(path, dtype)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A pool's workers would wait forever for a parent that was killed."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _load_tokenizer(path: Path, dtype: np.dtype) -> None:
    _worker.update(tokenizer=AutoTokenizer.from_pretrained(path), dtype=dtype)


def _tokenise(batch: list[tuple[str, float]]) -> list[tuple[np.ndarray, float]]:
    tokenizer, dtype = _worker["tokenizer"], _worker["dtype"]
    encoded = tokenizer([text for text, _ in batch], add_special_tokens=False, verbose=False)["input_ids"]
    first = separator_id(tokenizer)
    return [(np.array([first, *ids], dtype=dtype), size) for ids, (_, size) in zip(encoded, batch)]


def _add_shard(output: Path, index: dict[str, Any], documents: list[tuple[np.ndarray, float]]) -> None:
    """Write a shard, and then the index that names it: one that is not named does not exist."""
    name = f"shard-{len(index['shards']):05d}"
    sizes = [len(ids) for ids, _ in documents]
    contents = {
        "tokens": np.concatenate([ids for ids, _ in documents]),
        "documents": (np.cumsum(sizes) - sizes).astype(OFFSET),
    }
    require_space(output, sum(content.nbytes for content in contents.values()))
    for kind, content in contents.items():
        write_whole(output / f"{name}.{kind}", content.data)
    checksums = {kind: file_checksum(output / f"{name}.{kind}") for kind in contents}
    counts = {kind: len(content) for kind, content in contents.items()}
    read = round(sum(size for _, size in documents))
    index["shards"].append({"name": name, **counts, "bytes": read, "sha256": checksums})
    _write_index(output, index)


def _write_index(output: Path, index: dict[str, Any]) -> None:
    write_whole(output / INDEX, (json.dumps(index, indent=1) + "\n").encode())


def _total(index: dict[str, Any], key: str) -> int:
    return sum(shard[key] for shard in index["shards"])


if __name__ == "__main__":
    sys.exit(main())
