"""A small BERT under Hugging Face's `Trainer`, for the chaos suite.

It has AdamW, a falling learning rate, dropout, shuffling, and a layer that stays at the site.
"""

from __future__ import annotations

from typing import Any

import torch
from site_notes import FOLDER, acknowledged, final
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from fl_adapters import site
from fl_adapters.hf import FederatedCallback

ROWS, TOKENS, WORDS = 16, 8, 1000


def rows(seed: int) -> list[dict[str, torch.Tensor]]:
    """Return rows whose label is whether the first word is in the first half of the vocabulary."""
    words = torch.randint(0, WORDS, (ROWS, TOKENS), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": (row[0] < WORDS // 2).long()} for row in words]


class Rounds(TrainerCallback):
    """Notes each finished round of one epoch; it comes after the federation's callback."""

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        acknowledged(round(state.epoch))


def main() -> None:
    set_seed(site().index)
    config = BertConfig(
        vocab_size=WORDS,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
    )
    model = BertForSequenceClassification(config)
    arguments = TrainingArguments(
        output_dir=str(FOLDER / "out"),
        num_train_epochs=100,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        use_cpu=True,
        report_to=[],
        eval_strategy="epoch",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    callbacks = [FederatedCallback(keep_local=["bert.embeddings.position_embeddings.*"]), Rounds()]
    data = {"train_dataset": rows(site().index), "eval_dataset": rows(99)[:4]}
    Trainer(model, arguments, callbacks=callbacks, **data).train()
    final({name: tensor.numpy() for name, tensor in model.state_dict().items() if "position_embeddings" not in name})


if __name__ == "__main__":
    main()
