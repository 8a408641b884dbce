"""When decoding does not replay a captured step, and that the log says why."""

import logging
import threading

import pytest
import torch
from models import tiny_model, token_ids
from recording import Meanwhile, counting, eagerly, generate, generator
from transformers import CompileConfig, DynamicCache

from deltanet import DeltaNetForCausalLM, decoding_deltanet, graphs_deltanet
from deltanet.cache_deltanet import CACHE_NAME


@pytest.fixture
def graphs(monkeypatch):
    """Models on a CPU decode by replaying; the class counts."""
    recorder = counting("cpu")
    monkeypatch.setitem(graphs_deltanet.RECORDERS, "cpu", recorder)
    return recorder


def hooked(model):
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: output * 2)


def with_adapters(model):
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)


def with_offloading(model):
    accelerate = pytest.importorskip("accelerate")
    return accelerate.cpu_offload(model, execution_device="cpu")


class Tagged(torch.Tensor):
    """A kind of weight whose memory may be elsewhere, as those of tensor parallelism and quantisation."""


def tagged(model):
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.data.as_subclass(Tagged))


def patched(model):
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda x, forward=mlp.forward: 2 * forward(x)


OBSTACLES = {
    "hooks": (hooked, {}, "module `model.layers.1.mlp` has hooks"),
    "adapters": (with_adapters, {}, "module `model.layers.0.attn.q_proj` is a peft.tuners.lora"),
    "offloading": (with_offloading, {}, "has hooks"),
    "patched": (patched, {}, "module `model.layers.0.mlp` has a forward of its own"),
    "weights": (tagged, {}, "`lm_head` has a weight that is a Tagged"),
    "training": (lambda model: model.train(), {}, "the model is in training mode"),
    "hidden states": (None, {"output_hidden_states": True}, "the forward was given `output_hidden_states`"),
    "configuration": (lambda model: setattr(model.config, "output_hidden_states", True), {}, "asks for hidden states"),
    "switched off": (lambda model: setattr(model.decode_graphs, "enabled", False), {}, "switched off"),
    "offloaded cache": (None, {"cache_implementation": "offloaded"}, "the cache is offloaded"),
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_obstacles(graphs, name, caplog):
    change, options, reason = OBSTACLES[name]
    model, ids = generator(), token_ids(2, 6)
    expected = generate(model, ids)
    replayed = graphs.replayed
    decoding_deltanet._announce.cache_clear()
    model = change and change(model) or model
    with caplog.at_level(logging.INFO, "deltanet.decoding"):
        actual = generate(model, ids, return_dict_in_generate=True, **options).sequences
    assert graphs.replayed == replayed
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1 and lines[0].startswith("decoding on cpu: eager: ") and reason in lines[0]
    if change in (None, with_offloading):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("name, value", [("DELTANET_DECODE_GRAPHS", "0"), ("DELTANET_CHECK", "1")])
def test_environment(graphs, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    generate(generator(), token_ids(2, 6))
    assert graphs.recorded == 0


@pytest.mark.parametrize("kind", ["sliding", "global"])
@pytest.mark.parametrize("implementation", ["dynamic", "static"])
def test_hybrids_decode_eagerly(graphs, kind, implementation):
    model = tiny_model(kind, bos_token_id=None, eos_token_id=None)
    generate(model, token_ids(2, 6), cache_implementation=implementation)
    assert graphs.recorded == 0


def test_autocast_decodes_eagerly(graphs):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        generate(generator(), token_ids(2, 6))
    assert graphs.recorded == 0


def test_earlier_requests_for_hidden_states_forbid_nothing(graphs):
    """Transformers leaves its hooks on the model."""
    model, ids = generator(), token_ids(2, 6)
    with torch.no_grad():
        model(ids, output_hidden_states=True)
    generate(model, ids)
    assert graphs.replayed == 7


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_a_device_map_of_one_device_forbids_nothing(graphs, device_map, tmp_path):
    pytest.importorskip("accelerate")
    generator().save_pretrained(tmp_path)
    model = DeltaNetForCausalLM.from_pretrained(tmp_path, device_map=device_map)
    generate(model, token_ids(2, 6))
    assert graphs.replayed == 7


def test_inference_mode(graphs):
    model, ids, cache = generator(), token_ids(2, 6), DynamicCache(config=generator().config)
    with torch.inference_mode():
        sequences = generate(model, ids, **{CACHE_NAME: cache})
    assert torch.equal(generate(model, sequences, **{CACHE_NAME: cache}), eagerly(model, ids, 16))
    assert graphs.recorded == 1


def test_what_cannot_be_recorded_decodes_eagerly_and_is_tried_once(monkeypatch, caplog):
    class Failing:
        tried = 0

        def __init__(self, function, device):
            Failing.tried += 1
            raise RuntimeError("no room\nfor a graph")

    monkeypatch.setitem(graphs_deltanet.RECORDERS, "cpu", Failing)
    model, ids = generator(), token_ids(2, 6)
    sequences = [generate(model, ids) for _ in range(2)]
    assert Failing.tried == 1
    assert "decoding on cpu: capture failed: no room" in caplog.messages
    assert all(torch.equal(x, eagerly(model, ids)) for x in sequences)
    model.decode_graphs.release()
    generate(model, ids)
    assert Failing.tried == 2


def test_nothing_is_recorded_while_another_thread_generates(graphs):
    model, ids, inside, leave = generator(), token_ids(2, 6), threading.Event(), threading.Event()
    generate(model, token_ids(3, 6))
    waiting = Meanwhile(lambda: (inside.set(), leave.wait()), steps=(1,))
    thread = threading.Thread(target=generate, args=(generator(seed=1), ids), kwargs={"logits_processor": [waiting]})
    thread.start()
    inside.wait()
    results = [generate(model, ids), generate(model, ids[:1], num_beams=3)]
    assert graphs.recorded == 1 and graphs.replayed == 2 * 7  # the step of three rows, without an order of beams
    leave.set()
    thread.join()
    assert all(map(torch.equal, results, [generate(model, ids), eagerly(model, ids[:1], num_beams=3)]))
    assert graphs.recorded == 3  # here, and in the thread


def test_compilation_that_is_asked_for(graphs, monkeypatch):
    """A static cache alone is no request: Transformers would compile it, which takes a minute, where a step takes none."""
    model, ids = generator(), token_ids(2, 6)
    expected = eagerly(model, ids)
    compiled = []
    monkeypatch.setattr(type(model), "get_compiled_call", lambda self, config: compiled.append(config) or self.__call__)
    config = CompileConfig()
    config._compile_all_devices = True
    assert torch.equal(generate(model, ids, cache_implementation="static"), expected)
    assert not compiled and graphs.replayed == 7
    assert torch.equal(generate(model, ids, cache_implementation="static", compile_config=config), expected)
    assert compiled and graphs.replayed == 7
