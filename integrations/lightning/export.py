"""The results of a run, as a Lightning checkpoint."""

from __future__ import annotations

import os
from typing import Any

import torch
from safetensors.torch import save_model

from fl_adapters.torch.state import TorchState
from fl_runtime.types import Arrays


class Exporter:
    """Writes the trainer's model, and loads other weights to be written, on rank 0 alone."""

    def __init__(self, trainer: Any, module: torch.nn.Module, state: TorchState) -> None:
        self._trainer, self._module, self._state = trainer, module, state

    def load(self, arrays: Arrays) -> None:
        """Make `arrays` the weights that `export` writes."""
        self._state.set_state(arrays)

    def export(self, folder: str) -> None:
        """Write `model.ckpt`, weights and hyperparameters without the state of training, for
        `MyModule.load_from_checkpoint`; and `model.safetensors`, for `safetensors.torch.load_model`."""
        os.makedirs(folder, exist_ok=True)
        # not trainer.save_checkpoint: that is a collective, and rank 0 is alone here
        checkpoint = self._trainer._checkpoint_connector.dump_checkpoint(weights_only=True)
        torch.save(checkpoint, os.path.join(folder, "model.ckpt"))
        save_model(self._module, os.path.join(folder, "model.safetensors"))
