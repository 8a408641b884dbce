"""Every way to generate with a cache, against the forward without one.

    python -m deltanet.benchmarks.generation_matrix [--output FILE]

A cell is a way to generate, a kind of model and a batch size. Its deviation is the relative L2 distance between the logits
that chose each new token and those of one forward over that row alone, without cache and without padding. In float32 the
tokens must also be those of a search that keeps no cache. `tests/test_generation.py` runs the same cells.
"""

import argparse
import copy
import datetime
import json
import pathlib
from typing import Callable, NamedTuple

import torch
import transformers
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, StaticCache

from .. import DeltaNetConfig, DeltaNetForCausalLM
from ..cache_deltanet import CACHE_NAME

RESULT = pathlib.Path(__file__).parent / "results" / "generation_matrix.json"
KINDS = ("pure", "sliding", "global")
BATCHES = (1, 4)
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
STEPS, PROMPT, PADDING, CHUNK, BEAMS, RETURNED, CANDIDATES, TEMPERATURE = 6, 11, 3, 4, 3, 2, 3, 0.8


class Outcome(NamedTuple):
    rows: list[torch.Tensor]  # whole sequences without padding, [tokens] each
    logits: torch.Tensor  # [rows, steps, vocabulary], what chose the last `steps` tokens of each row


class Cell(NamedTuple):
    run: Callable[[DeltaNetForCausalLM, list[torch.Tensor]], Outcome]
    search: Callable[[DeltaNetForCausalLM, list[torch.Tensor], Outcome], list[torch.Tensor]]  # without a cache
    is_ragged: bool
    kinds: tuple[str, ...]


CELLS: dict[str, Cell] = {}


def cell(search, is_ragged=False, kinds=KINDS):
    """Register a way to generate under the function's name."""

    def register(run):
        CELLS[run.__name__] = Cell(run, search, is_ragged, kinds)
        return run

    return register


def prompts(batch, is_ragged, length=PROMPT, seed=1):
    """Rows of random ids without id 0; ragged ones lose three tokens from one row to the next."""
    rows = torch.randint(1, 61, (batch, length), generator=torch.Generator().manual_seed(seed))
    return [row[: length - 3 * i * is_ragged] for i, row in enumerate(rows)]


def padded(rows, columns=0):
    """Ids and mask [B, T], padded on the left to the longest row and by further columns."""
    pad = lambda values: torch.nn.functional.pad(  # noqa: E731
        pad_sequence(values, batch_first=True, padding_side="left"), (columns, 0)
    )
    return pad(rows), pad([torch.ones_like(row) for row in rows])


# Searches without a cache. Rows are recomputed from their first token for every new one.


def next_logits(model, row):
    return model(row[None], use_cache=False).logits[0, -1]


def greedy_search(model, rows, outcome):
    """From what each row of the outcome held before its last `steps` tokens."""
    found = []
    for row in outcome.rows:
        steps = outcome.logits.shape[1]
        row = row[:-steps]
        for _ in range(steps):
            row = torch.cat([row, next_logits(model, row).argmax()[None]])
        found.append(row)
    return found


def sampling_search(model, rows, outcome):
    torch.manual_seed(0)
    for _ in range(STEPS):
        logits = torch.stack([next_logits(model, row) for row in rows])
        tokens = torch.multinomial(torch.softmax(logits / TEMPERATURE, -1), 1)
        rows = [torch.cat([row, token]) for row, token in zip(rows, tokens)]
    return rows


def beam_search(model, rows, outcome):
    """Transformers' own, one row at a time."""
    options = {"num_beams": BEAMS, "num_return_sequences": RETURNED, "do_sample": False, "use_cache": False}
    return [found for row in rows for found in model.generate(row[None], max_new_tokens=STEPS, **options)]


def lookahead_search(model, rows, outcome):
    """Of the likeliest candidates the one whose own continuation is the surest."""
    found = []
    for row in rows:
        for _ in range(STEPS):
            candidates = next_logits(model, row).topk(CANDIDATES).indices
            logits = torch.stack([next_logits(model, torch.cat([row, token[None]])) for token in candidates])
            row = torch.cat([row, candidates[surest(logits)][None]])
        found.append(row)
    return found


def surest(logits):
    return torch.softmax(logits.float(), -1).amax(-1).argmax(-1)


# Ways to generate with a cache


def generate(model, rows, columns=0, extra=None, **options):
    """`model.generate` on left-padded rows; `extra` [B, E] ids follow the rows and belong to the result's prompts."""
    ids, mask = padded(rows, columns)
    if extra is not None:
        rows = [torch.cat(pair) for pair in zip(rows, extra)]
        ids, mask = torch.cat([ids, extra], 1), torch.nn.functional.pad(mask, (0, extra.shape[1]), value=1)
    options = {"do_sample": False, "max_new_tokens": STEPS, "input_ids": ids, **options}
    if "inputs_embeds" in options:
        del options["input_ids"]
    output = model.generate(attention_mask=mask, return_dict_in_generate=True, output_logits=True, **options)
    logits = torch.stack(output.logits, 1)
    if getattr(output, "beam_indices", None) is not None:
        logits = logits[output.beam_indices[:, : logits.shape[1]], torch.arange(logits.shape[1])]
    repeats = len(output.sequences) // len(rows)
    new = output.sequences[:, -logits.shape[1] :]
    return Outcome([torch.cat([rows[i // repeats], tokens]) for i, tokens in enumerate(new)], logits)


def absorb(model, rows):
    """A cache that has read the left-padded rows."""
    ids, mask = padded(rows)
    return getattr(model(ids, attention_mask=mask, use_cache=True), CACHE_NAME)


def continued(model, rows, count, seed=5):
    """Generation that gets `count` tokens more than its cache has read."""
    extra = torch.stack(prompts(len(rows), False, count, seed))
    return generate(model, rows, extra=extra, **{CACHE_NAME: absorb(model, rows)})


def join(*outcomes):
    return Outcome([row for outcome in outcomes for row in outcome.rows], torch.cat([o.logits for o in outcomes]))


@cell(greedy_search)
def greedy(model, rows):
    return generate(model, rows)


@cell(sampling_search)
def sampling(model, rows):
    torch.manual_seed(0)
    return generate(model, rows, do_sample=True, temperature=TEMPERATURE, top_k=0, top_p=1.0)


@cell(beam_search)
def beam(model, rows):
    return generate(model, rows, num_beams=BEAMS, num_return_sequences=RETURNED)


@cell(beam_search, is_ragged=True)
def beam_ragged(model, rows):
    return beam(model, rows)


@cell(beam_search, is_ragged=True)
def beam_static(model, rows):
    return generate(model, rows, num_beams=BEAMS, num_return_sequences=RETURNED, cache_implementation="static")


@cell(greedy_search)
def static(model, rows):
    return generate(model, rows, cache_implementation="static")


@cell(greedy_search, is_ragged=True)
def static_ragged(model, rows):
    return static(model, rows)


# Transformers moves keys and values of hybrids with CUDA streams.
@cell(greedy_search, is_ragged=True, kinds=("pure",))
def offloaded(model, rows):
    return generate(model, rows, cache_implementation="offloaded")


@cell(greedy_search)
def chunked_prefill(model, rows):
    return generate(model, rows, prefill_chunk_size=CHUNK)


@cell(greedy_search, is_ragged=True)
def chunked_prefill_ragged(model, rows):
    return join(*(generate(model, rows, prefill_chunk_size=size) for size in (1, CHUNK)))


@cell(greedy_search, is_ragged=True)
def chunked_prefill_static(model, rows):
    caches = [StaticCache(config=model.config, max_cache_len=32) for _ in range(2)]
    sizes = (1, CHUNK)
    return join(*(generate(model, rows, prefill_chunk_size=s, **{CACHE_NAME: c}) for s, c in zip(sizes, caches)))


@cell(greedy_search)
def continue_1(model, rows):
    return continued(model, rows, 1)


@cell(greedy_search)
def continue_3(model, rows):
    return continued(model, rows, 3)


@cell(greedy_search)
def continue_70(model, rows):
    return continued(model, rows, 70)


@cell(greedy_search, is_ragged=True)
def continue_ragged(model, rows):
    return join(*(continued(model, rows, count) for count in (1, 3, 70)))


@cell(greedy_search)
def continue_generated(model, rows):
    """A second turn: the cache that `generate` returned, its answer, and five tokens more."""
    ids, _ = padded(rows)
    first = model.generate(ids, max_new_tokens=STEPS, do_sample=False, return_dict_in_generate=True)
    extra = torch.cat([first.sequences[:, ids.shape[1] :], torch.stack(prompts(len(rows), False, 5, 6))], 1)
    return generate(model, rows, extra=extra, **{CACHE_NAME: getattr(first, CACHE_NAME)})


@cell(greedy_search)
def left_padding(model, rows):
    return generate(model, rows, columns=PADDING)


@cell(greedy_search, is_ragged=True)
def ragged(model, rows):
    return generate(model, rows)


@cell(greedy_search, is_ragged=True)
def inputs_embeds(model, rows):
    return generate(model, rows, inputs_embeds=model.get_input_embeddings()(padded(rows)[0]))


@cell(lookahead_search, is_ragged=True)
def batch_selection(model, rows):
    """Candidates share their row's state, then the chosen one's state is kept."""
    rows, taken = list(rows), []
    ids, mask = padded(rows)
    output = model(ids, attention_mask=mask, use_cache=True)
    cache, logits, first = getattr(output, CACHE_NAME), output.logits[:, -1], torch.arange(len(rows)) * CANDIDATES
    for _ in range(STEPS):
        candidates = logits.topk(CANDIDATES).indices
        cache.batch_repeat_interleave(CANDIDATES)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        arguments = {"attention_mask": mask.repeat_interleave(CANDIDATES, 0), CACHE_NAME: cache}
        each = model(candidates.view(-1, 1), **arguments).logits.view(len(rows), CANDIDATES, -1)
        chosen = surest(each)
        cache.batch_select_indices(first + chosen)
        taken.append(logits)
        logits = each[torch.arange(len(rows)), chosen]
        rows = [torch.cat([row, ids[i][None]]) for row, ids, i in zip(rows, candidates, chosen)]
    return Outcome(rows, torch.stack(taken, 1))


def twice(model, rows, cache):
    """Two prompts through one cache, which is reset in between."""
    others = prompts(len(rows), False, PROMPT - 2, 7)
    outcomes = []
    for each in (others, rows):
        cache.reset()
        outcomes.append(generate(model, each, **{CACHE_NAME: cache}))
    return join(*outcomes)


# The attention layers of a DynamicCache forget nothing in the `reset` of Transformers 5.17.
@cell(greedy_search, is_ragged=True, kinds=("pure",))
def reset(model, rows):
    return twice(model, rows, DynamicCache(config=model.config))


@cell(greedy_search, is_ragged=True)
def reset_static(model, rows):
    return twice(model, rows, StaticCache(config=model.config, max_cache_len=32))


@cell(greedy_search, is_ragged=True)
def fork(model, rows):
    """One prompt is read once, copied, and continued in two ways."""
    first = absorb(model, rows)
    caches = (first, copy.deepcopy(first))
    extras = [torch.stack(prompts(len(rows), False, count, seed=count)) for count in (2, 3)]
    return join(*(generate(model, rows, extra=extra, **{CACHE_NAME: c}) for extra, c in zip(extras, caches)))


# The comparison


def teacher_forced(model, outcome):
    """Logits [rows, steps, vocabulary] of one cache-free forward over each row alone."""
    steps = outcome.logits.shape[1]
    return torch.stack([model(row[None], use_cache=False).logits[0, -steps - 1 : -1] for row in outcome.rows])


@torch.no_grad()
def compare(model, name, batch, with_search=True):
    """(largest deviation of a row, whether all tokens are those of the search without a cache)."""
    way = CELLS[name]
    rows = prompts(batch, way.is_ragged)
    outcome = way.run(model, rows)
    expected = teacher_forced(model, outcome).float()
    deviation = (outcome.logits.float() - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    if not with_search:
        return deviation.max().item(), None
    found = way.search(model, rows, outcome)
    equal = len(found) == len(outcome.rows) and all(map(torch.equal, outcome.rows, found))
    return deviation.max().item(), equal


def build(kind, dtype):
    """A small model whose logits are far from flat, which never ends a sequence."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 64, "num_hidden_layers": 4, "num_heads": 2, "intermediate_size": 96}
    special = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    config = DeltaNetConfig(**sizes, **special, initializer_range=0.1)
    hybrids = {"sliding": lambda: config.with_sliding_window(8), "global": config.with_global_attention}
    return DeltaNetForCausalLM(hybrids[kind]() if kind in hybrids else config).eval().to(dtype)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, default=RESULT)
    output = parser.parse_args().output
    environment = {"torch": torch.__version__, "transformers": transformers.__version__, "device": "cpu"}
    result = {"environment": {**environment, "date": datetime.date.today().isoformat()}, "cells": []}
    for name, way in CELLS.items():
        for kind in way.kinds:
            for batch in BATCHES:
                row = {"way": name, "kind": kind, "batch": batch}
                row["float32"], row["tokens_equal"] = compare(build(kind, torch.float32), name, batch)
                row["bfloat16"], _ = compare(build(kind, torch.bfloat16), name, batch, with_search=False)
                result["cells"].append(row)
                line = "{way:<24}{kind:<9}{batch:>2}  {float32:.1e}  {bfloat16:.1e}  {tokens_equal}"
                print(line.format(**row), flush=True)
    result["largest"] = {dtype: max(row[dtype] for row in result["cells"]) for dtype in ("float32", "bfloat16")}
    print(result["largest"], "all tokens equal:", all(row["tokens_equal"] for row in result["cells"]))
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
