"""Bits per byte of a held-out text, while a model trains."""

import json
import math
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback

from .bits_per_byte import bits_per_byte
from .finished import finished_directory
from .recipe import Recipe
from .sources import FileSource
from .text import shipped_chapters

BITS_FILE = "heldout.json"


def heldout_documents(name: str) -> list[str]:
    """The documents of a file or directory as in `deltanet.train.prepare`, or of the shipped novel by "shipped".

    Raises:
        ValueError: there are none.
    """
    if name == "shipped":
        return shipped_chapters("heldout")
    documents = [text for text, _ in FileSource([Path(name)]).documents(0)]
    if not documents:
        raise ValueError(f"Recipe: `heldout` is {name}, which has no text; allowed: at least one document.")
    return documents


class HeldOut(TrainerCallback):
    """Logs `bits_per_byte` of the documents every so many steps and after the last one.

    With `best`, the directory `best` always holds the model of the fewest bits so far, and in `heldout.json` its step.
    """

    def __init__(
        self,
        trainer: Trainer,
        tokenizer: PreTrainedTokenizerBase,
        documents: list[str],
        recipe: Recipe,
        best: Path | None = None,
    ):
        self.trainer, self.tokenizer, self.documents, self.recipe, self.best = trainer, tokenizer, documents, recipe, best
        self.fewest = _read_bits(best) if best and best.exists() else math.inf

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.recipe.evaluate_every and state.global_step != state.max_steps:
            return
        model.eval()
        with torch.autocast(model.device.type, torch.bfloat16, enabled=args.bf16):
            window, batch = self.recipe.block_length, self.recipe.device_batch
            bits = bits_per_byte(model, self.tokenizer, self.documents, window, batch)
        model.train()
        logs_loss = control.should_log
        self.trainer.log({"bits_per_byte": bits})
        control.should_log = logs_loss  # of this step, which comes later
        if state.is_world_process_zero:
            print(f"step {state.global_step}: {bits:.4f} bits per byte of the held-out text", flush=True)
        if self.best and bits < self.fewest:
            self.fewest = bits
            self._save(state.global_step, bits)

    def _save(self, step: int, bits: float) -> None:
        weights = self.trainer.accelerator.get_state_dict(self.trainer.model_wrapped)
        if self.trainer.is_world_process_zero():
            with finished_directory(self.best) as folder:
                self.trainer.accelerator.unwrap_model(self.trainer.model).save_pretrained(folder, state_dict=weights)
                found = {"step": step, "bits_per_byte": bits}
                (folder / BITS_FILE).write_text(json.dumps(found) + "\n", encoding="utf-8")


def _read_bits(best: Path) -> float:
    return json.loads((best / BITS_FILE).read_text(encoding="utf-8"))["bits_per_byte"]
