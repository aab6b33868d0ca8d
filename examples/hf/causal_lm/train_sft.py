"""Fine-tunes a decoder language model with LoRA: train.py with trl's SFTTrainer.

python train_sft.py                         # with a small base model, pretrained on first use
python train_sft.py --shard 1/3             # on the text of the first of three sites
python train_sft.py --model HuggingFaceTB/SmolLM2-135M --learning-rate 2e-4

Saves the adapter in --output.
"""

from __future__ import annotations

import argparse

from datasets import Dataset
from peft import LoraConfig
from transformers import set_seed
from trl import SFTConfig, SFTTrainer

from base import pretrained
from data import load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model of the hub, or a folder (default: a small one that is made here)")
    parser.add_argument("--base", default="runs", help="folder for the small model")
    parser.add_argument("--shard", metavar="I/N", help="part to train on, such as 1/3")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=1e-2, help="for models of the hub try 2e-4")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="out")
    args = parser.parse_args()

    data = load(args.shard)
    name = args.model or pretrained(data.base, args.base)
    set_seed(args.seed)
    trainer = SFTTrainer(
        model=name,
        args=SFTConfig(
            output_dir=args.output,
            num_train_epochs=args.epochs,
            learning_rate=args.learning_rate,
            per_device_train_batch_size=8,
            max_length=64,
            gradient_checkpointing=False,
            bf16=False,
            eval_strategy="epoch",
            save_strategy="no",
            report_to="none",
            seed=args.seed,
        ),
        train_dataset=Dataset.from_dict({"text": data.train}),
        eval_dataset=Dataset.from_dict({"text": data.validation}),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear"),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
