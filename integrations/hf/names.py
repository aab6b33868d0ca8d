"""Names that a Trainer's model, tokenizer and training set hold, which sites must have in common."""

from __future__ import annotations

from torch import nn
from transformers import Trainer

from fl_adapters.torch.handshake.agreement import fingerprinted
from fl_adapters.torch.handshake.names import labels_of_config, names_of_data, names_of_processing
from fl_adapters.torch.selection import unwrap
from fl_runtime.wire.names import Names


def names_of_trainer(trainer: Trainer) -> dict[str, Names]:
    """Return label names, the tokenizer's vocabulary and the like, by what they are."""
    model = unwrap(trainer.model)
    base = getattr(model, "get_base_model", lambda: model)()
    processing = trainer.processing_class or getattr(trainer.data_collator, "tokenizer", None)
    found = labels_of_config(getattr(base, "config", None)) | names_of_processing(processing)
    return found | names_of_data(trainer.train_dataset) | _reference(trainer)


def _reference(trainer: Trainer) -> dict[str, Names]:
    """The hashes of the reference model of TRL's trainers (DPO, GRPO), which is part of the loss and never travels."""
    reference = getattr(trainer, "ref_model", None)
    if not isinstance(reference, nn.Module):
        return {}
    facts = fingerprinted("reference model", dict(unwrap(reference).named_parameters()))
    return {name: fact for name, fact in facts.items() if isinstance(fact, Names)}
