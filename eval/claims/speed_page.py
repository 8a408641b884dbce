"""Tables of what `deltanet.benchmarks` measured on a GPU, for `eval/RESULTS.md`."""

import json
from pathlib import Path

from .markdown import image, not_run, table

RULE, MODEL = "gpu_delta_rule.json", "gpu_model_h100.json"
PEERS = {"ours": "DeltaNet", "llama": "Llama"}
SIZE = "1.3B"


def chunked_over_recurrent(folder: Path) -> str:
    """The paper's Figure 1: milliseconds of both forms by length and head size, and how many times faster the chunked is."""
    times = {
        (row["D"], row["T"], row["peer"]): row["forward"]["wall_ms"]
        for row in _rows(folder / RULE, "figure1")
        if row.get("forward_only")
    }
    sizes, lengths = (sorted({key[part] for key in times}) for part in (0, 1))
    rows = []
    for T in lengths:
        pairs = [(times.get((D, T, "recurrent")), times.get((D, T, "ours"))) for D in sizes]
        rows.append((f"{T:,}", *(f"{a / b:.1f} × ({a:.2f} / {b:.2f})" if a and b else "–" for a, b in pairs)))
    text = table(["length", *(f"head size {D}" for D in sizes)], rows)
    picture = image((folder / RULE).with_suffix(".png"), "Times by shape, and chunked over recurrent")
    return _shown(text, picture, "gpu_delta_rule --part figure1 --peers ours")


def training_throughput(folder: Path) -> str:
    """Tokens a second of forward and backward at 16,384 tokens a batch, by length."""
    rows = [
        (PEERS[row["peer"]], f"{row['B']} × {row['T']:,}", f"{row['tokens_per_s']:,.0f}", f"{row['mfu']:.0%}")
        for row in _models(folder, "train")
        if not row.get("variant")
    ]
    picture = image((folder / MODEL).with_name("gpu_model_h100_training.png"), "Training throughput against length")
    return _shown(table(["model", "batch × length", "tokens/s", "MFU"], rows), picture, "gpu_model --part train")


def reading(folder: Path) -> str:
    """Milliseconds and memory to read a prompt."""
    rows = [
        (PEERS[row["peer"]], f"{row['T']:,}", f"{row['wall_ms']:,.1f}", f"{row['peak_over_weights_mib']:,.0f}")
        for row in _models(folder, "prefill")
    ]
    return _shown(table(["model", "prompt", "ms", "memory beside the weights, MiB"], rows), "", "gpu_model --part prefill")


def context(folder: Path) -> str:
    """Tokens a second and memory of a generated token behind a context."""
    rows = [
        (PEERS[row["peer"]], row["B"], f"{row['T']:,}", f"{row['tokens_per_s']:,.0f}", f"{row['cache_mib']:,.0f}")
        for row in _models(folder, "decode")
    ]
    picture = image((folder / MODEL).with_name("gpu_model_h100_context.png"), "A token against its context")
    heads = ["model", "batch", "context", "tokens/s", "state or keys and values, MiB"]
    return _shown(table(heads, rows), picture, "gpu_model --part decode --peers ours llama")


def _rows(path: Path, part: str) -> list[dict]:
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    return [row for row in rows if row["part"] == part and "error" not in row]


def _models(folder: Path, part: str) -> list[dict]:
    return [row for row in _rows(folder / MODEL, part) if row["size"] == SIZE and row["peer"] in PEERS]


def _shown(text: str, picture: str, command: str) -> str:
    return "\n\n".join(filter(None, [text, picture])) if text else not_run(f"python -m deltanet.benchmarks.{command}")
