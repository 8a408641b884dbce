"""The parts of the benchmark of whole models that need no GPU: cells, going on, memory, the account, the drawings."""

import functools
import itertools
import json
import types

import pytest
import torch
from models import tiny_config, tiny_model, token_ids

from deltanet.benchmarks import (
    generation_account,
    gpu_glue,
    gpu_model,
    host_account,
    model_peers,
    model_worker,
    training_account,
)
from deltanet.benchmarks.model_plots import draw
from deltanet.train.flops import mixing_flops, peak_flops, product_parameters, training_flops


@pytest.mark.parametrize("part", gpu_model.PARTS)
@pytest.mark.parametrize("peer", model_peers.NAMES)
def test_cells_of_a_part_do_not_replace_each_other(part, peer):
    tasks = gpu_model.plan(part, peer)
    assert len({gpu_model.ModelResults.key(task) for task in tasks}) == len(tasks) > 0
    assert {task["kind"] for task in tasks} <= set(model_worker.KINDS) & set(gpu_model.FIGURES)
    assert {task.get("variant", "") for task in tasks} <= set(model_peers.VARIANTS)


def test_a_run_that_was_cut_off_goes_on(tmp_path, monkeypatch):
    """What has figures of the same code is left out; errors, and figures of other code, are not."""
    versions = {"ours": "a", "fla": "1"}
    monkeypatch.setattr(gpu_model.model_peers, "version", lambda peer: versions[peer])
    tasks = [*gpu_model.plan("account", "ours"), *gpu_model.plan("account", "fla")]
    results = gpu_model.ModelResults(tmp_path / "figures.json", {"device": "x"})
    for task in (tasks[0], tasks[2]):
        results.add({**task, "wall_us": 1.0})
    results.add({**tasks[1], "error": "stopped: out of time"})
    again = gpu_model.ModelResults(tmp_path / "figures.json", {"device": "x"})
    assert again.missing(tasks) == [tasks[1], tasks[3]]
    versions["ours"] = "b"
    assert again.missing(tasks) == [tasks[0], tasks[1], tasks[3]]
    again.add({**tasks[0], "wall_us": 2.0})
    again.add({**tasks[0], "error": "not run: out of time"})
    assert again.data["rows"][-1]["wall_us"] == 2.0
    assert sum(row["peer"] == "ours" and row["B"] == 1 for row in again.data["rows"]) == 1


@pytest.mark.parametrize("peer", ["ours", "llama"])
def test_peers_have_the_sizes_of_the_paper(peer):
    with torch.device("meta"):
        counts = {size: model_peers.build(peer, size, "meta").num_parameters() for size in ("340M", "1.3B")}
    assert counts["1.3B"] == pytest.approx(1_365_677_056, rel=2e-3)
    assert counts["340M"] == pytest.approx(374e6, rel=1e-2)


@pytest.mark.parametrize(
    "kind, figure",
    [
        ("generate", "tokens_per_s"),
        ("prefill", "wall_ms"),
        ("step", "wall_ms"),
        ("decode", "ms_a_step"),
        ("host", "host_ms"),
    ],
)
def test_worker_measures(kind, figure):
    task = {"part": kind, "kind": kind, "peer": "ours", "size": "tiny", "B": 2, "T": 5, "new": 5, "seconds": 0.2}
    row = model_worker.run(task, model_worker.load_model, "cpu")
    assert "error" not in row and row[figure] > 0


def test_worker_measures_training_and_says_what_fails():
    task = {"part": "train", "kind": "train", "peer": "ours", "size": "tiny", "B": 1, "T": 70, "seconds": 0.2}
    for variant in {"", *model_peers.TRAINING_VARIANTS["ours"]} - {"compiled"}:  # which takes a minute here
        row = model_worker.run({**task, "variant": variant}, model_worker.load_model, "cpu")
        assert "error" not in row and row["tokens_per_s"] == pytest.approx(70 / row["wall_ms"] * 1e3)
    row = model_worker.run({**task, "variant": "unknown"}, model_worker.load_model, "cpu")
    assert row["error"] == "KeyError: 'unknown'"


def test_what_is_compiled_ahead():
    """One step of a thin model of each size that is trained, variants in an order of its own, and no figure but the time."""
    tasks = [task for part in ("train", "step", "prefill") for task in gpu_model.plan(part, "fla")]
    compiled = gpu_model.compilations(tasks)
    assert [(task["peer"], task["size"]) for task in compiled] == [("fla", "1.3B thin"), ("fla", "340M thin")]
    assert gpu_model.compilations(gpu_model.plan("prefill", "fla")) == []
    load = functools.partial(model_worker.load_model, seed=3)
    row = model_worker.run({**compiled[0], "peer": "ours", "size": "tiny thin", "B": 1, "T": 70}, load, "cpu")
    assert "error" not in row and row["first_s"] > 0
    assert model_worker.load_model("ours", "tiny thin", "cpu", "", seed=3).config.num_hidden_layers == 1


def test_memory_of_a_cache():
    model = tiny_model()
    output = model.generate(token_ids(3, 9), max_new_tokens=2, return_dict_in_generate=True)
    cache = getattr(output, "past_key_values", None) or output.cache
    states, lengths = 3 * 2 * (2 * 16 * 16 + 3 * 32 * 3) * 4, 2 * 8  # batch, layers; recurrent and three convolutions
    assert model_worker.tensor_bytes(cache) == states + lengths
    shared = torch.zeros(4)
    assert model_worker.tensor_bytes({"a": [shared], "b": (shared, types.SimpleNamespace(c=torch.zeros(2)))}) == 24


def test_account_adds_up(monkeypatch):
    """By a clock that ticks when it is read: every stopwatch takes one tick, and the pauses between them are the rest."""
    monkeypatch.setattr(generation_account, "SHORT", 2)
    monkeypatch.setattr(generation_account, "LONG", 6)
    monkeypatch.setattr(generation_account.time, "perf_counter", itertools.count().__next__)
    model = tiny_model()
    call = type(model).__call__
    figures = generation_account.account(model, lambda new: model.generate(token_ids(1, 4), max_new_tokens=new), "cpu")
    parts = ("model_call_us", "inputs_us", "bookkeeping_us", "stop_check_us")
    assert figures == {**dict.fromkeys(parts, 1e6), "sampling_and_rest_us": 4e6, "wall_us": 8e6}
    assert type(model).__call__ is call and "__call__" not in vars(type(model))


def test_own_times_of_the_host_add_up(monkeypatch):
    """By a clock that ticks when it is read: a call lasts one tick, and two more for each that is watched inside of it."""
    monkeypatch.setattr(host_account.time, "perf_counter", itertools.count().__next__)
    model, ids = tiny_model(), token_ids(1, 4)
    forward = type(model).forward
    with torch.no_grad():
        figures = host_account.host_account(model, lambda: model(ids), 2, "cpu")
    calls, own = figures["calls"], figures["own_us"]
    assert (calls["DeltaNetBlock"], calls["DeltaNetRMSNorm"], calls["cache"]) == (2, 7, 4)
    watched = sum(calls.values())
    # The outermost call lasts two ticks for each of the others and one for itself.
    assert sum(own.values()) == pytest.approx((2 * (watched - 1) + 1) / 2 * 1e6)
    assert own["DeltaNetRMSNorm"] == pytest.approx(7 / 2 * 1e6)
    assert (figures["host_ms"], figures["synchronizations"]) == (1e3, 0)
    assert type(model).forward is forward


def test_account_of_a_step():
    names = {
        "nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNT": "products",
        "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16>": "products",
        "void pytorch_flash::flash_fwd_kernel<cutlass::bfloat16_t>": "mixing",
        "hopper_scan_kernel": "mixing",
        "gradient_kernel": "mixing",
        "l2norm_fwd_kernel": "mixing",
        "rms_norm_gradient_kernel": "norms",
        "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16, float, true>": "norms",
        "swiglu_gradient_kernel": "swiglu",
        "backward_kernel": "convolution",
        "cross_entropy_kernel": "loss",
        "void at::native::vectorized_elementwise_kernel<8, at::native::CUDAFunctor_add<c10::BFloat16>>": "sums_and_copies",
        "Memset (Device)": "sums_and_copies",
        "something": "other",
    }
    assert {name: training_account.group_of(name) for name in names} == names
    events = [("gradient_kernel", 0, 4000), ("gradient_kernel", 5000, 7000), ("something", 7000, 8000)]
    figures = training_account.by_group(events, steps=2)
    assert figures == {
        "mixing_ms": 3.0,
        "other_ms": 0.5,
        "kernels": {"gradient_kernel": [3.0, 1.0], "something": [0.5, 0.5]},
    }


def test_glue_compares_like_with_like():
    names = []
    for name, functions, inputs in gpu_glue.works(gpu_glue.TINY, "cpu"):
        names.append(name)
        theirs = "pytorch" if "pytorch" in functions else "unfused"
        ours, others = (gpu_glue.several(functions[peer]()(*inputs)) for peer in ("ours", theirs))
        torch.testing.assert_close([y.float() for y in ours], [y.float() for y in others], rtol=2e-2, atol=2e-2)
        figures = gpu_glue.measure(functions["ours"], inputs, "cpu")
        assert 0 < figures["forward_ms"] and 0 < figures["forward_backward_ms"]
    assert names == ["norm", "head norm", "sum and norm", "q, k, v, b", "gate, up", "swiglu", "loss"]


class TestOperations:
    def test_of_the_paper(self):
        """6 N is 7.8e9 at 1.3B; the delta rule adds a fiftieth, at every length."""
        config = model_peers.flops_config("ours", "1.3B")
        per_token = 24 * 16 * (6 * 128 * 128 + 4 * 64 * 256)
        assert mixing_flops(config, 2048) == mixing_flops(config, 16384) == per_token
        assert training_flops(config, 1_300_000_000, 2048) == pytest.approx(6 * 1.3e9 + 3 * per_token)

    @pytest.mark.parametrize("length, mean", [(4, 2), (64, 5 * (1 - 5 / 128))])
    def test_of_attention(self, length, mean):
        """Half the length in causal attention, and what a window of 5 leaves of it."""
        pure, sliding, full = (mixing_flops(tiny_config(kind), length) for kind in ("pure", "sliding", "global"))
        assert sliding - pure == pytest.approx(4 * 32 * mean)
        assert full - pure == pytest.approx(4 * 32 * length / 2)
        llama = model_peers.flops_config("llama", "tiny")
        assert mixing_flops(llama, length) == pytest.approx(2 * 4 * 32 * length / 2)

    @pytest.mark.parametrize("tied", [False, True])
    def test_parameters_of_products(self, tied):
        model = tiny_model(tie_word_embeddings=tied)
        body = sum(p.numel() for name, p in model.named_parameters() if "embed" not in name and "lm_head" not in name)
        assert product_parameters(model) == body + 61 * 32

    def test_devices(self):
        assert peak_flops("NVIDIA H100 80GB HBM3") == 989.4e12
        assert peak_flops("AMD EPYC 9354") is None


def test_drawings_and_table(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "figures.json"
    cell = {"size": "1.3B", "B": 1, "T": 2048, "version": "a"}
    rows = [
        {**cell, "part": "decode", "peer": peer, "tokens_per_s": 100.0, "cache_mib": size, "ms_a_step": 10.0}
        for peer, size in (("ours", 24.0), ("llama", 400.0))
    ]
    rows.append({**cell, "part": "train", "peer": "ours", "tokens_per_s": 6e4, "peak_mib": 3e4, "variant": "", "mfu": 0.5})
    rows.append({**cell, "part": "train", "peer": "fla", "error": "OutOfMemoryError: CUDA out of memory."})
    path.write_text(json.dumps({"environment": {"device": "a card"}, "rows": rows}))
    assert [target.name for target in draw(path)] == ["figures_context.png", "figures_training.png"]
    table = gpu_model.table(rows).splitlines()
    assert next(line for line in table if "cache MiB" in line).split()[-3:] == ["24", "400", "-"]
    assert next(line for line in table if "MFU" in line).split()[-5:] == ["50.0%", "-", "out", "of", "memory"]
    path.write_text(json.dumps({"environment": {"device": "a card"}, "rows": rows[-1:]}))
    with pytest.raises(ValueError, match="has nothing to draw"):
        draw(path)
