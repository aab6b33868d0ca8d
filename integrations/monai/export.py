"""The results of a run, as MONAI keeps a network."""

from __future__ import annotations

import os

import torch
from safetensors.torch import save_model

from fl_adapters.torch.state import TorchState, unwrap
from fl_runtime.types import Arrays


class Exporter:
    """Writes the trainer's network, and loads other weights to be written, on rank 0 alone."""

    def __init__(self, network: torch.nn.Module, state: TorchState) -> None:
        self._network, self._state = unwrap(network), state

    def load(self, arrays: Arrays) -> None:
        """Make `arrays` the weights that `export` writes."""
        self._state.set_state(arrays)

    def export(self, folder: str) -> None:
        """Write `model.pt`, a state dict such as bundles keep in `models/`, for MONAI's `CheckpointLoader` and
        `torch.load(path, weights_only=True)`; and `model.safetensors`, for `safetensors.torch.load_model`."""
        os.makedirs(folder, exist_ok=True)
        torch.save(self._network.state_dict(), os.path.join(folder, "model.pt"))
        save_model(self._network, os.path.join(folder, "model.safetensors"))
