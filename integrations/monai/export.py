"""Results of a run, in the formats in which MONAI keeps a network."""

from __future__ import annotations

import os

import torch
from safetensors.torch import save_model

from fl_adapters.torch.selection import unwrap


class Exporter:
    """Writes the trainer's network. Used on rank 0 alone."""

    def __init__(self, network: torch.nn.Module) -> None:
        self._network = unwrap(network)

    def export(self, folder: str) -> None:
        """Write the network as it is to `folder`.

        `model.pt` is a state dict such as bundles keep in `models/`, for MONAI's `CheckpointLoader` and for
        `torch.load(path, weights_only=True)`. `model.safetensors` is for `safetensors.torch.load_model`.
        """
        os.makedirs(folder, exist_ok=True)
        torch.save(self._network.state_dict(), os.path.join(folder, "model.pt"))
        save_model(self._network, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
