"""Writes a checkpoint as a self-contained Hub repository: weights, configuration, tokenizer, code and model card."""

import json
import shutil
import tempfile
from os import PathLike
from pathlib import Path
from typing import NamedTuple

from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME
from transformers.utils.hub import convert_file_size_to_int

from .card import EVAL_RESULTS_FILE, Facts, Statement, eval_results, model_card
from .contents import TOKENIZER, checkpoint_files
from .flatten import AUTO_MAP, write_code
from .source import Checkpoint, completed, open_checkpoint
from .weights import combined_hash, stored_tensors, tensor_hashes, weight_files, write_shards

# Fields of a tokenizer's configuration that hold paths of the machine where it was saved.
_PATHS = ("name_or_path", "special_tokens_map_file", "tokenizer_file")


class Written(NamedTuple):
    """The weights of a repository."""

    hashes: dict[str, str]  # SHA-256 of dtype, shape and bytes by tensor
    origin: str  # where the weights come from, with their combined hash and what was changed


def write_repository(
    source: str | PathLike | PreTrainedModel,
    output: Path,
    *,
    name: str,
    statement: Statement,
    tokenizer: str | PathLike | PreTrainedTokenizerBase | None = None,
    source_revision: str | None = None,
    max_shard_size: int | str = "5GB",
    leave_out: bool = False,
    complete: bool = True,
) -> Written:
    """Write the repository to `output`, an empty or missing directory.

    Args:
        source: a model in memory, a directory, or an id of the Hub, in today's layout of names or in those of 2024,
            which are rewritten exactly.
        name: the repository's id, for the card.
        statement: what the card says; gaps are filled from the metadata of a README.md in the source, whose text is not
            taken over.
        tokenizer: in place of the source's: a tokenizer, a directory or an id.
        source_revision: branch, tag or commit of a source on the Hub.
        max_shard_size: of a weights file; smaller files of the source are taken as they are.
        leave_out: pass over files of a directory that are no part of a checkpoint, as is done for the Hub's.
        complete: demand what a published repository must have, a licence and a tokenizer.

    Raises:
        ValueError, TypeError: the source holds files that must not be published, or its configuration, tensors and
            tokenizer do not fit together, or the licence is not stated.
        FileNotFoundError: weights, configuration or tokenizer are missing.
        FileExistsError: `output` is not empty.
    """
    if output.exists() and any(output.iterdir()):
        raise FileExistsError(f"{output} is not empty; choose another output directory.")
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = open_checkpoint(source, Path(scratch) / "model", source_revision, leave_out)
        statement = completed(statement, checkpoint, name)
        if complete and not statement.license:
            raise ValueError("The licence of the checkpoint is not stated; pass --license, for example apache-2.0.")
        output.mkdir(parents=True, exist_ok=True)
        try:
            _write_tokenizer(checkpoint, tokenizer, output, complete)
            return _write(checkpoint, output, name, statement, max_shard_size)
        except BaseException:
            shutil.rmtree(output)
            raise


def _write(checkpoint: Checkpoint, output: Path, name: str, statement: Statement, max_shard_size: int | str) -> Written:
    _write_configuration(checkpoint, output)
    hashes = _write_weights(checkpoint, output, max_shard_size)
    for licence in (file for file in checkpoint.names if file.startswith("LICENSE")):
        shutil.copyfile(checkpoint.directory / licence, output / licence)
    facts = Facts(
        name=name,
        architecture=checkpoint.architecture,
        config=checkpoint.config,
        num_parameters=checkpoint.num_parameters(),
        dtype=checkpoint.dtype(),
        code_revision=write_code(output),
        origin=_origin(checkpoint, hashes),
    )
    _write_card(statement, facts, output)
    checkpoint_files(output)
    return Written(hashes, facts.origin)


def _write_weights(checkpoint: Checkpoint, output: Path, max_shard_size: int | str) -> dict[str, str]:
    """Write the weights and return their hashes, which are those of the source, read back."""
    files = checkpoint.weight_files()
    if checkpoint.changes or max(file.stat().st_size for file in files) > convert_file_size_to_int(max_shard_size):
        write_shards(checkpoint.tensors, output, max_shard_size)
    else:
        index = checkpoint.directory / SAFE_WEIGHTS_INDEX_NAME
        for file in [*files, index] if index.is_file() else files:
            shutil.copyfile(file, output / file.name)
    hashes = tensor_hashes(checkpoint.tensors)
    written = [path.name for path in output.iterdir()]
    if tensor_hashes(stored_tensors(weight_files(output, written))) != hashes:
        raise RuntimeError(f"The weights written to {output} differ from the source's, so they were removed again.")
    return hashes


def _origin(checkpoint: Checkpoint, hashes: dict[str, str]) -> str:
    # In the cache of huggingface_hub the name of a snapshot's folder is its commit.
    commit = f" of {checkpoint.origin}, commit {checkpoint.directory.name}" if checkpoint.origin else ""
    if not checkpoint.changes:
        return f"Weights{commit}, unchanged: {len(hashes)} tensors, combined SHA-256 {combined_hash(hashes)}."
    before = combined_hash(tensor_hashes(checkpoint.stored))
    return (
        f"Weights{commit} in a layout of 2024: {len(checkpoint.stored)} tensors, combined SHA-256 {before}. "
        f"{' '.join(checkpoint.changes)} No number changed: {len(hashes)} tensors, combined SHA-256 {combined_hash(hashes)}."
    )


def _write_configuration(checkpoint: Checkpoint, output: Path) -> None:
    config = checkpoint.config
    if "generation_config.json" in checkpoint.names:
        generation = GenerationConfig.from_pretrained(checkpoint.directory)
    else:
        generation = GenerationConfig.from_model_config(config)
    generation.save_pretrained(output)
    config.architectures, config.auto_map = [checkpoint.architecture], dict(AUTO_MAP)
    config.save_pretrained(output)


def _write_tokenizer(checkpoint: Checkpoint, tokenizer, output: Path, required: bool) -> None:
    own = [name for name in checkpoint.names if TOKENIZER.fullmatch(name)]
    if tokenizer is not None:
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        tokenizer.save_pretrained(output)
    elif "tokenizer_config.json" in own:
        for name in own:
            (output / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(checkpoint.directory / name, output / name)
    elif required:
        raise FileNotFoundError(f"{checkpoint.directory} has no tokenizer; pass --tokenizer DIRECTORY_OR_ID.")
    else:
        return
    _clean_tokenizer(output / "tokenizer_config.json")
    size, allowed = len(AutoTokenizer.from_pretrained(output)), checkpoint.config.vocab_size
    if size > allowed:
        raise ValueError(f"The tokenizer has {size} ids, more than the model's vocab_size {allowed}.")


def _clean_tokenizer(settings: Path) -> None:
    fields = json.loads(settings.read_text(encoding="utf-8"))
    if "auto_map" in fields:
        raise ValueError("The tokenizer needs custom code (auto_map), which is not published.")
    if any(key in fields for key in _PATHS):
        fields = {key: value for key, value in fields.items() if key not in _PATHS}
        settings.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_card(statement: Statement, facts: Facts, output: Path) -> None:
    (output / "README.md").write_text(model_card(statement, facts), encoding="utf-8")
    results = eval_results(statement.results)
    if results is not None:
        (output / EVAL_RESULTS_FILE).parent.mkdir()
        (output / EVAL_RESULTS_FILE).write_text(results, encoding="utf-8")
