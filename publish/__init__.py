"""Publishing: push a DeltaNet checkpoint that anyone can load, with this package or without it.

    python -m deltanet.publish SOURCE REPOSITORY --license apache-2.0    # one commit on the Hub
    python -m deltanet.publish SOURCE --output DIRECTORY                 # the same files here, nothing sent
"""

import tempfile
from os import PathLike
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .card import Statement, read_results
from .repository import write_repository
from .upload import check_token, listing, upload_repository


def publish(
    source: str | PathLike | PreTrainedModel,
    repo_id: str | None = None,
    *,
    statement: Statement | None = None,
    tokenizer: str | PathLike | PreTrainedTokenizerBase | None = None,
    source_revision: str | None = None,
    max_shard_size: int | str = "5GB",
    leave_out: bool = False,
    output: str | PathLike | None = None,
    dry_run: bool = False,
    hashes: bool = False,
    private: bool = False,
    revision: str | None = None,
    message: str = "Publish a DeltaNet checkpoint",
    token: str | None = None,
) -> str | None:
    """Write a checkpoint as a self-contained repository, print what it holds, and upload it in one commit.

    After an interruption the same call goes on: what the Hub has is not sent again.

    Args:
        source, tokenizer, statement, source_revision, max_shard_size, leave_out: see [`write_repository`].
        output: keep the repository in this empty directory, and send nothing. Without `repo_id`, neither a licence nor a
            tokenizer is demanded.
        dry_run: print, and send nothing.
        hashes: print the SHA-256 of every tensor, too.
        repo_id, private, revision, message, token: see [`upload_repository`].

    Returns:
        The address of the commit, or None where nothing was sent.

    Raises:
        ValueError: neither `repo_id` nor `output` is given.
        PermissionError: there is no token, or the Hub refuses it; nothing has been written then.
        Other errors are those of [`write_repository`] and [`upload_repository`].
    """
    if repo_id is None and output is None:
        raise ValueError("`repo_id` and `output` are None; one must say where the checkpoint is to go.")
    sends = not dry_run and output is None
    if sends:
        check_token(token)
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "repository" if output is None else Path(output)
        written = write_repository(
            source,
            directory,
            name=repo_id or str(output),
            statement=statement or Statement(),
            tokenizer=tokenizer,
            source_revision=source_revision,
            max_shard_size=max_shard_size,
            leave_out=leave_out,
            complete=repo_id is not None,
        )
        for name, digest in written.hashes.items() if hashes else ():
            print(f"{digest}  {name}")
        print(listing(directory))
        print(written.origin)
        if not sends:
            print("Nothing was sent.")
            return None
        return upload_repository(directory, repo_id, private=private, revision=revision, message=message, token=token)


__all__ = ["Statement", "publish", "read_results"]
