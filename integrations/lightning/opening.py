"""Opens the module that a run has left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fl_adapters.torch import opening
from fl_runtime.errors import ConfigError

_CHECKPOINT = "model.ckpt"


def open_model(folder: Path, into: Any = None, *, partial: bool = False) -> Any:
    """Open the checkpoint in the folder of a model.

    Args:
        folder: Folder of the model.
        into: Class of the module, for `load_from_checkpoint`; or a module, which gets the weights in place.
        partial: Whether a module keeps its own values for tensors that did not travel.

    Returns:
        The module, on the CPU.

    Raises:
        ConfigError: The class is missing or cannot be made from the checkpoint.
        StateMismatchError: The weights do not fit the module, which is as it was.
    """
    if into is None:
        raise ConfigError(
            "a checkpoint of Lightning opens with the class of its module",
            where=str(folder / _CHECKPOINT),
            fix="load(YourModule), or load(into=YourModule(...)) for a class that has not saved its hyperparameters",
        )
    if not isinstance(into, type):
        return opening.open_model(folder, into, partial=partial)
    return _made(folder / _CHECKPOINT, into)


def _made(path: Path, module: Any) -> Any:
    """The module that its class makes from a checkpoint."""
    instance = f"load(into={module.__name__}(...))"
    if not path.is_file():
        raise ConfigError(
            "there is no checkpoint of Lightning, since the server keeps the tensors alone",
            where=str(path.parent),
            fix=f"make the module as for training: {instance}",
        )
    try:
        torch.load(path, map_location="meta", weights_only=True)  # of what follows, nothing needs more than that
    except Exception as error:
        raise ConfigError(
            f"the checkpoint holds more than weights and plain hyperparameters: {str(error).splitlines()[0]}",
            where=str(path),
            fix=f"make the module as for training: {instance}",
        ) from None
    try:
        return module.load_from_checkpoint(path, map_location="cpu")
    except TypeError as error:
        raise ConfigError(
            f"{module.__name__} cannot be made from the checkpoint: {error}",
            where=str(path),
            fix=f"call self.save_hyperparameters() in its __init__, or make the module: {instance}",
        ) from None
