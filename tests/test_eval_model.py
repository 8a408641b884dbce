"""The model as lm-eval sees it: what a recurrence can get wrong, and the choice of tokens."""

import pytest
import torch
from eval_checkpoints import english_like_text, save_checkpoint, tiny_tokenizer
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from models import KINDS
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from deltanet.eval.model import DeltaNetLM

SENTENCES = english_like_text(200).split("\n")
# Short enough for sums of log-probabilities that float32 resolves below 1e-4.
TEXTS = [" ".join(SENTENCES[5 * index : 5 * index + 1 + index % 3]) for index in range(16)]


@pytest.fixture(scope="module", params=KINDS)
def checkpoint(request, tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp(request.param), request.param)


def _requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, argument, index) for index, argument in enumerate(arguments)]


def _model(checkpoint: str, batch_size: int, **options) -> DeltaNetLM:
    return DeltaNetLM(checkpoint, device="cpu", dtype="float32", batch_size=batch_size, **options)


def test_it_is_registered_with_lm_eval():
    assert get_model("deltanet") is DeltaNetLM


def test_likelihoods_do_not_depend_on_the_batch(checkpoint):
    pairs = _requests("loglikelihood", [(text[: len(text) // 2], text[len(text) // 2 :]) for text in TEXTS])
    rolling = _requests("loglikelihood_rolling", [(text,) for text in TEXTS])
    one, many = _model(checkpoint, 1), _model(checkpoint, 16)
    for (single, greedy), (batched, also) in zip(one.loglikelihood(pairs), many.loglikelihood(pairs)):
        assert batched == pytest.approx(single, abs=1e-4) and greedy == also
    assert many.loglikelihood_rolling(rolling) == pytest.approx(one.loglikelihood_rolling(rolling), abs=1e-4)


def test_generation_with_left_padding_is_generation_alone(checkpoint):
    prompts = _requests("generate_until", [(text, {"until": ["\n"], "max_gen_toks": 12}) for text in TEXTS])
    alone = _model(checkpoint, 1).generate_until(prompts)
    assert _model(checkpoint, 16).generate_until(prompts) == alone
    assert len(set(alone)) > 8


@pytest.mark.parametrize("window", [64, 1024])
def test_windows_longer_than_the_training_length(tmp_path, window):
    checkpoint = save_checkpoint(tmp_path, max_position_embeddings=64)
    lm = _model(checkpoint, 2, max_length=window)
    text = " ".join(SENTENCES[:40])
    ids = lm.tok_encode(text)
    assert len(ids) > 256
    expected = 0.0
    for start in range(0, len(ids), window):
        # lm-eval's windows: the token before each is its context, and the last window is filled up with tokens before it.
        stop = min(start + window, len(ids))
        inputs = ([lm.prefix_token_id] + ids)[max(0, stop - window) : stop]
        scores = lm.model(torch.tensor([inputs])).logits.double().log_softmax(-1)[0]
        expected += sum(scores[len(inputs) - stop + index, ids[index]].item() for index in range(start, stop))
    assert lm.loglikelihood_rolling(_requests("loglikelihood_rolling", [(text,)])) == pytest.approx([expected], abs=1e-2)


def test_bos_is_prepended_only_where_asked_for(tmp_path):
    checkpoint = save_checkpoint(tmp_path)
    without, with_bos = _model(checkpoint, 1), _model(checkpoint, 1, add_bos_token=True)
    ids = without.tok_encode("the garden")
    assert AutoTokenizer.from_pretrained(checkpoint)("the garden").input_ids == [1, *ids], "the tokenizer's own habit"
    assert with_bos.tok_encode("the garden") == [1, *ids]
    assert without.tok_batch_encode(["the garden"])[0].tolist() == [ids]
    assert without.token_choices()["add_bos_token"] is False and with_bos.token_choices()["add_bos_token"] is True


def test_without_bos_the_prefix_is_eos(tmp_path):
    choices = _model(save_checkpoint(tmp_path, tokenizer=tiny_tokenizer(bos=None)), 1).token_choices()
    assert (choices["bos_token"], choices["prefix_token"], choices["eos_token"]) == (None, "</s>", "</s>")


@pytest.mark.parametrize(("stops", "warned"), [(2, False), ([5, 2], False), (5, True)])
def test_an_eos_that_generation_ignores_is_told(tmp_path, caplog, stops, warned):
    _model(save_checkpoint(tmp_path, eos_token_id=stops), 1)
    assert ("the tokenizer's EOS is 2" in caplog.text) == warned


def test_sums_are_float32_and_no_cache_is_built(tmp_path, monkeypatch):
    lm = DeltaNetLM(save_checkpoint(tmp_path), device="cpu", dtype="bfloat16")
    assert lm.softmax_dtype == torch.float32 and lm.model.dtype == torch.bfloat16
    outputs = []
    original = lm.model.forward

    def noted(*args, **kwargs):
        outputs.append(original(*args, **kwargs))
        return outputs[-1]

    monkeypatch.setattr(lm.model, "forward", noted)
    ((score, _),) = lm.loglikelihood(_requests("loglikelihood", [("the garden", " above the river and the old house")]))
    assert outputs[0].past_key_values is None
    assert score != torch.tensor(score).bfloat16().item(), "a sum in bfloat16 keeps three digits"


def test_other_causal_models_are_taken_too(tmp_path):
    config = LlamaConfig(vocab_size=304, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    ((score, _),) = _model(str(tmp_path), 1).loglikelihood(_requests("loglikelihood", [("the", " house")]))
    assert score < 0
