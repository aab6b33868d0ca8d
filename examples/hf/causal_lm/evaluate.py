"""Perplexity of a language model, with or without an adapter, on held-out text."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from base import token_blocks

BATCH = 32


def perplexity(model_name: str, adapter: str | Path | None, text: list[str]) -> float:
    """Perplexity: exp of the mean loss per token.

    Args:
        model_name: Base model, by its folder or its name on the hub.
        adapter: Folder of an adapter that train.py or a federation saved; None scores the base model.
        text: Paragraphs.

    Returns:
        The perplexity, at least 1; lower is better.
    """
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    model = AutoModelForCausalLM.from_pretrained(model_name)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    model.eval()
    blocks = torch.tensor(token_blocks(tokenizer, text))
    total = 0.0
    for batch in blocks.split(BATCH):
        with torch.inference_mode():
            total += float(model(input_ids=batch, labels=batch).loss) * len(batch)  # blocks have equal length
    return math.exp(total / len(blocks))
