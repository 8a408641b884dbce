"""A progress bar for the Trainer: steps, time left and the loss, on one line."""

from tqdm.auto import tqdm
from transformers import TrainerCallback

_FORMAT = "{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} steps, {elapsed} gone, {remaining} left{postfix}"


class ProgressBar(TrainerCallback):
    """Shows training as a bar that starts where the run starts; use it with `disable_tqdm=True`."""

    def __init__(self, description: str):
        self.description = description
        self.bar = None

    def on_train_begin(self, args, state, control, **kwargs):
        steps = {"total": state.max_steps, "initial": state.global_step}
        self.bar = tqdm(**steps, desc=self.description, unit="step", dynamic_ncols=True, mininterval=1, bar_format=_FORMAT)

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in (logs or {}):
            self.bar.set_postfix_str(f"loss {float(logs['loss']):.2f}", refresh=False)

    def on_train_end(self, args, state, control, **kwargs):
        self.close()

    def close(self):
        """Leave the bar as it stands; also after an interruption, which no event announces."""
        if self.bar is not None:
            self.bar.close()
