"""setup.py and __init__.py: what an installation holds, and what an import costs and needs."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import deltanet

ROOT = Path(__file__).parent.parent
NOT_INSTALLED = ("tests", ".ci")


def tracked():
    """Files under version control, relative to the root."""
    command = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [Path(name) for name in listed.split("\0") if name and (ROOT / name).exists()]


def installed_files():
    """What belongs in an installation: the root's modules, and everything in the folders."""
    files = [path for path in tracked() if path.parts[0] not in NOT_INSTALLED]
    return {path.as_posix() for path in files if len(path.parts) > 1 or path.suffix == ".py" and path.name != "setup.py"}


def modules():
    names = [Path("deltanet", path).with_suffix("").as_posix() for path in installed_files() if path.endswith(".py")]
    return sorted(name.removesuffix("/__init__").replace("/", ".") for name in names)


def python(code, *path, cwd=None):
    """Run code in a new interpreter that looks for modules in `path` first; returns what it prints."""
    places = os.pathsep.join(map(str, path)) if path else os.environ.get("PYTHONPATH", "")
    environment = {**os.environ, "PYTHONPATH": places, "PYTHONSAFEPATH": ""}
    run = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The tracked files in a folder of their own, since a build writes beside its sources."""
    folder = tmp_path_factory.mktemp("clone")
    for path in tracked():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, folder / path)
    return folder


def build(clone, what, output):
    """A wheel by setuptools itself, which needs no network and no environment of its own."""
    code = f"from setuptools import build_meta; print(build_meta.build_{what}({str(output)!r}))"
    return output / python(code, cwd=clone).splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(clone, tmp_path_factory):
    return build(clone, "wheel", tmp_path_factory.mktemp("wheel"))


# What is installed


def test_the_wheel_holds_every_file(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == {f"deltanet/{name}" for name in installed_files()}


def test_the_wheels_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
        assert any(name.endswith("/LICENSE") for name in archive.namelist())
    assert metadata["Name"] == "deltanet" and metadata["Version"] == deltanet.__version__
    assert metadata["License"] == "Apache-2.0" and metadata["Requires-Python"] == ">=3.10"
    assert set(metadata.get_all("Provides-Extra")) >= {"eval", "train", "test"}
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    names = {re.match(r"[\w-]+", line).group() for line in required}
    assert names == {"torch", "transformers", "safetensors", "huggingface_hub"}
    assert "Apache License" in (ROOT / "LICENSE").read_text()


FIND_ALL = """
import importlib.util, deltanet
names = {names!r}
missing = [name for name in names if importlib.util.find_spec(name) is None]
assert not missing, missing
from deltanet.kernels.delta_rule import chunk_delta_rule
print(deltanet.__file__)
"""


def test_the_wheel_is_importable(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    assert Path(python(FIND_ALL.format(names=modules()), tmp_path, cwd=tmp_path)).parent == tmp_path / "deltanet"


def test_an_editable_installation(clone, tmp_path):
    editable = build(clone, "editable", tmp_path)
    site = tmp_path / "site"
    with zipfile.ZipFile(editable) as archive:
        archive.extractall(site)
    # This environment may hold an editable installation of its own, whose finder must not answer.
    forget = """
import site, sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in repr(finder)]
for name in [name for name in sys.modules if name.startswith("__editable__")]:
    del sys.modules[name]
"""
    code = f"{forget}site.addsitedir({str(site)!r})\n{FIND_ALL.format(names=modules())}"
    assert Path(python(code, site, cwd=tmp_path)).parent == clone


def test_the_constraints_are_pins():
    for name in ("constraints.txt", "constraints-floor.txt"):
        lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
        assert {"torch", "transformers"} <= {line.split("==")[0] for line in lines}
        assert all(line.count("==") == 1 for line in lines)


# What an import needs and costs

BLOCK_TRITON = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ImportError("blocked")
sys.meta_path.insert(0, Blocker())
"""


def test_without_triton():
    code = """
import torch
from deltanet import DeltaNetConfig, DeltaNetForCausalLM
sizes = dict(vocab_size=9, hidden_size=16, num_hidden_layers=1, num_heads=2, intermediate_size=16)
model = DeltaNetForCausalLM(DeltaNetConfig(**sizes))
model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
assert "triton" not in sys.modules
print(model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2, do_sample=False).shape[1] <= 5)
"""
    assert python(BLOCK_TRITON + code) == "True"


def test_importing_touches_no_gpu():
    code = """
import torch, transformers.modeling_utils, transformers.generation
def refuse(*args, **kwargs):
    raise AssertionError("the import asked for a GPU")
for name in ("_lazy_init", "init", "is_available", "device_count", "current_device", "get_device_capability",
             "get_device_properties", "get_device_name"):
    setattr(torch.cuda, name, refuse)
for name in ("is_available", "device_count", "current_accelerator"):
    setattr(torch.accelerator, name, refuse)
import deltanet
print("imported")
"""
    assert python(code) == "imported"


def test_importing_is_quick():
    """Under 0.3 s beyond what every model of Transformers imports; processor time, which a busy machine stretches less."""
    code = """
import time, torch, transformers.modeling_utils, transformers.generation
start = time.process_time()
import deltanet
print(time.process_time() - start)
"""
    assert min(float(python(code)) for _ in range(2)) < 0.3


# The root as the working directory


def test_kernels_is_a_plain_folder():
    assert (ROOT / "kernels" / "delta_rule.py").exists() and not (ROOT / "kernels" / "__init__.py").exists()


def test_hugging_faces_kernels_are_found_from_the_root(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("mark = 'theirs'\n")
    assert python("import kernels; print(kernels.mark)", tmp_path, cwd=ROOT) == "theirs"


def test_transformers_works_from_the_root():
    code = """
import json
import transformers.integrations.hub_kernels
from transformers import LlamaConfig, LlamaForCausalLM
sizes = dict(vocab_size=9, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
model = LlamaForCausalLM(LlamaConfig(**sizes))
from transformers import AutoConfig
import deltanet
print(json.dumps([model.config.model_type, AutoConfig.for_model("delta_net").model_type]))
"""
    assert json.loads(python(code, cwd=ROOT)) == ["llama", "delta_net"]
