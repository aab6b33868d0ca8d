"""A small random BERT with a tokenizer of its own, in a folder, and sentence pairs over its vocabulary."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForSequenceClassification, BertModel, PreTrainedTokenizerFast

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"word{i}" for i in range(20))]


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=16, **special)


def config() -> BertConfig:
    return BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
    )


def base(folder: Path, *, classifies: bool = False, with_tokenizer: bool = True) -> str:
    """Save a model to `folder`, as a pretrained one would lie there; return the folder."""
    torch.manual_seed(0)
    (BertForSequenceClassification if classifies else BertModel)(config()).save_pretrained(folder)
    if with_tokenizer:
        tokenizer().save_pretrained(folder)
    return str(folder)


def pairs(rows: int = 16) -> dict[str, list[object]]:
    """Columns of sentence pairs and their labels."""
    return {
        "first": [f"word{i % 20} word{i % 7}" for i in range(rows)],
        "second": [f"word{i % 5}" for i in range(rows)],
        "label": [i % 2 for i in range(rows)],
    }
