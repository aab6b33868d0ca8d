"""Base model of the example: a small decoder, pretrained once on text that no site holds. No hub is needed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

END = "<end>"  # ends a paragraph
VOCABULARY = 1024
BLOCK = 64  # tokens
BATCH = 16
EPOCHS = 4
LEARNING_RATE = 3e-3


def pretrained(text: Sequence[str], folder: str) -> str:
    """Path of the base model for `text` within `folder`. Makes the model if it is not there.

    Several processes may call this at once: one makes the model, the others wait. Its name depends on the text.
    """
    digest = hashlib.sha256(END.join(text).encode()).hexdigest()[:8]
    target = Path(folder).resolve() / f"base-{digest}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.exists():
            made = target.with_name(f"{target.name}.partial")
            _pretrain(text, made)
            os.replace(made, target)  # atomic, so that no process sees half of it
    return str(target)


def _pretrain(text: Sequence[str], folder: Path) -> None:
    """Train the base model in a plain loop, with the same result on every run."""
    print("pretraining a small base model", flush=True)
    set_seed(0)
    tokenizer = _tokenizer(text)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    blocks = torch.tensor(token_blocks(tokenizer, text))
    steps = EPOCHS * (len(blocks) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps + 1)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(blocks))[: len(blocks) // BATCH * BATCH].split(BATCH):
            model(input_ids=blocks[batch], labels=blocks[batch]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tokenizer(text: Sequence[str]) -> PreTrainedTokenizerFast:
    """Train a tokenizer: byte-pair encoding over bytes, which can encode any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def token_blocks(tokenizer: PreTrainedTokenizerFast, text: Sequence[str]) -> list[list[int]]:
    """Paragraphs as one token sequence, each with an end token, cut into blocks of equal length. Drops the rest."""
    whole = "".join(paragraph + tokenizer.eos_token for paragraph in text)
    ids: list[int] = tokenizer(whole, verbose=False)["input_ids"]
    return [ids[i : i + BLOCK] for i in range(0, len(ids) - BLOCK + 1, BLOCK)]
