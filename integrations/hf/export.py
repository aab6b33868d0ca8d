"""The results of a run in the formats of transformers and PEFT."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import PreTrainedModel

from fl_adapters.torch_state import TorchState, as_tensor, unwrap
from fl_runtime.types import Arrays


class Exporter:
    """Writes the trainer's model, and loads other weights to be written, on rank 0 alone.

    gathered: for a sharded PEFT model, its adapter on the host; it is written from there, since gathering needs all
    ranks, and the live model is left alone.
    """

    def __init__(
        self, model: nn.Module, processing_class: Any, state: TorchState, *, gathered: Arrays | None = None
    ) -> None:
        self._model, self._processing_class, self._state = unwrap(model), processing_class, state
        self._gathered = gathered

    def load(self, arrays: Arrays) -> None:
        """Make `arrays` the weights that `export` writes."""
        if self._gathered is None:
            self._state.set_state(arrays)
        else:
            self._gathered = {name: np.copy(array) for name, array in arrays.items()}

    def export(self, folder: str) -> None:
        """Write to `folder` by `save_pretrained` (a PEFT model writes its adapter), else as `model.safetensors`;
        the tokenizer or processor beside it.

        A PEFT adapter opens with `PeftModel.from_pretrained(base, folder)`.
        """
        os.makedirs(folder, exist_ok=True)
        if isinstance(self._model, PreTrainedModel) or hasattr(self._model, "peft_config"):
            options = {} if self._gathered is None else {"state_dict": self._adapter(self._gathered)}
            self._model.save_pretrained(folder, **options)  # type: ignore[operator]
        else:
            from safetensors.torch import save_model

            save_model(self._model, os.path.join(folder, "model.safetensors"))
        if hasattr(self._processing_class, "save_pretrained"):
            self._processing_class.save_pretrained(folder)

    def _adapter(self, arrays: Arrays) -> dict[str, Tensor]:
        """The model's own names -> the adapter's tensors on the host."""
        names = {id(tensor): name for name, tensor in self._state.tensors.items()}
        return {
            raw: as_tensor(arrays[names[id(tensor)]])
            for raw, tensor in self._model.state_dict(keep_vars=True).items()
            if id(tensor) in names
        }
