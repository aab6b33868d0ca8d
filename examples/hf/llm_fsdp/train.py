"""Fine-tunes a language model that FSDP2 shards over all processes: an ordinary transformers.Trainer script.

torchrun --nproc-per-node 2 train.py             # all weights of a small random Llama, also without a GPU
torchrun --nproc-per-node 8 train.py --model Qwen/Qwen3-8B --learning-rate 1e-5
torchrun --nproc-per-node 2 train.py --lora      # a LoRA adapter alone

Needs transformers 5, which shards the model as it loads it.
"""

from __future__ import annotations

import argparse
import os

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, default_data_collator
from transformers.distributed import DistributedConfig

from base import blocks, small_llama


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model of the hub, or a folder (default: a small one that is made here)")
    parser.add_argument("--lora", action="store_true", help="train a LoRA adapter, and not all weights")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--output", default="out")
    args = parser.parse_args()

    training = TrainingArguments(
        output_dir=args.output,
        num_train_epochs=args.epochs,
        learning_rate=args.learning_rate,
        per_device_train_batch_size=8,
        eval_strategy="epoch",
        save_strategy="no",
        report_to="none",
        seed=0,
        average_tokens_across_devices=False,  # blocks have equal lengths; else HF multiplies the loss it reports
        ddp_backend=None if torch.cuda.is_available() else "gloo",
    )
    training.device  # noqa: B018, begins the process group
    shards = DistributedConfig(fsdp_size=int(os.environ["WORLD_SIZE"]))
    model = AutoModelForCausalLM.from_pretrained(args.model or small_llama("runs"), distributed_config=shards)
    if args.lora:
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear"))

    train, validation = blocks()
    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=default_data_collator,
    )
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    if trainer.is_world_process_zero():
        print(f"loss {loss:.3f}")


if __name__ == "__main__":
    main()
