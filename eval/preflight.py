"""What can be told before the model is loaded: tokenizer, vocabulary, memory."""

import os
from pathlib import Path

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import deltanet  # noqa: F401  registers the architecture with the Auto classes

from .errors import EvaluationError

DEFAULT_LENGTH = 2048
# What a forward keeps beside the logits: some tensors of the residual stream's and the MLP's width, in float32.
_WIDTHS = 16
_USABLE = 0.7


def load_config_and_tokenizer(args):
    """The model's configuration and its tokenizer, as lm-eval will load them.

    Raises:
        EvaluationError: one of them is not there.
    """
    options = {"revision": args.revision, "trust_remote_code": args.trust_remote_code}
    if os.path.sep in args.model and args.model.startswith((".", os.path.sep)) and not Path(args.model).is_dir():
        raise EvaluationError(f"MODEL is {args.model!r}: no such directory")
    try:
        config = AutoConfig.from_pretrained(args.model, **options)
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer or args.model, **options)
    except (OSError, ValueError) as error:
        raise EvaluationError(f"the configuration or tokenizer of {args.model!r} cannot be loaded: {error}") from error
    return config, tokenizer


def check_tokenizer(config, tokenizer, add_bos_token: bool) -> None:
    """
    Raises:
        EvaluationError: there is neither BOS nor EOS (a text without context needs a first token), BOS is asked for and
            missing, or the tokenizer has ids that the model has no embedding for.
    """
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise EvaluationError("the tokenizer has neither a BOS nor an EOS token; set `bos_token` or `eos_token` in it")
    if add_bos_token and tokenizer.bos_token_id is None:
        raise EvaluationError("--add_bos_token: the tokenizer has no BOS token")
    largest = max(tokenizer.get_vocab().values())
    if largest >= config.vocab_size:
        raise EvaluationError(
            f"the tokenizer has ids up to {largest}, the model {config.vocab_size} embeddings: another model's tokenizer?"
        )


def window_length(config, max_length: int | None, lengths) -> int:
    """Tokens a forward reads at most: as asked for, else the longest prompt asked for, else the length trained on."""
    return max_length or max(lengths or [0]) or getattr(config, "max_position_embeddings", None) or DEFAULT_LENGTH


def find_batch_size(args, config, length: int) -> int:
    """
    The batch that fits in the free memory beside the weights, at most `max_batch_size`: an estimate from the shapes, since
    trying ends in a killed process on a CPU. A number in `batch_size` is taken as it is.

    Raises:
        EvaluationError: not even one row of `length` tokens fits, or there is no such device.
    """
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise EvaluationError(f"--device {args.device}: no GPU is available here")
    if args.batch_size != "auto":
        return int(args.batch_size)
    free = free_memory(args.device)
    weights, element = _weights(args, config)
    row = _row_bytes(config, length, element)
    rows = int((free * _USABLE - weights) / row)
    if rows < 1:
        raise EvaluationError(
            f"{length} tokens do not fit: {free / 2**30:.1f} GiB are free, the weights need {weights / 2**30:.1f} and a row "
            f"{row / 2**30:.1f}; choose a smaller --max_length or --lengths, or another --device or --dtype"
        )
    return min(rows, args.max_batch_size)


def free_memory(device: str) -> int:
    """Bytes free for this process: of the GPU, or its share of the machine's memory and of the control group's."""
    if device.startswith("cuda"):
        own = device if ":" in device else f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        return torch.cuda.mem_get_info(torch.device(own))[0]
    free = psutil.virtual_memory().available
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()).isdigit():
        free = min(free, int(text) - int(used.read_text()))
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _weights(args, config) -> tuple[int, int]:
    """Bytes of all weights and of one, counted on a model without storage."""
    dtype = (config.dtype or torch.float32) if args.dtype == "auto" else getattr(torch, args.dtype)
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(config, trust_remote_code=args.trust_remote_code).num_parameters()
    return parameters * dtype.itemsize, dtype.itemsize


def _row_bytes(config, length: int, element: int) -> int:
    """One row of a forward: logits, their float32 copy and log-softmax, and the activations of a layer."""
    return length * (config.vocab_size * (element + 8) + config.hidden_size * 4 * _WIDTHS)
