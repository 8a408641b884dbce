"""The model card of a published checkpoint, and its results in the two forms that the Hub reads.

Results are a JSON list, one object a number:

    {"task": "lambada_openai", "dataset": "EleutherAI/lambada_openai", "metric": "acc", "value": 0.484,
     "stderr": 0.007, "settings": {"num_fewshot": 0, "dtype": "bfloat16"}}

`task`, `metric` and `value` are required; the others may be missing or null. `dataset` is the benchmark's id on the Hub. All
results are in the card; those with a dataset are in `.eval_results/`, too, of several for one task the first, because a
leaderboard takes one number a task. (The Hub shows there what a benchmark's own `eval.yaml` names as a task.)
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml
from transformers import PreTrainedConfig

EVAL_RESULTS_FILE = ".eval_results/deltanet.yaml"

PIPELINE_TAGS = {
    "DeltaNetForCausalLM": "text-generation",
    "DeltaNetForSequenceClassification": "text-classification",
    "DeltaNetForTokenClassification": "token-classification",
    "DeltaNetModel": "feature-extraction",
}

_KINDS = {
    "task": (str,),
    "dataset": (str,),
    "metric": (str,),
    "value": (int, float),
    "stderr": (int, float),
    "settings": (dict,),
}
_REQUIRED_KEYS = {"task", "metric", "value"}


@dataclass
class Statement:
    """What a publisher says of a checkpoint. Nothing is guessed: what is None or empty is called not stated."""

    license: str | None = None  # identifier of the Hub, such as "apache-2.0"; required
    languages: list[str] = field(default_factory=list)
    datasets: list[str] = field(default_factory=list)  # ids of the training data
    base_model: str | None = None
    tags: list[str] = field(default_factory=list)
    training: str | None = None  # Markdown: how it was trained
    results: list[dict] = field(default_factory=list)  # of the form above

    def __post_init__(self):
        check_results(self.results, "Statement")


@dataclass
class Facts:
    """What the export measured."""

    name: str
    architecture: str
    config: PreTrainedConfig
    num_parameters: int
    dtype: str
    code_revision: str
    origin: str  # where the weights come from, and their hash


def read_results(path: str | Path) -> list[dict]:
    """The results in a JSON file of the form above; raises `ValueError` naming the entry and the key."""
    results = json.loads(Path(path).read_text(encoding="utf-8"))
    check_results(results, str(path))
    return results


def check_results(results: list[dict], where: str) -> None:
    """Raise `ValueError`, saying `where` and which entry, for results of another form."""
    if not isinstance(results, list):
        raise ValueError(f"{where}: results are a {type(results).__name__}; they must be a list of objects.")
    for number, result in enumerate(results):
        entry = f"{where}, entry {number}"
        if not isinstance(result, dict) or not _REQUIRED_KEYS <= set(result) <= _KINDS.keys():
            raise ValueError(f"{entry}: the keys must be {sorted(_REQUIRED_KEYS)} and may be {sorted(_KINDS)}.")
        for key, value in result.items():
            optional = value is None and key not in _REQUIRED_KEYS
            if not optional and not (isinstance(value, _KINDS[key]) and _is_finite(value)):
                kinds = " or ".join(kind.__name__ for kind in _KINDS[key])
                raise ValueError(f"{entry}: `{key}` is {value!r}; it must be {kinds}, and numbers finite.")


def _is_finite(value) -> bool:
    return not isinstance(value, bool) and (not isinstance(value, float) or math.isfinite(value))


def results_of_card(card: ModelCard) -> list[dict]:
    """The results in the metadata of a card, without those that are not of the form above, such as "20.0 ± 1.2"."""
    results = []
    for entry in card.data.eval_results or []:
        settings = dict(entry.metric_args) if isinstance(entry.metric_args, dict) else {}
        result = {
            "task": entry.dataset_name,
            "dataset": entry.dataset_type if "/" in str(entry.dataset_type) else None,
            "metric": entry.metric_type,
            "value": entry.metric_value,
            "stderr": settings.pop("stderr", None),
            "settings": settings or None,
        }
        try:
            check_results([result], "card")
        except ValueError:
            continue
        results.append(result)
    return results


def eval_results(results: list[dict]) -> str | None:
    """The text of `.eval_results/deltanet.yaml`, or None where no result names its dataset."""
    entries = {}
    for result in results:
        if result.get("dataset"):
            entry = EvalResultEntry(
                dataset_id=result["dataset"],
                task_id=result["task"],
                value=result["value"],
                notes=", ".join([result["metric"], *_settings(result)]),
            )
            entries.setdefault((entry.dataset_id, entry.task_id), entry)
    if not entries:
        return None
    return yaml.safe_dump(eval_result_entries_to_yaml(list(entries.values())), sort_keys=False)


def model_card(statement: Statement, facts: Facts) -> str:
    """README.md: metadata in YAML, then text."""
    metadata = ModelCardData(
        license=statement.license,
        language=statement.languages or None,
        library_name="transformers",
        pipeline_tag=PIPELINE_TAGS[facts.architecture],
        tags=sorted({"delta_net", "linear-attention", "custom_code", "arxiv:2406.06484", *statement.tags}),
        datasets=statement.datasets or None,
        base_model=statement.base_model,
        eval_results=[_model_index_entry(result) for result in statement.results] or None,
        model_name=facts.name if statement.results else None,
    )
    sections = {
        f"# {facts.name}": _introduction(facts),
        "## Use": _usage(facts),
        "## Training data": ", ".join(f"[{x}](https://huggingface.co/datasets/{x})" for x in statement.datasets),
        "## How it was trained": statement.training,
        "## Results": _results_table(statement.results),
        "## Origin": _origin(facts),
    }
    body = "\n\n".join(f"{title}\n\n{(text or 'Not stated.').strip()}" for title, text in sections.items())
    return f"---\n{metadata.to_yaml()}\n---\n\n{body}\n"


def _model_index_entry(result: dict) -> EvalResult:
    arguments = {**(result.get("settings") or {}), "stderr": result.get("stderr")}
    return EvalResult(
        task_type="text-generation",
        dataset_type=result.get("dataset") or result["task"],
        dataset_name=result["task"],
        metric_type=result["metric"],
        metric_value=result["value"],
        metric_args={key: value for key, value in arguments.items() if value is not None} or None,
    )


def _mixers(config: PreTrainedConfig) -> str:
    mixers = [f"{config.num_hidden_layers - len(config.attention_specs)} with the delta rule"]
    for window in sorted({spec["window_size"] or 0 for spec in config.attention_specs.values()}):
        layers = [layer for layer, spec in sorted(config.attention_specs.items()) if (spec["window_size"] or 0) == window]
        reach = f"a window of {window:,} tokens" if window else "the whole context"
        mixers.append(f"{len(layers)} with softmax attention over {reach} ({', '.join(map(str, layers))}, counted from 0)")
    return ", ".join(mixers)


def _introduction(facts: Facts) -> str:
    config = facts.config
    rows = {
        "parameters": f"{facts.num_parameters:,}",
        "dtype of the weights": facts.dtype,
        "layers": _mixers(config),
        "width, heads": f"{config.hidden_size}, {config.num_heads}",
        "vocabulary": f"{config.vocab_size:,}",
        "length trained on": f"{config.max_position_embeddings:,}",
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return (
        "A DeltaNet: a linear transformer whose layers keep an associative memory of constant size and correct it with the "
        f"delta rule ([arXiv 2406.06484](https://arxiv.org/abs/2406.06484)).\n\n| | |\n|---|---|\n{table}"
    )


def _usage(facts: Facts) -> str:
    auto_class = "AutoModel" + facts.architecture.removeprefix("DeltaNet").removeprefix("Model")
    last_line = "outputs = model(**inputs)"
    if facts.architecture == "DeltaNetForCausalLM":
        last_line = "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0], skip_special_tokens=True))"
    return f"""```python
from transformers import AutoTokenizer, {auto_class}

name = "{facts.name}"
tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
model = {auto_class}.from_pretrained(name, trust_remote_code=True, dtype="auto")
inputs = tokenizer("The delta rule", return_tensors="pt")
{last_line}
```

The code of the model is in this repository and needs torch and transformers (5.17 or newer); with Triton and a GPU its
fused kernels are used. Where the package `deltanet` is imported first, that package is used instead, and
`trust_remote_code` is not needed."""


def _settings(result: dict) -> list[str]:
    return [f"{key} {value}" for key, value in (result.get("settings") or {}).items()]


def _results_table(results: list[dict]) -> str:
    rows = []
    for result in results:
        error = "" if result.get("stderr") is None else f" ± {result['stderr']:.4g}"
        value = f"{result['value']:.4g}{error}"
        rows.append(f"| {result['task']} | {result['metric']} | {value} | {', '.join(_settings(result))} |")
    return "\n".join(["| task | metric | value | settings |", "|---|---|---|---|", *rows]) if rows else ""


def _origin(facts: Facts) -> str:
    code = f"Code written from the package `deltanet`, revision {facts.code_revision}, by `python -m deltanet.publish`."
    return f"{facts.origin}\n\n{code}"
