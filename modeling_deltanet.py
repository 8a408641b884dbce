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

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .cache_deltanet import CACHE_NAME, accept_cache_name, delta_cache_layer
from .configuration_deltanet import DELTA_LAYER_TYPE, DeltaNetConfig
from .kernels.delta_rule import chunk_delta_rule, delta_rule_step, recurrent_delta_rule
from .kernels.reference import compute_dtype
from .kernels.short_conv import short_convolution, short_convolution_step
from .layout_deltanet import (
    TokenLayout,
    check_mask,
    check_token_ids,
    find_boundaries,
    packed_layout,
    padding_layout,
)

# The reference calls the embedding `embeddings` on disk; in memory it has the name that Transformers' sharding, tensor
# parallel and adapter helpers look for.
register_checkpoint_conversion_mapping(
    DeltaNetConfig.model_type, [WeightRenaming("embeddings", "embed_tokens")], overwrite=True
)


class DeltaNetRMSNorm(nn.Module):
    """RMSNorm over the last dimension, in float32 with one rounding at the end (the reference rounds there too)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = compute_dtype(x.dtype)
        return F.rms_norm(x.to(dtype), self.weight.shape, self.weight.to(dtype), self.eps).to(x.dtype)


class DeltaNetShortConvolution(nn.Conv1d):
    """Depthwise causal convolution, its weight [D, 1, W] used nowhere else (offloading and sharding rely on that)."""

    def __init__(self, dim: int, width: int, activation: str | None):
        super().__init__(dim, dim, width, groups=dim, bias=False)
        self.activation = activation

    def forward(
        self, x: torch.Tensor, state: torch.Tensor | None, layout: TokenLayout, output_state: bool, in_place: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x [B, T, D] -> (y [B, T, D], state [B, D, W - 1] or `None`); `in_place` updates `state` for a single token."""
        weight = self.weight.to_local() if hasattr(self.weight, "to_local") else self.weight
        if in_place:
            return short_convolution_step(x[:, 0], weight, None, self.activation, state)[:, None], None
        order = layout.order
        if order is not None and state is None and not output_state:
            # Nothing precedes or follows, so zeros in place of padding are exact and cheaper than stepping over it.
            x, order = x.masked_fill(~layout.real[..., None], 0), None
        return short_convolution(
            x,
            weight,
            activation=self.activation,
            initial_state=state,
            output_final_state=output_state,
            cu_seqlens=layout.cu_seqlens,
            padding_order=order,
        )


class DeltaNetMixer(nn.Module):
    """The delta-rule layer of the paper's section 3.3; parameter names are the reference's."""

    def __init__(self, config: DeltaNetConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.qk_activation, self.qk_norm = config.qk_activation, config.qk_norm
        self.use_short_conv, self.use_beta, self.use_gate = config.use_short_conv, config.use_beta, config.use_gate
        self.beta_scale = 2.0 if config.allow_neg_eigval else 1.0
        self.delta_rule = chunk_delta_rule if config.attn_mode == "chunk" else recurrent_delta_rule
        hidden_size, num_heads = config.hidden_size, config.num_heads
        key_dim, value_dim = int(hidden_size * config.expand_k), int(hidden_size * config.expand_v)
        self.head_k_dim, self.head_v_dim = key_dim // num_heads, value_dim // num_heads

        self.q_proj = nn.Linear(hidden_size, key_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, key_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, value_dim, bias=False)
        if config.use_beta:
            self.b_proj = nn.Linear(hidden_size, num_heads, bias=False)
        if config.use_short_conv:
            qk_silu = "silu" if config.qk_activation == "silu" else None
            self.q_conv1d = DeltaNetShortConvolution(key_dim, config.conv_size, qk_silu)
            self.k_conv1d = DeltaNetShortConvolution(key_dim, config.conv_size, qk_silu)
            self.v_conv1d = DeltaNetShortConvolution(value_dim, config.conv_size, "silu")
        if config.use_gate:
            self.g_proj = nn.Linear(hidden_size, value_dim, bias=False)
        self.o_norm = DeltaNetRMSNorm(self.head_v_dim, config.norm_eps)
        self.o_proj = nn.Linear(value_dim, hidden_size, bias=False)

    def forward(
        self, hidden_states: torch.Tensor, layout: TokenLayout, past_key_values: Cache | None = None
    ) -> torch.Tensor:
        """hidden_states [B, T, hidden_size] -> the same shape."""
        cache = delta_cache_layer(past_key_values, self.layer_idx)
        conv_states, state = ([None] * 3, None) if cache is None else cache.read()
        is_step = state is not None and hidden_states.shape[1] == 1 and layout.real is None and not torch.is_grad_enabled()

        q, k, v, conv_states = self._project(hidden_states, conv_states, layout, cache is not None, is_step)
        beta = self._writing_strength(hidden_states, k.shape[2], layout)
        use_l2 = self.qk_norm == "l2"
        if is_step:
            o = delta_rule_step(q[:, 0], k[:, 0], v[:, 0], beta[:, 0], state, use_qk_l2norm_in_kernel=use_l2)[:, None]
            cache.advance(1)
        else:
            o, final_state = self.delta_rule(
                q, k, v, beta, None, state, cache is not None, use_l2, cu_seqlens=layout.cu_seqlens
            )
            if cache is not None:
                cache.write(conv_states, final_state, hidden_states.shape[1])

        o = self.o_norm(o)
        if self.use_gate:
            o = o * F.silu(self.g_proj(hidden_states)).unflatten(-1, (-1, self.head_v_dim))
        return self.o_proj(o.flatten(-2))

    def _project(self, hidden_states, conv_states, layout, output_state, is_step):
        """Queries, keys [B, T, H, K] and values [B, T, H, V] ready for the delta rule, and the convolutions' new states."""
        streams = [self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)]
        new_states = [None, None, None]
        if self.use_short_conv:
            convolutions = (self.q_conv1d, self.k_conv1d, self.v_conv1d)
            for i, convolution in enumerate(convolutions):
                streams[i], new_states[i] = convolution(streams[i], conv_states[i], layout, output_state, is_step)
        else:
            activated = (0, 1, 2) if self.qk_activation == "silu" else (2,)
            streams = [F.silu(x) if i in activated else x for i, x in enumerate(streams)]
        q, k = (self._feature_map(x.unflatten(-1, (-1, self.head_k_dim)), layout) for x in streams[:2])
        return q, k, streams[2].unflatten(-1, (-1, self.head_v_dim)), new_states

    def _feature_map(self, x: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
        """Activations other than SiLU, and the normalisation by the sum; the L2 norm is the operation's own."""
        if self.qk_activation == "relu":
            x = F.relu(x)
        elif self.qk_activation == "elu":
            x = F.elu(x) + 1
        if self.qk_norm == "sum":
            total = x.to(compute_dtype(x.dtype)).sum(-1, keepdim=True)
            if layout.real is not None:
                # Features of tokens that do not exist are zero and would become NaN, which a zero beta does not stop.
                total = total.masked_fill(~layout.real[..., None, None], 1)
            x = (x / total).to(x.dtype)
        return x

    def _writing_strength(self, hidden_states: torch.Tensor, num_heads: int, layout: TokenLayout) -> torch.Tensor:
        """Beta, [B, T, H] in float32 (float64 in a float64 model), zero at padding; H is this rank's share of the heads."""
        dtype = compute_dtype(hidden_states.dtype)
        if self.use_beta:
            beta = self.b_proj(hidden_states).to(dtype).sigmoid() * self.beta_scale
        else:
            beta = hidden_states.new_full((*hidden_states.shape[:2], num_heads), self.beta_scale, dtype=dtype)
        return beta if layout.real is None else beta.masked_fill(~layout.real[..., None], 0)


class DeltaNetAttention(nn.Module):
    """Softmax attention of the hybrid models: RoPE, optional sliding window and grouped key-value heads."""

    def __init__(self, config: DeltaNetConfig, layer_idx: int):
        super().__init__()
        spec = config.attention_specs[layer_idx]
        num_heads = spec["num_heads"]
        num_kv_heads = spec["num_kv_heads"] or num_heads
        self.config, self.layer_idx, self.is_causal = config, layer_idx, True
        self.head_dim = config.hidden_size // num_heads
        self.rope = (self.head_dim, float(spec["rope_theta"] or 10000.0))
        self.num_key_value_groups = num_heads // num_kv_heads
        self.sliding_window = spec["window_size"]
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=spec["qkv_bias"])
        self.k_proj = nn.Linear(config.hidden_size, num_kv_heads * self.head_dim, bias=spec["qkv_bias"])
        self.v_proj = nn.Linear(config.hidden_size, num_kv_heads * self.head_dim, bias=spec["qkv_bias"])
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden_states, attention_mask, position_embeddings, past_key_values=None, **kwargs):
        """hidden_states [B, T, hidden_size] -> (the same shape, attention weights or `None`)."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (p(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in projections)
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings[self.rope])
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        scaling = self.head_dim**-0.5
        window = self.sliding_window
        o, weights = attention(self, q, k, v, attention_mask, scaling=scaling, sliding_window=window, **kwargs)
        return self.o_proj(o.flatten(-2)), weights


def rotary_embedding(position_ids: torch.Tensor, head_dim: int, theta: float, dtype: torch.dtype):
    """Cosine and sine of RoPE for positions [B, T], each [B, T, head_dim]; computed in float32."""
    exponents = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=compute_dtype(dtype)) / head_dim
    angles = position_ids[..., None] * theta**-exponents
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


class DeltaNetMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: DeltaNetConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN["silu"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


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
        normed = self.attn_norm(hidden_states)
        if self.is_delta:
            mixed = self.attn(normed, layout or TokenLayout(), cache)
        else:
            mixed, _ = self.attn(normed, attention_mask, position_embeddings, cache, **kwargs)
        hidden_states = hidden_states + mixed
        return hidden_states + self.mlp(self.mlp_norm(hidden_states))


class DeltaNetPreTrainedModel(PreTrainedModel):
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
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        except RuntimeError as error:
            if "gate_proj" in str(error) and "mismatch" in str(error).lower():
                raise ValueError(_layout_of_2024(pretrained_model_name_or_path, "gate_proj of twice the width")) from error
            raise
        old_norms = [key for key in info["unexpected_keys"] if re.search(r"layers\.\d+\.(attn|mlp)\.norm\.weight$", key)]
        if old_norms:
            raise ValueError(_layout_of_2024(pretrained_model_name_or_path, f"norms named {old_norms[0]}"))
        return (model, info) if output_loading_info else model


def _layout_of_2024(source, what: str) -> str:
    return (
        f"The checkpoint {source} has a layout of 2024 ({what}). Rewrite it once, exactly, with "
        f"`python -m deltanet.convert {source} OUTPUT_DIRECTORY`, and load the result."
    )


def _accept_name_on_disk(module: nn.Module, state_dict: dict, prefix: str, *_):
    """The Trainer resumes by `load_state_dict` from a saved file, past the renaming of `from_pretrained`."""
    saved = f"{prefix}embeddings.weight"
    if saved in state_dict:
        state_dict[f"{prefix}embed_tokens.weight"] = state_dict.pop(saved)


class DeltaNetModel(DeltaNetPreTrainedModel):
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
            position_ids: [B, T]. Without mask and cache, a restart in a single row begins a new packed sequence.
            past_key_values: `DynamicCache(config=...)` or `StaticCache(config=...)`; Transformers 5.24 says `cache`.
            use_cache: return the recurrent state; by default in evaluation only, never for packed sequences.
            kwargs: `cu_seq_lens_q` [N + 1] or `seq_idx` [1, T] mark packed sequences; others go to the attention layers.

        Raises:
            `ValueError` naming the argument, what it was and what is allowed.
        """
        inputs_embeds = self._embed(input_ids, inputs_embeds)
        batch, length = inputs_embeds.shape[:2]
        masks_are_ready = isinstance(attention_mask, dict)
        if attention_mask is not None and not masks_are_ready:
            check_mask(attention_mask, batch, length, past_key_values)
        cu_seqlens = find_boundaries(
            batch=batch,
            length=length,
            position_ids=position_ids,
            cu_seq_lens_q=kwargs.get("cu_seq_lens_q"),
            seq_idx=kwargs.pop("seq_idx", None),
            attention_mask=attention_mask,
            past_key_values=past_key_values,
        )
        if past_key_values is None and cu_seqlens is None and self._wants_cache(use_cache):
            past_key_values = DynamicCache(config=self.config)
        self._check_checkpointing(past_key_values)

        if cu_seqlens is not None:
            layout, packed_position_ids = packed_layout(cu_seqlens, length)
            position_ids = packed_position_ids if position_ids is None else position_ids
        else:
            delta_mask = attention_mask.get(DELTA_LAYER_TYPE) if masks_are_ready else attention_mask
            layout = padding_layout(delta_mask, length, self.config.conv_size)
        masks, position_embeddings = {}, None
        if self.config.attention_specs:
            position_ids = self._positions(position_ids, inputs_embeds, past_key_values)
            masks = attention_mask if masks_are_ready else self.attention_masks(
                self.config, inputs_embeds, attention_mask, past_key_values, position_ids
            )
            position_embeddings = self._rotary_embeddings(position_ids, inputs_embeds.dtype)
            kwargs["position_ids"] = position_ids

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

    @staticmethod
    def _positions(position_ids, inputs_embeds, past_key_values):
        if position_ids is not None:
            return position_ids
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        return (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen)[None]

    def _rotary_embeddings(self, position_ids, dtype):
        ropes = {block.attn.rope for block in self.layers if not block.is_delta}
        return {rope: rotary_embedding(position_ids, *rope, dtype) for rope in ropes}

    @staticmethod
    def attention_masks(config, inputs_embeds, attention_mask, past_key_values, position_ids) -> dict:
        """Masks of a hybrid's attention layers by layer type, in the form the attention implementation wants."""
        makers = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
        arguments = {
            "config": config,
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            CACHE_NAME: past_key_values,
            "position_ids": position_ids,
        }
        return {kind: make(**arguments) for kind, make in makers.items() if kind in config.layer_types}


class DeltaNetForCausalLM(DeltaNetPreTrainedModel, GenerationMixin):
    """DeltaNet with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: DeltaNetConfig):
        super().__init__(config)
        self.model = DeltaNetModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @staticmethod
    def create_masks_for_generate(config, inputs_embeds, attention_mask, position_ids=None, **kwargs) -> dict:
        """Ready masks for one step of `generate` with a compilable cache; a generated token is never padding."""
        past_key_values = kwargs.get(CACHE_NAME)
        masks = DeltaNetModel.attention_masks(config, inputs_embeds, attention_mask, past_key_values, position_ids)
        length = inputs_embeds.shape[1]
        if attention_mask is not None and length > 1:
            masks[DELTA_LAYER_TYPE] = attention_mask[:, -length:]
        return masks

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
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            shifted = kwargs.pop("shift_labels", None)
            shifted = F.pad(labels, (0, 1), value=-100)[:, 1:] if shifted is None else shifted
            loss = self.loss_function(
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
