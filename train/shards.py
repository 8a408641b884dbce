"""Token ids on disk: shards mapped into memory, an index with their checksums, and data sets over them.

A directory holds `index.json`, the tokenizer, and for each shard its ids (`.tokens`, little-endian, of the index's dtype)
and where each of its documents begins (`.documents`, uint64, from the shard's first token).
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import AutoTokenizer, DataCollatorWithFlattening, PreTrainedTokenizerBase

FORMAT = "deltanet token shards 1"
INDEX = "index.json"
TOKENIZER = "tokenizer"
OFFSET = np.dtype("<u8")


def token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def tokenizer_checksum(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what decides a text's ids: the whole fast tokenizer, without its state of padding and truncation, and the
    id between documents."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state = {key: value for key, value in state.items() if key not in ("padding", "truncation", "version")}
    text = json.dumps([state, separator_id(tokenizer)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def separator_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that begins every document: BOS, or EOS of a tokenizer without one."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise ValueError("`tokenizer` has neither a BOS nor an EOS token; allowed: one that can tell where documents begin.")


def file_checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


class TokenShards:
    """The token ids of a directory that `deltanet.train.prepare` finished, as one stream.

    Raises:
        ValueError: the directory is not finished, a shard is empty or has another size or (with `verify`, which reads all
            of them) another checksum than the index says, or the tokenizer is another one.
    """

    def __init__(self, path: Path, verify: bool = True):
        self.path = Path(path)
        self.index = read_index(self.path)
        if not self.index["complete"]:
            raise ValueError(f"{self.path} is not finished; the command that began it goes on (deltanet.train.prepare).")
        self.checksum = file_checksum(self.path / INDEX)
        self.tokenizer = AutoTokenizer.from_pretrained(self.path / TOKENIZER)
        self._check_tokenizer()
        self._check_shards(verify)
        self.ends = np.cumsum([shard["tokens"] for shard in self.index["shards"]])
        self._maps = [np.memmap(self._file(shard, "tokens"), self.index["dtype"], "r") for shard in self.index["shards"]]

    def __len__(self) -> int:
        """Number of tokens."""
        return int(self.ends[-1])

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Ids [stop - start], int64, of a piece of the stream, whatever shards it lies in."""
        pieces = []
        for shard in range(np.searchsorted(self.ends, start, side="right"), len(self.ends)):
            offset = self.ends[shard] - len(self._maps[shard])
            pieces.append(self._maps[shard][max(0, start - offset) : stop - offset])
            if stop <= self.ends[shard]:
                break
        return torch.from_numpy(np.concatenate(pieces).astype(np.int64))

    def document_starts(self) -> np.ndarray:
        """Where each document begins in the stream, int64 [documents]."""
        offsets = self.ends - [shard["tokens"] for shard in self.index["shards"]]
        starts = [np.fromfile(self._file(shard, "documents"), OFFSET) for shard in self.index["shards"]]
        return np.concatenate([start.astype(np.int64) + offset for start, offset in zip(starts, offsets)])

    def _file(self, shard: dict[str, Any], kind: str) -> Path:
        return self.path / f"{shard['name']}.{kind}"

    def _check_tokenizer(self) -> None:
        found, size = tokenizer_checksum(self.tokenizer), len(self.tokenizer)
        if size != self.index["vocab_size"]:
            expected = f"{self.index['vocab_size']}, as the shards were made with"
            raise ValueError(f"{self.path / TOKENIZER} has a vocabulary of {size} ids; allowed: {expected}. Prepare anew.")
        if found != self.index["tokenizer_sha256"]:
            expected = f"{self.index['tokenizer_sha256']}, which made the shards"
            raise ValueError(f"{self.path / TOKENIZER} has the checksum {found}; allowed: {expected}. Prepare anew.")

    def _check_shards(self, verify: bool) -> None:
        if not self.index["shards"]:
            raise ValueError(f"{self.path} has no shards; allowed: one and more. Prepare it anew.")
        widths = {"tokens": np.dtype(self.index["dtype"]).itemsize, "documents": OFFSET.itemsize}
        total = sum(shard[kind] * width for shard in self.index["shards"] for kind, width in widths.items())
        with tqdm(total=total, desc="Verifying data", unit="B", unit_scale=True, disable=None if verify else True) as bar:
            for shard in self.index["shards"]:
                for kind, width in widths.items():
                    self._check_file(shard, kind, width, verify)
                    bar.update(shard[kind] * width)

    def _check_file(self, shard: dict[str, Any], kind: str, width: int, verify: bool) -> None:
        path, expected = self._file(shard, kind), shard[kind] * width
        size = path.stat().st_size if path.is_file() else 0
        if size == 0 or size != expected:
            raise ValueError(f"{path} has {size} bytes; allowed: {expected}, more than none. Copy it again or prepare anew.")
        if verify and (found := file_checksum(path)) != shard["sha256"][kind]:
            expected = shard["sha256"][kind]
            raise ValueError(f"{path} has the checksum {found}; allowed: {expected}. Copy it again or prepare anew.")


def read_index(path: Path) -> dict[str, Any]:
    """The index of a directory of shards.

    Raises:
        ValueError: there is none of this format.
    """
    try:
        index = json.loads((path / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} has no readable {INDEX}; allowed: what `deltanet.train.prepare` made.") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise ValueError(f"{path / INDEX} is not of the format {FORMAT!r}; allowed: what `deltanet.train.prepare` made.")
    return index


class ShardBlocks(Dataset):
    """Blocks of `length` tokens of the stream, across documents and shards, as the paper trains; a shorter rest is left out.

    Raises:
        ValueError: the stream is shorter than one block.
    """

    def __init__(self, shards: TokenShards, length: int):
        if len(shards) < length:
            raise ValueError(f"{shards.path} has {len(shards)} tokens; allowed: at least `block_length` = {length}.")
        self.shards, self.length = shards, length

    def __len__(self) -> int:
        return len(self.shards) // self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = self.shards.read(index * self.length, (index + 1) * self.length)
        return {"input_ids": ids, "labels": ids}


class PackedDocuments(Dataset):
    """Neighbouring whole documents, as many as fit into `length` tokens, kept apart by `collate_packs`.

    Raises:
        ValueError: a document is longer than `length`.
    """

    def __init__(self, shards: TokenShards, length: int):
        self.shards = shards
        self.bounds = np.append(shards.document_starts(), len(shards))
        sizes = np.diff(self.bounds)
        if sizes.max() > length:
            worst = int(sizes.argmax())
            raise ValueError(
                f"Document {worst} of {shards.path} has {sizes[worst]} tokens, the most of any; allowed with packing: at "
                f"most `block_length` = {length}. Raise that, divide the document, or train without packing."
            )
        self.firsts = [0]
        while (limit := int(np.searchsorted(self.bounds, self.bounds[self.firsts[-1]] + length, "right")) - 1) < len(sizes):
            self.firsts.append(limit)
        self.firsts.append(len(sizes))

    def __len__(self) -> int:
        return len(self.firsts) - 1

    def __getitem__(self, index: int) -> dict[str, list[dict[str, torch.Tensor]]]:
        bounds = self.bounds[self.firsts[index] : self.firsts[index + 1] + 1]
        return {"documents": [{"input_ids": self.shards.read(start, stop)} for start, stop in zip(bounds, bounds[1:])]}


def collate_packs(packs: list[dict]) -> dict[str, torch.Tensor]:
    """One row of all documents, with the boundaries, positions and labels that keep them apart."""
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    return collator([document for pack in packs for document in pack["documents"]])
