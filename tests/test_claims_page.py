"""`eval/RESULTS.md`: it shows what the JSON files say, and its parts say what they must of made-up results."""

import json

import pytest

from deltanet.eval.claims import language_page, language_plots, results, speed_page
from deltanet.eval.claims.language import FILE, Settings
from deltanet.eval.claims.language_models import LABELS
from deltanet.eval.claims.markdown import PAGE


def _run(model, seed, test):
    return {
        **{"kind": "train", "model": model, "seed": seed, "parameters": 17_355_136, "seconds": 20.0, "step_ms": 25.0},
        "shared_gpu": False,
        **{"train_s": 16.0, "validation": test - 1, "test": test, "curve": [[1000, 90.0], [2000, test - 1]]},
        "needles": [{"length": 64, "facts": 1, "right": test / 100, "asked": 4}, {"length": 128, "facts": 1, "right": 0.5}],
        **{"distances": [{"up_to": 128, "right": 0.5}], "lengths": [[64, test], [1024, 3.0]], "positions": [[128, test]]},
    }


@pytest.fixture
def folder(tmp_path):
    cells = [{"T": T, "tokens_per_s": 1234.0, "cache_mib": T / 64, "peak_over_weights_mib": 1500.0} for T in (64, 128)]
    runs = [
        *(_run("deltanet", 1, 30.0), _run("deltanet", 0, 20.0)),
        _run("transformer", 0, 40.0) | {"lengths": [[64, 9.0]], "shared_gpu": True},
        {"kind": "train", "model": "mamba2", "seed": 0, "error": "a step takes 900 ms", "too_slow": True, "seconds": 6.0},
        {"kind": "generation", "model": "deltanet", "batch": 8, "cells": cells, "seconds": 3.0, "shared_gpu": False},
    ]
    data = {
        "environment": {"device": "NVIDIA H100 80GB HBM3", "torch": "2.11.0"},
        "settings": vars(Settings()) | {"size": vars(Settings().size)},
        "data": {"vocabulary": 8192, "train": {"tokens": 12_493_049}},
        "runs": runs,
    }
    (tmp_path / FILE).write_text(json.dumps(data))
    return tmp_path


def _rows(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_page_is_up_to_date():
    text = PAGE.read_text(encoding="utf-8")
    assert results.render(text) == text, "run `python -m deltanet.eval.claims.results`"


def test_every_block_stands_on_the_page_once():
    text = PAGE.read_text(encoding="utf-8")
    for broken in (text.replace("<!-- recall -->", ""), text + "\n<!-- recall -->\n<!-- end of recall -->"):
        with pytest.raises(ValueError, match="each once"):
            results.render(broken)


def test_blocks_are_replaced_whole(monkeypatch, tmp_path):
    monkeypatch.setattr(results, "SECTIONS", {"a": (lambda folder: f"\nin {folder.name}\n", tmp_path / "x")})
    page = "before\n<!-- a -->\nold\n\nolder\n<!-- end of a -->\nafter\n"
    once = results.render(page)
    assert once == "before\n<!-- a -->\nin x\n<!-- end of a -->\nafter\n" == results.render(once)


def test_modelling_has_means_over_seeds_and_says_what_is_missing(folder):
    text = language_page.modelling(folder)
    head, _, deltanet, transformer = _rows(text)
    assert deltanet == [LABELS["deltanet"], "17.36 M", "24.00", "25.00", "20.00, 30.00", "25.0", "16.0", "28.24"]
    assert transformer[2:7] == ["39.00", "40.00", "40.00", "–", "–"], "no times of a GPU that others used"
    assert len(head) == len(deltanet)
    assert "Mamba2: a step takes 900 ms." in text and f"{LABELS['elu-sum']}: not run." in text
    assert language_page.IN_PAPER.keys() == LABELS.keys() - {"mamba2"}


def test_other_tables_of_the_language_models(folder):
    assert _rows(language_page.recall(folder))[2] == [LABELS["deltanet"], "25%", "50%"]
    head, _, deltanet, transformer = _rows(language_page.length(folder))
    assert head == ["tokens in a window", "64", "1,024"] and deltanet == [LABELS["deltanet"], "25.00", "3.00"]
    assert transformer == [LABELS["transformer"], "9.00", "–"]
    assert _rows(language_page.generation(folder))[3] == [LABELS["deltanet"], "8", "128", "1,234", "2.0", "1,500.0"]
    data = json.loads((folder / FILE).read_text())
    data["runs"][-1]["shared_gpu"] = True
    (folder / FILE).write_text(json.dumps(data))
    assert _rows(language_page.generation(folder))[3][3:5] == ["–", "2.0"]
    settings = language_page.settings(folder)
    assert "200 steps of 128 × 128 tokens, then 600 steps of 16 × 1,024 tokens more on facts" in settings
    assert "1,600 steps of 16 × 1,024 tokens, 26.2 million together" in settings and "69 s" in settings


def test_plots_are_drawn_and_shown(folder):
    assert {path.name for path in language_plots.draw(folder)} == {path.name for path in folder.glob("language_*.png")}
    assert len(list(folder.glob("*.png"))) == 4
    assert "language_recall.png)" in language_page.recall(folder)


def test_what_has_not_run_is_named_with_its_command(tmp_path):
    makers = [make for make, _ in results.SECTIONS.values()]
    for make in makers:
        assert make(tmp_path).startswith("Not run yet: `python -m deltanet.")
    assert language_plots.draw(tmp_path) == []


def test_synthetic_claims_bring_their_own_text_and_plot(tmp_path):
    section = results.synthetic("state_tracking", lambda results: f"{len(results.runs)} runs\n")
    (tmp_path / "synthetic_state_tracking.json").write_text(json.dumps({"environment": {}, "runs": [{}, {}]}))
    (tmp_path / "synthetic_state_tracking.png").touch()
    assert section(tmp_path).startswith("2 runs\n\n![state tracking](")


def _benchmark(folder, name, rows):
    (folder / name).write_text(json.dumps({"rows": rows}))


def test_speed_tables(tmp_path):
    times = [("ours", 64, 512, 1.0), ("recurrent", 64, 512, 4.0), ("ours", 128, 512, 2.0), ("ours", 64, 1024, 0.5)]
    rows = [
        {"part": "figure1", "peer": peer, "D": D, "T": T, "forward_only": True, "forward": {"wall_ms": ms}}
        for peer, D, T, ms in times
    ]
    rows += [
        {"part": "figure1", "peer": "recurrent", "D": 64, "T": 1024, "error": "out of memory", "forward_only": True},
        {"part": "ops", "peer": "ours", "D": 64, "T": 512, "forward": {"wall_ms": 9.0}},
    ]
    _benchmark(tmp_path, speed_page.RULE, rows)
    assert _rows(speed_page.chunked_over_recurrent(tmp_path)) == [
        ["length", "head size 64", "head size 128"],
        ["---", "---", "---"],
        ["512", "4.0 × (4.00 / 1.00)", "–"],
        ["1,024", "–", "–"],
    ]
    common = {"size": "1.3B", "B": 8, "T": 2048, "tokens_per_s": 61460.0}
    rows = [
        {"part": "train", "peer": "ours", **common, "variant": "", "mfu": 0.4963},
        {"part": "train", "peer": "ours", **common, "variant": "autocast", "mfu": 0.43},
        {"part": "train", "peer": "llama", **common, "variant": "", "error": "no"},
        {"part": "prefill", "peer": "llama", **common, "wall_ms": 17.85, "peak_over_weights_mib": 517.0},
        {"part": "decode", "peer": "ours", **common, "cache_mib": 7.2},
    ]
    _benchmark(tmp_path, speed_page.MODEL, rows)
    assert _rows(speed_page.training_throughput(tmp_path))[2:] == [["DeltaNet", "8 × 2,048", "61,460", "50%"]]
    assert _rows(speed_page.reading(tmp_path))[2:] == [["Llama", "2,048", "17.9", "517"]]
    assert _rows(speed_page.context(tmp_path))[2:] == [["DeltaNet", "8", "2,048", "61,460", "7"]]
