"""The reference's layouts of 2024 as today's: tensors are renamed and split by rows, no number changes.

* Until February 2025 `mlp.gate_proj` held both halves of the SwiGLU, [2 * intermediate, hidden]: the gate's rows, then
  those of `up_proj`, which did not exist.
* With `norm_first`, the default from June to November 2024 and gone in February 2025, a layer's two norms belonged to
  what they precede: `attn.norm` and `mlp.norm` for today's `attn_norm` and `mlp_norm`.
"""

import re

from .weights import StoredTensor

_NORM = re.compile(r"(.*layers\.\d+\.)(attn|mlp)\.norm\.weight$")
_GATE = re.compile(r"(.*layers\.\d+\.mlp\.)gate_proj\.weight")


def in_todays_layout(
    tensors: dict[str, StoredTensor], fields: dict
) -> tuple[dict[str, StoredTensor], dict, list[str]]:
    """Tensors and fields of the configuration in today's layout, and sentences that say what had to change."""
    changes = []
    norms = [name for name in tensors if _NORM.match(name)]
    if norms:
        tensors = {_NORM.sub(r"\1\2_norm.weight", name): tensor for name, tensor in tensors.items()}
        fields = {key: value for key, value in fields.items() if key != "norm_first"}
        changes.append(f"{len(norms)} norms were renamed, from attn.norm to attn_norm and from mlp.norm to mlp_norm.")
    prefixes = [match[1] for match in map(_GATE.fullmatch, tensors) if match]
    fused = [prefix for prefix in prefixes if f"{prefix}up_proj.weight" not in tensors]
    for prefix in fused:
        tensors = {**tensors, **_split(tensors[f"{prefix}gate_proj.weight"], prefix)}
    if fused:
        changes.append(f"{len(fused)} gate_proj of twice the width were split, the second half of the rows being up_proj.")
    return dict(sorted(tensors.items())), fields, changes


def _split(tensor: StoredTensor, prefix: str) -> dict[str, StoredTensor]:
    rows, shape = tensor.shape[0], (tensor.shape[0] // 2, *tensor.shape[1:])
    if rows % 2:
        raise ValueError(f"{tensor.key} has {rows} rows and there is no up_proj; two halves need an even number.")
    return {
        f"{prefix}gate_proj.weight": tensor._replace(shape=shape, rows=slice(0, rows // 2)),
        f"{prefix}up_proj.weight": tensor._replace(shape=shape, rows=slice(rows // 2, rows)),
    }
