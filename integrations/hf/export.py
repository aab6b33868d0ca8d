"""The results of a run in the formats of transformers and PEFT."""

from __future__ import annotations

import os
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from fl_adapters.torch_state import unwrap


def export_model(model: nn.Module, processing_class: Any, folder: str) -> None:
    """Write `model` to `folder`: `save_pretrained` where it has one (a PEFT model writes its adapter), else
    `model.safetensors`. The tokenizer or processor goes beside it.

    A PEFT adapter opens with `PeftModel.from_pretrained(base, folder)`.
    """
    os.makedirs(folder, exist_ok=True)
    model = unwrap(model)
    if isinstance(model, PreTrainedModel) or hasattr(model, "peft_config"):
        model.save_pretrained(folder)  # type: ignore[operator]
    else:
        from safetensors.torch import save_model

        save_model(model, os.path.join(folder, "model.safetensors"))
    if hasattr(processing_class, "save_pretrained"):
        processing_class.save_pretrained(folder)
