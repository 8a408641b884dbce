"""The package's code as files of a Hub repository: nothing is left out, and what cannot be carried over is refused."""

from pathlib import Path

import pytest
from publishing import copy_package, edit
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.models.auto import modeling_auto

from deltanet import DeltaNetConfig
from deltanet.publish.flatten import AUTO_MAP, PACKAGE, flattened_code, write_code


def tiny_package(directory: Path) -> Path:
    """What a package must have, and two files to import from."""
    (directory / "kernels").mkdir()
    (directory / "configuration_deltanet.py").write_text('DELTA_LAYER_TYPE = "linear_attention_delta"\n')
    (directory / "kernels/delta_rule.py").write_text('NAMESPACE = "deltanet"\n')
    (directory / "kernels/checks.py").write_text("MAX_K = 256\n")
    (directory / "kernels/reference.py").write_text("CHUNK = 64\n")
    return directory


def test_no_file_is_left_out(tmp_path):
    """By the loader's own rule: what it copies for the model is what the package's modules import."""
    write_code(tmp_path)
    loaded = {Path(path).name for path in get_relative_import_files(tmp_path / "modeling_deltanet.py")}
    written = {path.name for path in tmp_path.iterdir()}
    assert loaded <= written
    package = [*PACKAGE.glob("*_deltanet.py"), *PACKAGE.glob("kernels/**/*.py")]
    assert {path.relative_to(PACKAGE).as_posix().replace("/", "_") for path in package} == written


def test_new_files_are_taken(tmp_path):
    package = copy_package(tmp_path / "package")
    (package / "kernels/more.py").write_text("EXTRA = 1\n")
    (package / "more_deltanet.py").write_text("from .kernels.more import EXTRA\n")
    edit(package / "modeling_deltanet.py", "from .layout", "from .more_deltanet import EXTRA\nfrom .layout")
    code = flattened_code(package)
    assert "EXTRA = 1" in code.files["kernels_more.py"]
    assert "from .kernels_more import EXTRA" in code.files["more_deltanet.py"]
    assert code.revision != flattened_code().revision


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("from . import checks", "cannot carry over"),
        ("from .checks import (MAX_K); from .reference import CHUNK", "cannot carry over"),
        ("from .absent import name", "cannot carry over"),
        ("from .deep.file import name", "cannot carry over"),
        ("from ..layout_deltanet import TokenLayout", "cannot carry over"),
        ("try:\n    import deltanet.kernels.checks\nexcept ImportError: pass", "deltanet.kernels.checks"),
        ("try:\n    from kernels.checks import MAX_K\nexcept ImportError: pass", "kernels.checks"),
        ("import triton", "outside `try`"),
        ("import importlib; importlib.import_module('x')", "import_module"),
        ("TABLE = open(__file__ + '.json')", "__file__"),
        ("OPERATOR = 'deltanet::more'", "NAMESPACE"),
        ("LIBRARY = torch.library.Library('deltanet', 'FRAGMENT')", "NAMESPACE"),
        ("OPERATOR = torch.ops.deltanet.chunk_delta_rule", "NAMESPACE"),
        ("NAMESPACE = 'deltanet'", "NAMESPACE"),
        ("LAYER = 'linear_attention_delta'", "DELTA_LAYER_TYPE"),
    ],
)
def test_what_cannot_be_carried_over_is_refused(tmp_path, line, message):
    package = tiny_package(tmp_path)
    (package / "kernels/more.py").write_text(f"{line}\n")
    with pytest.raises(ValueError, match=message) as caught:
        flattened_code(package)
    assert "kernels/more.py" in str(caught.value)


@pytest.mark.parametrize("text", ["", 'NAMESPACE = f"{__name__}"\n', 'NAMESPACE = "a"\nNAMESPACE = "b"\n'])
def test_namespace_must_be_found(tmp_path, text):
    package = tiny_package(tmp_path)
    (package / "kernels/delta_rule.py").write_text(text)
    with pytest.raises(ValueError, match="kernels/delta_rule.py: expected one line `NAMESPACE = "):
        flattened_code(package)


def test_only_operators_are_in_the_namespace(tmp_path):
    package = tiny_package(tmp_path)
    text = 'import logging\nlogger = logging.getLogger("deltanet")\nMESSAGE = "deltanet has no such operator"\n'
    (package / "kernels/more.py").write_text(text)
    assert text in flattened_code(package).files["kernels_more.py"]


def test_names_in_process_wide_tables_carry_the_revision():
    code = flattened_code()
    assert f'NAMESPACE = "deltanet_{code.revision}"' in code.files["kernels_delta_rule.py"]
    assert f'DELTA_LAYER_TYPE = "linear_attention_delta_{code.revision}"' in code.files["configuration_deltanet.py"]


def test_an_import_that_only_the_loader_sees_is_refused(tmp_path):
    """Transformers reads docstrings, too."""
    package = tiny_package(tmp_path)
    (package / "more_deltanet.py").write_text('"""Usage:\n\n    from .kernels.delta_rule import chunk_delta_rule\n"""\n')
    with pytest.raises(ValueError, match="kernels.delta_rule.py"):
        write_code(tmp_path, package)


def test_auto_map_names_what_the_package_registers():
    for name, reference in AUTO_MAP.items():
        if name != "AutoConfig":
            assert getattr(modeling_auto, name)._model_mapping[DeltaNetConfig].__name__ == reference.split(".")[1]
    assert AUTO_MAP["AutoConfig"].endswith(f".{DeltaNetConfig.__name__}")
