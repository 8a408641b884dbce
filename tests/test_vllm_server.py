"""`vllm serve DIR` on loopback, compiled and in several processes, and clients of the OpenAI protocol."""

import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm")

import httpx  # noqa: E402
from openai import BadRequestError, OpenAI  # noqa: E402
from served import VOCABULARY, generated, logprobs, model_of, prompts  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

READY_WITHIN = 200
"""Seconds; vLLM starts three processes and compiles."""
NAME = "tiny"
COMMAND = Path(__file__).with_name("vllm_command.py")


def write_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """A word for each id."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    tokenizer.save_pretrained(directory)
    return tokenizer


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_until_ready(server: subprocess.Popen, address: str, log: Path) -> None:
    deadline = time.monotonic() + READY_WITHIN
    while time.monotonic() < deadline and server.poll() is None:
        try:
            if httpx.get(f"{address}/health", timeout=5).is_success:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    pytest.fail(f"no answer from the server:\n{log.read_text()[-4000:]}")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("served") / "checkpoint"
    model_of("sliding").save_pretrained(path)
    write_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def client(directory):
    port, log = free_port(), directory.with_name("server.log")
    options = ["--served-model-name", NAME, "--dtype", "float32", "--max-num-batched-tokens", "128", "--max-num-seqs", "8"]
    command = [sys.executable, COMMAND, "serve", directory, "--host", "127.0.0.1", "--port", str(port), *options]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    with log.open("w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        wait_until_ready(server, f"http://127.0.0.1:{port}", log)
        yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    finally:
        server.terminate()
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()


def complete(client, prompt, count=16, **options):
    extra = {"return_token_ids": True, "ignore_eos": True}
    return client.completions.create(
        model=NAME, prompt=prompt, max_tokens=count, temperature=0, extra_body=extra, **options
    ).choices[0]


def test_the_model_is_listed(client):
    assert [model.id for model in client.models.list()] == [NAME]


def test_simultaneous_clients_get_the_tokens_of_generate(client):
    requests = prompts(24)
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda request: complete(client, request).token_ids, requests))
    assert answers == [generated(model_of("sliding"), request, 16) for request in requests]


def test_text_goes_through_the_tokenizer_of_the_checkpoint(client):
    prompt = prompts(3)[2]
    text = " ".join(f"w{i}" for i in prompt)
    expected = [f"w{i}" for i in generated(model_of("sliding"), prompt, 8)]
    assert complete(client, text, 8).text.split() == expected


def test_a_stream_says_the_same_in_pieces(client):
    prompt = prompts(1)[0]
    stream = client.completions.create(
        model=NAME, prompt=prompt, max_tokens=8, temperature=0, stream=True, extra_body={"ignore_eos": True}
    )
    pieces = [chunk.choices[0].text for chunk in stream if chunk.choices]
    assert len(pieces) >= 8
    assert "".join(pieces).split() == complete(client, prompt, 8).text.split()


def test_logprobs_are_those_of_the_model(client):
    prompt = prompts(4)[3]
    answer = complete(client, prompt, 8, logprobs=1)
    expected = logprobs(model_of("sliding"), prompt + answer.token_ids)[-8:]
    torch.testing.assert_close(torch.tensor(answer.logprobs.token_logprobs), expected, atol=1e-4, rtol=1e-4)


def test_a_client_that_hangs_up_and_a_prompt_too_long_hurt_nobody(client):
    prompt = prompts(5)[4]
    with client.completions.create(model=NAME, prompt=prompt, max_tokens=500, stream=True) as stream:
        next(iter(stream))
    with pytest.raises(BadRequestError, match="maximum context length|max_model_len|too long|longer than"):
        complete(client, [5] * 1100)
    assert complete(client, prompt).token_ids == generated(model_of("sliding"), prompt, 16)
