"""A zero-shot task for lm-eval cut from prose: which of four endings closes the paragraph?"""

import random

from datasets import Dataset
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

CHOICES = 4
CHANCE = 1 / CHOICES
ENDING_WORDS = 8
FEWEST_CONTEXT_WORDS, MOST_CONTEXT_WORDS = 16, 64


def cut_endings(documents: list[str], seed: int = 0) -> list[dict]:
    """One question for each paragraph that is long enough: its last words, hidden among the last words of others.

    Returns:
        Dictionaries of `context`, `choices` (equally many words each; one continues the context in the text) and `answer`,
        the index of that one.
    """
    paragraphs = [paragraph.split() for document in documents for paragraph in document.split("\n\n")]
    paragraphs = [words for words in paragraphs if len(words) >= FEWEST_CONTEXT_WORDS + ENDING_WORDS]
    endings = [" ".join(words[-ENDING_WORDS:]) for words in paragraphs]
    draw = random.Random(seed)
    questions = []
    for words, ending in zip(paragraphs, endings):
        choices = draw.sample([other for other in endings if other != ending], CHOICES - 1)
        answer = draw.randrange(CHOICES)
        choices.insert(answer, ending)
        context = " ".join(words[:-ENDING_WORDS][-MOST_CONTEXT_WORDS :])
        questions.append({"context": context, "choices": choices, "answer": answer})
    return questions


def endings_task(documents: list[str]) -> dict:
    """The task in lm-eval's terms. `acc` compares the choices as they are, because they are equally many words."""
    return {
        "task": "endings",
        "custom_dataset": lambda **_: {"test": Dataset.from_list(cut_endings(documents))},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }


class _QuietLM(HFLM):
    """lm-eval's model without its progress bars."""

    def loglikelihood(self, requests, disable_tqdm=True):
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)


def evaluate_endings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: list[str]
) -> tuple[float, float, int]:
    """Accuracy by lm-eval, its standard error, and the number of questions."""
    harness = _QuietLM(pretrained=model, tokenizer=tokenizer, batch_size=16, max_length=2048, add_bos_token=False)
    tasks = TaskManager(include_defaults=False)
    result = simple_evaluate(harness, tasks=[endings_task(documents)], task_manager=tasks, log_samples=False)
    scores = result["results"]["endings"]
    return scores["acc,none"], scores["acc_stderr,none"], result["n-samples"]["endings"]["effective"]
