"""A checkpoint to be published: where it lies, what it holds, and whether its parts fit together."""

import json
import re
from dataclasses import replace
from math import prod
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import ModelCard, snapshot_download
from transformers import PreTrainedModel

from .. import modeling_deltanet
from ..configuration_deltanet import DeltaNetConfig
from .card import PIPELINE_TAGS, Statement, results_of_card
from .contents import checkpoint_files
from .layouts import in_todays_layout
from .weights import StoredTensor, stored_tensors, weight_files

_DOWNLOADED = ["model*.safetensors*", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt", "README.md", "LICENSE*"]
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


class Checkpoint(NamedTuple):
    """A checkpoint whose tensors are those that its configuration asks for."""

    directory: Path
    names: list[str]  # files in `directory` that belong to it
    origin: str | None  # its id, where it is on the Hub
    config: DeltaNetConfig
    architecture: str
    stored: dict[str, StoredTensor]  # as the files have them
    tensors: dict[str, StoredTensor]  # in today's layout
    changes: list[str]  # what had to change for that, in sentences

    def weight_files(self) -> list[Path]:
        return weight_files(self.directory, self.names)

    def num_parameters(self) -> int:
        return sum(prod(tensor.shape) for tensor in self.tensors.values())

    def dtype(self) -> str:
        return ", ".join(sorted({_DTYPES.get(tensor.dtype, tensor.dtype) for tensor in self.tensors.values()}))


def open_checkpoint(
    source: str | PathLike | PreTrainedModel, scratch: Path, revision: str | None = None, leave_out: bool = False
) -> Checkpoint:
    """Find, read and check a checkpoint.

    Arguments and errors are those of [`write_repository`]; a model in memory is saved to the missing directory `scratch`.
    """
    directory, origin = _locate(source, scratch, revision)
    # The cache's folder of a repository may hold whatever that repository does; none of it is this machine's.
    names = checkpoint_files(directory, leave_out or origin is not None)
    if "config.json" not in names:
        raise FileNotFoundError(f"{directory} has no config.json.")
    fields = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    if fields.get("model_type") != DeltaNetConfig.model_type:
        raise ValueError(
            f"{directory / 'config.json'}: model_type is {fields.get('model_type')!r}; only {DeltaNetConfig.model_type!r} "
            "is published here."
        )
    stored = stored_tensors(weight_files(directory, names))
    tensors, fields, changes = in_todays_layout(stored, fields)
    config = DeltaNetConfig.from_dict(fields)
    architecture = (config.architectures or ["DeltaNetForCausalLM"])[0]
    if architecture not in PIPELINE_TAGS:
        raise ValueError(f"{directory}: the architecture is {architecture!r}; it may be one of {sorted(PIPELINE_TAGS)}.")
    _check_tensors(directory, config, architecture, tensors)
    return Checkpoint(directory, names, origin, config, architecture, stored, tensors, changes)


def _locate(source, scratch: Path, revision: str | None) -> tuple[Path, str | None]:
    """The directory of a checkpoint, and its id where it is on the Hub."""
    if isinstance(source, PreTrainedModel):
        source.save_pretrained(scratch)
        return scratch, None
    if not isinstance(source, (str, PathLike)):
        raise TypeError(f"The source is a {type(source).__name__}; it may be a directory, an id or a PreTrainedModel.")
    if Path(source).is_dir():
        return Path(source), None
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(source)):
        raise FileNotFoundError(f"{source} is neither a directory nor an id of the Hub, which is owner/name.")
    return Path(snapshot_download(str(source), revision=revision, allow_patterns=_DOWNLOADED)), str(source)


def _check_tensors(directory: Path, config: DeltaNetConfig, architecture: str, tensors: dict[str, StoredTensor]) -> None:
    with torch.device("meta"):
        model = getattr(modeling_deltanet, architecture)(config)
    # Names on disk are the reference's.
    expected = {name.replace("embed_tokens", "embeddings"): x.shape for name, x in model.state_dict().items()}
    if config.tie_word_embeddings and "lm_head.weight" not in tensors:
        expected.pop("lm_head.weight", None)
    problems = {
        "missing": sorted(expected.keys() - tensors.keys()),
        "unexpected": sorted(tensors.keys() - expected.keys()),
        "of another shape": sorted(x for x in expected.keys() & tensors.keys() if expected[x] != tensors[x].shape),
    }
    found = [f"{what}: {', '.join(names[:4])} ({len(names)} in all)" for what, names in problems.items() if names]
    if found:
        raise ValueError(f"The tensors in {directory} are not those of its config.json. {'; '.join(found)}.")


def completed(statement: Statement, checkpoint: Checkpoint, name: str) -> Statement:
    """The statement with its gaps filled from the metadata of the source's own card, and from the state of `Trainer`."""
    said, results = {}, []
    if "README.md" in checkpoint.names:
        text = (checkpoint.directory / "README.md").read_text(encoding="utf-8")
        card = ModelCard(text, ignore_metadata_errors=True)
        said, results = card.data.to_dict(), results_of_card(card)
    origin = checkpoint.origin if checkpoint.origin != name else None
    return replace(
        statement,
        license=statement.license or said.get("license"),
        languages=statement.languages or _several(said.get("language")),
        datasets=statement.datasets or _several(said.get("datasets")),
        base_model=statement.base_model or origin or said.get("base_model"),
        tags=[*statement.tags, *_several(said.get("tags"))],
        training=statement.training or _training_summary(checkpoint.directory),
        results=statement.results or results,
    )


def _several(value) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def _training_summary(directory: Path) -> str | None:
    path = directory / "trainer_state.json"
    if not path.is_file():
        return None
    state = json.loads(path.read_text(encoding="utf-8"))
    parts = [f"{state['global_step']:,} optimizer steps"]
    if state.get("num_input_tokens_seen"):
        parts.append(f"{state['num_input_tokens_seen']:,} tokens")
    losses = [entry["loss"] for entry in state.get("log_history", []) if "loss" in entry]
    return f"With Trainer: {', '.join(parts)}" + (f"; last loss {losses[-1]:.4g}." if losses else ".")
