"""A training run: data, model and Transformers' Trainer out of a recipe, from its beginning or from its last checkpoint."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import PartialState
from torch.utils.data import Dataset
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from .. import DeltaNetForCausalLM
from .checkpointing import KEEP_MIXING
from .finished import finished_directory, last_checkpoint, require_space
from .heldout import HeldOut, heldout_documents
from .optimizers import MuonFactory
from .portable import PortableTrainer
from .prepare import prepare_shipped
from .recipe import FREE_TO_CHANGE, SHIPPED, Recipe, load_recipe
from .shards import PackedDocuments, ShardBlocks, TokenShards, collate_packs, tokenizer_checksum

RECIPE_FILE = "recipe.yaml"
LOG_FILE = "training.json"
MODEL = "model"
BEST = "best"
BYTES_PER_PARAMETER = 12
"""Of a checkpoint: the weight and the two moments of AdamW, in float32."""


class WholeSteps(Dataset):
    """The items of a data set with their numbers, without a rest that fills no step: every step has the same size.

    Raises:
        ValueError: there are not enough for one step.
    """

    def __init__(self, items: Dataset, per_step: int):
        if len(items) < per_step:
            raise ValueError(f"`data` has {len(items)} blocks; allowed: at least {per_step}, which is one step.")
        self.items, self.length = items, len(items) // per_step * per_step

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        return {"block": index, **self.items[index]}


def train(recipe: Recipe) -> Path:
    """Train, continuing an interrupted run of the same recipe; returns the directory of the finished model.

    Raises:
        ValueError: the recipe, the data or what is in `output` do not go together.
        OSError: the disk has no room for the checkpoints.
        NotFinite: a loss or a gradient is NaN or infinite.
    """
    output, processes = Path(recipe.output), PartialState(cpu=not torch.accelerator.is_available())
    begun = _check_output(output, recipe)
    if (output / MODEL).exists():
        processes.print(f"{output / MODEL} is finished; another --output trains another.")
        return output / MODEL
    with processes.main_process_first():
        shards = _open_data(recipe, begun, verify=recipe.verify_data and processes.is_main_process)
    recipe = dataclasses.replace(recipe, data_checksum=shards.checksum)
    items = (PackedDocuments if recipe.packing else ShardBlocks)(shards, recipe.block_length)
    dataset = WholeSteps(items, recipe.blocks_per_step)
    model = _model(recipe, shards.tokenizer)
    checkpoint = last_checkpoint(output)
    if checkpoint is None:
        size = BYTES_PER_PARAMETER * model.num_parameters()
        require_space(output, size * (recipe.keep_checkpoints + 2))
    trainer = _trainer(recipe, model, dataset, shards.tokenizer, processes.num_processes)
    if processes.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        recipe.write(output / RECIPE_FILE)
        _describe(recipe, model, dataset, checkpoint)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if processes.is_main_process:
        with finished_directory(output / MODEL) as folder:
            if recipe.keep_best:
                shutil.copytree(output / BEST, folder, dirs_exist_ok=True)
            else:
                model.save_pretrained(folder, state_dict=weights)
            shards.tokenizer.save_pretrained(folder)
            recipe.write(folder / RECIPE_FILE)
            (folder / LOG_FILE).write_text(json.dumps(trainer.state.log_history, indent=1) + "\n", encoding="utf-8")
    processes.wait_for_everyone()
    return output / MODEL


def _check_output(output: Path, recipe: Recipe) -> Recipe | None:
    """The recipe of the run that `output` holds, which must be the same one, or `None` of a new directory."""
    if not (output / RECIPE_FILE).is_file():
        strangers = sorted(path.name for path in output.iterdir() if path.name != "data") if output.exists() else []
        if strangers:
            raise ValueError(f"`output` {output} holds {strangers[0]} and no {RECIPE_FILE}; allowed: a new directory.")
        return None
    begun = load_recipe(str(output / RECIPE_FILE), {})
    names = [spec.name for spec in dataclasses.fields(Recipe) if spec.name not in (*FREE_TO_CHANGE, "data_checksum")]
    changed = [
        f"`{name}` = {getattr(begun, name)!r} (now {getattr(recipe, name)!r})"
        for name in names
        if getattr(begun, name) != getattr(recipe, name)
    ]
    if changed:
        raise ValueError(f"{output} was begun with {', '.join(changed)}; allowed: the same values, or another --output.")
    return begun


def _open_data(recipe: Recipe, begun: Recipe | None, verify: bool) -> TokenShards:
    path = Path(recipe.data)
    if recipe.data == SHIPPED:
        path = Path(recipe.output) / "data"
        prepare_shipped(path, recipe.config().vocab_size)
    shards = TokenShards(path, verify)
    expected = recipe.data_checksum or (begun and begun.data_checksum)
    if expected not in (None, shards.checksum):
        raise ValueError(f"`data` {path} has an index of checksum {shards.checksum}; allowed: {expected}, as the run began.")
    return shards


def _model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> DeltaNetForCausalLM:
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    if recipe.pretrained:
        return _pretrained_model(recipe.pretrained, tokenizer)
    config = recipe.config(vocab_size=len(tokenizer), **{name: getattr(tokenizer, name) for name in names})
    if config.vocab_size < len(tokenizer):
        allowed = f"at least {len(tokenizer)}, the vocabulary of the data's tokenizer"
        raise ValueError(f"Recipe: `model.vocab_size` is {config.vocab_size}; allowed: {allowed}.")
    set_seed(recipe.seed)
    return DeltaNetForCausalLM(config)


def _pretrained_model(name: str, tokenizer: PreTrainedTokenizerBase) -> DeltaNetForCausalLM:
    found, expected = tokenizer_checksum(AutoTokenizer.from_pretrained(name)), tokenizer_checksum(tokenizer)
    if found != expected:
        allowed = f"{expected}, which made the data. Prepare them with --tokenizer {name}"
        raise ValueError(f"`pretrained` {name} has a tokenizer of the checksum {found}; allowed: {allowed}.")
    return DeltaNetForCausalLM.from_pretrained(name, dtype=torch.float32)


def _accumulation(recipe: Recipe, processes: int) -> int:
    """Forwards a process before a step, so that the batch, and the order of the data, are the recipe's on any number."""
    forwards, rest = divmod(recipe.accumulation, processes)
    if rest:
        forward = f"`device_batch` x `block_length` = {recipe.device_batch} x {recipe.block_length}"
        raise ValueError(
            f"A step of `batch_tokens` = {recipe.batch_tokens} is {recipe.accumulation} forwards of {forward} tokens; "
            f"allowed: a multiple of {processes}, the number of processes."
        )
    return forwards


def _trainer(
    recipe: Recipe,
    model: DeltaNetForCausalLM,
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    processes: int,
) -> PortableTrainer:
    arguments = TrainingArguments(
        output_dir=recipe.output,
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.device_batch,
        gradient_accumulation_steps=_accumulation(recipe, processes),
        learning_rate=recipe.learning_rate,
        **_schedule(recipe),
        warmup_steps=recipe.warmup_steps,
        weight_decay=recipe.weight_decay,
        adam_beta1=recipe.betas[0],
        adam_beta2=recipe.betas[1],
        adam_epsilon=recipe.epsilon,
        max_grad_norm=recipe.max_grad_norm,
        bf16=recipe.precision == "bfloat16",
        torch_compile=recipe.torch_compile,
        seed=recipe.seed,
        logging_steps=recipe.log_every,
        # The Trainer's filter would hide what the guard looks for.
        logging_nan_inf_filter=False,
        save_steps=recipe.save_every,
        save_total_limit=recipe.keep_checkpoints,
        report_to=recipe.report_to,
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
    )
    if arguments.n_gpu > 1:
        raise ValueError(
            f"The process sees {arguments.n_gpu} GPUs; allowed: one a process. For all of them, `accelerate launch "
            "--num_processes N -m deltanet.train`; for one, CUDA_VISIBLE_DEVICES=0."
        )
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable(KEEP_MIXING)
    collate = _numbered(collate_packs if recipe.packing else default_data_collator)
    trainer = PortableTrainer(
        model, arguments, train_dataset=dataset, data_collator=collate, optimizer_cls_and_kwargs=_optimizer(recipe)
    )
    trainer.remove_callback(PrinterCallback)
    if recipe.heldout:
        documents = heldout_documents(recipe.heldout)
        best = Path(recipe.output) / BEST if recipe.keep_best else None
        trainer.add_callback(HeldOut(trainer, tokenizer, documents, recipe, best))
    return trainer


def _schedule(recipe: Recipe) -> dict:
    initial, final = (rate / recipe.learning_rate for rate in (recipe.initial_learning_rate, recipe.final_learning_rate))
    if recipe.schedule == "cosine":
        rates = {"min_lr_rate": final, "warmup_lr_rate": initial}
        return {"lr_scheduler_type": "cosine_warmup_with_min_lr", "lr_scheduler_kwargs": rates}
    shape = {"num_decay_steps": recipe.decay_steps, "decay_type": "linear", "min_lr_ratio": final}
    return {"lr_scheduler_type": recipe.schedule, "lr_scheduler_kwargs": shape}


def _optimizer(recipe: Recipe) -> tuple[type, dict] | None:
    """What makes the optimizer, or `None` where the Trainer's own AdamW does."""
    if recipe.optimizer == "adamw":
        return None
    if not hasattr(torch.optim, "Muon"):
        raise ValueError(f"Recipe: `optimizer` is muon; allowed with torch {torch.__version__}: adamw. 2.9 has Muon.")
    values = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay}
    return MuonFactory, {**values, "betas": tuple(recipe.betas), "eps": recipe.epsilon}


def _numbered(collate: Callable[[list[dict]], dict]) -> Callable[[list[dict]], dict]:
    """The collator for items that have a number, which it keeps under "block"."""

    def collate_numbered(items: list[dict]) -> dict:
        blocks = torch.tensor([item["block"] for item in items])
        return {**collate([{key: item[key] for key in item if key != "block"} for item in items]), "block": blocks}

    return collate_numbered


def _describe(recipe: Recipe, model: DeltaNetForCausalLM, dataset: WholeSteps, checkpoint: Path | None) -> None:
    print(f"model     {model.num_parameters() / 1e6:,.1f} million parameters, {model.config.num_hidden_layers} layers")
    times = recipe.steps * recipe.blocks_per_step / len(dataset)
    print(f"data      {len(dataset):,} blocks of at most {recipe.block_length} tokens, read {times:.2f} times")
    print(f"training  {recipe.steps:,} steps of {recipe.batch_tokens:,} tokens, in {recipe.output}")
    if checkpoint is not None:
        print(f"An earlier run was interrupted; going on from {checkpoint.name}.")
