"""Training runs under accelerate's FSDP2 on two processes without a GPU, for test_train_fsdp.py.

accelerate takes CPUs for DDP, whatever its configuration says; told that these are GPUs, it divides the model.
"""

import dataclasses
import os

from accelerate import PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from launching import join, report
from torch.distributed.tensor import DTensor
from train_worker import interrupted_at

from deltanet.fused_deltanet import _is_divided
from deltanet.train import portable, run
from deltanet.train.__main__ import CONFIGURATIONS
from deltanet.train.recipe import load_recipe


def divide():
    """What `accelerate launch --config_file fsdp2.yaml` sets, and GPUs where there are none."""
    words = ["--config_file", str(CONFIGURATIONS / "fsdp2.yaml"), "--num_processes", "2", "script.py"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    settings = prepare_multi_gpu_env(arguments)
    os.environ.update({name: x for name, x in settings.items() if name.startswith(("FSDP_", "ACCELERATE_"))})
    begin = portable.PortableTrainer.__init__

    def begin_divided(self, *arguments, **keywords):
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        begin(self, *arguments, **keywords)
        assert self.is_fsdp_enabled

    portable.PortableTrainer.__init__ = begin_divided


def main():
    join()
    divide()
    recipe = load_recipe("recipe.yaml", {})
    to = lambda name: dataclasses.replace(recipe, output=name)  # noqa: E731
    divided = []
    loaded = portable.PortableTrainer._prepare_for_training

    def watched(self, *arguments):
        result = loaded(self, *arguments)
        whole = not all(isinstance(parameter, DTensor) for parameter in self.model.parameters())
        divided.append(not whole and _is_divided(self.model.lm_head))
        return result

    portable.PortableTrainer._prepare_for_training = watched
    run.train(to("divided"))
    interrupted_at(3, to("divided-at-3"))
    run.train(to("divided-at-3"))
    interrupted_at(3, to("divided-to-one"))
    run.train(to("one-to-divided"))
    report({"divided": divided})


if __name__ == "__main__":
    main()
