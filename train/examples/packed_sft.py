"""
Supervised fine-tuning on prompts and completions with TRL, packed: no padding, and no sample sees another.

    python -m deltanet.train.examples.packed_sft MODEL DATA.jsonl OUTPUT

A line of DATA is {"prompt": "...", "completion": "..."}; the loss covers completions. TRL warns that packing wants flash
attention: DeltaNet reads where samples begin from `position_ids`, in every implementation, and needs none.
"""

import argparse

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import deltanet  # noqa: F401  registers the model with the Auto classes


def fine_tune(model_name: str, data: str, output: str, **settings) -> SFTTrainer:
    """Train and save; `settings` are fields of `SFTConfig` over those chosen here."""
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32)
    config = SFTConfig(
        output_dir=output,
        **{
            "max_length": 2048,
            "packing": True,
            # One row: packed samples are parted in a single row only.
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 8,
            "learning_rate": 2e-5,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.03,
            "bf16": torch.cuda.is_available(),
            "report_to": "none",
            **settings,
        },
    )
    trainer = SFTTrainer(
        model,
        config,
        train_dataset=load_dataset("json", data_files=data, split="train"),
        processing_class=AutoTokenizer.from_pretrained(model_name),
    )
    trainer.train()
    trainer.save_model(output)
    return trainer


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("output")
    fine_tune(*vars(parser.parse_args()).values())


if __name__ == "__main__":
    main()
