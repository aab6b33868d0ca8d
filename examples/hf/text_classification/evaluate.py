"""Prints the accuracy of trained adapters on the held-out rows.

python evaluate.py out runs/<job>/model
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

from data import Data, load
from model import MAX_LENGTH, minilm

BATCH = 64


def accuracy_of(adapter: str | Path, data: Data) -> float:
    """Share of the test rows, from 0 to 1, that MiniLM with the adapter in this folder predicts correctly."""
    logging.set_verbosity_error()  # silences a warning about the new head, which comes with the adapter
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    base = AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=len(data.labels))
    model = PeftModel.from_pretrained(base, adapter).eval()
    rows = sorted(data.test, key=lambda row: len(row[0]))  # batches of similar length need less padding
    right = 0
    for start in range(0, len(rows), BATCH):
        texts, labels = zip(*rows[start : start + BATCH], strict=True)
        batch = tokenizer(texts, truncation=True, max_length=MAX_LENGTH, padding=True, return_tensors="pt")
        with torch.inference_mode():
            predicted = model(**batch).logits.argmax(-1)
        right += int((predicted == torch.tensor(labels)).sum())
    return right / len(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", nargs="+", metavar="FOLDER", help="adapter that train.py or a federation saved")
    parser.add_argument("--data", help="data that it was trained on, as for train.py")
    args = parser.parse_args(arguments)
    data = load(args.data)
    for adapter in args.adapters:
        print(f"{accuracy_of(adapter, data):.3f} on {len(data.test)} held-out rows: {adapter}")


if __name__ == "__main__":
    main()
