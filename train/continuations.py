"""Which of four continuations follows in a text it has not seen: a model's accuracy, by lm-eval."""

import yaml
from datasets import Dataset
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..eval.model import DeltaNetLM
from ..eval.smoke import CHOICES, held_out_text, smoke_documents
from ..eval.suites import TASKS

TASK = "smoke_choice"
CHANCE = 1 / CHOICES


class _QuietLM(DeltaNetLM):
    """The model of `deltanet.eval` without progress bars."""

    def loglikelihood(self, requests, disable_tqdm=True):
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)


def right_continuations(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[float, float, int]:
    """Accuracy in the smoke suite's choice of continuations, its standard error, and the number of questions."""
    documents = smoke_documents(held_out_text(None))[TASK]
    task = yaml.safe_load((TASKS / f"{TASK}.yaml").read_text(encoding="utf-8"))
    task["custom_dataset"] = lambda **_: {"test": Dataset.from_list(documents)}
    harness = _QuietLM(pretrained=model, tokenizer=tokenizer, batch_size=16, max_length=2048)
    tasks = TaskManager(include_defaults=False)
    result = simple_evaluate(harness, tasks=[task], task_manager=tasks, log_samples=False)
    scores = result["results"][TASK]
    return scores["acc,none"], scores["acc_stderr,none"], len(documents)
