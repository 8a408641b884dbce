"""The suites against the installed lm-eval, local data, and the two versions of the recall tasks."""

import importlib
import json
import re
from pathlib import Path
from types import SimpleNamespace

import lm_eval
import pytest
from datasets import Dataset
from eval_checkpoints import english_like_text, no_environment_report, read_command, save_checkpoint  # noqa: F401
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from deltanet.eval import task_data
from deltanet.eval.cli import main
from deltanet.eval.errors import EvaluationError
from deltanet.eval.paper import compare, load_paper
from deltanet.eval.smoke import held_out_text, smoke_documents
from deltanet.eval.suites import HUB_DATASETS, RECALL, SUITES, TASKS
from deltanet.eval.task_data import load_tasks, task_files, task_manager

STOCK = [
    Path(lm_eval.__file__).parent / "tasks" / name
    for name in ("wikitext", "lambada", "piqa", "hellaswag", "winogrande", "arc", *RECALL, "ruler")
]
DOCUMENTS = {
    "wikitext": {"page": " = A title = \n \n The first sentence , about a river . \n The second one . \n"},
    "lambada_openai": {"text": "The captain asked the captain for the garden and the house and spoke to the garden"},
    "piqa": {"goal": "open a window", "sol1": "push the window", "sol2": "walk the river", "label": 0},
    "hellaswag": {
        "ctx_a": "A captain walked.",
        "ctx_b": "he",
        "activity_label": "Walking",
        "endings": ["spoke to a friend.", "walked the river.", "answered.", "was tired."],
        "label": "1",
    },
    "winogrande": {
        "sentence": "The house was above the river because the _ was little.",
        "option1": "house",
        "option2": "river",
        "answer": "2",
    },
    "arc_easy": {
        "question": "What is a river?",
        "choices": {"text": ["a garden", "a road", "a house", "a window"], "label": ["A", "B", "C", "D"]},
        "answerKey": "B",
    },
    "swde": {"text": "The captain is Smith. The river is Avon. The captain: ", "value": " Smith"},
}
DOCUMENTS |= {"arc_challenge": DOCUMENTS["arc_easy"], "squad_completion": DOCUMENTS["swde"], "fda": DOCUMENTS["swde"]}
SPLITS = {"wikitext": "test", "lambada_openai": "test", "arc_easy": "test", "arc_challenge": "test"}


@pytest.fixture
def quick_index(monkeypatch):
    """lm-eval's index cut down to the folders of the suites: the full one takes many seconds."""

    def manager(include_path=(), include_defaults=True, metadata=None):
        folders = [*(STOCK if include_defaults else []), *include_path]
        return TaskManager(include_path=folders, include_defaults=False, metadata=metadata)

    monkeypatch.setattr(task_data, "TaskManager", manager)


@pytest.fixture
def local_data(tmp_path):
    for task, document in DOCUMENTS.items():
        file = tmp_path / "data" / task / f"{SPLITS.get(task, 'validation')}.jsonl"
        file.parent.mkdir(parents=True)
        file.write_text(3 * (json.dumps(document) + "\n"))
    return tmp_path / "data"


def test_the_suites_name_tasks_of_the_installed_lm_eval(quick_index):
    for suite in SUITES.values():
        manager = task_manager(list(suite.tasks))
        kinds = {manager.task_index[name].kind.name for name in suite.tasks}
        assert kinds <= {"TASK", "PY_TASK"}


def test_the_papers_columns_are_metrics_of_their_tasks(quick_index):
    paper = load_paper()
    manager = task_manager([column["task"] for column in paper["columns"]] + ["piqa"])
    for column in paper["columns"]:
        config = manager.task_index[column["task"]].cfg
        metrics = {metric["metric"]: metric.get("higher_is_better") for metric in config["metric_list"]}
        assert float(config["metadata"]["version"]) == column["version"], column
        name = column["metric"].removesuffix(",none")
        assert metrics[name] in (column["higher_is_better"], None), column
        assert config["dataset_path"] == HUB_DATASETS[column["task"]]


def test_averages_of_the_papers_rows_are_means_of_their_columns():
    paper = load_paper()
    assert {row["size"] for row in paper["rows"]} == {"340M / 15B tokens", "1.3B / 100B tokens"}
    for row in paper["rows"]:
        mean = sum(row["values"][name] for name in paper["average"]["of"]) / 6
        assert row["values"]["Avg"] == pytest.approx(mean, abs=0.1), row["model"]


def test_the_recall_classes_are_version_1_of_lm_eval(quick_index):
    for name in RECALL:
        task_class = load_yaml(task_manager([name]).task_index[name].yaml_path)["class"]
        assert task_class.VERSION == 1
        assert task_class.DATASET_PATH == HUB_DATASETS[name] == HUB_DATASETS[f"{name}_v0"]


def test_paper_and_recall_suites_run_from_local_data(quick_index, local_data, tmp_path):
    model = save_checkpoint(tmp_path / "model")
    common = [model, "--data", str(local_data), "--device", "cpu", "--bootstrap_iters", "0", "--batch_size", "2"]
    paper = main([*common, "--suite", "paper", "--output_path", str(tmp_path / "paper")])
    assert set(paper["results"]) == set(SUITES["paper"].tasks)
    assert paper["paper"]["columns"] == ["Wiki", "LMB ppl", "LMB", "PIQA", "Hella", "Wino", "ARC-e", "ARC-c", "Avg"]
    row = next(row for row in paper["paper"]["rows"] if row["model"] == "DeltaNet (conv)" and "1.3B" in row["size"])
    own = paper["results"]["hellaswag"]["metrics"]["acc_norm,none"] * 100
    assert row["differences"]["Hella"] == pytest.approx(own - 50.2)
    table = (tmp_path / "paper/table.md").read_text()
    assert f"50.2 ({own - 50.2:+.1f})" in table
    assert (tmp_path / "paper/plot.png").stat().st_size > 10_000

    recall = main([*common, "--suite", "recall", "--output_path", str(tmp_path / "recall")])
    versions = {name: result["version"] for name, result in recall["results"].items()}
    assert versions == {f"{name}_v0": 0 for name in RECALL} | {name: 1 for name in RECALL}
    assert recall["paper"]["columns"] == ["SWDE", "SQuAD", "FDA"]
    command = read_command(recall["command"])
    assert command.gen_kwargs == {"until": ["\n"], "max_gen_toks": 48}
    assert command.include_path == str(tmp_path / "recall/task_files")


@pytest.mark.parametrize("name", RECALL)
def test_version_1_from_local_data_is_lm_evals_own_class(quick_index, local_data, tmp_path, monkeypatch, name):
    manager = task_manager([name, f"{name}_v0"])
    specs = task_files(manager, [name, f"{name}_v0"], local_data, tmp_path / "files", fewshot=False)
    tasks = load_tasks(manager, specs, [0, 0])
    task_class = load_yaml(manager.task_index[name].yaml_path)["class"]
    monkeypatch.setattr(task_class, "DATASET_PATH", str(local_data / name))
    monkeypatch.setattr(task_class, "DATASET_NAME", None)
    original = task_class()
    document = DOCUMENTS["swde"]
    assert tasks[name].doc_to_text(document) == original.doc_to_text(document) == document["text"].strip()
    assert tasks[f"{name}_v0"].doc_to_text(document) == document["text"]
    for answer in ("it is SMITH, they say", "Avon", " smith"):
        assert tasks[name].process_results(document, [answer]) == original.process_results(document, [answer])
    # Version 0 wants the space before the value too.
    assert tasks[f"{name}_v0"].process_results(document, ["Smith"]) == {"contains": 0}
    assert tasks[name].process_results(document, ["Smith"]) == {"contains": 1}
    assert tasks[name].config.generation_kwargs == {"until": ["\n"], "max_gen_toks": 48}


def test_missing_data_is_named_in_full(quick_index, local_data, tmp_path):
    (local_data / "piqa/validation.jsonl").unlink()
    (local_data / "arc_easy/test.jsonl").rename(local_data / "arc_easy/train.jsonl")
    manager = task_manager(list(SUITES["paper"].tasks))
    with pytest.raises(EvaluationError, match=r"lacks piqa/validation, arc_easy/test \(\.jsonl or"):
        task_files(manager, list(SUITES["paper"].tasks), local_data, tmp_path / "files", fewshot=False)
    with pytest.raises(EvaluationError, match="winogrande/train"):
        task_files(manager, ["winogrande"], local_data, tmp_path / "files", fewshot=True)


def test_parquet_and_examples_from_the_training_split(quick_index, tmp_path):
    for split, goal in (("train", "shown"), ("validation", "asked")):
        rows = [{**DOCUMENTS["piqa"], "goal": f"{goal} {index}"} for index in range(4)]
        (tmp_path / "piqa").mkdir(exist_ok=True)
        Dataset.from_list(rows).to_parquet(tmp_path / "piqa" / f"{split}.parquet")
    arguments = [save_checkpoint(tmp_path / "model"), "--tasks", "piqa", "--data", str(tmp_path), "--num_fewshot", "2"]
    arguments += ["--output_path", str(tmp_path / "out"), "--device", "cpu", "--log_samples", "--bootstrap_iters", "0"]
    results = main(arguments)
    sample = json.loads((tmp_path / "out/tasks/piqa.samples.jsonl").read_text().splitlines()[0])
    prompt = sample["arguments"][0][0]
    assert prompt.count("Question: shown") == 2 and prompt.count("Question: asked") == 1
    assert "--num_fewshot 2" in results["command"] and results["paper"] is None


def test_other_versions_and_examples_get_no_column():
    metrics = {"contains,none": 0.5}
    zero = {"n_shot": 0, "metrics": metrics}
    results = {"swde_v0": {"version": 0, **zero}, "fda_v0": {"version": 1, **zero}}
    results["squad_completion_v0"] = {**results["swde_v0"], "n_shot": 1}
    comparison = compare(results, load_paper())
    assert comparison["model"] == {"SWDE": 50.0}
    assert compare({"piqa": {"version": 2, "n_shot": 0, "metrics": {"acc,none": 0.5}}}, load_paper()) is None


def test_groups_tags_and_classes_cannot_read_local_data(quick_index, local_data, tmp_path):
    for name in ("ai2_arc", "ruler"):
        with pytest.raises(EvaluationError, match=f"task '{name}' cannot read --data"):
            task_files(task_manager([name]), [name], local_data, tmp_path / "files", fewshot=False)


def test_tasks_of_ones_own_stand_in_the_plain_command(tmp_path, quick_index):
    own = tmp_path / "own"
    own.mkdir()
    (own / "mine.yaml").write_text("task: mine\noutput_type: loglikelihood\ndataset_path: json\ntest_split: test\n")
    manager = task_manager(["mine", "piqa"], own)
    specs = task_files(manager, ["mine", "piqa"], None, tmp_path / "files", fewshot=False)
    assert specs == {"mine": str(tmp_path / "files/mine.yaml"), "piqa": "piqa"}
    assert load_yaml(specs["mine"])["output_type"] == "loglikelihood"


def test_unknown_tasks_get_similar_names(quick_index):
    with pytest.raises(EvaluationError, match="unknown task 'arc_eazy'; similar: arc_easy"):
        task_manager(["piqa", "arc_eazy"])


def test_needle_prompts_have_the_lengths_asked_for(quick_index, tmp_path, monkeypatch):
    # RULER's module fetches sentence data when imported, which these tasks do not use, and sorts six million words.
    words = {kind: [f"{kind}{index}" for index in range(20)] for kind in ("nouns", "adjectives", "verbs")}
    monkeypatch.setattr("nltk.download", lambda name: None)
    monkeypatch.setattr("wonderwords.RandomWord", lambda: SimpleNamespace(_categories=words))
    prepare = importlib.import_module("lm_eval.tasks.ruler.prepare_niah")
    original = prepare.generate_samples
    monkeypatch.setattr(prepare, "generate_samples", lambda *args, **kwargs: original(*args, **{**kwargs, "num_samples": 2}))
    model = save_checkpoint(tmp_path / "model")
    arguments = [model, "--suite", "ruler", "--lengths", "768", "1024", "--device", "cpu", "--batch_size", "4"]
    results = main([*arguments, "--gen_kwargs", "max_gen_toks=4", "--output_path", str(tmp_path / "out")])
    assert results["settings"]["max_length"] == 1024
    command = read_command(results["command"])
    assert command.metadata["max_seq_lengths"] == [768, 1024] and command.metadata["tokenizer"] == model
    assert command.model_args["max_length"] == 1024
    for task in SUITES["ruler"].tasks:
        metrics = results["results"][task]["metrics"]
        assert 0 <= metrics["768,none"] <= 1 and 0 <= metrics["1024,none"] <= 1
        assert results["results"][task]["n_samples"]["effective"] == 4


def test_smoke_documents_are_the_same_each_time_and_answerable():
    text = english_like_text(300)
    documents = smoke_documents(text)
    assert documents == smoke_documents(text)
    flat = " ".join(text.split())
    for document in documents["smoke_last_word"]:
        assert f"{document['context']} {document['word']}" in flat
        assert re.search(rf"\b{document['word']}\b", document["context"]), "it has been there before"
    for document in documents["smoke_choice"]:
        assert f"{document['context']} {document['choices'][document['label']]}" in flat
        assert len(set(document["choices"])) == 4
    assert {document["label"] for document in documents["smoke_choice"]} == {0, 1, 2, 3}
    for document in documents["smoke_needle"]:
        assert document["prompt"].count(document["value"]) == 1
        assert not document["prompt"].endswith(document["value"])
    assert {name for name in documents} == set(SUITES["smoke"].tasks)


def test_the_smoke_text_is_told_when_missing_or_short(tmp_path):
    with pytest.raises(EvaluationError, match=r"smoke\.txt"):
        held_out_text(tmp_path)
    with pytest.raises(EvaluationError, match="gives 1 passages"):
        smoke_documents(english_like_text(8))


def test_task_files_are_shipped():
    shipped = {path.stem for path in TASKS.glob("*.yaml")}
    assert shipped == {*SUITES["smoke"].tasks, *(f"{name}_v0" for name in RECALL)}
