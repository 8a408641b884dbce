"""The model as lm-eval sees it."""

import logging
import os

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

import deltanet  # noqa: F401  registers the architecture with the Auto classes

logger = logging.getLogger(__name__)


@register_model("deltanet")
class DeltaNetLM(HFLM):
    """
    lm-eval's `hf` model with the defaults that the paper's numbers need; any causal language model can be given.

    It differs from `hf` in four points: no BOS token is prepended unless asked for (the tokenizer's own habit would
    prepend one with the paper's tokenizer), the softmax is computed and summed in float32, likelihoods build no cache,
    and processes started by accelerate share the work on a CPU and on several machines too. Scores equal those of
    `--model hf --model_args ...,add_bos_token=False,softmax_dtype=float32`.
    """

    def __init__(self, pretrained, add_bos_token=False, softmax_dtype="float32", backend="causal", **kwargs):
        if kwargs.get("device") == "cpu" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            # Otherwise accelerate takes the processes that torchrun starts on a CPU for single ones.
            os.environ.setdefault("ACCELERATE_USE_CPU", "true")
        super().__init__(pretrained, backend=backend, add_bos_token=add_bos_token, softmax_dtype=softmax_dtype, **kwargs)
        if hasattr(self, "accelerator"):
            # lm-eval counts processes only where the machine has more than one GPU, and ranks within one machine.
            self._rank = self.accelerator.process_index
            self._world_size = self.accelerator.num_processes
        stops, eos = self.token_choices()["generation_eos_token_id"], self.tokenizer.eos_token_id
        if eos is not None and eos not in (stops if isinstance(stops, list) else [stops]):
            logger.warning("generation stops at id %s, the tokenizer's EOS is %s: text behind it will be scored", stops, eos)

    def _model_call(self, inps, attn_mask=None, labels=None):
        """Logits [B, T, V] of token ids [B, T] padded on the right; a causal model needs no mask there."""
        mixed = self.mixed_precision_dtype
        with torch.no_grad(), torch.autocast(self.device.type, dtype=mixed, enabled=mixed is not None):
            return self.model(inps, use_cache=False).logits

    def token_choices(self) -> dict:
        """What the scores depend on and a tokenizer decides: the first token of a text without context, BOS, EOS and pad."""
        generation = getattr(self.model, "generation_config", None)
        return {
            "add_bos_token": bool(self.add_bos_token),
            "prefix_token": self.tok_decode([self.prefix_token_id], skip_special_tokens=False),
            "prefix_token_id": self.prefix_token_id,
            "bos_token": self.tokenizer.bos_token,
            "eos_token": self.tokenizer.eos_token,
            "pad_token": self.tokenizer.pad_token,
            "generation_eos_token_id": getattr(generation, "eos_token_id", None),
        }
