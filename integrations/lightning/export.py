"""Results of a run, as a Lightning checkpoint."""

from __future__ import annotations

import os
from typing import Any

import torch
from safetensors.torch import save_model

from .trainer import weights_checkpoint


class Exporter:
    """Writes the trainer's module. Used on rank 0 alone."""

    def __init__(self, trainer: Any, module: torch.nn.Module) -> None:
        self._trainer, self._module = trainer, module

    def export(self, folder: str) -> None:
        """Write the module as it is to `folder`.

        `model.ckpt` holds weights and hyperparameters, without the state of training, for
        `MyModule.load_from_checkpoint`. `model.safetensors` is for `safetensors.torch.load_model`.
        """
        os.makedirs(folder, exist_ok=True)
        torch.save(weights_checkpoint(self._trainer), os.path.join(folder, "model.ckpt"))
        save_model(self._module, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
