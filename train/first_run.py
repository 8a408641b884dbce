"""
The first run: trains a small DeltaNet on the shipped English text, on a CPU, and shows what it has learnt.

    python -m deltanet.train.first_run [--output DIR] [--steps N] [--retrain]

The model appears in DIR when it is finished. An interrupted run continues from its last checkpoint, with the result of an
uninterrupted one; a finished model is used again.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainingArguments, set_seed

from .. import DeltaNetConfig, DeltaNetForCausalLM
from .blocks import TokenBlocks, token_stream
from .finished import finished_directory, last_checkpoint, remove_directory
from .progress import ProgressBar
from .quiet import quiet
from .text import shipped_chapters
from .tokenization import train_tokenizer

SETTINGS_FILE = "first_run.json"
MOST_THREADS = 4
"""The matrices are small: more threads wait for each other."""

NEXT_STEPS = """
Next:
    {python} -m deltanet.train.report {model} --prompt "Mr. Darcy was"
    {python} -m deltanet.train.first_run --steps 4000 --output runs/longer

    import deltanet
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model, tokenizer = (auto.from_pretrained("{model}") for auto in (AutoModelForCausalLM, AutoTokenizer))
"""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Size and length of the run: the best held-out bits per byte found for two minutes on two CPU cores."""

    vocab_size: int = 4096
    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 2
    intermediate_size: int = 384
    block_length: int = 256
    batch_size: int = 4
    steps: int = 1000
    learning_rate: float = 5e-3
    save_steps: int = 100
    seed: int = 0


def main() -> int:
    arguments = _parse_arguments()
    sys.stdout.reconfigure(line_buffering=True)
    quiet()
    try:
        train_or_reuse(arguments.output, Settings(steps=arguments.steps), arguments.retrain)
        status = report(arguments.output)
    except OSError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\n\nStopped. Nothing is half-written; the same command goes on from here.", file=sys.stderr)
        return 130
    if status == 0:
        python = min(sys.executable, os.path.relpath(sys.executable), key=len)
        print(NEXT_STEPS.format(model=arguments.output, python=python))
    return status


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m deltanet.train.first_run", description=__doc__.split("\n\n")[0].strip())
    parser.add_argument("--output", type=Path, default=Path("runs/first"), help="directory of the model (%(default)s)")
    parser.add_argument("--steps", type=int, default=Settings.steps, help="optimiser steps (%(default)s)")
    parser.add_argument("--retrain", action="store_true", help="train anew and replace a finished model")
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error(f"--steps is {arguments.steps}; allowed: 1 and more.")
    return arguments


def train_or_reuse(output: Path, settings: Settings, retrain: bool = False) -> None:
    """Make sure that `output` holds the finished model of these settings.

    Raises:
        FileExistsError: `output` holds a model of other settings and `retrain` is false, or no first run made it.
    """
    found = _read_settings(output) if output.exists() else None
    if found is None or retrain:
        train(output, settings)
    elif found != dataclasses.asdict(settings):
        raise FileExistsError(f"{output} holds a finished model of other settings; --retrain replaces it.")
    else:
        print(f"{output} holds a finished model; it is used again (--retrain trains a new one).")


def train(output: Path, settings: Settings) -> None:
    """Train, continuing an interrupted run of the same settings, and put model, tokenizer and settings into `output`."""
    torch.set_num_threads(min(torch.get_num_threads(), MOST_THREADS))
    duration = "about two minutes on two cores" if settings == Settings() else "by settings of your own"
    print(f"Training a first DeltaNet on the CPU: {duration}. Ctrl-C stops it, the same command goes on.\n")
    work = _work_directory(output, settings)
    chapters = shipped_chapters("train")
    print(f"    text       {sum(map(len, chapters)) / 1e6:.2f} MB, two novels by Jane Austen, {len(chapters)} chapters")
    tokenizer = _tokenizer(work / "tokenizer", chapters, settings)
    blocks = TokenBlocks(token_stream(chapters, tokenizer), settings.block_length)
    print(f"    tokenizer  {len(tokenizer)} pieces learnt from the text, which becomes {blocks.blocks.numel()} tokens")
    model = _model(settings, tokenizer)
    epochs = settings.steps * settings.batch_size / len(blocks)
    print(f"    model      {settings.num_layers} layers, {model.num_parameters() / 1e6:.1f} million parameters")
    print(f"    training   {settings.steps} steps, {epochs:.1f} times through the text\n")
    _fit(model, blocks, work, settings)
    with finished_directory(output) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        _write_settings(folder, settings)
    remove_directory(work)
    print(f"\nThe model is in {output}: safetensors, configuration and tokenizer.")


def report(output: Path) -> int:
    """Load the model in a new process and let that show what it has learnt; returns the exit status."""
    print("Loading it in a new process by AutoModelForCausalLM.from_pretrained ...")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    command = [sys.executable, "-m", "deltanet.train.report", str(output)]
    return subprocess.run(command, env=environment).returncode


def _fit(model: DeltaNetForCausalLM, blocks: TokenBlocks, work: Path, settings: Settings) -> None:
    arguments = TrainingArguments(
        output_dir=str(work),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        warmup_steps=max(1, settings.steps // 20),
        weight_decay=0.1,
        adam_beta2=0.95,
        save_steps=settings.save_steps,
        save_total_limit=2,
        logging_steps=5,
        seed=settings.seed,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    progress = ProgressBar("    training")
    trainer = Trainer(model, arguments, train_dataset=blocks, callbacks=[progress])
    trainer.remove_callback(PrinterCallback)
    checkpoint = last_checkpoint(work)
    if checkpoint is not None:
        print(f"    An earlier run was interrupted; going on from {checkpoint.name}.\n")
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        progress.close()


def _model(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> DeltaNetForCausalLM:
    set_seed(settings.seed)
    end = tokenizer.eos_token_id
    config = DeltaNetConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.num_layers,
        num_heads=settings.num_heads,
        intermediate_size=settings.intermediate_size,
        max_position_embeddings=settings.block_length,
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    return DeltaNetForCausalLM(config)


def _tokenizer(folder: Path, chapters: list[str], settings: Settings) -> PreTrainedTokenizerBase:
    """The tokenizer of the interrupted run, or a new one."""
    if not folder.exists():
        with finished_directory(folder) as partial:
            train_tokenizer(chapters, settings.vocab_size).save_pretrained(partial)
    return AutoTokenizer.from_pretrained(folder)


def _work_directory(output: Path, settings: Settings) -> Path:
    """The directory of checkpoints beside `output`; one of other settings is begun anew."""
    work = output.with_name(f"{output.name}.training")
    if not work.exists() or _read_settings(work) != dataclasses.asdict(settings):
        with finished_directory(work) as partial:
            _write_settings(partial, settings)
    return work


def _read_settings(folder: Path) -> dict:
    if not (folder / SETTINGS_FILE).is_file():
        raise FileExistsError(f"{folder} exists and was not made by a first run; move it away or choose another --output.")
    return json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))


def _write_settings(folder: Path, settings: Settings) -> None:
    (folder / SETTINGS_FILE).write_text(json.dumps(dataclasses.asdict(settings), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
