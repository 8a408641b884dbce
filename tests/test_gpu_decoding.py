"""Decoding by CUDA graphs against eager decoding, token by token; `-s` prints what recording takes and costs."""

import copy
import threading
import time

import pytest
import torch
from models import tiny_model, token_ids
from recording import Meanwhile, counting, eagerly, generate
from transformers import CompileConfig, LogitsProcessor

from deltanet import DeltaNetConfig, DeltaNetForCausalLM, graphs_deltanet
from deltanet.cache_deltanet import CACHE_NAME
from deltanet.mixer_deltanet import DeltaNetRMSNorm

pytestmark = pytest.mark.gpu
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NO_END = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture
def graphs(device, monkeypatch):
    recorder = counting(device.type)
    monkeypatch.setitem(graphs_deltanet.RECORDERS, device.type, recorder)
    return recorder


def small(device, dtype=torch.float32, seed=0):
    return tiny_model(seed=seed, **NO_END).to(device, dtype)


def middle(device, dtype=torch.float32, seed=0):
    """Eight layers of width 512 with four heads of 128, and a gate."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 512, "num_hidden_layers": 8, "num_heads": 4, "vocab_size": 8000, "use_gate": True}
    with device:
        return DeltaNetForCausalLM(DeltaNetConfig(**sizes, **NO_END)).eval().to(dtype)


SIZES = {"small": small, "middle": middle}


def ids_on(device, batch, length=9, seed=1):
    return token_ids(batch, length, seed=seed).to(device)


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_512_tokens(device, graphs, size, dtype, batch):
    model, ids = SIZES[size](device, DTYPES[dtype]), ids_on(device, batch)
    options = {"return_dict_in_generate": True, "output_logits": True}
    actual, expected = (run(model, ids, 512, **options) for run in (generate, eagerly))
    differences = [(a - b).abs().max().item() for a, b in zip(actual.logits, expected.logits)]
    print(
        f"\n{size} {dtype} batch {batch}: recorded in {graphs.seconds[0]:.3f} s, largest difference {max(differences):.1e}"
    )
    assert torch.equal(actual.sequences, expected.sequences)
    assert graphs.recorded == 1 and graphs.replayed == 511


WAYS = {
    "sampling": {"do_sample": True, "top_k": 50, "temperature": 0.8},
    "beam": {"num_beams": 4, "num_return_sequences": 2},
    "beam sampling": {"num_beams": 3, "do_sample": True},
    "static": {"cache_implementation": "static"},
    "chunked": {"prefill_chunk_size": 4},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ways(device, graphs, way, dtype):
    """On a ragged batch with padding on the left."""
    model, ids = middle(device, DTYPES[dtype]), ids_on(device, 3)
    mask = torch.ones_like(ids)
    mask[1, :4] = mask[2, :1] = 0
    options, outcomes = {"attention_mask": mask, **WAYS[way]}, []
    for run in (generate, eagerly):
        torch.manual_seed(3)
        # Eager decoding with a static cache would be compiled.
        chosen = {**options, "disable_compile": True} if run is eagerly else options
        outcomes.append(run(model, ids, 32, **chosen))
    assert torch.equal(*outcomes)
    # Transformers 5.17 does not tell the last token of a prompt, alone in its chunk, from a decoded one.
    assert graphs.replayed - 31 * (2 if "num_beams" in options else 1) in ((0, 1) if way == "chunked" else (0,))


def test_returned_caches_are_independent(device, graphs):
    model, prompts = middle(device), [ids_on(device, 2, seed=seed) for seed in (1, 2)]
    first, second = (generate(model, ids, return_dict_in_generate=True) for ids in prompts)
    for outcome in (first, second, first):
        longer = torch.cat([outcome.sequences, ids_on(device, 2, 3, seed=9)], 1)
        cache, other = (copy.deepcopy(getattr(outcome, CACHE_NAME)) for _ in range(2))
        assert torch.equal(generate(model, longer, **{CACHE_NAME: cache}), eagerly(model, longer, **{CACHE_NAME: other}))
    assert graphs.recorded == 1


def test_interleaved_models_and_batches(device, graphs):
    """After every token of one generation, another model, another batch size and the same one decode."""
    models = [middle(device, seed=seed) for seed in (0, 1)]
    jobs = [(models[0], ids_on(device, 2)), (models[1], ids_on(device, 2)), (models[0], ids_on(device, 5, seed=4))]
    expected = [eagerly(model, ids, 8) for model, ids in jobs]
    results = []
    among = Meanwhile(lambda: results.append([generate(model, ids, 8) for model, ids in jobs]))
    outer = ids_on(device, 2, seed=8)
    assert torch.equal(generate(models[0], outer, 32, logits_processor=[among]), eagerly(models[0], outer, 32))
    assert len(results) == 32
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, expected))
    assert graphs.recorded == 4


def test_threads(device, graphs):
    """Generations of four threads in turn, each drawing random numbers."""
    models = [middle(device, seed=seed) for seed in (0, 1)]
    jobs = [(models[i % 2], ids_on(device, 1 + i // 2, seed=i)) for i in range(4)]
    expected = [generate(model, ids) for model, ids in jobs]
    barrier, results = threading.Barrier(len(jobs)), [None] * len(jobs)
    options = {"do_sample": True, "top_k": 1}

    def run(i):
        results[i] = generate(*jobs[i], logits_processor=[Meanwhile(barrier.wait)], **options)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(map(torch.equal, results, expected))
    assert graphs.recorded == 4 and graphs.replayed == 2 * 4 * 7


def test_another_stream(cuda, graphs):
    """A step belongs to the stream it was made for."""
    model, ids, stream = middle(cuda), ids_on(cuda, 2), torch.cuda.Stream()
    expected = generate(model, ids)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        actual = generate(model, ids)
    stream.synchronize()
    assert torch.equal(actual, expected) and torch.equal(generate(model, ids), expected)
    assert graphs.recorded == 2


def test_memory_that_others_free(cuda, graphs):
    """The workspaces of cuBLAS, which `torch.compile` with CUDA graphs of its own throws away."""
    model, ids = middle(cuda, torch.bfloat16), ids_on(cuda, 5)
    expected = generate(model, ids)
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    rubbish = [torch.full((2**22,), float("nan"), device=cuda) for _ in range(16)]
    assert torch.equal(generate(model, ids), expected)
    assert all(bool(x.isnan().all()) for x in rubbish) and graphs.recorded == 1


@pytest.mark.parametrize("change", ["replaced", "dtype", "loaded", "moved"])
def test_weights_that_change(device, graphs, change):
    model, ids = middle(device), ids_on(device, 2)
    before = generate(model, ids)
    weight = model.lm_head.weight
    if change == "replaced":
        weight.data = weight.data.flip(0)
    elif change == "dtype":
        model.to(torch.bfloat16)
    elif change == "loaded":
        model.load_state_dict(middle(device, seed=5).state_dict())
    else:
        model.cpu()
        model.to(device)
    actual = generate(model, ids)
    assert torch.equal(actual, eagerly(model, ids))
    assert torch.equal(actual, before) == (change == "moved")


def test_compilation_that_is_asked_for(cuda, graphs):
    torch._dynamo.reset()
    model, ids = small(cuda), ids_on(cuda, 2)
    config = CompileConfig(mode="default")
    actual = generate(model, ids, cache_implementation="static", compile_config=config)
    torch._dynamo.reset()
    assert torch.equal(actual, eagerly(model, ids))
    assert graphs.recorded == 0


def test_a_loaded_model(cuda, graphs, tmp_path):
    """As the README loads it, and a hybrid beside it."""
    middle(cuda, torch.bfloat16).save_pretrained(tmp_path)
    model, ids = DeltaNetForCausalLM.from_pretrained(tmp_path, dtype="auto", device_map="auto"), ids_on(cuda, 2)
    assert torch.equal(generate(model, ids), eagerly(model, ids))
    assert graphs.replayed == 7
    hybrid = tiny_model("sliding", **NO_END).to(cuda)
    assert torch.equal(generate(hybrid, ids), eagerly(hybrid, ids))
    assert graphs.replayed == 7


class Memory(LogitsProcessor):
    """Bytes allocated on the device, at every 100th token."""

    def __init__(self):
        self.bytes, self.calls = [], 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        if self.calls % 100 == 0:
            self.bytes.append(torch.cuda.memory_allocated())
        return scores


def test_memory_over_10000_tokens(cuda, graphs):
    """Constant but for the ids; and over calls with returned caches that are thrown away."""
    model, ids, memory = small(cuda, torch.bfloat16), ids_on(cuda, 4), Memory()
    generate(model, ids, 10_000, logits_processor=[memory])
    ids_grew = 8 * ids.numel() // ids.shape[1] * 10_000
    print(f"\nbytes after 100 and 10,000 tokens: {memory.bytes[0]}, {memory.bytes[-1]}")
    assert memory.bytes[-1] - memory.bytes[0] <= 4 * ids_grew
    allocated = []
    for _ in range(20):
        generate(model, ids, 8, return_dict_in_generate=True)
        allocated.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert len(set(allocated[2:])) == 1
    assert graphs.recorded == 1


def test_memory_of_steps_is_released(cuda, graphs):
    model = small(cuda)
    generate(model, ids_on(cuda, 2))
    model.decode_graphs.release()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for batch in range(1, 8):
        generate(model, ids_on(cuda, batch))
    assert len(model.decode_graphs) == model.decode_graphs.limit == 4
    assert torch.cuda.memory_allocated() > before
    model.decode_graphs.release()
    assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize("batch", [1, 32])
def test_a_model_of_the_papers_size(cuda, graphs, batch):
    """Recording takes less than a second when the kernels are compiled; what a token and a step cost is printed."""
    torch.manual_seed(0)
    with cuda:
        model = DeltaNetForCausalLM(DeltaNetConfig.delta_net_1_3b(**NO_END)).eval().to(torch.bfloat16)
    ids = ids_on(cuda, batch, 64)
    expected = eagerly(model, ids, 16)
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    assert torch.equal(generate(model, ids, 16), expected)
    pinned = [after - b for after, b in zip((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()), before)]
    times = {}
    for run in (generate, eagerly):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run(model, ids, 4)
        between = time.perf_counter()
        run(model, ids, 68)
        times[run.__name__] = round(64 * batch / (time.perf_counter() - between - (between - start)), 1)
    print(f"\n1.3B, batch {batch}: recorded in {graphs.seconds[0]:.3f} s; tokens/s {times}; pinned bytes {pinned}")
    assert graphs.seconds[0] < 1
    assert torch.equal(generate(model, ids, 16), expected)


def test_a_recording_that_fails_leaves_everything_working(cuda, graphs, monkeypatch):
    """Last in this file: a step that waits for the device cannot be recorded."""
    model, ids, stream, norm = small(cuda), ids_on(cuda, 2), torch.cuda.current_stream(), DeltaNetRMSNorm.forward
    expected = eagerly(model, ids)
    monkeypatch.setattr(DeltaNetRMSNorm, "forward", lambda *x, **how: torch.cuda.synchronize() or norm(*x, **how))
    assert torch.equal(generate(model, ids, do_sample=True, top_k=1), expected)
    assert torch.cuda.current_stream() == stream and len(model.decode_graphs.failures) == 1
    monkeypatch.setattr(DeltaNetRMSNorm, "forward", norm)
    model.decode_graphs.release()
    assert torch.equal(generate(model, ids, do_sample=True, top_k=1), expected)
    assert graphs.recorded == 1
