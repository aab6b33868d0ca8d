"""Site script of benchmarks/lora.py: trains MiniLM with LoRA on the site's part of the SMS Spam Collection.

All sites score the global model on the same test rows.

usage: lora_site.py RANKS [--rows N] [--test-rows N] [--seed S]   (RANKS: one for each site, such as 2,4,8)
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    Trainer,
    TrainingArguments,
    set_seed,
)

import fl_adapters
from fl_adapters.hf import FederatedCallback

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "examples" / "hf" / "text_classification"))

from data import Row, load  # noqa: E402
from model import MAX_LENGTH, minilm  # noqa: E402

DATA = Path(os.environ.get("FL_ADAPTERS_DATA", ROOT.parent / "shared" / "data")) / "sms_spam"
LAYERS = [4, 5]  # the last two of six


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ranks")
    parser.add_argument("--rows", type=int, default=1600, help="training rows of all sites together")
    parser.add_argument("--test-rows", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    ranks = [int(rank) for rank in args.ranks.split(",")]

    set_seed(args.seed)
    data = load(str(DATA), rows=args.rows)
    tokenizer = AutoTokenizer.from_pretrained(minilm())

    def encode(rows: list[Row]) -> list[dict[str, Any]]:
        return [{**tokenizer(text, truncation=True, max_length=MAX_LENGTH), "labels": label} for text, label in rows]

    model = AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=len(data.labels))
    rank = ranks[fl_adapters.site().index % len(ranks)]
    lora = LoraConfig(
        task_type="SEQ_CLS",
        r=rank,
        lora_alpha=2 * rank,
        target_modules=["query", "key", "value", "dense"],
        layers_to_transform=LAYERS,
        modules_to_save=["classifier"],
    )
    Trainer(
        model=get_peft_model(model, lora),
        args=TrainingArguments(
            output_dir="out",
            num_train_epochs=1,
            learning_rate=2e-3,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=64,
            eval_strategy="epoch",
            save_strategy="no",
            report_to="none",
            seed=args.seed,
            use_cpu=True,
        ),
        train_dataset=encode(data.train),
        eval_dataset=encode(data.test[: args.test_rows]),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=f1_of_spam,
        callbacks=[FederatedCallback(required=True)],
    ).train()


def f1_of_spam(prediction: EvalPrediction) -> dict[str, float]:
    """F1 score of label 1, which is spam; label 0 is ham."""
    predicted, is_spam = prediction.predictions.argmax(-1) == 1, prediction.label_ids == 1
    return {"f1": 2 * float((predicted & is_spam).sum()) / max(float(predicted.sum() + is_spam.sum()), 1.0)}


if __name__ == "__main__":
    main()
