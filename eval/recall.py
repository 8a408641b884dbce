"""The recall tasks' metric, for the YAML files in `tasks/`."""

from lm_eval.tasks.swde.task import contains_score


def contains(doc: dict, results: list[str]) -> dict[str, int]:
    """1 where the generated text contains the value as it stands in the data, in any case: task version 0."""
    return {"contains": contains_score(results[0], [doc["value"]])}


def contains_stripped(doc: dict, results: list[str]) -> dict[str, int]:
    """The same for the value without surrounding spaces: task version 1."""
    return {"contains": contains_score(results[0], [doc["value"].strip()])}
