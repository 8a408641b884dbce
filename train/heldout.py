"""Bits per byte of a held-out text, while a model trains."""

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback

from .bits_per_byte import bits_per_byte
from .sources import FileSource
from .text import shipped_chapters


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
    """Logs `bits_per_byte` of the documents every so many steps and after the last one."""

    def __init__(self, trainer: Trainer, tokenizer: PreTrainedTokenizerBase, documents: list[str], every: int, window: int):
        self.trainer, self.tokenizer, self.documents, self.every, self.window = trainer, tokenizer, documents, every, window

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every and state.global_step != state.max_steps:
            return
        model.eval()
        with torch.autocast(model.device.type, torch.bfloat16, enabled=args.bf16):
            bits = bits_per_byte(model, self.tokenizer, self.documents, self.window)
        model.train()
        logs_loss = control.should_log
        self.trainer.log({"bits_per_byte": bits})
        control.should_log = logs_loss  # of this step, which comes later
        if state.is_world_process_zero:
            print(f"step {state.global_step}: {bits:.4f} bits per byte of the held-out text", flush=True)
