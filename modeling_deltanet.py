"""
DeltaNet: a linear transformer with the delta rule (Yang et al., "Parallelizing Linear Transformers with the Delta Rule
over Sequence Length", arXiv 2406.06484) as a Transformers model.

Per token and head, with the state S [K, V], the mixer of every block computes

    q, k, v = short convolution and activation of the projections of x
    q, k    = q / |q|, k / |k|
    beta    = sigmoid(b_proj(x))                      doubled where negative eigenvalues are allowed
    S       = S + k beta (v - S^T k)^T                the delta rule, paper section 2.2
    o       = S^T q / sqrt(K)
    y       = o_proj(RMSNorm_per_head(o))             times silu(g_proj(x)) before o_proj where gated
"""

import re
import shlex
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .attention_deltanet import DeltaNetAttention, attention_masks, rotary_embedding
from .cache_deltanet import CACHE_NAME, accept_cache_name
from .configuration_deltanet import CONVERSION_COMMAND, DELTA_LAYER_TYPE, DeltaNetConfig
from .context_parallel_deltanet import ContextParallelMixin, labels_a_process, segment_layout, shifted_labels
from .decoding_deltanet import DeltaNetGenerationMixin, replays_decode_steps
from .fused_deltanet import LanguageModelHead, linear_cross_entropy, project, swiglu_linear
from .graphs_deltanet import DecodeGraphs
from .layout_deltanet import (
    TokenLayout,
    check_mask,
    check_token_ids,
    find_boundaries,
    packed_layout,
    padding_layout,
)
from .mixer_deltanet import DeltaNetMixer, DeltaNetRMSNorm
from .warmup_deltanet import WarmupMixin

# The reference calls the embedding `embeddings` on disk; in memory it has the name that Transformers' sharding, tensor
# parallel and adapter helpers look for.
register_checkpoint_conversion_mapping(
    DeltaNetConfig.model_type, [WeightRenaming("embeddings", "embed_tokens")], overwrite=True
)


class DeltaNetMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: DeltaNetConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return swiglu_linear(*project(x, self.gate_proj, self.up_proj), self.down_proj)


class DeltaNetBlock(GradientCheckpointingLayer):
    """x += mixer(norm(x)); x += SwiGLU(norm(x)), with softmax attention as the mixer in a hybrid's attention layers."""

    def __init__(self, config: DeltaNetConfig, layer_idx: int):
        super().__init__()
        self.is_delta = config.layer_types[layer_idx] == DELTA_LAYER_TYPE
        self.attn_norm = DeltaNetRMSNorm(config.hidden_size, config.norm_eps)
        self.attn = DeltaNetMixer(config, layer_idx) if self.is_delta else DeltaNetAttention(config, layer_idx)
        self.mlp_norm = DeltaNetRMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = DeltaNetMLP(config)

    def forward(self, hidden_states, layout=None, attention_mask=None, position_embeddings=None, cache=None, **kwargs):
        layout = layout or TokenLayout()
        normed, hidden_states = self.attn_norm(hidden_states, with_total=True)
        if self.is_delta:
            mixed = self.attn(normed, layout, cache)
        else:
            packed = None if layout.cu_seqlens is None else layout.real
            mixed, _ = self.attn(normed, attention_mask, position_embeddings, cache, packed, **kwargs)
        normed, hidden_states = self.mlp_norm(hidden_states, mixed, with_total=True)
        return hidden_states + self.mlp(normed)


class DeltaNetPreTrainedModel(WarmupMixin, PreTrainedModel):
    """Loading, initialisation and what Transformers may do with the model."""

    config: DeltaNetConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DeltaNetBlock"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _is_stateful = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": DeltaNetBlock, "attentions": DeltaNetAttention}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """As in Transformers; raises `ValueError` for the layouts of 2024, which would load with random weights."""
        arguments = (pretrained_model_name_or_path, *args)
        try:
            model, info = super().from_pretrained(*arguments, **kwargs, output_loading_info=True)
        except RuntimeError as error:
            if "ignore_mismatched_sizes" not in str(error):
                raise
            # The error does not say which sizes disagree; to load once more does.
            kwargs["ignore_mismatched_sizes"] = True
            _refuse_layouts_of_2024(*super().from_pretrained(*arguments, **kwargs, output_loading_info=True))
            raise
        _refuse_layouts_of_2024(model, info)
        model.config.check_tensor_parallel(model._tp_size or 1)
        return (model, info) if output_loading_info else model


def _refuse_layouts_of_2024(model: PreTrainedModel, info: dict) -> None:
    norms = [key for key in info["unexpected_keys"] if re.search(r"layers\.\d+\.(attn|mlp)\.norm\.weight$", key)]
    gates = [key for key, *_ in info["mismatched_keys"] if key.replace("gate_proj", "up_proj") in info["missing_keys"]]
    if norms or gates:
        what = f"norms named {min(norms)}" if norms else f"both halves of the SwiGLU in {min(gates)}"
        command = CONVERSION_COMMAND.replace("SOURCE", shlex.quote(model.name_or_path))
        raise ValueError(
            f"The checkpoint {model.name_or_path} has a layout of 2024 ({what}). Rewrite it once, exactly, with "
            f"`{command}`, and load the result."
        )


def _accept_name_on_disk(module: nn.Module, state_dict: dict, prefix: str, *_):
    """The Trainer resumes by `load_state_dict` from a saved file, past the renaming of `from_pretrained`."""
    saved = f"{prefix}embeddings.weight"
    if saved in state_dict:
        state_dict[f"{prefix}embed_tokens.weight"] = state_dict.pop(saved)


class DeltaNetModel(ContextParallelMixin, DeltaNetPreTrainedModel):
    """The stack of blocks, from token ids or embeddings to normalised hidden states."""

    def __init__(self, config: DeltaNetConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([DeltaNetBlock(config, i) for i in range(config.num_hidden_layers)])
        self.norm = DeltaNetRMSNorm(config.hidden_size, config.norm_eps)
        self.gradient_checkpointing = False
        self.register_load_state_dict_pre_hook(_accept_name_on_disk)
        self.post_init()

    @accept_cache_name
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """
        Args:
            input_ids: [B, T]; or `inputs_embeds` [B, T, hidden_size].
            attention_mask: [B, tokens in the cache + T], zero at padding. A padded token writes nothing anywhere.
            position_ids: [B, T]; by default counted from the cache or the mask. Without mask and cache, a restart in a
                single row begins a new packed sequence.
            past_key_values: `DynamicCache(config=...)` or `StaticCache(config=...)`; Transformers 5.24 says `cache`.
            use_cache: return the recurrent state; by default in evaluation only, never for packed sequences.
            kwargs: `cu_seq_lens_q` [N + 1] or `seq_idx` [1, T] mark packed sequences; others go to the attention layers.

        Raises:
            `ValueError` naming the argument, what it was and what is allowed.
        """
        inputs_embeds = self._embed(input_ids, inputs_embeds)
        shape = inputs_embeds.shape[:2]
        masks_are_ready = isinstance(attention_mask, dict)
        if attention_mask is not None and not masks_are_ready:
            check_mask(attention_mask, *shape, past_key_values)
        boundaries = (position_ids, kwargs.get("cu_seq_lens_q"), kwargs.pop("seq_idx", None), attention_mask)
        if self.context_group is not None:
            cache = (past_key_values, use_cache)
            layout, restarts = segment_layout(self.context_group, inputs_embeds, *boundaries, *cache), None
            past_key_values = DynamicCache(config=self.config) if use_cache else None
        else:
            cu_seqlens = find_boundaries(shape, *boundaries, past_key_values)
            if past_key_values is None and cu_seqlens is None and self._wants_cache(use_cache):
                past_key_values = DynamicCache(config=self.config)
            self._check_checkpointing(past_key_values)
            layout, restarts = self._layout(cu_seqlens, attention_mask, shape[1])

        masks, position_embeddings = {}, None
        if self.config.attention_specs:
            if position_ids is None:
                counted = self._positions(inputs_embeds, attention_mask, past_key_values)
                position_ids = counted if restarts is None else restarts
            position_embeddings = self._rotary_embeddings(position_ids, inputs_embeds.dtype)
            # The boundaries in force, which `position_ids` need not repeat next to `cu_seq_lens_q` or `seq_idx`.
            kwargs["position_ids"] = position_ids if restarts is None else restarts
            masks = (
                attention_mask
                if masks_are_ready
                else attention_masks(self.config, inputs_embeds, attention_mask, past_key_values, kwargs["position_ids"])
            )

        hidden_states = inputs_embeds
        for block, layer_type in zip(self.layers, self.config.layer_types):
            hidden_states = block(
                hidden_states,
                layout=layout,
                attention_mask=masks.get(layer_type),
                position_embeddings=position_embeddings,
                # Not as `past_key_values`: Transformers 5.17 drops that from a block with gradient checkpointing even where
                # no gradient is taken, and `generate` would then forget its prompt.
                cache=past_key_values,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **{CACHE_NAME: past_key_values})

    def _embed(self, input_ids, inputs_embeds):
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of `input_ids` and `inputs_embeds`.")
        if inputs_embeds is None:
            check_token_ids(input_ids, self.config.vocab_size)
            inputs_embeds = self.embed_tokens(input_ids)
        if inputs_embeds.ndim != 3 or inputs_embeds.shape[2] != self.config.hidden_size:
            shape, width = tuple(inputs_embeds.shape), self.config.hidden_size
            raise ValueError(f"`inputs_embeds` has shape {shape}; allowed: [batch, tokens, {width}] (hidden_size).")
        if inputs_embeds.shape[0] == 0 or inputs_embeds.shape[1] == 0:
            raise ValueError(f"The input has shape {tuple(inputs_embeds.shape[:2])}; allowed: at least one token a row.")
        return inputs_embeds

    def _wants_cache(self, use_cache: bool | None) -> bool:
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        return use_cache and not self._is_checkpointing()

    def _is_checkpointing(self) -> bool:
        return self.gradient_checkpointing and self.training and torch.is_grad_enabled()

    def _check_checkpointing(self, past_key_values):
        if past_key_values is not None and self._is_checkpointing():
            raise ValueError(
                "`past_key_values` cannot be used with gradient checkpointing in training: the backward pass runs every "
                "layer again and would absorb the tokens twice."
            )

    def _layout(self, cu_seqlens, attention_mask, length):
        """The layout of the batch, and positions [1, T] that restart with every packed sequence or `None`."""
        if cu_seqlens is not None:
            return packed_layout(cu_seqlens, length)
        if isinstance(attention_mask, dict):
            attention_mask = attention_mask.get(DELTA_LAYER_TYPE)
        return padding_layout(attention_mask, length, self.config.conv_size), None

    @staticmethod
    def _positions(inputs_embeds, attention_mask, past_key_values):
        """[1 or B, T]; padding takes no position, so that a row continues the same way whatever stands before it."""
        length = inputs_embeds.shape[1]
        if isinstance(attention_mask, torch.Tensor):
            return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        return (torch.arange(length, device=inputs_embeds.device) + seen)[None]

    def _rotary_embeddings(self, position_ids, dtype):
        # Pipeline parallelism puts modules of its own in the place of blocks that run elsewhere.
        ropes = {block.attn.rope for block in self.layers if not getattr(block, "is_delta", True)}
        return {rope: rotary_embedding(position_ids, *rope, dtype) for rope in ropes}


class DeltaNetForCausalLM(ContextParallelMixin, DeltaNetPreTrainedModel, DeltaNetGenerationMixin):
    """DeltaNet with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: DeltaNetConfig):
        super().__init__(config)
        self.model = DeltaNetModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = LanguageModelHead(config.hidden_size, config.vocab_size, bias=False)
        self.decode_graphs = DecodeGraphs()
        self.post_init()

    @replays_decode_steps
    @accept_cache_name
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """
        Arguments as in [`DeltaNetModel.forward`], and

        Args:
            labels: [B, T], shifted inside; -100 is ignored. The loss covers the positions kept by `logits_to_keep`.
            logits_to_keep: compute the last so many logits only (0 for all), or those at a tensor of positions.
            kwargs: `num_items_in_batch` and `shift_labels` go to the loss.

        With labels in training and `config.fuse_linear_cross_entropy`, the output's `logits` are `None`.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden_states, logits, loss = outputs.last_hidden_state[:, kept, :], None, None
        loss_function = self.loss_function
        if labels is not None and self._fuses_loss():
            loss_function = partial(linear_cross_entropy, self.lm_head, hidden_states)
        else:
            logits = self.lm_head(hidden_states)
        if labels is not None:
            group, shifted = self.context_group, kwargs.pop("shift_labels", None)
            if shifted is None:
                shifted = F.pad(labels, (0, 1), value=-100)[:, 1:] if group is None else shifted_labels(labels, group)
            if group is not None and kwargs.get("num_items_in_batch") is None:
                kwargs["num_items_in_batch"] = labels_a_process(shifted[:, kept], group)
            loss = loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.vocab_size,
                shift_labels=shifted[:, kept].contiguous(),
                **kwargs,
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE_NAME: outputs[CACHE_NAME] if CACHE_NAME in outputs else None},
        )

    def _fuses_loss(self) -> bool:
        """A loss function that somebody has set in place of the usual one needs all logits."""
        return self.training and self.config.fuse_linear_cross_entropy and self.loss_function is ForCausalLMLoss


class DeltaNetForSequenceClassification(GenericForSequenceClassification, DeltaNetPreTrainedModel):
    """DeltaNet with a classifier on the last real token of each row."""

    def __init__(self, config: DeltaNetConfig):
        # The generic constructor asks the Auto class for the backbone, which custom code from the Hub cannot do.
        DeltaNetPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = DeltaNetModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()


class DeltaNetForTokenClassification(GenericForTokenClassification, DeltaNetPreTrainedModel):
    """DeltaNet with a classifier on every token."""

    def __init__(self, config: DeltaNetConfig):
        DeltaNetPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = DeltaNetModel(config)
        self.dropout = nn.Dropout(getattr(config, "classifier_dropout", None) or 0.0)
        self.score = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()


__all__ = [
    "DeltaNetForCausalLM",
    "DeltaNetForSequenceClassification",
    "DeltaNetForTokenClassification",
    "DeltaNetModel",
    "DeltaNetPreTrainedModel",
]
