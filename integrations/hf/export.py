"""The results of a run in the formats of transformers and PEFT."""

from __future__ import annotations

import os
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from fl_adapters.torch.state import TorchState, is_sharded, unwrap
from fl_runtime.types import Arrays


class Exporter:
    """Writes the trainer's model, and loads other weights to be written; on rank 0 alone."""

    def __init__(self, model: nn.Module, processing_class: Any, state: TorchState) -> None:
        self._model, self._processing_class, self._state = unwrap(model), processing_class, state

    def load(self, arrays: Arrays) -> None:
        """Make `arrays` the weights of the model."""
        self._state.set_state(arrays)

    def export(self, folder: str) -> None:
        """Write to `folder` by `save_pretrained` (a PEFT model writes its adapter), else as `model.safetensors`;
        the tokenizer or processor beside it.

        A PEFT adapter opens with `PeftModel.from_pretrained(base, folder)`.
        """
        os.makedirs(folder, exist_ok=True)
        if isinstance(self._model, PeftModel):
            self._model.save_pretrained(folder, state_dict=self._unsharded())
        elif isinstance(self._model, PreTrainedModel):
            self._model.save_pretrained(folder)
        else:
            from safetensors.torch import save_model

            save_model(self._model, os.path.join(folder, "model.safetensors"))
        if hasattr(self._processing_class, "save_pretrained"):
            self._processing_class.save_pretrained(folder)

    def _unsharded(self) -> dict[str, Tensor] | None:
        """What PEFT may look at where the base is sharded, and gathering it would need all ranks; else None."""
        if not any(is_sharded(parameter) for parameter in self._model.parameters()):
            return None
        return {name: tensor for name, tensor in self._model.state_dict().items() if not is_sharded(tensor)}
