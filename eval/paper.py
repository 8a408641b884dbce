"""The paper's Table 1 beside a run."""

import json

from .suites import TASKS


def load_paper() -> dict:
    """`tasks/paper.json`: the columns with the task and metric that each is, and the rows as printed."""
    return json.loads((TASKS / "paper.json").read_text(encoding="utf-8"))


def compare(results: dict, paper: dict) -> dict | None:
    """
    The run's numbers in the paper's units and their differences from each of its rows.

    A column is filled only by the task version that the paper ran, without examples. Returns `None` where none was run; else
    `columns` (names), `decimals` (as the paper prints), `model` (values by column), `rows` (`model`, `size`, `values`,
    `differences`) and `source`.
    """
    own = {}
    for column in paper["columns"]:
        result = results.get(column["task"])
        if result and float(result["version"]) == column["version"] and not result["n_shot"]:
            own[column["name"]] = result["metrics"][column["metric"]] * column["scale"]
    average = paper["average"]
    if all(name in own for name in average["of"]):
        own[average["name"]] = sum(own[name] for name in average["of"]) / len(average["of"])
    if not own:
        return None
    order = [name for name in paper["rows"][0]["values"] if name in own]
    rows = [
        {
            "model": row["model"],
            "size": row["size"],
            "values": {name: row["values"][name] for name in order},
            "differences": {name: own[name] - row["values"][name] for name in order},
        }
        for row in paper["rows"]
    ]
    perplexities = {column["name"] for column in paper["columns"] if column["scale"] == 1}
    return {
        "columns": order,
        "decimals": {name: 2 if name in perplexities else 1 for name in order},
        "model": {name: own[name] for name in order},
        "rows": rows,
        "source": paper["source"],
    }
