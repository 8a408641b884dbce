"""modeling_deltanet.py under the tools around it: compiler, export, adapters, offloading, meta device, sharding plans."""

import re

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload, disk_offload, dispatch_model
from models import KINDS, tiny_config, tiny_model, token_ids
from oracle import relative_error
from peft import LoraConfig, get_peft_model
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoModel, AutoModelForCausalLM

from deltanet import DeltaNetForCausalLM, DeltaNetModel

try:
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES
except ImportError:  # Transformers 5.17
    from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES

all_kinds = pytest.mark.parametrize("kind", KINDS)
LENGTHS = (9, 14, 70)


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled_and_eager(kind):
    """A compiled model that counts its graphs, and the model; two layers, since compiling is slow."""
    model, counter = tiny_model(kind, num_hidden_layers=2), CompileCounterWithBackend("aot_eager")
    return torch.compile(model, fullgraph=True, backend=counter), model, counter


# torch.compile and torch.export


@pytest.mark.parametrize("kind", ["pure", "global"])
def test_compiled_forward(kind, dynamo):
    compiled, model, counter = compiled_and_eager(kind)
    for length in LENGTHS:
        ids = token_ids(2, length)
        with torch.no_grad():
            assert relative_error(compiled(ids, use_cache=False).logits, model(ids).logits) <= 1e-5
    # One graph for the first length and one for every other.
    assert counter.frame_count == 2


@pytest.mark.parametrize("kind", ["pure", "sliding"])
def test_compiled_forward_with_padding(kind, dynamo):
    compiled, model, counter = compiled_and_eager(kind)
    for length in LENGTHS:
        ids = token_ids(2, length)
        mask = (torch.arange(length) >= torch.tensor([0, length // 3])[:, None]).long()
        torch._dynamo.mark_dynamic(ids, 1)
        torch._dynamo.mark_dynamic(mask, 1)
        with torch.no_grad():
            actual, expected = (run(ids, attention_mask=mask, use_cache=False).logits for run in (compiled, model))
        assert relative_error(actual[mask.bool()], expected[mask.bool()]) <= 1e-5
    assert counter.frame_count == 1


@pytest.mark.parametrize("kind, checkpointing", [("pure", True), ("sliding", False)])
def test_compiled_training_step(kind, checkpointing, dynamo):
    compiled, model, counter = compiled_and_eager(kind)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for length in LENGTHS:
        ids, grads = token_ids(2, length), []
        torch._dynamo.mark_dynamic(ids, 1)
        for run in (compiled, model):
            model.zero_grad(set_to_none=True)
            run(input_ids=ids, labels=ids).loss.backward()
            grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
        errors = {name: relative_error(grads[0][name], grads[1][name]) for name in grads[1]}
        assert all(error <= 1e-4 for error in errors.values()), errors
    assert counter.frame_count == 1


@pytest.mark.parametrize("kind, boundaries", [("pure", "cu_seq_lens_q"), ("sliding", "position_ids")])
def test_compiled_packing(kind, boundaries, dynamo):
    """The number of sequences is data: one graph serves different packings of a row."""
    compiled, model, counter = compiled_and_eager(kind)
    for lengths in ((4, 5, 3), (2, 6, 4), (6, 1, 5)):
        ids = token_ids(1, 12)
        packing = {"position_ids": torch.cat([torch.arange(n) for n in lengths])[None]}
        if boundaries == "cu_seq_lens_q":
            packing["cu_seq_lens_q"] = F.pad(torch.tensor(lengths).cumsum(0), (1, 0))
        with torch.no_grad():
            actual = compiled(ids, **packing, use_cache=False).logits
            expected = torch.cat([model(part, use_cache=False).logits for part in ids.split(lengths, 1)], 1)
        assert relative_error(actual, expected) <= 1e-5
    assert counter.frame_count == 1


@all_kinds
def test_export(kind):
    model = tiny_model(kind)
    length = torch.export.Dim("length", min=2, max=512)
    inputs = {"input_ids": token_ids(2, 12), "use_cache": False}
    shapes = {"input_ids": {1: length}, "use_cache": None}
    with torch.no_grad():
        program = torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=False)
        for tokens in (2, 33, 150):
            ids = token_ids(2, tokens)
            actual = program.module()(input_ids=ids, use_cache=False).logits
            assert relative_error(actual, model(ids).logits) <= 1e-5


# Adapters


@all_kinds
def test_lora_on_all_linear_layers(kind):
    model, ids = tiny_model(kind, use_gate=True), token_ids(2, 8)
    linears = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    assert {n.split(".")[-1] for n in linears} >= {"b_proj", "g_proj", "q_proj", "o_proj", "down_proj"}
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    peft_model = get_peft_model(model, config).train()
    adapted = {n.removeprefix("base_model.model.") for n, m in peft_model.named_modules() if hasattr(m, "lora_A")}
    assert adapted == linears

    trained = {n: p for n, p in peft_model.named_parameters() if p.requires_grad}
    assert all("lora_" in n for n in trained)
    optimizer, losses = torch.optim.Adam(trained.values(), 1e-2), []
    for _ in range(8):
        optimizer.zero_grad()
        loss = peft_model(input_ids=ids, labels=ids).loss
        loss.backward()
        assert not [n for n, p in trained.items() if p.grad is None or not p.grad.any()]
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5

    peft_model.eval()
    with torch.no_grad():
        expected = peft_model(input_ids=ids).logits
        generated = peft_model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
        merged = peft_model.merge_and_unload()
        assert relative_error(merged(ids).logits, expected) <= 1e-4
        # The greedy continuation is what the cache-free forward says at every position.
        logits = merged(generated, use_cache=False).logits[:, 7:-1]
    chosen = logits.gather(-1, generated[:, 8:, None])[..., 0]
    assert generated.shape == (2, 13)
    torch.testing.assert_close(chosen, logits.max(-1).values, atol=1e-3, rtol=0)


# Offloading


def spread(model, kind_of_storage):
    devices = {name: "cpu" for name in ("model.embed_tokens", "model.norm", "lm_head")}
    blocks = range(model.config.num_hidden_layers)
    return devices | {f"model.layers.{i}": "cpu" if i == 0 else kind_of_storage for i in blocks}


OFFLOADS = {
    "cpu_offload": lambda model, folder: cpu_offload(model, execution_device="cpu"),
    "disk_offload": lambda model, folder: disk_offload(model, folder, execution_device="cpu"),
    "dispatch": lambda model, folder: dispatch_model(
        model, spread(model, "disk"), main_device="cpu", offload_dir=folder, force_hooks=True
    ),
}


@pytest.mark.parametrize("offload", OFFLOADS)
@all_kinds
def test_offloading(tmp_path, kind, offload):
    model, ids = tiny_model(kind, use_gate=True), token_ids(2, 8)
    with torch.no_grad():
        expected = model(ids).logits
        tokens = model.generate(ids, max_new_tokens=3, do_sample=False)
        OFFLOADS[offload](model, str(tmp_path))
        assert {p.device.type for n, p in model.named_parameters() if "layers.1" in n} == {"meta"}
        assert torch.equal(model(ids).logits, expected)
        assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False), tokens)


@pytest.mark.parametrize("device_map", ["auto", "cpu", "disk"])
@pytest.mark.parametrize("kind", ["pure", "sliding"])
def test_device_map(tmp_path, kind, device_map):
    model, ids = tiny_model(kind, tie_word_embeddings=True), token_ids(2, 8)
    model.save_pretrained(tmp_path / "model")
    device_map = spread(model, "disk") if device_map == "disk" else device_map
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=str(tmp_path / "offload")
    )
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        assert torch.equal(
            loaded.generate(ids, max_new_tokens=3, do_sample=False), model.generate(ids, max_new_tokens=3, do_sample=False)
        )


# Initialisation


def build_directly(config):
    return DeltaNetForCausalLM(config)


def build_from_config(config):
    return AutoModelForCausalLM.from_config(config)


def build_on_meta(config):
    with torch.device("meta"):
        model = DeltaNetForCausalLM(config)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    model.init_weights()
    return model


@pytest.mark.parametrize("build", [build_directly, build_from_config, build_on_meta])
def test_initialisation(build):
    torch.manual_seed(3)
    attn = {"layers": [1, 3], "num_heads": 4, "qkv_bias": True}
    config = tiny_config(hidden_size=64, num_heads=16, num_hidden_layers=6, use_gate=True, initializer_range=0.05, attn=attn)
    groups = {}
    for name, parameter in build(config).named_parameters():
        groups.setdefault(re.sub(r"layers\.\d+\.", "", name), []).append(parameter.detach().flatten())
    assert {"model.attn.q_conv1d.weight", "model.attn.b_proj.weight", "model.attn.k_proj.bias"} <= groups.keys()
    for name, parts in groups.items():
        values = torch.cat(parts)
        if "norm" in name or "bias" in name:
            assert bool((values == (1 if "norm" in name else 0)).all()), name
        else:
            # Five standard errors of the mean and of the deviation of a normal distribution.
            assert abs(values.mean()) < 5 * 0.05 / len(values) ** 0.5, name
            assert abs(values.std() / 0.05 - 1) < 5 / (2 * len(values)) ** 0.5, name


def test_a_missing_tensor_is_initialised(tmp_path):
    """What a checkpoint lacks is drawn as in a new model, and what it has is left alone."""
    DeltaNetModel(tiny_config()).save_pretrained(tmp_path)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {"lm_head.weight"}
    assert abs(model.lm_head.weight.std().item() / 0.3 - 1) < 0.1
    ids = token_ids(2, 6)
    with torch.no_grad():
        expected = AutoModel.from_pretrained(tmp_path)(ids).last_hidden_state
        assert torch.equal(model.model(ids).last_hidden_state, expected)


# Sharding plans


def names_of(model):
    return {n for n, _ in model.named_parameters()} | {n for n, _ in model.named_modules()}


def plan_matches(key, name):
    return re.fullmatch(re.escape(key).replace(r"\*", r"\d+"), name) is not None


@pytest.fixture(scope="module")
def hybrid():
    return tiny_model("sliding", use_gate=True)


def test_tensor_parallel_plan(hybrid):
    plan = hybrid.tp_plan
    unmatched = [key for key in plan if not any(plan_matches(key, name) for name in names_of(hybrid))]
    assert not unmatched
    assert not set(plan.values()) - set(ALL_PARALLEL_STYLES.keys())
    # A matrix that the plan forgets would be whole on every rank and disagree with its neighbours' shards.
    sharded = [n for n, p in hybrid.named_parameters() if p.ndim > 1 and n != "model.embed_tokens.weight"]
    forgotten = [n for n in sharded if not any(plan_matches(k, n) or plan_matches(k + ".weight", n) for k in plan)]
    assert not forgotten


@pytest.mark.parametrize("projection, style", [("q_proj", "colwise"), ("b_proj", "colwise"), ("o_proj", "rowwise")])
def test_tensor_parallel_styles_fit(hybrid, projection, style):
    assert hybrid.tp_plan[f"model.layers.*.attn.{projection}"] == style


def test_pipeline_plan(hybrid):
    modules = dict(hybrid.named_modules())
    assert list(hybrid._pp_plan) and all(key in modules for key in hybrid._pp_plan)
    assert {"model.embed_tokens", "model.layers", "model.norm", "lm_head"} == set(hybrid._pp_plan)


def test_fsdp_plan(hybrid):
    fsdp = pytest.importorskip("transformers.distributed.fsdp")
    styles = getattr(fsdp, "ALL_FSDP_STYLES", ("free_full_weight", "keep_full_weight"))
    modules = [name for name, _ in hybrid.named_modules()]
    for key, style in hybrid._fsdp_plan.items():
        assert any(plan_matches(key, name) for name in modules), key
        assert style in styles
