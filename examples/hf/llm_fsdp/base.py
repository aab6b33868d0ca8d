"""Model and text of the example: a small Llama with random weights, and the bytes of English text. No hub is needed."""

from __future__ import annotations

import os
from pathlib import Path
from pydoc_data.topics import topics  # the chapters behind Python's help()

import torch
from filelock import FileLock
from transformers import LlamaConfig, LlamaForCausalLM

import fl_adapters

BLOCK = 64  # bytes, which are the tokens
BLOCKS = 512  # of the whole text; the rest is not used, to keep the example quick


def small_llama(folder: str) -> str:
    """Path of a small Llama within `folder`, which is made on first use. Several processes may call this at once."""
    target = Path(folder).resolve() / "small-llama"
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.exists():
            torch.manual_seed(0)
            config = LlamaConfig(
                vocab_size=256,
                hidden_size=64,
                intermediate_size=192,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=BLOCK,
            )
            made = target.with_name(f"{target.name}.partial")
            LlamaForCausalLM(config).save_pretrained(made)
            os.replace(made, target)  # atomic, so that no process sees half of it
    return str(target)


def blocks() -> tuple[list[dict[str, list[int]]], list[dict[str, list[int]]]]:
    """Training and validation blocks of this site: its own chapters in a federation, else all of them."""
    text = "".join(topics.values()).encode()
    found = [list(text[i * BLOCK : (i + 1) * BLOCK]) for i in range(BLOCKS)]
    site = fl_adapters.site()  # outside a federation: index 0 of 1
    mine = found[BLOCKS * site.index // site.count : BLOCKS * (site.index + 1) // site.count]
    samples = [{"input_ids": block, "labels": block} for block in mine]
    return [s for i, s in enumerate(samples) if i % 8], samples[::8]
