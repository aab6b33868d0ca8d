"""Results of a run, as a Lightning checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import save_file, save_model

from fl_adapters.torch.ranks.collectives import on_rank_zero
from fl_adapters.torch.ranks.sharded_state import full_state
from fl_adapters.torch.ranks.shards import is_sharded

from .trainer import weights_checkpoint

_METADATA = {"format": "pt"}


class Exporter:
    """Writes the trainer's module. Used on rank 0 alone, unless the module is sharded."""

    def __init__(self, trainer: Any, module: torch.nn.Module) -> None:
        self._trainer, self._module = trainer, module

    def export(self, folder: str) -> None:
        """Write the module as it is to `folder`.

        `model.ckpt` holds weights and hyperparameters, without the state of training, for
        `MyModule.load_from_checkpoint`. `model.safetensors` is for `safetensors.torch.load_model`.
        """
        checkpoint = weights_checkpoint(self._trainer)
        if any(is_sharded(parameter) for parameter in self._module.parameters()):
            state = checkpoint["state_dict"] = full_state(self._module)
            on_rank_zero(lambda: _write(folder, checkpoint, lambda path: save_file(state, path, metadata=_METADATA)))
        else:
            _write(folder, checkpoint, lambda path: save_model(self._module, path, metadata=_METADATA))


def _write(folder: str, checkpoint: dict[str, Any], save: Callable[[str], None]) -> None:
    os.makedirs(folder, exist_ok=True)
    torch.save(checkpoint, os.path.join(folder, "model.ckpt"))
    save(os.path.join(folder, "model.safetensors"))
