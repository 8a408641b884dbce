"""
Makes of a finished run what can be given away: weights in bfloat16, the tokenizer, and results on a test split.

    python -m deltanet.train.release RUN OUTPUT --test FILE

RUN is the `output` of a recipe, FILE a split of `deltanet.train.corpus`. OUTPUT is whole before anything is measured;
results.json then holds the curve of the run and the bits per byte of the test split, over all and by source.
"""

import argparse
import json
import platform
import sys
from pathlib import Path

import torch
import transformers
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from .. import DeltaNetForCausalLM
from .bits_per_byte import bits_per_byte, compressed_bits_per_byte
from .finished import finished_directory, write_whole
from .heldout import BITS_FILE
from .quiet import quiet
from .report import RESULTS
from .run import LOG_FILE, MODEL, RECIPE_FILE

DTYPES = ("float32", "bfloat16")
CURVE = ("step", "loss", "bits_per_byte", "tokens_per_second")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m deltanet.train.release", description=__doc__.split("\n\n")[0].strip())
    parser.add_argument("run", type=Path, help="directory of a finished run")
    parser.add_argument("output", type=Path, help="directory of the released model")
    parser.add_argument("--test", type=Path, required=True, help="test.jsonl of the corpus")
    parser.add_argument("--batch", type=int, default=8, help="windows in one forward (%(default)s)")
    arguments = parser.parse_args()
    quiet()
    try:
        results = release(arguments.run, arguments.output, arguments.test, arguments.batch)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{arguments.output}: {results['test']['float32']:.4f} bits per byte of the test split.")
    return 0


def release(run: Path, output: Path, test: Path, batch: int = 8) -> dict:
    """Write the model of a run into `output` unless it is there, then its results; returns those.

    Raises:
        ValueError: the run is not finished, or the test split has rows without source or text.
    """
    if not (run / MODEL / LOG_FILE).is_file():
        raise ValueError(f"{run} has no {MODEL}/{LOG_FILE}; allowed: the `output` of a finished run of deltanet.train.")
    documents = read_documents(test)
    if not (output / "config.json").exists():
        _write_model(run / MODEL, output)
    results = {
        "device": _device(),
        "versions": _versions(),
        **_training(run / MODEL),
        "test": measure(output, documents, batch),
    }
    write_whole(output / RESULTS, (json.dumps(results, indent=1) + "\n").encode())
    return results


def read_documents(path: Path) -> dict[str, list[str]]:
    """The texts of a split of the corpus by their source."""
    documents: dict[str, list[str]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        row = json.loads(line)
        if not {"source", "text"} <= row.keys():
            raise ValueError(f"{path}, line {number} has {sorted(row)}; allowed: rows with source and text.")
        documents.setdefault(row["source"], []).append(row["text"])
    return documents


def measure(folder: Path, documents: dict[str, list[str]], batch: int) -> dict:
    """Bits per byte of a released model: over all documents in either arithmetic, by source in float32, and by xz."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    sizes = {source: sum(len(text.encode()) for text in texts) for source, texts in documents.items()}
    found: dict = {"bytes": sum(sizes.values()), "documents": sum(map(len, documents.values()))}
    for dtype in DTYPES:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device).eval()
        bits = _by_source(model, folder, documents, batch)
        found[dtype] = sum(bits[source] * size for source, size in sizes.items()) / found["bytes"]
        if dtype == "float32":
            found["by_source"] = {source: {"bytes": sizes[source], "bits_per_byte": bits[source]} for source in sizes}
    found["xz"] = compressed_bits_per_byte([text for texts in documents.values() for text in texts])
    return found


def _by_source(model: PreTrainedModel, folder: Path, documents: dict[str, list[str]], batch: int) -> dict[str, float]:
    tokenizer, window = AutoTokenizer.from_pretrained(folder), model.config.max_position_embeddings
    return {
        source: bits_per_byte(model, tokenizer, texts, window, batch)
        for source, texts in tqdm(documents.items(), desc=f"Measuring in {model.dtype}", unit=" sources", disable=None)
    }


def _write_model(source: Path, output: Path) -> None:
    model = DeltaNetForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    with finished_directory(output) as folder:
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)
        (folder / RECIPE_FILE).write_bytes((source / RECIPE_FILE).read_bytes())


def _training(folder: Path) -> dict:
    log = json.loads((folder / LOG_FILE).read_text(encoding="utf-8"))
    curve = [
        {key: entry[key] for key in CURVE if key in entry} for entry in log if "loss" in entry or "bits_per_byte" in entry
    ]
    seconds = [entry["train_runtime"] for entry in log if "train_runtime" in entry]
    best = folder / BITS_FILE
    validation = json.loads(best.read_text(encoding="utf-8")) if best.exists() else None
    return {"seconds": seconds, "validation": validation, "curve": curve}


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}


if __name__ == "__main__":
    sys.exit(main())
