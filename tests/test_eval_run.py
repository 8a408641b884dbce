"""`python -m deltanet.eval`: one run of the smoke suite, what it writes, resuming, and the same through plain lm-eval."""

import json
import subprocess
import sys

import pytest
import torch
from eval_checkpoints import english_like_text, no_environment_report, read_command, save_checkpoint  # noqa: F401
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from deltanet.eval import runner
from deltanet.eval.cli import main
from deltanet.eval.runner import DeltaNetLM

METRICS = {
    "smoke_perplexity": "bits_per_byte,none",
    "smoke_last_word": "perplexity,none",
    "smoke_choice": "acc_norm,none",
    "smoke_needle": "contains,none",
}


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """Arguments of a run, its directory and its results."""
    folder = tmp_path_factory.mktemp("eval")
    (folder / "smoke.txt").write_text(english_like_text(200))
    model = save_checkpoint(folder / "model")
    common = [model, "--data", str(folder), "--limit", "5", "--bootstrap_iters", "0", "--device", "cpu", "--batch_size", "4"]
    arguments = [*common, "--suite", "smoke", "--output_path", str(folder / "out"), "--log_samples"]
    return {"folder": folder, "common": common, "arguments": arguments, "results": main(arguments)}


def test_every_output_type_gives_its_metric(smoke):
    results = smoke["results"]["results"]
    assert list(results) == list(METRICS)
    for task, metric in METRICS.items():
        assert results[task]["metrics"][metric] >= 0
        assert results[task]["n_samples"]["effective"] == 5
    samples = (smoke["folder"] / "out/tasks/smoke_needle.samples.jsonl").read_text().splitlines()
    assert len(samples) == 5 and all(json.loads(line)["arguments"][0][0].endswith(" is") for line in samples)


def test_results_say_what_they_depend_on(smoke):
    results = smoke["results"]
    assert results["versions"]["lm-eval"] and results["versions"]["torch"] == torch.__version__
    assert results["settings"]["softmax_dtype"] == "float32" and results["settings"]["max_length"] == 256
    assert results["tokens"]["add_bos_token"] is False
    assert (results["tokens"]["prefix_token"], results["tokens"]["eos_token"]) == ("<s>", "</s>")
    table = (smoke["folder"] / "out/table.md").read_text()
    assert "add_bos_token False" in table and "these numbers compare with nothing" in table
    assert (smoke["folder"] / "out/plot.png").read_bytes().startswith(b"\x89PNG")


def test_card_results_have_the_documented_form(smoke):
    card = json.loads((smoke["folder"] / "out/card_results.json").read_text())
    entry = next(entry for entry in card if (entry["task"], entry["metric"]) == ("smoke_choice", "acc_norm"))
    assert entry["value"] == smoke["results"]["results"]["smoke_choice"]["metrics"]["acc_norm,none"]
    assert entry["settings"] == {
        "num_fewshot": 0,
        "version": 1,
        "dtype": "float32",
        "max_length": 256,
        "add_bos_token": False,
        "limit": 5.0,
    }
    assert all({"task", "metric", "value"} <= set(entry) for entry in card)


def test_plain_lm_eval_gives_the_same_numbers(smoke):
    config = read_command(smoke["results"]["command"])
    plain = simple_evaluate(
        model=config.model,
        model_args=config.model_args,
        tasks=config.tasks,
        task_manager=TaskManager(include_path=config.include_path, include_defaults=False),
        limit=config.limit,
        batch_size=config.batch_size,
        device=config.device,
        bootstrap_iters=0,
    )
    assert config.model == "hf" and config.model_args["add_bos_token"] is False
    for task in METRICS:
        own = smoke["results"]["results"][task]["metrics"]
        for metric, value in plain["results"][task].items():
            if metric != "name" and isinstance(value, float):
                assert own[metric] == pytest.approx(value, rel=1e-6), (task, metric)


def test_a_second_run_keeps_results_and_a_changed_one_does_not(smoke, monkeypatch):
    evaluated = []
    original = runner._evaluate

    def noted(lm, task, *rest):
        evaluated.append(task.task_name)
        return original(lm, task, *rest)

    monkeypatch.setattr(runner, "_evaluate", noted)
    monkeypatch.setattr(runner, "DeltaNetLM", lambda **kwargs: pytest.fail("the model was loaded"))
    assert main(smoke["arguments"])["results"] == smoke["results"]["results"]

    monkeypatch.setattr(runner, "DeltaNetLM", DeltaNetLM)
    stored = smoke["folder"] / "out/tasks/smoke_choice.json"
    stored.write_text(stored.read_text()[:100])
    assert main(smoke["arguments"])["results"] == smoke["results"]["results"]
    assert evaluated == ["smoke_choice"]

    main([*smoke["common"], "--tasks", "smoke_needle", "--output_path", str(smoke["folder"] / "out"), "--add_bos_token"])
    assert evaluated == ["smoke_choice", "smoke_needle"]


def test_a_task_that_fails_leaves_the_others(smoke, monkeypatch):
    original = runner._evaluate

    def fails_at_choice(lm, task, *rest):
        if task.task_name == "smoke_choice":
            raise RuntimeError("interrupted")
        return original(lm, task, *rest)

    monkeypatch.setattr(runner, "_evaluate", fails_at_choice)
    out = smoke["folder"] / "cut"
    with pytest.raises(RuntimeError, match="interrupted"):
        main([*smoke["common"], "--tasks", "smoke_needle,smoke_choice", "--output_path", str(out)])
    assert [path.name for path in (out / "tasks").iterdir()] == ["smoke_needle.json"]


def test_a_batch_that_does_not_fit_is_halved(smoke, monkeypatch):
    sizes = []
    original = runner.simple_evaluate

    def out_of_memory_above_two(lm, **kwargs):
        sizes.append(lm.batch_size)
        if lm.batch_size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(lm, **kwargs)

    monkeypatch.setattr(runner, "simple_evaluate", out_of_memory_above_two)
    results = main([*smoke["common"], "--tasks", "smoke_choice", "--output_path", str(smoke["folder"] / "halved")])
    assert sizes == [4, 2]
    halved, whole = (run["results"]["smoke_choice"]["metrics"]["acc_norm,none"] for run in (results, smoke["results"]))
    assert halved == whole


def test_two_processes_share_the_work_and_agree(smoke):
    out = smoke["folder"] / "two"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "deltanet.eval"]
    run = [*launch, *smoke["common"], "--suite", "smoke", "--output_path", str(out)]
    subprocess.run(run, check=True, capture_output=True, timeout=300)
    results = json.loads((out / "results.json").read_text())["results"]
    for task, metric in METRICS.items():
        assert results[task]["processes"] == 2
        expected = smoke["results"]["results"][task]["metrics"][metric]
        assert results[task]["metrics"][metric] == pytest.approx(expected, rel=1e-5), task
