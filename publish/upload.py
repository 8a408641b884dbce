"""One commit to the Hub; blobs go up one by one before it, and those that the Hub has are not sent again."""

import sys
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from .card import EVAL_RESULTS_FILE
from .contents import CODE, TOKENIZER, WEIGHTS, checkpoint_files


def listing(directory: Path) -> str:
    """The files of a prepared repository with their sizes, and the total."""
    sizes = {name: (directory / name).stat().st_size for name in checkpoint_files(directory)}
    rows = [f"{size:>15,}  {name}" for name, size in sizes.items()]
    return "\n".join([*rows, f"{sum(sizes.values()):>15,}  bytes in {len(sizes)} files"])


def check_token(token: str | None) -> None:
    """Raise `PermissionError` where there is no token, or the Hub does not know it."""
    try:
        HfApi(token=token).whoami()
    except LocalTokenNotFoundError:
        raise PermissionError("There is no Hub token: run `hf auth login`, or set HF_TOKEN.") from None
    except HfHubHTTPError as error:
        if error.response is None or error.response.status_code not in (401, 403):
            raise
        raise PermissionError("The Hub refuses the token: run `hf auth login` for another with write access.") from None


def upload_repository(
    directory: Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str = "Publish a DeltaNet checkpoint",
    token: str | None = None,
) -> str:
    """Make the repository at `revision` hold the files of `directory`, in one commit. Returns the address of the commit.

    After an interruption the same call goes on: blobs on the Hub are not sent again, and nothing is visible there before
    the commit. Weights, model code, tokenizer files and results that the repository held and `directory` does not are
    deleted in that commit (an old `model.safetensors` would be read in place of new shards); its other files stay.

    Args:
        private: create the repository private; an error where it exists and is public.
        revision: a branch, created where it does not exist; `main` by default.
        token: of the Hub; by default the one of `hf auth login` or HF_TOKEN. It is not printed and not written.

    Raises:
        PermissionError: `private` is asked of a public repository.
        ValueError: `directory` holds what is no part of a checkpoint.
        HfHubHTTPError, RuntimeError: from huggingface_hub, for an upload that failed; call again to go on.
    """
    names = checkpoint_files(directory)
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
    if private and not api.model_info(repo_id).private:
        raise PermissionError(f"--private was asked for, but {repo_id} exists and is public; nothing was uploaded.")
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    additions = [CommitOperationAdd(name, directory / name) for name in names]
    # The commit itself carries the small files.
    large = [addition for addition in additions if addition.path_in_repo.endswith(".safetensors")]
    for number, addition in enumerate(large, 1):
        size = (directory / addition.path_in_repo).stat().st_size
        print(f"[{number}/{len(large)}] {addition.path_in_repo}, {size:,} bytes", file=sys.stderr, flush=True)
        api.preupload_lfs_files(repo_id, [addition], revision=revision)
    present = api.list_repo_files(repo_id, revision=revision)
    stale = [name for name in present if name not in names and _is_ours(name)]
    operations = [*additions, *(CommitOperationDelete(name) for name in stale)]
    return api.create_commit(repo_id, operations, commit_message=message, revision=revision).commit_url


def _is_ours(name: str) -> bool:
    return name == EVAL_RESULTS_FILE or any(kind.fullmatch(name) for kind in (WEIGHTS, CODE, TOKENIZER))
