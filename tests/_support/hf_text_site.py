"""A site that trains a small text classifier with its tokenizer, from a folder with a base model."""

from __future__ import annotations

from typing import Any

import hf_models as m
import st_models as st
import torch
from transformers import BertForSequenceClassification

from fl_adapters.hf import FederatedCallback


class Texts(torch.utils.data.Dataset):
    """Sentences as the tokenizer of the base gives them, with labels that can be learned."""

    def __init__(self, seed: int = 0) -> None:
        words, columns = st.tokenizer(), st.pairs(16)
        turned = columns["label"][seed:] + columns["label"][:seed]
        self.rows = [
            {**words(text, padding="max_length"), "labels": label}
            for text, label in zip(columns["first"], turned, strict=True)
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def trained(kit: str, base: str, seed: int = 0, *, lora: bool = False, freeze: bool = False) -> Any:
    """Train what lies in `base` at a site, and return the model."""
    model = BertForSequenceClassification.from_pretrained(base)
    if freeze:
        model.bert.embeddings.requires_grad_(False)
    if lora:
        model = m.adapted(model, modules_to_save=["classifier"])
    m.trainer(
        FederatedCallback(kit=kit),
        model=model,
        train_dataset=Texts(seed),
        processing_class=st.tokenizer(),
        lr_scheduler_type="constant",
        seed=seed,
    ).train()
    return model.eval()
