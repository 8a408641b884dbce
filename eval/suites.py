"""What each suite runs."""

from dataclasses import dataclass, field
from pathlib import Path

TASKS = Path(__file__).parent / "tasks"


@dataclass(frozen=True)
class Suite:
    """
    Attributes:
        tasks: lm-eval's task names, in the order in which they run.
        gen_kwargs: lm-eval's generation arguments for the tasks that generate, where the installed version has others.
        lengths: prompt lengths in tokens, for tasks that make their own prompts.
    """

    tasks: tuple[str, ...]
    gen_kwargs: dict = field(default_factory=dict)
    lengths: tuple[int, ...] = ()


RECALL = ("swde", "squad_completion", "fda")
SUITES = {
    # Table 1 of the paper, its zero-shot columns.
    "paper": Suite(("wikitext", "lambada_openai", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge")),
    # Its recall columns: version 0 is what the paper ran, version 1 strips the prompts and scores far higher. lm-eval's
    # squad_completion would stop at an empty line and after 256 tokens, the paper's three at a line's end and after 48.
    "recall": Suite((*(f"{task}_v0" for task in RECALL), *RECALL), gen_kwargs={"until": ["\n"], "max_gen_toks": 48}),
    # The needle tasks of RULER that need no data: one needle in noise, many needles, many needles with long keys.
    "ruler": Suite(("niah_single_1", "niah_multikey_2", "niah_multikey_3"), lengths=(1024, 2048, 4096, 8192, 16384, 32768)),
    "smoke": Suite(("smoke_perplexity", "smoke_last_word", "smoke_choice", "smoke_needle")),
}

# The benchmark's name on the Hub, for model cards.
HUB_DATASETS = {
    "wikitext": "EleutherAI/wikitext_document_level",
    "lambada_openai": "EleutherAI/lambada_openai",
    "piqa": "baber/piqa",
    "hellaswag": "Rowan/hellaswag",
    "winogrande": "allenai/winogrande",
    "arc_easy": "allenai/ai2_arc",
    "arc_challenge": "allenai/ai2_arc",
    "swde": "hazyresearch/based-swde-v2",
    "fda": "hazyresearch/based-fda",
    "squad_completion": "hazyresearch/based-squad",
    "swde_v0": "hazyresearch/based-swde-v2",
    "fda_v0": "hazyresearch/based-fda",
    "squad_completion_v0": "hazyresearch/based-squad",
}
