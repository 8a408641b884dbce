"""
Generation: how DeltaNet takes part in Transformers' loops, and how `generate` decodes by replaying a captured step.

`generate` opens a `Decoding`. The first forward of one token lends its cache to a captured step (`graphs_deltanet.py`), the
following ones replay it, and the end of `generate` ends the loan. What a step does not cover runs the ordinary forward on
the same cache. A log line says which way runs, and why.
"""

import contextlib
import functools
import logging
import os
import threading
from functools import wraps

import torch
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from .attention_deltanet import attention_masks
from .cache_deltanet import CACHE_NAME
from .configuration_deltanet import DELTA_LAYER_TYPE
from .graphs_deltanet import RECORDERS, DecodeStep, Loan, Survey, layout, survey
from .layout_deltanet import values_are_readable

logger = logging.getLogger("deltanet.decoding")

# What `generate` keeps for the preparation of inputs alone, or what a decoded token does not need.
_NOT_FOR_FORWARD = ("next_sequence_length", "inputs_embeds", "attention_mask", "position_ids")

_this_thread = threading.local()  # its open decodings, the innermost last
_recording = threading.RLock()  # held while a step is recorded
_open: list["Decoding"] = []  # of all threads


class Decoding:
    """One call of `generate`: its cache is lent to a captured step from the first decoded token on."""

    def __init__(self, model: GenerationMixin, needs_masks: bool):
        self.model, self.needs_masks = model, needs_masks or bool(model.config.attention_specs)
        self.thread = threading.get_ident()
        self.loan: Loan | None = None
        self.is_refused = False

    @functools.cached_property
    def survey(self) -> Survey:
        return survey(self.model)

    def run(self, forward, input_ids: torch.Tensor | None, arguments: dict) -> torch.Tensor | None:
        """Logits [B, 1, vocabulary] of one decoded token, or `None` where `forward` itself must run."""
        cache = arguments.get(CACHE_NAME)
        if self.is_refused or cache is None or input_ids is None or input_ids.ndim != 2 or input_ids.shape[1] != 1:
            return None
        if torch.is_grad_enabled() or not _is_plain(input_ids.device, arguments):
            return None
        if self.loan is None:
            self._lend(forward, input_ids, cache)
        elif not self.is_lent(cache):
            return None
        elif self.loan.step.ids.shape != input_ids.shape or not self.loan.is_intact():
            self.refuse(input_ids.device, "the cache changed its batch or was reset")
        return None if self.loan is None else self.loan.step.run(input_ids)

    def is_lent(self, cache: Cache | None) -> bool:
        """Whether `cache` is the one whose layers hold a step's tensors now."""
        return self.loan is not None and self.loan.cache is cache

    def _lend(self, forward, input_ids: torch.Tensor, cache: Cache) -> None:
        device = input_ids.device
        if obstacle := self.obstacle(device):
            return self.refuse(device, obstacle)
        if not all(getattr(layer, "has_previous_state", {}).get(0) for layer in cache.layers):
            return None  # a prompt of one token
        if obstacle := _obstacle_in_cache(cache, device):
            return self.refuse(device, obstacle)
        key = (self.survey.weights, _circumstances(device), layout(cache))
        step = self.model.decode_graphs.take(key) or self._record(forward, input_ids, cache, key)
        if step is not None:
            self.loan = Loan(cache, step)
            _announce(device.type, "replays a captured step")

    def _record(self, forward, input_ids: torch.Tensor, cache: Cache, key: tuple) -> DecodeStep | None:
        device, failures = input_ids.device, self.model.decode_graphs.failures
        with _recording:
            if not self._is_alone():
                return self.refuse(device, "another thread generates")
            if key not in failures:
                try:
                    return DecodeStep(forward, self.model, cache, input_ids, key)
                except RuntimeError as error:
                    failures[key] = f"capture failed: {(str(error) or repr(error)).splitlines()[0]}"
                    logger.warning("decoding on %s: %s", device.type, failures[key])
            return self.refuse(device, failures[key])

    def _is_alone(self) -> bool:
        """Whether no other thread generates: while one records on a device, others cannot draw random numbers there."""
        return all(decoding.thread == self.thread for decoding in _open)

    def reorder(self, cache: Cache, rows: torch.Tensor) -> bool:
        """Reorder a cache that is lent; False where the cache itself must do it."""
        if not self.is_lent(cache) or not self.loan.is_intact():
            return False
        step = self.loan.step
        with _recording:
            if step.reordering is None and self._is_alone():
                step.record_reordering()
        if step.reordering is None:
            return False
        step.reorder(rows)
        return True

    def obstacle(self, device: torch.device) -> str:
        """Why no step of this model can be captured on `device` now; empty where it can."""
        if device.type not in RECORDERS:
            return f"there are no graphs for {device.type}"
        if not self.model.decode_graphs.enabled or os.environ.get("DELTANET_DECODE_GRAPHS") == "0":
            return "decode graphs are switched off"
        if self.model.config.attention_specs:
            return "keys and values of attention layers grow"
        if any(getattr(self.model.config, name, False) for name in ("output_hidden_states", "output_attentions")):
            return "the configuration asks for hidden states or attentions"
        if torch.is_autocast_enabled(device.type):
            return "autocast is on"
        if os.environ.get("DELTANET_CHECK") == "1":
            return "DELTANET_CHECK=1 waits for the device"
        return self.survey.obstacle

    def refuse(self, device: torch.device, reason: str) -> None:
        """Decode eagerly from here on."""
        self.end()
        self.is_refused = True
        _announce(device.type, f"eager: {reason}")

    def end(self) -> None:
        """Give the cache its own tensors back, and the step to the next call."""
        if self.loan is not None:
            loan, self.loan = self.loan, None
            loan.end()
            self.model.decode_graphs.give_back(loan.step)


@contextlib.contextmanager
def _decoding(model: GenerationMixin, needs_masks: bool):
    decoding, stack = Decoding(model, needs_masks), vars(_this_thread).setdefault("decodings", [])
    with _recording:
        _open.append(decoding)
    stack.append(decoding)
    try:
        yield
    finally:
        stack.pop()
        _open.remove(decoding)
        decoding.end()


def _current(model: GenerationMixin) -> Decoding | None:
    """The call of `generate` that this thread is in, if it is one of `model`."""
    stack = getattr(_this_thread, "decodings", None)
    return stack[-1] if stack and stack[-1].model is model else None


def _is_plain(device: torch.device, arguments: dict) -> bool:
    """Whether a forward of one token is asked for nothing but the logits after a real token."""
    for name, value in arguments.items():
        if value is None or value is False or name in (CACHE_NAME, "position_ids"):
            continue
        if name == "attention_mask":
            # Ready masks without one of the tokens say that all are real; others are left to the ordinary forward.
            if not isinstance(value, dict) or value.get(DELTA_LAYER_TYPE) is not None:
                return False
        elif name == "logits_to_keep" and isinstance(value, int) and value <= 1:
            continue
        elif value is not True or name not in ("use_cache", "return_dict"):
            _announce(device.type, f"eager: the forward was given `{name}`")
            return False
    return True


def _obstacle_in_cache(cache: Cache, device: torch.device) -> str:
    if any(getattr(layer, "_layer_type", None) != DELTA_LAYER_TYPE for layer in cache.layers):
        return "the cache has other layers than delta-rule layers"
    if getattr(cache, "offloading", False) or any(layer.device != device for layer in cache.layers):
        return "the cache is offloaded"
    return ""


def _begins_unpadded(mask: torch.Tensor, cache: Cache | None) -> bool:
    """Whether a prompt has no padding, which no layer then looks for. To ask waits for nothing as long as the cache is
    unused: the prompt is the device's first work."""
    is_used = cache is None or any(getattr(layer, "has_previous_state", {}).get(0) for layer in cache.layers)
    return not is_used and bool((mask == 1).all())


def _circumstances(device: torch.device) -> tuple:
    """What else a recording depends on; its tensors belong to a stream."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    settings = (torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled())
    return (device, stream, os.environ.get("DELTANET_BACKEND"), *settings)


@functools.cache
def _announce(device: str, way: str) -> None:
    logger.info("decoding on %s: %s", device, way)


def replays_decode_steps(forward):
    """Let the `forward` of a causal language model replay a captured step where `generate` has one."""

    @wraps(forward)
    def wrapper(self, input_ids=None, *args, **kwargs):
        decoding = None if torch.compiler.is_compiling() or args else _current(self)
        logits = None if decoding is None else decoding.run(forward, input_ids, kwargs)
        if logits is None:
            return forward(self, input_ids, *args, **kwargs)
        return CausalLMOutputWithPast(logits=logits, **{CACHE_NAME: kwargs[CACHE_NAME]})

    return wrapper


class DeltaNetGenerationMixin(GenerationMixin):
    """What DeltaNet adds to `generate`: ready masks, captured steps, and no inputs that a decoded token does not need."""

    @wraps(GenerationMixin.generate)
    def generate(self, *args, **kwargs):
        # A loop of the caller's own may look at the masks.
        with _decoding(self, needs_masks=kwargs.get("custom_generate") is not None):
            return super().generate(*args, **kwargs)

    def _valid_auto_compile_criteria(self, model_kwargs, generation_config):
        """A static cache is compiled where no captured step can serve it, or where `compile_config` asks for it."""
        decoding = _current(self)
        if decoding is not None and generation_config.compile_config is None and not decoding.obstacle(self.device):
            return False
        compiles = super()._valid_auto_compile_criteria(model_kwargs, generation_config)
        if decoding is not None and compiles:
            decoding.refuse(self.device, "the forward is compiled")
        return compiles

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, *args, **kwargs):
        decoding = _current(self)
        if decoding is not None and not decoding.needs_masks and CACHE_NAME in outputs:
            # The state knows the prompt and its padding, and a decoded token is real: nothing is left to say.
            model_kwargs.pop("attention_mask", None)
            model_kwargs.pop("position_ids", None)
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)

    def _reorder_cache(self, cache, beam_idx):
        decoding = _current(self)
        if decoding is None or not decoding.reorder(cache, beam_idx):
            cache.reorder_cache(beam_idx)
        return cache

    # `generate` reads the signature to learn what the model takes.
    @wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, input_ids, *args, is_first_iteration=False, **kwargs):
        decoding, cache = _current(self), kwargs.get(CACHE_NAME)
        if decoding is not None and decoding.is_lent(cache) and kwargs.get("next_sequence_length") == 1:
            return {"input_ids": input_ids[:, -1:], **{k: v for k, v in kwargs.items() if k not in _NOT_FOR_FORWARD}}
        inputs = super().prepare_inputs_for_generation(input_ids, *args, is_first_iteration=is_first_iteration, **kwargs)
        # Ready masks for every decoding step; Transformers makes them for compilable caches only.
        mask, ids = inputs.get("attention_mask"), inputs["input_ids"]
        if isinstance(mask, torch.Tensor) and cache is not None and is_first_iteration:
            prompt = inputs["inputs_embeds"] if ids is None else ids
            if mask.shape == prompt.shape[:2] and _begins_unpadded(mask, cache):
                inputs["attention_mask"] = None
        elif isinstance(mask, torch.Tensor) and cache is not None:
            embeds = torch.empty((*ids.shape, 0), dtype=self.dtype, device=ids.device)
            arguments = {CACHE_NAME: cache, "position_ids": inputs.get("position_ids")}
            inputs["attention_mask"] = self.create_masks_for_generate(self.config, embeds, mask, **arguments)
        return inputs

    @staticmethod
    def create_masks_for_generate(
        config, inputs_embeds, attention_mask, position_ids=None, is_first_iteration=False, **kwargs
    ) -> dict:
        """Masks by layer type for one step of `generate`."""
        masks = attention_masks(config, inputs_embeds, attention_mask, kwargs.get(CACHE_NAME), position_ids)
        if attention_mask is not None:
            new = attention_mask[:, -inputs_embeds.shape[1] :]
            if is_first_iteration and _begins_unpadded(new, kwargs.get(CACHE_NAME)):
                return masks
            # A generated token is never padding. Transformers 5.17 does not say whether a single token is generated or a
            # prompt's that is read in chunks of one, so look where that does not wait for the device.
            if new.shape[1] > 1 or is_first_iteration or values_are_readable(new) and not bool(new.all()):
                masks[DELTA_LAYER_TYPE] = new
        return masks

    def init_continuous_batching(self, *args, **kwargs):
        raise NotImplementedError(
            "Continuous batching keeps pages of keys and values and has no place for DeltaNet's recurrent state; `generate` "
            "takes a padded batch."
        )


__all__ = ["DeltaNetGenerationMixin", "replays_decode_steps"]
