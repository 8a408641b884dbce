"""What may be in a published checkpoint, and what must never leave a machine."""

import re
from pathlib import Path

WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
CODE = re.compile(r"(\w+_deltanet|kernels_\w+)\.py")
TOKENIZER = re.compile(
    r"tokenizer(_config)?\.json|(tokenizer|spiece|sentencepiece\.bpe)\.model|special_tokens_map\.json|added_tokens\.json"
    r"|vocab\.(json|txt)|merges\.txt|chat_template\.jinja|additional_chat_templates/\w+\.jinja"
)
_OTHERS = re.compile(r"config\.json|generation_config\.json|README\.md|LICENSE(\.\w+)?|\.eval_results/[\w.-]+\.yaml")
_PARTS = (WEIGHTS, CODE, TOKENIZER, _OTHERS)

# Folders and files by which git and huggingface_hub keep their own books; never part of a checkpoint, never harmful.
_BOOKKEEPING = re.compile(r"(\.git|\.cache)/.*|\.gitattributes|\.gitignore|__pycache__/.*")

_REASONS = {
    "looks like a secret": re.compile(
        r"(.*/)?(\.env.*|\.netrc|\.?token(s|\.txt)?|stored_tokens|id_(rsa|dsa|ecdsa|ed25519).*"
        r"|.*(secret|credential|password).*|.*\.(pem|key|p12|pfx|keystore))",
        re.IGNORECASE,
    ),
    "state of the optimizer or of a training run": re.compile(
        r"(.*/)?(optimizer|scheduler|scaler|rng_state|training_args|trainer_state|train_state|global_step).*"
    ),
    "a pickle or another format than safetensors": re.compile(r".*\.(bin|pt|pth|pkl|pickle|ckpt|joblib|npy|npz|msgpack|h5)"),
}

_LONGEST_HEADER = 100_000_000  # of a safetensors file, by its format

_SECRETS = {
    "a Hub token": re.compile(rb"\bhf_[A-Za-z0-9]{30,}"),
    "a private key": re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    "an access key": re.compile(
        rb"\b(AKIA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{36}|github_pat_\w{22,}|sk-(proj-)?[A-Za-z0-9]{40,})\b"
    ),
}


def checkpoint_files(directory: Path, leave_out: bool = False) -> list[str]:
    """The paths inside `directory` that belong to a checkpoint, sorted.

    Args:
        leave_out: pass over what does not belong, instead of raising.

    Raises:
        ValueError: files that do not belong, each with the reason; always where a file that does belong is a link to
            somewhere outside, or holds something like a token or a private key.
    """
    belonging, refused = [], []
    for path in sorted(p for p in directory.rglob("*") if p.is_file() or p.is_symlink()):
        name = path.relative_to(directory).as_posix()
        if _BOOKKEEPING.fullmatch(name):
            continue
        if any(part.fullmatch(name) for part in _PARTS):
            belonging.append(name)
        else:
            refused.append(f"{name}: {_reason(name)}")
    if refused and not leave_out:
        listing = "\n  ".join(refused)
        raise ValueError(
            f"Refused to publish {directory}: it holds what is no part of a checkpoint.\n  {listing}\nMove these files "
            "away, or publish without them: --leave-out."
        )
    for name in belonging:
        _check_link(directory, name)
        _check_secrets(name, _text_of(directory / name))
    return belonging


def _text_of(path: Path) -> bytes:
    """What a file holds, of safetensors the header alone."""
    with open(path, "rb") as stream:
        if path.suffix != ".safetensors":
            return stream.read()
        return stream.read(min(int.from_bytes(stream.read(8), "little"), _LONGEST_HEADER))


def _check_secrets(name: str, content: bytes) -> None:
    for what, pattern in _SECRETS.items():
        if pattern.search(content):
            # The message names the file and not the secret.
            raise ValueError(f"Refused to publish {name}: it holds what looks like {what}. Remove it from the file.")


def _reason(name: str) -> str:
    return next((reason for reason, pattern in _REASONS.items() if pattern.fullmatch(name)), "not part of a checkpoint")


def _check_link(directory: Path, name: str) -> None:
    target, root = (directory / name).resolve(), directory.resolve()
    # The cache of huggingface_hub: snapshots/<commit>/<file> is a link into blobs/ of the same repository.
    blobs = root.parents[1] / "blobs" if root.parent.name == "snapshots" else root
    if not target.is_file() or not (target.is_relative_to(root) or target.is_relative_to(blobs)):
        raise ValueError(f"Refused to publish {name}: it is a link to {target}, which is outside the checkpoint.")
