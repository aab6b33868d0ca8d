"""Results of a run in the formats of transformers and PEFT."""

from __future__ import annotations

import os
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from fl_adapters.torch.state import is_sharded, unwrap


class Exporter:
    """Writes the trainer's model and its tokenizer or processor. Used on rank 0 alone."""

    def __init__(self, model: nn.Module, processing_class: Any) -> None:
        self._model, self._processing_class = unwrap(model), processing_class

    def export(self, folder: str) -> None:
        """Write the model as it is to `folder`, with `save_pretrained` if it has that, else as `model.safetensors`.

        A PEFT model writes its adapter, which opens with `PeftModel.from_pretrained(base, folder)`.
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
        """Tensors that one rank can read alone, if the base is sharded over ranks; else None."""
        if not any(is_sharded(parameter) for parameter in self._model.parameters()):
            return None
        return {name: tensor for name, tensor in self._model.state_dict().items() if not is_sharded(tensor)}
