"""Checkpoints for vLLM's CPU engine, what `generate` says to them, and engines in this process."""

import os

# In this process, where tests reach into the scheduler and an engine starts in seconds. Before vLLM is imported.
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_NO_USAGE_STATS="1",
)

import contextlib
import functools
import gc
import random

import pytest
import torch
from models import tiny_model

vllm = pytest.importorskip("vllm")

VOCABULARY = 211
WINDOW = 37
_SOFTMAX = {"num_heads": 2, "num_kv_heads": 1}
_ATTENTION = {
    "pure": None,
    "sliding": {**_SOFTMAX, "layers": [1, 3], "window_size": WINDOW},
    "global": {**_SOFTMAX, "layers": [1], "qkv_bias": True},
    "both": [{**_SOFTMAX, "layers": [1], "window_size": WINDOW}, {**_SOFTMAX, "layers": [2], "rope_theta": 500.0}],
}
KINDS = tuple(_ATTENTION)


@functools.cache
def model_of(kind: str, **overrides):
    """Four layers, logits far from flat, no end token; heads of 32 are the smallest that vLLM's attention on a CPU takes."""
    fields = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_heads": 2,
        "intermediate_size": 96,
        "initializer_range": 0.2,
        "max_position_embeddings": 1024,
        "attn": _ATTENTION[kind],
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return tiny_model("pure", seed=KINDS.index(kind), **{**fields, **overrides})


def prompts(count: int, lengths: tuple[int, int] = (1, 700), seed: int = 4) -> list[list[int]]:
    """Random ids; the lengths include both ends and whatever is near a chunk of 64."""
    numbers = random.Random(seed)
    chosen = [*lengths, 2, 63, 64, 65, 128][:count]
    chosen += [numbers.randint(*lengths) for _ in range(count - len(chosen))]
    return [[numbers.randrange(3, VOCABULARY) for _ in range(length)] for length in chosen]


def generated(model, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens of Transformers' `generate`, each the best by far more than float32 rounds."""
    options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    result = model.generate(torch.tensor([prompt]), max_new_tokens=count, **options)
    first, second = torch.cat(result.logits).topk(2).values.unbind(-1)
    assert (first - second).min() > 5e-5, "two tokens are as good as equal; another seed makes another prompt"
    return result.sequences[0, len(prompt) :].tolist()


def logprobs(model, ids: list[int]) -> torch.Tensor:
    """[len(ids) - 1] log probability of each id after its predecessors, in one forward."""
    with torch.no_grad():
        logits = model(torch.tensor([ids[:-1]])).logits[0].float()
    return logits.log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]]


@contextlib.contextmanager
def serving(directory, **options):
    """An engine with room for few sequences and few tokens a step, so that requests wait and prompts are cut."""
    defaults = {"dtype": "float32", "enforce_eager": True, "max_model_len": 1024}
    batching = {"max_num_seqs": 8, "max_num_batched_tokens": 96}
    engine = vllm.LLM(str(directory), skip_tokenizer_init=True, **{**defaults, **batching, **options})
    try:
        yield engine
    finally:
        engine.llm_engine.engine_core.shutdown()
        del engine
        gc.collect()
        vllm.distributed.cleanup_dist_env_and_memory()


def greedy(count: int) -> vllm.SamplingParams:
    return vllm.SamplingParams(temperature=0, max_tokens=count, detokenize=False, ignore_eos=True)


def asked(directory, requests: list[list[int]], params: vllm.SamplingParams, **options) -> list:
    """vLLM's answers to prompts that come at once."""
    with serving(directory, **options) as llm:
        return llm.generate([{"prompt_token_ids": ids} for ids in requests], params, use_tqdm=False)


def served(directory, requests: list[list[int]], count: int, **options) -> list[list[int]]:
    """Greedy tokens of the engine."""
    return [list(answer.outputs[0].token_ids) for answer in asked(directory, requests, greedy(count), **options)]
