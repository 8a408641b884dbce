"""The shipped configurations of accelerate: each is read by it, says what its name says, and launches a run."""

import subprocess
import sys

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from transformers import AutoModelForCausalLM

from deltanet.modeling_deltanet import DeltaNetForCausalLM
from deltanet.train.__main__ import CONFIGURATIONS

KINDS = {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}


def test_all_are_known():
    assert {path.stem for path in CONFIGURATIONS.iterdir()} == KINDS.keys()


@pytest.mark.parametrize("name", KINDS)
def test_configuration(name):
    config = load_config_from_file(str(CONFIGURATIONS / f"{name}.yaml"))
    assert config.distributed_type.value == KINDS[name]
    # The recipe's precision would otherwise be another than the one in force.
    assert config.mixed_precision == "no"


def test_fsdp_settings_reach_the_processes():
    words = ["--config_file", str(CONFIGURATIONS / "fsdp2.yaml"), "--num_processes", "2", "script.py"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    settings = prepare_multi_gpu_env(arguments)
    assert settings["ACCELERATE_USE_FSDP"] == "true" and settings["FSDP_VERSION"] == "2"
    assert settings["FSDP_TRANSFORMER_CLS_TO_WRAP"] in DeltaNetForCausalLM._no_split_modules
    assert settings["FSDP_STATE_DICT_TYPE"] == "FULL_STATE_DICT"


def test_launch(tmp_path):
    """The command of the documentation, where there is no GPU: two processes on CPUs."""
    values = {"output": tmp_path / "run", "tokens": 2048, "warmup_tokens": 0, "log_every": 1, "device_batch": 2}
    small = {"model.vocab_size": 300, "model.hidden_size": 32, "model.num_hidden_layers": 1, "model.intermediate_size": 32}
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGURATIONS / "ddp.yaml")]
    command = [*launcher, "--num_processes", "2", "--main_process_port", "0", "-m", "deltanet.train", "tiny"]
    flags = [f"--{name}={value}" for name, value in {**values, **small}.items()]
    printed = subprocess.run([*command, *flags], cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert printed.count("step 2/2 100.00% | loss") == 1 and printed.count("The model is in") == 1
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run/model").config.hidden_size == 32
