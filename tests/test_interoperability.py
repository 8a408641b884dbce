"""Checkpoints as the reference writes them: loaded, saved again, refused where they would load wrongly."""

import json

import pytest
import torch
from models import KINDS, tiny_config, tiny_model, token_ids
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from deltanet import DeltaNetConfig, DeltaNetForCausalLM, DeltaNetModel
from deltanet.configuration_deltanet import CONVERSION_COMMAND

all_kinds = pytest.mark.parametrize("kind", KINDS)
COMMAND = CONVERSION_COMMAND.replace(".", r"\.")
VOCAB, HIDDEN, INTERMEDIATE, HEADS = 61, 32, 48, 2

# `config.json` of a published checkpoint, at the size of these tests.
FIELDS = {
    "architectures": ["DeltaNetForCausalLM"],
    "attn": None,
    "attn_mode": "chunk",
    "bos_token_id": 1,
    "conv_size": 4,
    "eos_token_id": 2,
    "expand_k": 1,
    "expand_v": 1,
    "fuse_cross_entropy": True,
    "fuse_norm": True,
    "hidden_act": "swish",
    "hidden_ratio": 4,
    "hidden_size": HIDDEN,
    "initializer_range": 0.02,
    "intermediate_size": INTERMEDIATE,
    "max_position_embeddings": 2048,
    "model_type": "delta_net",
    "norm_eps": 1e-06,
    "norm_first": False,
    "num_heads": HEADS,
    "num_hidden_layers": 3,
    "qk_activation": "silu",
    "qk_norm": "l2",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.3",
    "use_beta": True,
    "use_cache": True,
    "use_gate": False,
    "use_output_norm": True,
    "use_short_conv": True,
    "vocab_size": VOCAB,
}
ATTENTION = {
    "pure": None,
    "sliding": {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "qkv_bias": True, "window_size": 5},
    "global": {"layers": [1], "num_heads": 4, "num_kv_heads": None, "rope_theta": 10000.0},
}


def shapes_of(kind, tied=False, gated=False):
    """The reference's state dict: names and shapes, written out."""
    shapes = {"model.embeddings.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    if not tied:
        shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    for layer in range(3):
        name = f"model.layers.{layer}."
        shapes |= {f"{name}attn_norm.weight": (HIDDEN,), f"{name}mlp_norm.weight": (HIDDEN,)}
        shapes |= {f"{name}mlp.{x}_proj.weight": (INTERMEDIATE, HIDDEN) for x in ("gate", "up")}
        shapes[f"{name}mlp.down_proj.weight"] = (HIDDEN, INTERMEDIATE)
        shapes |= {f"{name}attn.{x}_proj.weight": (HIDDEN, HIDDEN) for x in "qo"}
        groups = HIDDEN // 2 if (kind, layer) == ("sliding", 1) else HIDDEN
        shapes |= {f"{name}attn.{x}_proj.weight": (groups, HIDDEN) for x in "kv"}
        if ATTENTION[kind] and layer == 1:
            if ATTENTION[kind].get("qkv_bias"):
                shapes |= {f"{name}attn.{x}_proj.bias": (width,) for x, width in zip("qkv", (HIDDEN, groups, groups))}
            continue
        shapes |= {f"{name}attn.{x}_conv1d.weight": (HIDDEN, 1, 4) for x in "qkv"}
        shapes |= {f"{name}attn.b_proj.weight": (HEADS, HIDDEN), f"{name}attn.o_norm.weight": (HIDDEN // HEADS,)}
        if gated:
            shapes[f"{name}attn.g_proj.weight"] = (HIDDEN, HIDDEN)
    return shapes


def tensors_of(kind, dtype=torch.bfloat16, **options):
    generator = torch.Generator().manual_seed(3)
    shapes = sorted(shapes_of(kind, **options).items())
    return {name: (0.3 * torch.randn(shape, generator=generator)).to(dtype) for name, shape in shapes}


def write(folder, tensors, shards=1, **fields):
    """A checkpoint folder out of raw tensors and configuration fields, by no class of the package."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**FIELDS, **fields}))
    names = sorted(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    files = {name: f"model-{i * shards // len(names) + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        part = {name: tensors[name] for name in names if files[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": sum(x.nbytes for x in tensors.values())}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def stored(folder):
    """All tensors of a folder, whatever the number of files."""
    return {name: x for file in sorted(folder.glob("*.safetensors")) for name, x in load_file(file).items()}


def same(actual, expected):
    return actual.keys() == expected.keys() and all(
        torch.equal(actual[name], x) and actual[name].dtype is x.dtype for name, x in expected.items()
    )


# Loading what is published


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("options", [{}, {"tied": True}, {"gated": True}])
@all_kinds
def test_published_checkpoint(tmp_path, kind, options, shards):
    tensors = tensors_of(kind, **options)
    fields = {"attn": ATTENTION[kind], "tie_word_embeddings": "tied" in options, "use_gate": "gated" in options}
    write(tmp_path, tensors, shards, **fields)
    assert type(AutoConfig.from_pretrained(tmp_path)) is DeltaNetConfig
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    base, base_info = AutoModel.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    assert type(model) is DeltaNetForCausalLM and type(base) is DeltaNetModel
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert not base_info["missing_keys"] and set(base_info["unexpected_keys"]) <= {"lm_head.weight"}
    loaded = {name.replace("embed_tokens", "embeddings"): x for name, x in model.state_dict().items()}
    if "tied" in options:
        assert torch.equal(loaded.pop("lm_head.weight"), loaded["model.embeddings.weight"])
    assert same(loaded, tensors)
    ids = token_ids(2, 7)
    with torch.no_grad():
        assert torch.equal(model.model(ids).last_hidden_state, base(ids).last_hidden_state)


@pytest.mark.parametrize("size", [None, "10KB"])
@all_kinds
def test_what_is_saved_is_what_was_published(tmp_path, kind, size):
    """Name by name and bit by bit, whether the head or only the base model is saved, in one file or many."""
    tensors = tensors_of(kind)
    source = write(tmp_path / "published", tensors, attn=ATTENTION[kind])
    options = {} if size is None else {"max_shard_size": size}
    AutoModelForCausalLM.from_pretrained(source, dtype="auto").save_pretrained(tmp_path / "saved", **options)
    assert same(stored(tmp_path / "saved"), tensors)
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) == 1 or size is not None
    AutoModel.from_pretrained(source, dtype="auto").save_pretrained(tmp_path / "base", **options)
    body = {name.removeprefix("model."): x for name, x in tensors.items() if name != "lm_head.weight"}
    assert same(stored(tmp_path / "base"), body)
    fields = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert fields["model_type"] == "delta_net" and fields["attn"] == ATTENTION[kind]
    assert {key: fields[key] for key in ("num_heads", "norm_eps", "conv_size", "hidden_act", "expand_k")} == {
        key: FIELDS[key] for key in ("num_heads", "norm_eps", "conv_size", "hidden_act", "expand_k")
    }
    # Names and types of Transformers' own stay out of the file.
    assert not {"layer_types", "num_attention_heads", "rms_norm_eps", "sliding_window"} & fields.keys()


@pytest.mark.parametrize("size", [None, "10KB"])
@all_kinds
def test_saved_and_loaded(tmp_path, kind, size):
    model, ids = tiny_model(kind, use_gate=True), token_ids(2, 9)
    model.save_pretrained(tmp_path, **({} if size is None else {"max_shard_size": size}))
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (size is not None)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same(loaded.state_dict(), model.state_dict())
    before, after = model.config.to_dict(), loaded.config.to_dict()
    fields = (FIELDS.keys() & before.keys()) - {"architectures", "transformers_version"}
    assert {field: after[field] for field in fields} == {field: before[field] for field in fields}
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        assert torch.equal(loaded.generate(ids, max_new_tokens=4), model.generate(ids, max_new_tokens=4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_another_dtype(tmp_path, dtype):
    tensors = tensors_of("pure")
    model = AutoModelForCausalLM.from_pretrained(write(tmp_path, tensors), dtype=dtype)
    assert {x.dtype for x in model.parameters()} == {dtype}
    assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"].to(dtype))


def test_a_classifier_on_a_published_body(tmp_path):
    write(tmp_path, tensors_of("pure"))
    model, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3, output_loading_info=True)
    assert set(info["missing_keys"]) == {"score.weight"} and set(info["unexpected_keys"]) == {"lm_head.weight"}
    assert model.score.weight.shape == (3, HIDDEN)


def test_parameter_count():
    with torch.device("meta"):
        model = DeltaNetForCausalLM(DeltaNetConfig.delta_net_1_3b())
    assert sum(x.numel() for x in model.parameters()) == 1_365_677_056
    assert model.num_parameters() == 1_365_677_056


# The layouts of 2024

AUTO_CLASSES = pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification])


def with_fused_gate(tensors):
    fused = {name: x for name, x in tensors.items() if "up_proj" not in name}
    for name in fused:
        if "gate_proj" in name:
            fused[name] = torch.cat([fused[name], tensors[name.replace("gate_proj", "up_proj")]])
    return fused


def with_old_norms(tensors):
    return {name.replace("attn_norm", "attn.norm").replace("mlp_norm", "mlp.norm"): x for name, x in tensors.items()}


@pytest.mark.parametrize("options", [{}, {"ignore_mismatched_sizes": True}, {"output_loading_info": True}])
@pytest.mark.parametrize("rewrite", [with_fused_gate, with_old_norms])
@AUTO_CLASSES
def test_layouts_of_2024(tmp_path, auto_class, rewrite, options):
    write(tmp_path, rewrite(tensors_of("pure")))
    what = "both halves of the SwiGLU in .*layers.0.mlp.gate_proj" if rewrite is with_fused_gate else "norms named .*norm"
    with pytest.raises(ValueError, match=f"layout of 2024 \\({what}.*`{COMMAND.replace('SOURCE', str(tmp_path))}`"):
        auto_class.from_pretrained(tmp_path, **options)


@AUTO_CLASSES
def test_norm_first(tmp_path, auto_class):
    """The configuration that goes with the norms of 2024 says the same."""
    write(tmp_path, with_old_norms(tensors_of("pure")), norm_first=True)
    with pytest.raises(ValueError, match=f"`norm_first` is True; allowed: False; `{COMMAND}`"):
        auto_class.from_pretrained(tmp_path)


# What is broken


@pytest.mark.parametrize("field, value", [("intermediate_size", 96), ("hidden_size", 64), ("vocab_size", 70)])
def test_a_configuration_of_a_wrong_size(tmp_path, field, value):
    write(tmp_path, tensors_of("pure"), **{field: value})
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("shards, broken", [(1, "model.safetensors"), (3, "model-00002-of-00003.safetensors")])
def test_a_truncated_file(tmp_path, shards, broken):
    write(tmp_path, tensors_of("pure"), shards)
    content = (tmp_path / broken).read_bytes()
    (tmp_path / broken).write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(SafetensorError, match="incomplete metadata"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("shards, missing", [(1, "model.safetensors"), (3, "model-00002-of-00003.safetensors")])
def test_a_missing_file(tmp_path, shards, missing):
    write(tmp_path, tensors_of("pure"), shards)
    (tmp_path / missing).unlink()
    with pytest.raises(OSError, match=missing):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_configuration_that_is_not_ours(tmp_path):
    write(tmp_path, tensors_of("pure"), num_heads=5)
    with pytest.raises(ValueError, match=r"`expand_k` is 1; allowed: .* multiple of num_heads = 5"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert tiny_config().num_heads == HEADS
