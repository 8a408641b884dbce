"""
LoRA with PEFT: fine-tuning on texts that trains a small part of the weights and saves only that.

    python -m deltanet.train.examples.lora MODEL DATA.jsonl OUTPUT

A line of DATA is {"text": "..."}. `PeftModel.from_pretrained(model, OUTPUT)` puts the adapter on the model again, and
`merge_and_unload()` makes it part of the weights.
"""

import argparse

import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorWithFlattening, Trainer, TrainingArguments

import deltanet  # noqa: F401  registers the model with the Auto classes


def fine_tune(model_name: str, data: str, output: str, max_length: int = 2048, **settings) -> Trainer:
    """Train and save the adapter; `settings` are fields of `TrainingArguments` over those chosen here."""
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32)
    # Every projection of every layer, those of the writing strength included; the convolutions are no linear layers.
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=16, lora_alpha=32)
    model = get_peft_model(model, lora)

    def tokenize(rows):
        return {"input_ids": tokenizer([t + tokenizer.eos_token for t in rows["text"]])["input_ids"]}

    texts = load_dataset("json", data_files=data, split="train")
    samples = texts.map(tokenize, batched=True, remove_columns=texts.column_names)
    samples = samples.map(lambda row: {"input_ids": row["input_ids"][:max_length]})
    arguments = TrainingArguments(
        output_dir=output,
        **{
            "per_device_train_batch_size": 8,
            "learning_rate": 2e-4,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.03,
            "bf16": torch.cuda.is_available(),
            "report_to": "none",
            "save_strategy": "no",
            **settings,
        },
    )
    # The samples of a batch lie in one row without padding, with the boundaries that keep them apart.
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    trainer = Trainer(model, arguments, train_dataset=samples, data_collator=collator)
    trainer.train()
    model.save_pretrained(output)
    return trainer


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("output")
    fine_tune(*vars(parser.parse_args()).values())


if __name__ == "__main__":
    main()
