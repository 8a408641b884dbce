"""Safetensors files of a checkpoint: their tensors, the tensors' hashes, and the same tensors in files of another size."""

import hashlib
import json
import re
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME


class StoredTensor(NamedTuple):
    """A tensor of a file, or some of its rows; nothing is read yet."""

    file: Path
    key: str
    dtype: str  # as safetensors spells it, such as "BF16"
    shape: tuple[int, ...]
    rows: slice | None = None

    def read(self) -> torch.Tensor:
        with safe_open(self.file, framework="pt") as reader:
            return reader.get_tensor(self.key) if self.rows is None else reader.get_slice(self.key)[self.rows]

    def storage_size(self) -> int:
        """Bytes."""
        bits = 8 if self.dtype == "BOOL" else int(re.search(r"\d+", self.dtype)[0])
        return prod(self.shape) * bits // 8

    def sha256(self) -> str:
        """Of dtype, shape and bytes."""
        digest = hashlib.sha256(f"{self.dtype} {list(self.shape)}".encode())
        digest.update(self.read().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()


def weight_files(directory: Path, names: list[str]) -> list[Path]:
    """The safetensors files of a checkpoint, from its index where it has one.

    Args:
        names: the files of `directory` that may be read.

    Raises:
        FileNotFoundError: there are none (weights in pickles are not read), or one that the index names is missing.
        ValueError: there are both an index and an unsharded file, and readers would take different ones.
    """
    if {SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME} <= set(names):
        raise ValueError(
            f"{directory} holds both {SAFE_WEIGHTS_NAME} and {SAFE_WEIGHTS_INDEX_NAME}; remove the one that is not meant."
        )
    files = [SAFE_WEIGHTS_NAME]
    if SAFE_WEIGHTS_INDEX_NAME in names:
        index = json.loads((directory / SAFE_WEIGHTS_INDEX_NAME).read_text(encoding="utf-8"))
        files = sorted(set(index["weight_map"].values()))
    missing = [name for name in files if name not in names]
    if missing:
        raise FileNotFoundError(f"{directory} lacks {missing}; weights are read from safetensors and nothing else.")
    return [directory / name for name in files]


def stored_tensors(files: list[Path]) -> dict[str, StoredTensor]:
    """Every tensor of the files by name, from the headers alone.

    Raises:
        ValueError: a file is not in the safetensors format, or two files hold a tensor of one name.
    """
    tensors = {}
    for file in files:
        for tensor in _tensors_of(file):
            if tensor.key in tensors:
                raise ValueError(f"The tensor {tensor.key} is in {tensors[tensor.key].file.name} and in {file.name}.")
            tensors[tensor.key] = tensor
    return dict(sorted(tensors.items()))


def _tensors_of(file: Path) -> list[StoredTensor]:
    try:
        with safe_open(file, framework="pt") as reader:
            pieces = [(key, reader.get_slice(key)) for key in reader.keys()]
            return [StoredTensor(file, key, piece.get_dtype(), tuple(piece.get_shape())) for key, piece in pieces]
    except SafetensorError as error:
        raise ValueError(f"{file} is not a safetensors file: {error}") from error


def tensor_hashes(tensors: dict[str, StoredTensor]) -> dict[str, str]:
    """SHA-256 of every tensor by name: of dtype, shape and bytes."""
    return {name: tensor.sha256() for name, tensor in tensors.items()}


def combined_hash(hashes: dict[str, str]) -> str:
    """One hash for a whole checkpoint, whatever its sharding."""
    return hashlib.sha256("".join(f"{name} {digest}\n" for name, digest in sorted(hashes.items())).encode()).hexdigest()


def write_shards(tensors: dict[str, StoredTensor], output: Path, max_shard_size: int | str) -> None:
    """Write the tensors to `output`, in files of at most `max_shard_size`, with an index where there is more than one."""
    split = split_state_dict_into_shards_factory(
        dict(sorted(tensors.items(), key=lambda item: _layer_order(item[0]))),
        get_storage_size=StoredTensor.storage_size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for filename, names in split.filename_to_tensors.items():
        save_file({name: tensors[name].read() for name in names}, output / filename, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": dict(sorted(split.tensor_to_filename.items()))}
        (output / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _layer_order(name: str) -> list:
    """Sorts layer 2 before layer 10."""
    return [part.zfill(8) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
