"""Fine-tunes MiniLM with LoRA to predict the subject area of a text: an ordinary transformers.Trainer script.

python train.py                  # on all rows
python train.py --shard 1/3      # on the rows of the first of three sites

Saves the adapter in --output.
"""

from __future__ import annotations

import argparse

from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from data import ROWS, Row, load
from model import MAX_LENGTH, accuracy, minilm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="file or folder with label and text, or a hub data set (default: docstrings)")
    parser.add_argument("--shard", metavar="I/N", help="part to train on, such as 1/3")
    parser.add_argument("--rows", type=int, default=ROWS, help="training rows of all sites together; 0 for all")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="out")
    args = parser.parse_args()

    set_seed(args.seed)
    data = load(args.data, args.shard, args.rows)
    tokenizer = AutoTokenizer.from_pretrained(minilm())

    def encode(rows: list[Row]) -> list[dict[str, object]]:
        return [{**tokenizer(text, truncation=True, max_length=MAX_LENGTH), "labels": label} for text, label in rows]

    model = AutoModelForSequenceClassification.from_pretrained(
        minilm(), num_labels=len(data.labels), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    lora = LoraConfig(
        task_type="SEQ_CLS",
        r=32,
        lora_alpha=64,
        target_modules=["query", "key", "value", "dense"],
        layers_to_transform=[5],  # the last of six layers: quick, and enough for so few rows
        modules_to_save=["pooler", "classifier"],
    )
    trainer = Trainer(
        model=get_peft_model(model, lora),
        args=TrainingArguments(
            output_dir=args.output,
            num_train_epochs=args.epochs,
            learning_rate=2e-3,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=64,
            eval_strategy="epoch",
            save_strategy="no",
            report_to="none",
            seed=args.seed,
        ),
        train_dataset=encode(data.train),
        eval_dataset=encode(data.validation),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
