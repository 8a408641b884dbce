"""Configuration of DeltaNet: the reference's keys and defaults on disk, Transformers' names as aliases."""

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

# The cache layer of `cache_deltanet.py` registers itself under this name.
DELTA_LAYER_TYPE = "linear_attention_delta"

# Rewrites a checkpoint in one of the layouts of 2024.
CONVERSION_COMMAND = "python -m deltanet.publish SOURCE --output OUTPUT_DIRECTORY"

# Keys that a reference configuration may carry and that change the maths, with the only value supported here.
_UNSUPPORTED = {
    "attnres_block_size": None,
    "conv_bias": False,
    "norm_first": False,
    "share_conv_kernel": False,
    "use_elu": False,
    "use_output_norm": True,
    "use_rope": False,
}

_ATTENTION_DEFAULTS = {"num_kv_heads": None, "qkv_bias": False, "window_size": None, "rope_theta": 10000.0}


def _require(condition: bool, field: str, value, allowed: str) -> None:
    if not condition:
        raise ValueError(f"DeltaNetConfig: `{field}` is {value!r}; allowed: {allowed}.")


def _is_integer(value, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


@strict
class DeltaNetConfig(PreTrainedConfig):
    r"""
    Configuration of a [`DeltaNetModel`].

    Real-valued fields accept integers, so that configurations of published checkpoints (`"expand_k": 1`) load. Keys that
    only choose among the reference's kernels (other `fuse_*`, `use_l2warp`) are kept and have no effect; a key that would
    change the maths and is not supported raises.

    Args:
        vocab_size (`int`, defaults to 32000): number of token ids.
        hidden_size (`int`, defaults to 2048): width of the residual stream.
        num_hidden_layers (`int`, defaults to 24): number of blocks.
        num_heads (`int`, defaults to 16): heads of the delta rule, for queries, keys and values alike.
        expand_k (`float`, defaults to 1.0): width of all queries (and of all keys) as a multiple of `hidden_size`.
        expand_v (`float`, defaults to 1.0): width of all values as a multiple of `hidden_size`.
        attn_mode (`str`, defaults to `"chunk"`): `"chunk"`, or `"fused_recurrent"` for the step-by-step operation.
        use_beta (`bool`, defaults to `True`): learn the writing strength; `False` fixes it to one.
        use_gate (`bool`, defaults to `False`): multiply the normalised output by `silu(g_proj(x))`.
        use_short_conv (`bool`, defaults to `True`): depthwise causal convolution on queries, keys and values.
        conv_size (`int`, defaults to 4): width of that convolution.
        qk_norm (`str`, defaults to `"l2"`): `"l2"`, or `"sum"` (the L1 ablation of the paper's Table 1).
        qk_activation (`str`, defaults to `"silu"`): `"silu"`, `"relu"`, `"elu"` (meaning `1 + elu`) or `"identity"`.
        allow_neg_eigval (`bool`, defaults to `False`): double beta, so that transitions may have negative eigenvalues.
        hidden_ratio (`int` or `float`, defaults to 4): sets `intermediate_size` when that is `None`.
        intermediate_size (`int`, *optional*): width of the SwiGLU; by default two thirds of
            `hidden_ratio * hidden_size`, rounded up to a multiple of 256.
        hidden_act (`str`, defaults to `"swish"`): `"swish"` or `"silu"`, the same function.
        norm_eps (`float`, defaults to 1e-6): epsilon of every RMSNorm.
        attn (`dict` or `list[dict]`, *optional*): softmax attention in place of the delta rule in some layers. Keys:
            `layers` and `num_heads` (required), `num_kv_heads`, `qkv_bias`, `window_size` (`None` for full attention)
            and `rope_theta`. All windows must be equal.
        max_position_embeddings (`int`, defaults to 2048): length trained on. Evaluation tools read it; nothing limits it.
        initializer_range (`float`, defaults to 0.02): standard deviation of every weight matrix at initialisation.
        use_cache (`bool`, defaults to `True`): whether a forward in evaluation returns the recurrent state.
        fuse_linear_cross_entropy (`bool`, defaults to `False`): in training with labels, compute the loss without holding
            the logits of all tokens, and return `None` in their place. Evaluation is not affected.
        tie_word_embeddings (`bool`, defaults to `False`): share the embedding with the language-model head.
        pad_token_id, bos_token_id, eos_token_id (`int`, *optional*, default to `None`, 1 and 2): special tokens.

    Raises:
        `ValueError` naming the field, its value and what is allowed; for a field of a wrong type the strict dataclass's
        `StrictDataclassFieldValidationError`, which names the same.
    """

    model_type = "delta_net"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    attribute_map = {
        "num_attention_heads": "num_heads",
        "rms_norm_eps": "norm_eps",
        "conv_kernel_size": "conv_size",
    }
    # By heads. "grouped_gemm" is what every supported release calls a parameter split along its first dimension.
    base_model_tp_plan = {
        "layers.*.attn.q_proj": "colwise",
        "layers.*.attn.k_proj": "colwise",
        "layers.*.attn.v_proj": "colwise",
        "layers.*.attn.b_proj": "colwise",
        "layers.*.attn.g_proj": "colwise",
        "layers.*.attn.q_conv1d.weight": "grouped_gemm",
        "layers.*.attn.k_conv1d.weight": "grouped_gemm",
        "layers.*.attn.v_conv1d.weight": "grouped_gemm",
        "layers.*.attn.o_norm": "replicated_with_grad_allreduce",
        "layers.*.attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 32000
    hidden_size: int = 2048
    num_hidden_layers: int = 24
    num_heads: int = 16
    expand_k: float | int = 1.0
    expand_v: float | int = 1.0
    attn_mode: str = "chunk"
    use_beta: bool = True
    use_gate: bool = False
    use_short_conv: bool = True
    conv_size: int = 4
    qk_norm: str = "l2"
    qk_activation: str = "silu"
    allow_neg_eigval: bool = False
    hidden_ratio: int | float | None = 4
    intermediate_size: int | None = None
    hidden_act: str = "swish"
    norm_eps: float | int = 1e-6
    attn: dict | list | tuple | None = None
    max_position_embeddings: int = 2048
    initializer_range: float | int = 0.02
    use_cache: bool = True
    fuse_linear_cross_entropy: bool = False
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self, **kwargs):
        for alias in self.attribute_map.keys() & kwargs.keys():
            # The field, not its alias: the strict dataclass checks the types of fields only.
            setattr(self, self.attribute_map[alias], kwargs.pop(alias))
        for key, supported in _UNSUPPORTED.items():
            hint = f"; `{CONVERSION_COMMAND}` rewrites such a checkpoint of 2024" if key == "norm_first" else ""
            _require(kwargs.get(key, supported) in (supported, None), key, kwargs.get(key), f"{supported!r}{hint}")
        if self.intermediate_size is None:
            _require(self.hidden_ratio is not None, "hidden_ratio", None, "a number where `intermediate_size` is None")
            self.intermediate_size = 256 * -(-int(self.hidden_size * self.hidden_ratio * 2 / 3) // 256)
        # Before Transformers reads `layer_types`, and outside the strict dataclass, which hides `ValueError` in its own.
        self.validate_architecture()
        super().__post_init__(**kwargs)

    @classmethod
    def delta_net_340m(cls, **kwargs) -> "DeltaNetConfig":
        """The paper's 340M model; keyword arguments override fields."""
        return cls(**{"hidden_size": 1024, "num_hidden_layers": 24, "num_heads": 8, **kwargs})

    @classmethod
    def delta_net_1_3b(cls, **kwargs) -> "DeltaNetConfig":
        """The paper's 1.3B model (1,365,677,056 parameters at 32,000 token ids)."""
        return cls(**{"hidden_size": 2048, "num_hidden_layers": 24, "num_heads": 16, **kwargs})

    def with_sliding_window(self, window_size: int = 2048) -> "DeltaNetConfig":
        """The paper's first hybrid: a copy of this configuration with sliding-window attention in every other layer,
        starting with the second. The paper does not state its window; 2048 is ours."""
        layers = list(range(1, self.num_hidden_layers, 2))
        return self._with_attention({"layers": layers, "num_heads": self.num_heads, "window_size": window_size})

    def with_global_attention(self) -> "DeltaNetConfig":
        """The paper's second hybrid: a copy with full attention in the 2nd and the (N/2+1)-th layer."""
        layers = sorted({1, self.num_hidden_layers // 2})
        return self._with_attention({"layers": layers, "num_heads": self.num_heads})

    def _with_attention(self, attn: dict) -> "DeltaNetConfig":
        return type(self).from_dict({**self.to_dict(), "attn": attn})

    @property
    def attention_specs(self) -> dict[int, dict]:
        """The specification of each softmax layer with its defaults filled in, by layer index."""
        return {layer: spec for spec in self._attention_list() for layer in spec["layers"]}

    @property
    def layer_types(self) -> list[str]:
        """Kind of each layer, in the words of Transformers' caches and masks."""
        types = [DELTA_LAYER_TYPE] * self.num_hidden_layers
        for layer, spec in self.attention_specs.items():
            types[layer] = "full_attention" if spec["window_size"] is None else "sliding_attention"
        return types

    @property
    def sliding_window(self) -> int | None:
        """Window of the sliding-attention layers, or `None` where there are none."""
        return next((spec["window_size"] for spec in self._attention_list() if spec["window_size"]), None)

    def check_tensor_parallel(self, size: int):
        """Raise `ValueError` unless the heads of every layer can be divided among `size` processes."""
        heads = {self.num_heads}
        for spec in self._attention_list():
            heads |= {spec["num_heads"], spec["num_kv_heads"] or spec["num_heads"]}
        undivided = sorted(count for count in heads if count % size)
        if undivided:
            allowed = f"divisors of the numbers of heads, {', '.join(map(str, sorted(heads)))}"
            raise ValueError(f"`tp_size` is {size}; allowed: {allowed}.")

    def _attention_list(self) -> list[dict]:
        attn = [self.attn] if isinstance(self.attn, dict) else self.attn or []
        return [{**_ATTENTION_DEFAULTS, **spec} for spec in attn]

    def validate_layer_type(self):
        """`layer_types` is derived here and holds a type of our own; there is nothing to check."""

    def validate_architecture(self):
        """Check every combination of fields; the strict dataclass calls it again when a configuration is saved."""
        for field in ("vocab_size", "hidden_size", "num_hidden_layers", "num_heads", "conv_size", "intermediate_size"):
            _require(getattr(self, field) >= 1, field, getattr(self, field), "an integer of at least 1")
        for field in ("expand_k", "expand_v", "norm_eps"):
            _require(getattr(self, field) > 0, field, getattr(self, field), "a positive number")
        _require(self.initializer_range > 0, "initializer_range", self.initializer_range, "a positive number")
        _require(self.attn_mode in ("chunk", "fused_recurrent"), "attn_mode", self.attn_mode, "'chunk', 'fused_recurrent'")
        _require(self.qk_norm in ("l2", "sum"), "qk_norm", self.qk_norm, "'l2', 'sum'")
        _require(
            self.qk_activation in ("silu", "relu", "elu", "identity"),
            "qk_activation",
            self.qk_activation,
            "'silu', 'relu', 'elu', 'identity'",
        )
        _require(self.hidden_act in ("swish", "silu"), "hidden_act", self.hidden_act, "'swish', 'silu' (one function)")
        self._validate_head_dims()
        self._validate_attention()

    def _validate_head_dims(self):
        for field in ("expand_k", "expand_v"):
            width = int(self.hidden_size * getattr(self, field))
            allowed = f"values for which int(hidden_size * {field}) = {width} is a multiple of num_heads = {self.num_heads}"
            _require(width >= self.num_heads and width % self.num_heads == 0, field, getattr(self, field), allowed)
        key_dim = int(self.hidden_size * self.expand_k) // self.num_heads
        allowed = f"values that give keys of at most 256 per head, not {key_dim}"
        _require(key_dim <= 256, "num_heads", self.num_heads, allowed)

    def _validate_attention(self):
        if isinstance(self.attn, dict):
            named = {"attn": self.attn}
        else:
            named = {f"attn[{index}]": spec for index, spec in enumerate(self.attn or [])}
        taken = {}
        for name, spec in named.items():
            _require(isinstance(spec, dict), name, spec, "a dict")
            self._validate_attention_spec(name, {**_ATTENTION_DEFAULTS, **spec})
            for layer in spec["layers"]:
                allowed = f"layers not yet used; {layer} is in `{taken.get(layer)}` too"
                _require(layer not in taken, f"{name}.layers", spec["layers"], allowed)
                taken[layer] = name
        windows = {spec["window_size"] for spec in self._attention_list()} - {None}
        _require(len(windows) < 2, "attn", sorted(windows), "one `window_size` for all sliding layers")

    def _validate_attention_spec(self, name: str, spec: dict):
        known = {"layers", "num_heads", *_ATTENTION_DEFAULTS}
        for key in ("layers", "num_heads"):
            _require(key in spec, f"{name}.{key}", None, "a value; it is required")
        _require(set(spec) <= known, name, sorted(set(spec) - known), f"the keys {sorted(known)}")
        layers, heads, groups, window = (spec[key] for key in ("layers", "num_heads", "num_kv_heads", "window_size"))
        valid = isinstance(layers, (list, tuple)) and len(layers) > 0
        valid = valid and all(_is_integer(layer, 0) and layer < self.num_hidden_layers for layer in layers)
        _require(valid, f"{name}.layers", layers, f"a list of integers in [0, {self.num_hidden_layers})")
        head_dim_is_even = _is_integer(heads, 1) and self.hidden_size % (2 * heads) == 0
        _require(head_dim_is_even, f"{name}.num_heads", heads, f"divisors of hidden_size/2 = {self.hidden_size // 2}")
        valid = groups is None or (_is_integer(groups, 1) and heads % groups == 0)
        _require(valid, f"{name}.num_kv_heads", groups, f"None or a divisor of num_heads = {heads}")
        valid = window is None or _is_integer(window, 1)
        _require(valid, f"{name}.window_size", window, "None (full attention) or an integer of at least 1")
        _require(isinstance(spec["qkv_bias"], bool), f"{name}.qkv_bias", spec["qkv_bias"], "True, False")
        theta = spec["rope_theta"]
        valid = theta is None or (isinstance(theta, (int, float)) and theta > 0)
        _require(valid, f"{name}.rope_theta", theta, "None (10000) or a positive number")


__all__ = ["CONVERSION_COMMAND", "DELTA_LAYER_TYPE", "DeltaNetConfig"]
