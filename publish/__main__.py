"""The command: see `python -m deltanet.publish --help`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub.errors import HTTPError, StrictDataclassError

from . import Statement, publish, read_results


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m deltanet.publish",
        usage="%(prog)s SOURCE [REPOSITORY] [options]",
        description="Publish a DeltaNet checkpoint as a repository that loads with transformers alone, or write it to a "
        "directory. Checkpoints of the reference, in the layouts of 2024 too, are converted exactly.",
        epilog="After an interruption the same command goes on: what the Hub has is not sent again. The repository is "
        "prepared in the temporary directory (TMPDIR), weights included.",
    )
    parser.add_argument("source", help="directory, or id on the Hub, of a checkpoint")
    parser.add_argument("repository", nargs="?", help="id of the repository to write, such as name/delta-net-340m")
    parser.add_argument("--source-revision", help="branch, tag or commit of a source on the Hub")
    parser.add_argument("--tokenizer", help="directory or id, in place of the source's own")
    parser.add_argument("--max-shard-size", default="5GB", help="of one weights file (5GB)")
    parser.add_argument("--leave-out", action="store_true", help="pass over files that are no part of a checkpoint")
    parser.add_argument("--hashes", action="store_true", help="print the SHA-256 of every tensor")
    sending = parser.add_argument_group("sending")
    nothing_sent = sending.add_mutually_exclusive_group()
    nothing_sent.add_argument("--dry-run", action="store_true", help="list what would go up, with sizes; send nothing")
    nothing_sent.add_argument("--output", type=Path, help="write to this empty directory; send nothing")
    sending.add_argument("--private", action="store_true", help="create the repository private")
    sending.add_argument("--revision", help="branch to commit to, created if needed (main)")
    sending.add_argument("--message", default="Publish a DeltaNet checkpoint", help="the commit's message")
    card = parser.add_argument_group("model card", "gaps are filled from the metadata of the source's card, if it has one")
    card.add_argument("--license", help="identifier, such as apache-2.0; a repository must have one")
    card.add_argument("--language", action="append", default=[], help="code, such as en; may be repeated")
    card.add_argument("--dataset", action="append", default=[], help="id of training data; may be repeated")
    card.add_argument("--tag", action="append", default=[], help="further tag; may be repeated")
    card.add_argument("--base-model", help="id of the model that this one comes from")
    card.add_argument("--training", type=Path, help="Markdown file: how it was trained")
    card.add_argument("--results", type=Path, help="JSON file of results, card_results.json of `deltanet.eval`")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; what a user can put right ends it with one message and status 1."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.repository is None and options.output is None:
        parser.error("say where the checkpoint is to go: REPOSITORY, or --output DIRECTORY")
    try:
        _run(options)
    except (OSError, RuntimeError, ValueError, HTTPError, StrictDataclassError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


def _run(options: argparse.Namespace) -> None:
    statement = Statement(
        license=options.license,
        languages=options.language,
        datasets=options.dataset,
        base_model=options.base_model,
        tags=options.tag,
        training=options.training.read_text(encoding="utf-8") if options.training else None,
        results=read_results(options.results) if options.results else [],
    )
    address = publish(
        options.source,
        options.repository,
        statement=statement,
        tokenizer=options.tokenizer,
        source_revision=options.source_revision,
        max_shard_size=options.max_shard_size,
        leave_out=options.leave_out,
        output=options.output,
        dry_run=options.dry_run,
        hashes=options.hashes,
        private=options.private,
        revision=options.revision,
        message=options.message,
    )
    if address is not None:
        print(address)


if __name__ == "__main__":
    main()
