"""vLLM's engine on a CPU against `generate`: what requests get must not depend on who else is served."""

import copy
import random

import pytest
import torch
from served import asked, generated, greedy, logprobs, model_of, prompts, served, serving
from vllm import SamplingParams
from vllm.v1.core.sched.scheduler import Scheduler

OPTIONS = {
    "gate, negative eigenvalues, tied": {"use_gate": True, "allow_neg_eigval": True, "tie_word_embeddings": True},
    "no convolution, K != V": {"use_short_conv": False, "expand_k": 0.5, "expand_v": 2.0},
    "elu and sum, no beta": {"qk_activation": "elu", "qk_norm": "sum", "use_beta": False},
    "relu, step by step": {"qk_activation": "relu", "attn_mode": "fused_recurrent", "conv_size": 2},
}


@pytest.fixture
def preempted(monkeypatch):
    """Ids of the requests that the scheduler preempted, in order."""
    ids, preempt = [], Scheduler._preempt_request

    def record(self, request, *args, **kwargs):
        ids.append(request.request_id)
        return preempt(self, request, *args, **kwargs)

    monkeypatch.setattr(Scheduler, "_preempt_request", record)
    return ids


def serve_traffic(llm, requests, lengths, aborted, seed=0, before_step=lambda step: None) -> dict[int, list[int]]:
    """Requests arrive a few at a time; those in `aborted` leave after half of their tokens. Returns the tokens of each."""
    engine, arrivals = llm.llm_engine, random.Random(seed)
    waiting, results, left = list(range(len(requests))), {}, set()
    step = 0
    while waiting or engine.has_unfinished_requests():
        for index in waiting[: arrivals.choice([0, 0, 1, 2, 5])]:
            waiting.remove(index)
            engine.add_request(str(index), {"prompt_token_ids": requests[index]}, greedy(lengths[index]))
        before_step(step := step + 1)
        for output in engine.step():
            index = int(output.request_id)
            results[index] = list(output.outputs[0].token_ids)
            if index in aborted - left and len(results[index]) >= lengths[index] // 2:
                left.add(index)
                engine.abort_request([output.request_id])
    assert left == aborted
    return results


@pytest.mark.parametrize("kind, count", [("pure", 64), ("sliding", 16), ("global", 16), ("both", 64)])
def test_requests_that_come_and_go_get_the_tokens_of_generate(tmp_path, kind, count):
    model, requests = model_of(kind), prompts(count)
    model.save_pretrained(tmp_path)
    lengths = [random.Random(i).randint(4, 24) for i in range(count)]
    aborted = set(range(3, count, 9))
    with serving(tmp_path) as llm:
        results = serve_traffic(llm, requests, lengths, aborted)
    for index, request in enumerate(requests):
        expected = generated(model, request, lengths[index])
        if index in aborted:
            assert 0 < len(results[index]) < lengths[index]
            expected = expected[: len(results[index])]
        assert results[index] == expected, f"prompt of {len(request)} tokens"


def test_a_preempted_request_is_resumed_exactly(tmp_path, preempted):
    model, requests = model_of("pure"), prompts(12, (1, 300))
    model.save_pretrained(tmp_path)
    with serving(tmp_path) as llm:

        def preempt(step):
            if step % 6 == 0:
                llm.llm_engine.reset_prefix_cache(reset_running_requests=True)

        results = serve_traffic(llm, requests, [20] * 12, set(), before_step=preempt)
    assert len(set(preempted)) > 6
    assert results == {i: generated(model, request, 20) for i, request in enumerate(requests)}


def test_a_hybrid_short_of_memory_preempts_and_resumes(tmp_path, preempted):
    model, requests = model_of("global"), prompts(6, (90, 120))
    model.save_pretrained(tmp_path)
    # A request takes a block for each of three states and one for 128 tokens of keys and values. Nine can be given away:
    # two requests begin, and one has to leave when both pass 128 tokens.
    results = served(tmp_path, requests, 80, num_gpu_blocks_override=10, max_model_len=256)
    assert preempted
    assert results == [generated(model, request, 80) for request in requests]


@pytest.mark.parametrize("kind", ["pure", "both"])
def test_several_samples_of_a_prompt_keep_their_own_state(tmp_path, kind):
    model, requests = model_of(kind), prompts(5, (1, 200))
    model.save_pretrained(tmp_path)
    # vLLM's CPU engine has no seeds of single requests.
    params = SamplingParams(n=4, temperature=1.0, max_tokens=12, logprobs=0, prompt_logprobs=0, detokenize=False)
    for request, answer in zip(requests, asked(tmp_path, requests, params, seed=0)):
        samples = [list(sample.token_ids) for sample in answer.outputs]
        assert len({tuple(sample) for sample in samples}) == 4
        for ids, sample in zip(samples, answer.outputs):
            expected = logprobs(model, request + ids)
            said = [position[token].logprob for token, position in zip(ids, sample.logprobs)]
            torch.testing.assert_close(torch.tensor(said), expected[-len(ids) :], atol=1e-4, rtol=1e-4)
        of_prompt = [position[token].logprob for token, position in zip(request[1:], answer.prompt_logprobs[1:])]
        torch.testing.assert_close(torch.tensor(of_prompt), expected[: len(request) - 1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_of_a_checkpoint_mean_the_same(tmp_path, options):
    model, requests = model_of("pure", **options), prompts(10)
    model.save_pretrained(tmp_path)
    assert served(tmp_path, requests, 12) == [generated(model, request, 12) for request in requests]


def test_two_ranks_say_what_one_does(tmp_path):
    model, requests = model_of("both", use_gate=True, num_heads=4), prompts(12)
    model.save_pretrained(tmp_path)
    results = served(tmp_path, requests, 12, tensor_parallel_size=2)
    assert results == [generated(model, request, 12) for request in requests]


def test_prompts_may_be_longer_than_what_was_trained_on(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    model, requests = model_of("both"), prompts(2, (1100, 1500))
    model.save_pretrained(tmp_path)
    results = served(tmp_path, requests, 8, max_model_len=2 * model.config.max_position_embeddings)
    assert results == [generated(model, request, 8) for request in requests]


def test_a_bfloat16_model_keeps_float32_states(tmp_path):
    model, requests = copy.deepcopy(model_of("pure")).bfloat16(), prompts(4, (100, 300))
    model.save_pretrained(tmp_path)
    with serving(tmp_path, dtype="bfloat16") as llm:
        layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
        assert [[state.dtype for state in layer.kv_cache] for layer in layers] == 4 * [[torch.float32, torch.bfloat16]]
        params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        answers = llm.generate([{"prompt_token_ids": ids} for ids in requests], params, use_tqdm=False)
    differences = []
    for request, answer in zip(requests, answers):
        said = torch.tensor([position[token].logprob for token, position in zip(request[1:], answer.prompt_logprobs[1:])])
        differences.append((said - logprobs(model, request)).abs())
    # A logit of 4 to 8 has steps of 0.03 in bfloat16, so that a prompt of two tokens may be off by as much.
    assert torch.cat(differences).mean() < 0.03 and max(x.max() for x in differences) < 0.3
