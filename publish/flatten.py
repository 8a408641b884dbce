"""The package's model code as Hub custom code, which takes no sub-packages: `kernels/x.py` becomes `kernels_x.py`.

Every `*_deltanet.py` of the package's root and every `kernels/*.py` is taken, and each copy gets names of its own in the
process-wide tables of torch and Transformers, so that two revisions can be loaded side by side.
"""

import ast
import functools
import hashlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from transformers.dynamic_module_utils import get_imports, get_relative_imports

PACKAGE = Path(__file__).resolve().parents[1]

AUTO_MAP = {
    "AutoConfig": "configuration_deltanet.DeltaNetConfig",
    "AutoModel": "modeling_deltanet.DeltaNetModel",
    "AutoModelForCausalLM": "modeling_deltanet.DeltaNetForCausalLM",
    "AutoModelForSequenceClassification": "modeling_deltanet.DeltaNetForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_deltanet.DeltaNetForTokenClassification",
}

# Constants that name entries of process-wide tables: torch's operators, and Transformers' cache layers. Copies with
# equal contents share an entry, which is harmless; others must not.
_NAMESPACES = {"configuration_deltanet.py": "DELTA_LAYER_TYPE", "kernels/delta_rule.py": "NAMESPACE"}

# What the reader of a repository has; every other import belongs inside `try`.
_AVAILABLE = {"huggingface_hub", "torch", "transformers", *sys.stdlib_module_names}


class FlatCode(NamedTuple):
    """Custom code for the Hub."""

    revision: str  # hash of the contents; part of the names in process-wide tables
    files: dict[str, str]  # name to text


def write_code(directory: Path, package: Path = PACKAGE) -> str:
    """Write the code of a Hub repository, made from the files of `package`, and return its revision.

    Raises:
        ValueError: as `flattened_code`; or the loader of Transformers would look for a file that is not there.
    """
    code = flattened_code(package)
    for name, text in code.files.items():
        (directory / name).write_text(text, encoding="utf-8")
    for name in code.files:
        missing = {f"{module}.py" for module in get_relative_imports(directory / name)} - code.files.keys()
        if missing:
            raise ValueError(f"{name}: the loader of Transformers reads docstrings too and would miss {sorted(missing)}.")
    return code.revision


@functools.cache
def flattened_code(package: Path = PACKAGE) -> FlatCode:
    """The code of a Hub repository, made from the files of `package`.

    Raises:
        ValueError: a file cannot be carried over, naming file, line and what is allowed. Relative imports may be
            `from .x import y` and `from .kernels.x import y` (inside `kernels/`, `from .x import y`), each naming a file
            that is taken; other packages than torch, transformers and huggingface_hub are imported inside `try`.
    """
    paths = [*sorted(package.glob("*_deltanet.py")), *sorted((package / "kernels").glob("*.py"))]
    sources = {path.relative_to(package).as_posix(): path.read_text(encoding="utf-8") for path in paths}
    namespaces, texts = _namespaces(sources), {}
    for path, (name, text) in zip(paths, sources.items()):
        missing = sorted(set(get_imports(path)) - _AVAILABLE)
        if missing:
            raise ValueError(f"{name}: {missing} imported outside `try`; a reader may not have it.")
        tree = ast.parse(text)
        _check_names(name, tree)
        _check_namespaces(name, tree, namespaces)
        texts[name] = _rewrite_imports(name, text, tree, sources)
    digest = hashlib.sha256("".join(f"{name}\n{text}" for name, text in texts.items()).encode()).hexdigest()[:12]
    for name, constant in _NAMESPACES.items():
        texts[name] = re.sub(rf'(?m)^({constant} = "\w+)"$', rf'\1_{digest}"', texts[name])
    header = f"# Written by `python -m deltanet.publish`, revision {digest}; edit the package, not this copy.\n"
    return FlatCode(digest, {flat_name(name): header + text for name, text in texts.items()})


def flat_name(name: str) -> str:
    """`kernels/x.py` -> `kernels_x.py`."""
    return name.replace("/", "_")


def _rewrite_imports(name: str, text: str, tree: ast.Module, sources: dict[str, str]) -> str:
    lines = text.splitlines(keepends=True)
    folder = "kernels/" if name.startswith("kernels/") else ""
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        target = f"{folder}{(node.module or '').replace('.', '/')}.py"
        line = lines[node.lineno - 1]
        written = f"from .{node.module} import "
        # The loader of Transformers finds imports line by line with a regular expression.
        if node.level > 1 or target not in sources or not line.lstrip().startswith(written):
            raise ValueError(
                f"{name}:{node.lineno}: cannot carry over `{line.strip()}`. Write `from .x import y` or "
                "`from .kernels.x import y` on a line of its own, x being a root *_deltanet.py or a file of kernels/."
            )
        module = flat_name(target).removesuffix(".py")
        lines[node.lineno - 1] = line.replace(written, f"from .{module} import ", 1)
    return "".join(lines)


def _check_names(name: str, tree: ast.Module) -> None:
    """Refuse what the loader does not see: imports by name, files beside the code, the package by its absolute name."""
    for node in ast.walk(tree):
        used = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else None
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            modules = [node.module]
        own = [module for module in modules if module.split(".")[0] in ("deltanet", "kernels")]
        if own or used in ("__file__", "__import__", "import_module"):
            raise ValueError(f"{name}:{node.lineno}: {own or used} cannot be carried over to a Hub repository.")


def _namespaces(sources: dict[str, str]) -> dict[str, str]:
    """The values of `_NAMESPACES`, value to constant."""
    values = {}
    for name, constant in _NAMESPACES.items():
        found = re.findall(rf'(?m)^{constant} = "(\w+)"$', sources.get(name, ""))
        if len(found) != 1:
            raise ValueError(f'{name}: expected one line `{constant} = "..."`, found {len(found)}.')
        values[found[0]] = constant
    return values


def _check_namespaces(name: str, tree: ast.Module, namespaces: dict[str, str]) -> None:
    """Refuse a namespace spelled out where its constant belongs: copies would share what must be their own.

    Spelled out are, for the operators, "deltanet", "deltanet::operator" and `torch.ops.deltanet`.
    """
    for node in _nodes_to_check(name, tree):
        value = node.attr if isinstance(node, ast.Attribute) else getattr(node, "value", None)
        constant = namespaces.get(value.split("::")[0]) if isinstance(value, str) else None
        if constant:
            raise ValueError(f"{name}:{node.lineno}: write the constant {constant} in place of {value!r}.")


def _nodes_to_check(name: str, node: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a tree without the definition of its namespace and the names of loggers, which may say "deltanet"."""
    if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == _NAMESPACES.get(name):
        return
    if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "getLogger":
        return
    yield node
    for child in ast.iter_child_nodes(node):
        yield from _nodes_to_check(name, child)
