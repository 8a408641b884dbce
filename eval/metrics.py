"""The numbers in lm-eval's results."""


def numbers(results: dict):
    """All numbers of a run as (task, metric, value, standard error or `None`), without RULER's lengths that did not run."""
    for task, result in results.items():
        for key, value in result["metrics"].items():
            metric, _, filtered = key.partition(",")
            unused = task.startswith("niah_") and value == -1
            if not filtered or metric.endswith("_stderr") or unused or not isinstance(value, (int, float)):
                continue
            error = result["metrics"].get(f"{metric}_stderr,{filtered}")
            yield task, metric, value, error if isinstance(error, (int, float)) else None
