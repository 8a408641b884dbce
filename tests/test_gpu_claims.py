"""Training steps of the claims' language models recorded as CUDA graphs: they train as launched ones do."""

import dataclasses
import time

import numpy as np
import pytest
import torch

from deltanet.eval.claims.language import Settings
from deltanet.eval.claims.language_models import CONFIGURATIONS, build
from deltanet.eval.claims.language_training import train
from deltanet.eval.claims.text_measures import perplexity
from deltanet.eval.synthetic.recording import RecordedStep

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_recorded_training_is_launched_training(name, monkeypatch):
    settings = dataclasses.replace(Settings(), steps=30, evaluations=1)
    size = dataclasses.replace(settings.size, layers=2, mamba2_layers=2)
    stream = np.cumsum(np.random.default_rng(0).integers(0, 3, 30 * 4 * 256)) % 512
    tokens = torch.from_numpy(stream.reshape(30, 4, 256).astype(np.int32)).cuda()
    ends = []
    for is_recorded in (True, False):
        if not is_recorded:
            monkeypatch.setattr(RecordedStep, "_record", lambda self, batch: None)
        model = build(name, size, 512).cuda()
        evaluate = lambda model: perplexity(model, stream[:4096], 256, 4096)  # noqa: E731
        run = train(model, tokens, settings, evaluate, time.monotonic() + 100)
        assert run["recorded"] == is_recorded
        ends.append(run["curve"][0][1])
    assert ends[0] < 100 and ends[0] == pytest.approx(ends[1], rel=0.1)
