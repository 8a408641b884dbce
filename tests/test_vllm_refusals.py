"""What vLLM must not serve, or not read wrongly: options of the engine, checkpoints, layouts, missing kernels."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from models import tiny_config
from safetensors.torch import load_file, save_file
from served import KINDS, generated, model_of, prompts, served
from vllm.config import ModelConfig
from vllm.engine.arg_utils import EngineArgs

from deltanet.kernels import delta_rule
from deltanet.serving.options import check_checkpoint, check_kernels
from deltanet.serving.weights import places, todays_name

SOFTMAX = {"layers": [1], "num_heads": 4}
OTHERS = {"layers": [0], "num_heads": 2}


def configured(model, path, **options):
    """The engine's configuration; no weights are read."""
    model.save_pretrained(path)
    return EngineArgs(str(path), skip_tokenizer_init=True, dtype="float32", **options).create_engine_config()


@pytest.mark.parametrize(
    "options, said",
    [
        ({"enable_prefix_caching": True}, "`enable_prefix_caching` is True; allowed: False: vLLM would go on from copies"),
        ({"mamba_ssm_cache_dtype": "float16"}, "`mamba_ssm_cache_dtype` is 'float16'; allowed: 'auto' (float32),"),
        ({"quantization": "fp8"}, "`quantization` is 'fp8'; allowed: None"),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}},
            "`speculative_config.method` is 'ngram'; allowed: None: a recurrent state",
        ),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_engine_options_that_cannot_be_honoured_are_refused_by_name(tmp_path, options, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        configured(model_of("pure"), tmp_path, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_defaults_are_a_float32_state_and_no_prefix_caching(tmp_path, kind):
    cache = configured(model_of(kind), tmp_path).cache_config
    assert (cache.mamba_ssm_cache_dtype, cache.enable_prefix_caching) == ("float32", False)


def test_other_models_keep_prefix_caching():
    supported = ModelConfig.is_prefix_caching_supported.fget
    for architecture, expected in (("LlamaForCausalLM", True), ("DeltaNetForCausalLM", False)):
        model = SimpleNamespace(architecture=architecture, attn_type="decoder", pooler_config=None)
        assert supported(model) is expected


@pytest.mark.parametrize(
    "config, ranks, said",
    [
        ({"conv_size": 1}, 1, "`conv_size` is 1; allowed: at least 2"),
        ({}, 4, "`num_heads` is 2; allowed: multiples of tensor_parallel_size = 4"),
        ({"attn": [SOFTMAX, OTHERS]}, 1, "`attn` is [(2, 2), (4, 4)]; allowed: one `num_heads`"),
        ({"attn": {**SOFTMAX, "num_heads": 1}}, 2, "`attn.num_heads` is 1; allowed: multiples of"),
        ({"num_heads": 8, "attn": {**SOFTMAX, "num_heads": 16, "num_kv_heads": 4}}, 8, ""),
        ({"num_heads": 4, "attn": {**SOFTMAX, "num_heads": 8, "num_kv_heads": 4}, "hidden_size": 48}, 2, ""),
    ],
    ids=str,
)
def test_checkpoints_that_cannot_be_sharded_or_cached_are_refused_by_field(config, ranks, said):
    if not said:
        return check_checkpoint(tiny_config(**config), ranks)
    with pytest.raises(ValueError, match=re.escape(said)):
        check_checkpoint(tiny_config(**config), ranks)


def test_a_gpu_without_the_kernels_is_refused_unless_the_user_chose(monkeypatch):
    config = tiny_config(hidden_size=512)
    monkeypatch.delenv("DELTANET_BACKEND", raising=False)
    with pytest.raises(RuntimeError, match="cannot run .float32 with heads of more than 128.*DELTANET_BACKEND=torch"):
        check_kernels(config, torch.float32, torch.device("cuda"))
    monkeypatch.setattr(delta_rule, "_triton_implementations", lambda: (None, "Triton is not installed"))
    with pytest.raises(RuntimeError, match="cannot run .Triton is not installed"):
        check_kernels(config, torch.bfloat16, torch.device("cuda"))
    monkeypatch.setenv("DELTANET_BACKEND", "torch")
    check_kernels(config, torch.bfloat16, torch.device("cuda"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"use_gate": True, "use_beta": False}, {"use_short_conv": False}], ids=str)
def test_every_tensor_of_a_checkpoint_has_a_place(tmp_path, kind, options):
    model = model_of(kind, **options)
    model.save_pretrained(tmp_path)
    assert places(model.config).keys() == load_file(tmp_path / "model.safetensors").keys()


def rewrite(path, change):
    file = path / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda x: {k: v for k, v in x.items() if "1.attn.k_proj" not in k}, "Missing: model.layers.1.attn.k_proj.weight"),
        (lambda x: {**x, "model.layers.0.attn.A_log": torch.zeros(2)}, "Unknown: model.layers.0.attn.A_log"),
    ],
    ids=["missing", "unknown"],
)
def test_weights_that_do_not_fit_are_named(tmp_path, change, said):
    model_of("pure").save_pretrained(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(ValueError, match=said):
        served(tmp_path, prompts(1), 1)


def in_the_layout_of_2024(tensors):
    """Norms belong to what they precede, and gate_proj holds up_proj as well."""
    result = {}
    for name, tensor in tensors.items():
        name = re.sub(r"(layers\.\d+)\.(attn|mlp)_norm", r"\1.\2.norm", name)
        if ".up_proj." not in name:
            up = tensors.get(name.replace("gate_proj", "up_proj")) if ".gate_proj." in name else None
            result[name] = tensor if up is None else torch.cat([tensor, up])
    return result


def test_a_checkpoint_of_2024_is_served_as_it_is(tmp_path):
    model, requests = model_of("both"), prompts(6)
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, in_the_layout_of_2024)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "norm_first": True}))
    assert served(tmp_path, requests, 12) == [generated(model, request, 12) for request in requests]


def test_names_on_disk():
    assert todays_name("model.layers.3.attn.norm.weight") == "model.layers.3.attn_norm.weight"
    assert todays_name("model.embed_tokens.weight") == "model.embeddings.weight"
    assert todays_name("model.layers.3.attn.o_norm.weight") == "model.layers.3.attn.o_norm.weight"
