"""Decoding by replaying a captured step; here a recording is a stand-in that runs the captured function again."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from models import token_ids
from recording import Meanwhile, counting, eagerly, generate, generator
from transformers import DynamicCache, StaticCache, TorchAoConfig

from deltanet import DeltaNetForCausalLM, graphs_deltanet, layout_deltanet
from deltanet.benchmarks.generation_matrix import BATCHES, CELLS, compare
from deltanet.cache_deltanet import CACHE_NAME
from deltanet.graphs_deltanet import cache_slots
from deltanet.mixer_deltanet import DeltaNetMixer

# Where the ordinary forward decodes: a cache that moves, and a loop that calls the model itself.
EAGER = {"offloaded", "batch_selection"}


@pytest.fixture
def graphs(monkeypatch):
    """Models on a CPU decode by replaying; the class counts."""
    recorder = counting("cpu")
    monkeypatch.setitem(graphs_deltanet.RECORDERS, "cpu", recorder)
    return recorder


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", [name for name, cell in CELLS.items() if "pure" in cell.kinds])
def test_every_way_to_generate(graphs, name, batch):
    deviation, tokens_are_equal = compare(generator(), name, batch)
    assert tokens_are_equal
    assert deviation <= 1e-4
    assert (graphs.replayed == 0) == (name in EAGER)


# What a call leaves behind


def test_a_step_is_recorded_once_for_each_batch_size(graphs):
    model = generator()
    for batch in (1, 3, 1, 3, 1):
        ids = token_ids(batch, 6, seed=batch)
        assert torch.equal(generate(model, ids), eagerly(model, ids))
    assert graphs.recorded == 2
    assert graphs.replayed == 5 * 7
    assert len(model.decode_graphs) == 2


def test_returned_caches_are_independent(graphs):
    """The first of two caches goes on after the second call, and after it as if there had been no other."""
    model, prompts = generator(), [token_ids(2, 6, seed=seed) for seed in (1, 2)]
    first, second = (generate(model, ids, return_dict_in_generate=True) for ids in prompts)
    more = token_ids(2, 2, seed=9)
    for outcome in (first, second, first):
        longer = torch.cat([outcome.sequences, more], 1)
        cache = copy.deepcopy(getattr(outcome, CACHE_NAME))
        expected = eagerly(model, longer, use_cache=False)
        assert torch.equal(generate(model, longer, **{CACHE_NAME: cache}), expected)


@pytest.mark.parametrize("make", [DynamicCache, lambda config: StaticCache(config=config, max_cache_len=64)])
def test_a_given_cache_keeps_its_tensors(graphs, make):
    model, ids, cache = generator(), token_ids(2, 6), make(config=generator().config)
    sequences = generate(model, ids, **{CACHE_NAME: cache})
    before = [holder[name] for holder, name in cache_slots(cache)]
    addresses = [tensor.data_ptr() for tensor in before]
    again = generate(model, sequences, **{CACHE_NAME: cache})
    after = [holder[name] for holder, name in cache_slots(cache)]
    assert [tensor.data_ptr() for tensor in after] == addresses
    assert all(a is b for a, b in zip(before, after))
    assert torch.equal(again, eagerly(model, ids, 16))
    assert all(int(layer.cumulative_length) == again.shape[1] - 1 for layer in cache.layers)


def test_a_call_within_a_call(graphs):
    """Of the same batch size: the inner call has a step of its own."""
    model, ids, inner = generator(), token_ids(2, 6), token_ids(2, 5, seed=3)
    meanwhile = Meanwhile(lambda: generate(model, inner), steps=(1, 2, 5))
    assert torch.equal(generate(model, ids, logits_processor=[meanwhile]), eagerly(model, ids))
    assert all(torch.equal(result, eagerly(model, inner)) for result in meanwhile.results)
    assert graphs.recorded == 2


def within(run, model, ids, works, cache):
    """What a generation with `cache` returns and leaves, and the results of works in its middle, by number of call."""
    meanwhile = [Meanwhile(work, steps=(step,)) for step, work in works.items()]
    sequences = run(model, ids, logits_processor=meanwhile, **{CACHE_NAME: cache})
    results = [result for each in meanwhile for result in each.results if isinstance(result, torch.Tensor)]
    left = [holder[name].clone() for holder, name in cache_slots(cache)]
    with torch.no_grad():
        return [sequences, *results, *left, model(ids, past_key_values=cache).logits]


def both_ways(model, ids, works):
    """`within`, decoding by steps and eagerly; `works` takes the cache."""
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    return [within(run, model, ids, works(cache), cache) for run, cache in zip((generate, eagerly), caches)]


def test_forwards_within_a_call(graphs):
    """Of another model, on another cache, and of several tokens and with a loss on the cache that is generated with."""
    model, another, ids, config = generator(), generator(seed=1), token_ids(2, 6), generator().config
    others = iter([DynamicCache(config=config) for _ in range(4)])

    def works(cache):
        first, second = next(others), next(others)

        def forward(model, ids, cache, **options):
            return lambda: model(ids, **{CACHE_NAME: cache}, **options).logits

        with torch.no_grad():
            forward(another, token_ids(2, 4), first)()
        return {
            1: forward(another, token_ids(2, 1), first),
            2: forward(model, token_ids(2, 3), cache),
            3: forward(model, token_ids(2, 4), second),
            4: forward(model, token_ids(2, 1), second),
            5: forward(model, ids[:, :1], cache, labels=ids[:, :1]),
        }

    assert all(map(torch.equal, *both_ways(model, ids, works)))
    assert graphs.replayed == 7


CACHE_CHANGES = {
    "batch": lambda model, cache: (cache.batch_repeat_interleave(2), cache.batch_select_indices(torch.tensor([2, 0]))),
    "empty": lambda model, cache: cache.reset(),
    "reset": lambda model, cache: (cache.reset(), model(token_ids(2, 4), past_key_values=cache)),
    "fork": lambda model, cache: model(token_ids(2, 1), past_key_values=copy.deepcopy(cache)).logits,
}


@pytest.mark.parametrize("change", CACHE_CHANGES)
def test_a_cache_that_changes_within_a_call(graphs, change):
    model = generator()
    works = lambda cache: {4: lambda: CACHE_CHANGES[change](model, cache)}  # noqa: E731
    assert all(map(torch.equal, *both_ways(model, token_ids(2, 6), works)))
    assert graphs.replayed >= 3


def test_a_loop_of_the_callers_own(graphs):
    """It may keep the logits of earlier tokens, and look at the mask."""

    def loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        ids, logits, widths = input_ids, [], []
        for i in range(6):
            inputs = model.prepare_inputs_for_generation(
                ids, next_sequence_length=1 if i else None, is_first_iteration=i == 0, **model_kwargs
            )
            outputs = model(**inputs)
            model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
            logits.append(outputs.logits[:, -1])
            ids = torch.cat([ids, logits[-1].argmax(-1, keepdim=True)], 1)
            widths.append(model_kwargs["position_ids"].shape[1] - ids.shape[1])
        assert len(set(widths)) == 1
        return torch.stack(logits, 1)

    model, ids = generator(), token_ids(2, 6)
    assert torch.equal(generate(model, ids, custom_generate=loop), eagerly(model, ids, custom_generate=loop))
    assert graphs.replayed == 5


def test_an_interrupted_call(graphs):
    model, ids, cache = generator(), token_ids(2, 6), DynamicCache(config=generator().config)

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, ids, logits_processor=[Meanwhile(stop, steps=(4,))], **{CACHE_NAME: cache})
    partial = eagerly(model, ids, 4)
    assert torch.equal(generate(model, partial, 4, **{CACHE_NAME: cache}), eagerly(model, ids))
    assert graphs.recorded == 1


def test_interleaved_models_batches_and_threads(graphs):
    """Each thread in turn advances its own generation by a token; a thread among others records nothing."""
    models = [generator(seed=seed) for seed in (0, 1)]
    jobs = [(models[i % 2], token_ids(1 + i // 2, 6, seed=i)) for i in range(4)]
    expected = [generate(model, ids, 12) for model, ids in jobs]
    assert graphs.recorded == 4
    barrier, results = threading.Barrier(len(jobs)), [None] * len(jobs)

    def run(i):
        model, ids = jobs[i]
        results[i] = generate(model, ids, 12, logits_processor=[Meanwhile(barrier.wait, steps=range(13))])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(map(torch.equal, results, expected))
    assert graphs.recorded == 4 and graphs.replayed == 2 * 4 * 11


# When a step no longer fits


def replaced(model):
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data = weight.data.flip(0)


def loaded(model):
    model.load_state_dict(generator(seed=5).state_dict())


def in_place(model):
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)


def tied(model):
    model.lm_head.weight = model.model.embed_tokens.weight


CHANGES = {
    # change, whether the step is recorded again
    "replaced": (replaced, True),
    "tied": (tied, True),
    "dtype": (lambda model: model.to(torch.bfloat16), True),
    "double": (lambda model: model.double(), True),
    "new head": (lambda model: setattr(model, "lm_head", copy.deepcopy(model.lm_head)), True),
    "loaded": (loaded, False),
    "in place": (in_place, False),
    "released": (lambda model: model.decode_graphs.release(), True),
    "backend": (None, True),
}


@pytest.mark.parametrize("name", CHANGES)
def test_weights_that_change(graphs, name, monkeypatch):
    model, ids = generator(), token_ids(2, 6)
    before = generate(model, ids)
    change, is_recorded_again = CHANGES[name]
    if change:
        change(model)
    else:
        monkeypatch.setenv("DELTANET_BACKEND", "recurrent")
    assert torch.equal(generate(model, ids), eagerly(model, ids))
    assert graphs.recorded == 1 + is_recorded_again
    if name in ("replaced", "tied", "loaded", "in place"):
        assert not torch.equal(generate(model, ids), before)
    assert len(model.decode_graphs) == (2 if name == "backend" else 1)


def test_quantized_weights(graphs, tmp_path):
    """Their memory is that of the tensors inside."""
    torchao = pytest.importorskip("torchao.quantization", reason="needs torchao")
    generator().save_pretrained(tmp_path)
    config = TorchAoConfig(torchao.Int8WeightOnlyConfig())
    model, ids = DeltaNetForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map="cpu"), token_ids(2, 6)
    before = generate(model, ids)
    weight = model.model.layers[1].mlp.down_proj.weight
    weight.qdata = weight.qdata.flip(0)
    actual = generate(model, ids)
    assert torch.equal(actual, eagerly(model, ids)) and not torch.equal(actual, before)
    assert graphs.recorded == 2 and graphs.replayed == 14


def test_the_oldest_unused_steps_go(graphs):
    model = generator()
    model.decode_graphs.limit = 2
    for batch in (1, 2, 3, 2, 1):
        generate(model, token_ids(batch, 6))
    assert graphs.recorded == 4  # the last call found its step gone
    assert len(model.decode_graphs) == 2
    model.decode_graphs.limit = 0
    generate(model, token_ids(1, 6))
    assert len(model.decode_graphs) == 0


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_a_model_take_no_steps_along(graphs, duplicate):
    model, ids = generator(), token_ids(2, 6)
    model.decode_graphs.limit = 7
    expected = generate(model, ids)
    twin = duplicate(model)
    assert len(twin.decode_graphs) == 0 and twin.decode_graphs.limit == 7
    in_place(twin)
    assert torch.equal(generate(twin, ids), eagerly(twin, ids))
    assert torch.equal(generate(model, ids), expected)


def test_a_model_that_is_gone_frees_its_steps(graphs):
    model = generator()
    generate(model, token_ids(2, 6))
    step = weakref.ref(model.decode_graphs._idle[0])
    del model
    gc.collect()
    assert step() is None


def test_the_loop_grows_no_masks(graphs, monkeypatch):
    """A decoded token needs neither mask nor positions."""
    model, ids, seen = generator(), token_ids(2, 6), []
    forward = type(model).forward

    def spy(self, input_ids=None, **arguments):
        seen.append({name for name, value in arguments.items() if value is not None})
        return forward(self, input_ids, **arguments)

    spy.__wrapped__ = forward
    monkeypatch.setattr(type(model), "forward", spy)
    generate(model, ids, attention_mask=torch.ones_like(ids))
    assert "position_ids" in seen[0] and "position_ids" not in seen[1]
    assert seen[2] == seen[-1] == {CACHE_NAME, "use_cache", "logits_to_keep", "return_dict"}


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_layers_look_for_padding_where_there_is_some(monkeypatch, padded, options):
    """Also where a mask's values may not be read in the forward, as on a GPU."""
    monkeypatch.setattr(layout_deltanet, "values_are_readable", lambda _: False)
    model, ids, layouts = generator(), token_ids(2, 6), []
    forward = DeltaNetMixer.forward
    monkeypatch.setattr(DeltaNetMixer, "forward", lambda *x: layouts.append(x[2]) or forward(*x))
    mask = torch.ones_like(ids)
    mask[0, : 2 * padded] = 0
    model.generate(ids, attention_mask=mask, max_new_tokens=2, do_sample=False, **options)
    assert (layouts[0].real is not None) == padded
