"""configuration_deltanet.py: what is on disk, what is accepted and what is refused."""

import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from models import KINDS, tiny_config
from transformers import AutoConfig

from deltanet import DeltaNetConfig, DeltaNetForCausalLM

# `DeltaNetConfig()` of the reference (flash-linear-attention 0.5.2), less the keys that only choose among its kernels.
REFERENCE_DEFAULTS = {
    "allow_neg_eigval": False,
    "attn": None,
    "attn_mode": "chunk",
    "bos_token_id": 1,
    "conv_size": 4,
    "eos_token_id": 2,
    "expand_k": 1.0,
    "expand_v": 1.0,
    "fuse_linear_cross_entropy": False,
    "hidden_act": "swish",
    "hidden_ratio": 4,
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 5632,
    "max_position_embeddings": 2048,
    "model_type": "delta_net",
    "norm_eps": 1e-6,
    "num_heads": 16,
    "num_hidden_layers": 24,
    "pad_token_id": None,
    "qk_activation": "silu",
    "qk_norm": "l2",
    "tie_word_embeddings": False,
    "use_beta": True,
    "use_cache": True,
    "use_gate": False,
    "use_short_conv": True,
    "vocab_size": 32000,
}

# A configuration as the checkpoints on the Hub carry it: integers for real numbers, keys of kernels and of 2024.
PUBLISHED = {
    "architectures": ["DeltaNetForCausalLM"],
    "attn": None,
    "attn_mode": "chunk",
    "bos_token_id": 1,
    "chunk_size": 64,
    "conv_size": 4,
    "eos_token_id": 2,
    "expand_k": 1,
    "expand_v": 1,
    "fuse_cross_entropy": True,
    "fuse_norm": True,
    "hidden_act": "swish",
    "hidden_ratio": 4,
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": None,
    "max_position_embeddings": 2048,
    "model_type": "delta_net",
    "norm_eps": 1e-06,
    "norm_first": False,
    "num_heads": 8,
    "num_hidden_layers": 24,
    "qk_activation": "silu",
    "qk_norm": "l2",
    "share_conv_kernel": False,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.2",
    "use_beta": True,
    "use_cache": True,
    "use_elu": False,
    "use_gate": False,
    "use_output_norm": True,
    "use_rope": False,
    "use_short_conv": True,
    "vocab_size": 32000,
}

SLIDING = {"layers": [1, 3], "num_heads": 4, "num_kv_heads": 2, "window_size": 16}
FULL = {"layers": (2,), "num_heads": 2, "qkv_bias": True, "rope_theta": 50000}


def write_and_load(folder, fields, loader=AutoConfig):
    (folder / "config.json").write_text(json.dumps(fields))
    return loader.from_pretrained(folder)


def saved(config, folder):
    config.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


def test_keys_and_defaults_on_disk(tmp_path):
    on_disk = saved(DeltaNetConfig(), tmp_path)
    on_disk.pop("transformers_version")
    assert on_disk == REFERENCE_DEFAULTS


@pytest.mark.parametrize("loader", [AutoConfig, DeltaNetConfig])
def test_published_file(tmp_path, loader):
    config = write_and_load(tmp_path, PUBLISHED, loader)
    assert type(config) is DeltaNetConfig
    assert (config.expand_k, config.expand_v, config.hidden_act, config.num_heads) == (1, 1, "swish", 8)
    assert config.intermediate_size == 2816
    assert config.dtype is torch.bfloat16
    assert config.layer_types == ["linear_attention_delta"] * 24
    again = saved(config, tmp_path)
    lost = {key for key in PUBLISHED if key not in again} - {"torch_dtype"}
    assert not lost
    assert again["fuse_norm"] is True and again["expand_k"] == 1


def test_published_hybrid_file(tmp_path):
    attn = {"layers": [1, 12], "num_heads": 16, "num_kv_heads": 4, "qkv_bias": False, "window_size": 2048}
    attn["rope_theta"] = 10000
    config = write_and_load(tmp_path, {**PUBLISHED, "attn": attn})
    assert config.attn == attn
    assert [i for i, kind in enumerate(config.layer_types) if kind == "sliding_attention"] == [1, 12]
    assert config.sliding_window == 2048
    assert config.attention_specs[12]["num_kv_heads"] == 4


def test_integers_give_the_same_model_as_reals():
    reals = {"expand_k": 2.0, "expand_v": 1.0, "initializer_range": 1.0, "hidden_ratio": 4.0}
    integers = {name: int(value) for name, value in reals.items()}
    shapes = []
    for fields in (reals, integers):
        with torch.device("meta"):
            model = DeltaNetForCausalLM(tiny_config(intermediate_size=None, **fields))
        shapes.append({name: tuple(x.shape) for name, x in model.named_parameters()})
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    "alias, field, value",
    [("num_attention_heads", "num_heads", 4), ("rms_norm_eps", "norm_eps", 1e-5), ("conv_kernel_size", "conv_size", 3)],
)
def test_canonical_names(tmp_path, alias, field, value):
    config = tiny_config(**{alias: value})
    assert getattr(config, alias) == getattr(config, field) == value
    setattr(config, alias, 2)
    assert getattr(config, field) == 2
    on_disk = saved(config, tmp_path)
    assert on_disk[field] == 2 and alias not in on_disk


@pytest.mark.parametrize("attn", [None, SLIDING, [SLIDING, FULL]], ids=["pure", "dict", "list"])
def test_save_and_load(tmp_path, attn):
    config = tiny_config(
        num_hidden_layers=4, attn=attn, expand_v=2, use_gate=True, conv_size=3, norm_eps=1e-5, allow_neg_eigval=True
    )
    config.save_pretrained(tmp_path)
    for loaded in (DeltaNetConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        for field in REFERENCE_DEFAULTS:
            if field != "attn":
                assert getattr(loaded, field) == getattr(config, field), field
        assert loaded.layer_types == config.layer_types
        assert loaded.sliding_window == config.sliding_window
        assert {i: {**spec, "layers": list(spec["layers"])} for i, spec in loaded.attention_specs.items()} == {
            i: {**spec, "layers": list(spec["layers"])} for i, spec in config.attention_specs.items()
        }


def test_a_list_of_specifications():
    config = tiny_config(num_hidden_layers=4, attn=[SLIDING, FULL])
    delta, sliding, full = "linear_attention_delta", "sliding_attention", "full_attention"
    assert config.layer_types == [delta, sliding, full, sliding]
    assert config.sliding_window == 16
    assert config.attention_specs[1] == {**SLIDING, "qkv_bias": False, "rope_theta": 10000.0}
    assert config.attention_specs[2] == {**FULL, "num_kv_heads": None, "window_size": None}


@pytest.mark.parametrize(
    "make, hidden_size, num_heads, intermediate_size",
    [(DeltaNetConfig.delta_net_340m, 1024, 8, 2816), (DeltaNetConfig.delta_net_1_3b, 2048, 16, 5632)],
)
def test_sizes_of_the_paper(make, hidden_size, num_heads, intermediate_size):
    config = make()
    assert (config.hidden_size, config.num_heads, config.num_hidden_layers) == (hidden_size, num_heads, 24)
    assert config.intermediate_size == intermediate_size
    assert config.hidden_size // config.num_heads == 128
    assert make(num_heads=32).num_heads == 32


def test_parameter_count_of_1_3b():
    with torch.device("meta"):
        model = DeltaNetForCausalLM(DeltaNetConfig.delta_net_1_3b())
    assert model.num_parameters() == 1_365_677_056


@pytest.mark.parametrize("make", [DeltaNetConfig.delta_net_340m, DeltaNetConfig.delta_net_1_3b])
def test_hybrids_of_the_paper(make):
    plain = make(use_gate=True)
    sliding, full = plain.with_sliding_window(512), plain.with_global_attention()
    assert [kind == "sliding_attention" for kind in sliding.layer_types] == [False, True] * 12
    assert sliding.sliding_window == 512 and plain.with_sliding_window().sliding_window == 2048
    # The 2nd layer and the (N/2 + 1)-th, counted from one.
    assert [i + 1 for i, kind in enumerate(full.layer_types) if kind == "full_attention"] == [2, 13]
    assert full.sliding_window is None
    for hybrid in (sliding, full):
        assert hybrid.use_gate and hybrid.hidden_size == plain.hidden_size
        assert all(spec["num_heads"] == plain.num_heads for spec in hybrid.attention_specs.values())
    assert plain.attn is None


def attn(**changes):
    return {"attn": {"layers": [1], "num_heads": 4, **changes}}


def two(**changes):
    first = {"layers": [1], "num_heads": 4, "window_size": 8}
    return {"attn": [first, {**first, "layers": [2], **changes}]}


COMBINATIONS = [
    ({"num_heads": 3}, "expand_k", "1.0", "multiple of num_heads = 3"),
    ({"expand_k": 0.3}, "expand_k", "0.3", "= 9 is a multiple of num_heads = 2"),
    ({"expand_v": 0.3}, "expand_v", "0.3", "= 9 is a multiple of num_heads = 2"),
    ({"expand_k": 0}, "expand_k", "0", "positive"),
    ({"expand_v": -1.0}, "expand_v", "-1.0", "positive"),
    ({"hidden_size": 1024, "num_heads": 2}, "num_heads", "2", "at most 256 per head, not 512"),
    ({"num_heads": 0}, "num_heads", "0", "at least 1"),
    ({"num_attention_heads": 0}, "num_heads", "0", "at least 1"),
    ({"vocab_size": 0}, "vocab_size", "0", "at least 1"),
    ({"hidden_size": -8}, "hidden_size", "-8", "at least 1"),
    ({"num_hidden_layers": 0}, "num_hidden_layers", "0", "at least 1"),
    ({"conv_size": 0}, "conv_size", "0", "at least 1"),
    ({"intermediate_size": 0}, "intermediate_size", "0", "at least 1"),
    ({"hidden_ratio": None, "intermediate_size": None}, "hidden_ratio", "None", "a number"),
    ({"norm_eps": 0}, "norm_eps", "0", "positive"),
    ({"initializer_range": 0.0}, "initializer_range", "0.0", "positive"),
    ({"attn_mode": "fused_chunk"}, "attn_mode", "'fused_chunk'", "'chunk', 'fused_recurrent'"),
    ({"qk_norm": "l1"}, "qk_norm", "'l1'", "'l2', 'sum'"),
    ({"qk_activation": "gelu"}, "qk_activation", "'gelu'", "'silu', 'relu', 'elu', 'identity'"),
    ({"hidden_act": "powlu"}, "hidden_act", "'powlu'", "'swish', 'silu'"),
    ({"attnres_block_size": 4}, "attnres_block_size", "4", "None"),
    ({"conv_bias": True}, "conv_bias", "True", "False"),
    ({"norm_first": True}, "norm_first", "True", "False; `python -m deltanet.publish SOURCE --output OUTPUT_DIRECTORY`"),
    ({"share_conv_kernel": True}, "share_conv_kernel", "True", "False"),
    ({"use_elu": True}, "use_elu", "True", "False"),
    ({"use_output_norm": False}, "use_output_norm", "False", "True"),
    ({"use_rope": True}, "use_rope", "True", "False"),
    ({"attn": {"num_heads": 4}}, "attn.layers", "None", "required"),
    ({"attn": {"layers": [1]}}, "attn.num_heads", "None", "required"),
    ({"attn": {}}, "attn.layers", "None", "required"),
    ({"attn": [3]}, r"attn\[0\]", "3", "a dict"),
    (attn(window=8), "attn", r"\['window'\]", "'window_size'"),
    (attn(layers=[4]), "attn.layers", r"\[4\]", r"integers in \[0, 4\)"),
    (attn(layers=[-1]), "attn.layers", r"\[-1\]", r"integers in \[0, 4\)"),
    (attn(layers=[True]), "attn.layers", r"\[True\]", r"integers in \[0, 4\)"),
    (attn(layers=[]), "attn.layers", r"\[\]", r"integers in \[0, 4\)"),
    (attn(layers=1), "attn.layers", "1", r"integers in \[0, 4\)"),
    (attn(layers=[1, 1]), "attn.layers", r"\[1, 1\]", "1 is in `attn` too"),
    (two(layers=[1]), r"attn\[1\].layers", r"\[1\]", r"1 is in `attn\[0\]` too"),
    (two(window_size=9), "attn", r"\[8, 9\]", "one `window_size`"),
    (attn(window_size=0), "attn.window_size", "0", "at least 1"),
    (attn(window_size=True), "attn.window_size", "True", "at least 1"),
    (attn(window_size=2.5), "attn.window_size", "2.5", "at least 1"),
    (attn(num_heads=3), "attn.num_heads", "3", "divisors of hidden_size/2 = 16"),
    (attn(num_heads=32), "attn.num_heads", "32", "divisors of hidden_size/2 = 16"),
    (attn(num_kv_heads=3), "attn.num_kv_heads", "3", "a divisor of num_heads = 4"),
    (attn(num_kv_heads=0), "attn.num_kv_heads", "0", "a divisor of num_heads = 4"),
    (attn(qkv_bias="false"), "attn.qkv_bias", "'false'", "True, False"),
    (attn(rope_theta=0), "attn.rope_theta", "0", "positive"),
    (attn(rope_theta="1e4"), "attn.rope_theta", "'1e4'", "positive"),
]


@pytest.mark.parametrize(
    "fields, name, value, allowed", COMBINATIONS, ids=[str(row[0]).replace("'", "") for row in COMBINATIONS]
)
def test_bad_combinations(fields, name, value, allowed):
    with pytest.raises(ValueError, match=rf"`{name}` is {value}; allowed: .*{allowed}"):
        tiny_config(**{"num_hidden_layers": 4, **fields})


@pytest.mark.parametrize(
    "field, value",
    [
        ("num_heads", 2.0),
        ("num_heads", "2"),
        ("num_attention_heads", "2"),
        ("hidden_size", None),
        ("expand_k", "1"),
        ("norm_eps", "1e-6"),
        ("use_gate", 1),
        ("use_beta", "true"),
        ("tie_word_embeddings", None),
        ("qk_norm", 2),
        ("attn", "sliding"),
        ("eos_token_id", "2"),
    ],
)
def test_wrong_types(field, value):
    name = DeltaNetConfig.attribute_map.get(field, field)
    with pytest.raises(StrictDataclassError, match=f"'{name}'") as error:
        tiny_config(**{field: value})
    assert repr(value) in str(error.value) or type(value).__name__ in str(error.value)


def test_a_field_broken_later_is_not_saved(tmp_path):
    config = tiny_config()
    config.num_heads = 7
    with pytest.raises(StrictDataclassError, match="num_heads = 7"):
        config.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_is_equal(kind):
    config = tiny_config(kind)
    assert DeltaNetConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
