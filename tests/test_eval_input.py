"""Requests that cannot be evaluated: told before the model is loaded."""

import pytest
from eval_checkpoints import english_like_text, save_checkpoint, tiny_tokenizer
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from deltanet.eval import preflight, runner
from deltanet.eval.cli import build_parser, main
from deltanet.eval.errors import EvaluationError


@pytest.fixture(autouse=True)
def no_model(monkeypatch):
    monkeypatch.setattr(runner, "DeltaNetLM", lambda **kwargs: pytest.fail("the model was loaded"))


@pytest.fixture
def arguments(tmp_path):
    (tmp_path / "smoke.txt").write_text(english_like_text(200))
    model = save_checkpoint(tmp_path / "model")
    return [model, "--suite", "smoke", "--data", str(tmp_path), "--output_path", str(tmp_path / "out"), "--device", "cpu"]


def test_nothing_to_run():
    with pytest.raises(EvaluationError, match="name --suite .paper, recall, ruler, smoke. or --tasks"):
        main(["model"])


def test_a_model_that_is_not_there(arguments, tmp_path):
    with pytest.raises(EvaluationError, match="no such directory"):
        main([str(tmp_path / "absent"), *arguments[1:]])


def test_a_tokenizer_without_bos_and_eos(arguments):
    tiny_tokenizer(bos=None, eos=None).save_pretrained(arguments[0])
    with pytest.raises(EvaluationError, match="neither a BOS nor an EOS token"):
        main(arguments)


def test_bos_asked_for_and_missing(arguments):
    tiny_tokenizer(bos=None).save_pretrained(arguments[0])
    with pytest.raises(EvaluationError, match="--add_bos_token: the tokenizer has no BOS"):
        main([*arguments, "--add_bos_token"])


def test_a_vocabulary_that_does_not_match(arguments):
    words = {f"w{index}": index for index in range(305)}
    other = Tokenizer(models.WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=other, eos_token="w1").save_pretrained(arguments[0])
    with pytest.raises(EvaluationError, match="ids up to 304, the model 304 embeddings"):
        main(arguments)


def test_a_context_longer_than_memory(arguments, monkeypatch):
    monkeypatch.setattr(preflight, "free_memory", lambda device: 2**28)
    with pytest.raises(EvaluationError, match=r"262144 tokens do not fit: 0\.2 GiB are free"):
        main([*arguments, "--max_length", "262144"])


@pytest.mark.parametrize(("free", "expected"), [(2**26, 11), (2**40, 64)])
def test_the_batch_is_what_memory_holds(arguments, monkeypatch, free, expected):
    args = build_parser().parse_args(arguments)
    config, _ = preflight.load_config_and_tokenizer(args)
    monkeypatch.setattr(preflight, "free_memory", lambda device: free)
    row = 512 * (304 * 12 + 32 * 4 * 16)
    if expected < 64:
        expected = int((free * 0.7 - 4 * _parameters(arguments[0])) / row)
    assert preflight.find_batch_size(args, config, 512) == expected
    args.batch_size = "7"
    assert preflight.find_batch_size(args, config, 512) == 7


def _parameters(checkpoint):
    from safetensors import safe_open

    with safe_open(f"{checkpoint}/model.safetensors", "pt") as file:
        return sum(file.get_tensor(name).numel() for name in file.keys())


def test_data_that_cannot_be_had(arguments, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    lines = ["task: absent_data", "dataset_path: json", "dataset_kwargs: {data_files: {test: /absent.jsonl}}"]
    (own / "absent.yaml").write_text("\n".join([*lines, "output_type: loglikelihood", "test_split: test", ""]))
    with pytest.raises(EvaluationError, match="'absent_data' cannot load its data: FileNotFoundError"):
        main([arguments[0], "--tasks", "absent_data", "--include_path", str(own), *arguments[5:]])


def test_window_lengths(arguments):
    args = build_parser().parse_args(arguments)
    config, _ = preflight.load_config_and_tokenizer(args)
    assert preflight.window_length(config, None, []) == 256
    assert preflight.window_length(config, None, [1024, 4096]) == 4096
    assert preflight.window_length(config, 512, [1024]) == 512


@pytest.mark.parametrize(("text", "expected"), [("7", [7] * 4), ("0,1,2,3", [0, 1, 2, 3])])
def test_seeds(text, expected):
    assert build_parser().parse_args(["model", "--seed", text]).seed == expected


def test_two_seeds_are_refused(capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args(["model", "--seed", "1,2"])
    assert "one number or four" in capsys.readouterr().err
