"""Training runs on two processes, for test_train_processes.py: whole, interrupted and continued, and begun elsewhere."""

import dataclasses

import torch
import torch.distributed as dist
from launching import join, report
from transformers import TrainerCallback

from deltanet.train import run
from deltanet.train.recipe import load_recipe

EPOCH = 4
"""Steps of an epoch; the runs have ten."""
STEPS = (1, EPOCH - 1, EPOCH, EPOCH + 1)


def interrupted_at(step, recipe):
    """A run that ends behind a step and its checkpoint."""

    class Interrupt(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if state.global_step == step:
                raise KeyboardInterrupt

    trainer = run._trainer

    def with_interrupt(*arguments):
        result = trainer(*arguments)
        result.add_callback(Interrupt)
        return result

    run._trainer = with_interrupt
    try:
        run.train(recipe)
    except KeyboardInterrupt:
        return
    finally:
        run._trainer = trainer
    raise AssertionError("not interrupted")


def interrupted_inside(step, recipe):
    """A run that ends while both processes write a checkpoint."""
    save, target = torch.save, f"checkpoint-{step}/rng_state_{dist.get_rank()}.pth"

    def broken_save(content, path, *arguments, **keywords):
        if str(path).endswith(target):
            raise KeyboardInterrupt
        save(content, path, *arguments, **keywords)

    torch.save = broken_save
    try:
        run.train(recipe)
    except KeyboardInterrupt:
        return
    finally:
        torch.save = save
    raise AssertionError("not interrupted")


def main():
    rank, _ = join()
    recipe = load_recipe("recipe.yaml", {})
    to = lambda name: dataclasses.replace(recipe, output=name)  # noqa: E731
    found = {}
    run.train(to("whole"))
    for step in STEPS:
        interrupted_at(step, to(f"at-{step}"))
        run.train(to(f"at-{step}"))
    interrupted_inside(EPOCH, to("inside"))
    run.train(to("inside"))
    interrupted_at(3, to("two-to-one"))
    run.train(to("one-to-two"))
    run.train(dataclasses.replace(to("packed"), packing=True, block_length=64, batch_tokens=256, tokens=1280))
    try:
        run.train(dataclasses.replace(to("odd"), device_batch=4))
    except ValueError as error:
        found["odd"] = str(error)
    report(found)


if __name__ == "__main__":
    main()
