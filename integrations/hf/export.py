"""Results of a run in the formats of transformers, PEFT and sentence-transformers."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import AutoProcessor, PreTrainedModel, Trainer
from transformers.utils import cached_file

from fl_adapters.participant.results import ModelFiles
from fl_adapters.torch.ranks.collectives import on_rank_zero
from fl_adapters.torch.ranks.sharded_state import save_module
from fl_adapters.torch.ranks.shards import is_sharded
from fl_adapters.torch.selection import plain_name, unwrap
from fl_runtime.store.tensorfile import read_tensors

_PREPROCESSORS = ("tokenizer", "processor", "feature_extractor", "image_processor")
_ADAPTER = "adapter_model.safetensors"
_CONFIGS = ("tokenizer_config.json", "processor_config.json", "preprocessor_config.json")


class Exporter:
    """Writes the trainer's model, and what prepares its inputs. Used on rank 0 alone, unless the model is sharded.

    Tokenizer or processor are the trainer's own `processing_class`, else that of its data collator, as in HF's own
    `save_model`. Without either they are read from where the model's weights came from.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._model: nn.Module = unwrap(trainer.model)
        self._preprocessors = [trainer.processing_class] if trainer.processing_class is not None else []
        if not self._preprocessors:
            parts = [getattr(trainer.data_collator, name, None) for name in _PREPROCESSORS]
            self._preprocessors = [part for part in parts if hasattr(part, "save_pretrained")]

    def export(self, folder: str) -> ModelFiles | None:
        """Write the model as it is to `folder`, with `save_pretrained` if it has that, else as `model.safetensors`.

        A PEFT model writes its adapter, which opens with `PeftModel.from_pretrained(base, folder)`.

        Args:
            folder: Folder to write to. It is made if it does not exist.

        Returns:
            What makes another copy of the weights open in the same way; None for models that are not of transformers.
        """
        sharded = any(is_sharded(parameter) for parameter in self._model.parameters())
        save_module(self._model, folder)
        return on_rank_zero(lambda: self._add_files(folder)) if sharded else self._add_files(folder)

    def _add_files(self, folder: str) -> ModelFiles | None:
        """Write what prepares the model's inputs."""
        for preprocessor in self._preprocessors or self._of_the_base(folder):
            if hasattr(preprocessor, "save_pretrained"):
                preprocessor.save_pretrained(folder)
        return self._described(Path(folder))

    def _described(self, folder: Path) -> ModelFiles | None:
        if isinstance(self._model, PeftModel):
            saved = read_tensors(folder / _ADAPTER)
            return ModelFiles(folder, {name: array.shape for name, array in saved.items()}, _ADAPTER)
        # transformers 5 saves some models under the names of earlier versions; it reads both
        return ModelFiles(folder, _shapes(self._model)) if isinstance(self._model, PreTrainedModel) else None

    def _of_the_base(self, folder: str) -> Sequence[Any]:
        """Tokenizer or processor that lies beside the weights from which the model was made, if it is on this machine.

        Says so, since the script may have used another one. Empty for models that are not of transformers.
        """
        base = self._model.get_base_model() if isinstance(self._model, PeftModel) else self._model
        if not isinstance(base, PreTrainedModel):
            return []
        source = base.config.name_or_path
        found = _preprocessor_of(source) if source else None
        name = os.path.basename(folder)
        said = f"{name}/ gets the tokenizer or processor of {source}" if found else f"{name}/ has no tokenizer"
        print(f"fl-adapters: {said}, since the Trainer has no processing_class=", file=sys.stderr, flush=True)
        return [found] if found else []


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name of each tensor of a model's state -> its shape. Tensors that are tied have the first of their names."""
    state = {plain_name(name): tensor for name, tensor in model.state_dict(keep_vars=True).items()}
    first = {id(tensor): name for name, tensor in reversed(state.items())}
    return {name: tuple(state[name].shape) for name in first.values()}


def _preprocessor_of(source: str) -> Any:
    """Tokenizer or processor of `source`, a folder or a name on the Hub; None if it is not on this machine."""
    with suppress(OSError, ValueError, ImportError):  # not there, with code of its own, or in need of more packages
        # for a folder without one, AutoProcessor would make an empty tokenizer
        if any(_lies_there(source, name) for name in _CONFIGS):
            return AutoProcessor.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    return None


def _lies_there(source: str, name: str) -> bool:
    with suppress(OSError):
        return cached_file(source, name, local_files_only=True) is not None
    return False
