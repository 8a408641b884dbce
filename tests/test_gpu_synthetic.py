"""Training steps of the synthetic tasks recorded as CUDA graphs: they train as launched ones do."""

import pytest
import torch

from deltanet.eval.synthetic import training
from deltanet.eval.synthetic.recording import RecordedStep
from deltanet.eval.synthetic.tasks import TASKS, make_data

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("text", ["deltanet:num_heads=1", "deltanet:num_heads=1,use_short_conv=true", "llama", "mamba2"])
def test_recorded_training_is_launched_training(text, monkeypatch):
    sizes = {"vocab": 64, "length": 64, "pairs": 4}
    task = TASKS["mqar"].resized(vocab=64, sizes=sizes, examples=512, test_examples=128, batch_size=32, epochs=2)
    task = task.resized(model={**task.model, "dropout": 0.0})
    data = make_data(task, 0)
    runs = []
    for is_recorded in (True, False):
        if not is_recorded:
            monkeypatch.setattr(RecordedStep, "_record", lambda self, batch: None)
        runs.append(training.train(task, data, text, 64, 1e-3, 0.1, 0, "cuda"))
        assert runs[-1]["recorded"] == is_recorded
    assert runs[0]["loss"] == pytest.approx(runs[1]["loss"], rel=0.01)
