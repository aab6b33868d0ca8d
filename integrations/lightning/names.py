"""Names that a module, its datamodule and the training set hold, which sites must have in common."""

from __future__ import annotations

from typing import Any

from fl_adapters.torch.handshake.names import labels_of_config, names_held_by, names_of_data
from fl_runtime.wire.names import Names

from . import trainer as lightning


def names_of_fit(trainer: Any, module: Any) -> dict[str, Names]:
    """Return label names, numbers of classes, tokenizers and the like, by what they are."""
    found: dict[str, Names] = {}
    for loader in lightning.training_loaders(trainer):
        found |= names_of_data(getattr(loader, "dataset", None))
    for part in (module, *module.children()):
        found |= labels_of_config(getattr(part, "config", None))
    return found | names_held_by(trainer.datamodule, "the datamodule") | names_held_by(module, "the module")
