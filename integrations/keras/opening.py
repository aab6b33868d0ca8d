"""Opens the Keras model that a run has left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras

from fl_runtime.errors import ConfigError, StateMismatchError
from fl_runtime.store.tensorfile import read_tensors

from .names import named_variables
from .preprocessing import deriving_again
from .state import assign

_SHOWN = 8


def open_model(folder: Path, into: Any = None, *, partial: bool = False) -> Any:
    """Open the folder of a model: `model.keras`, `model.weights.h5`, or the tensors that a server keeps.

    Args:
        folder: Folder of the model.
        into: A built model, which gets the weights in place. Default: the model that `model.keras` describes, which
            Keras makes in its safe mode.
        partial: Whether the model keeps its own values for weights that did not travel.

    Returns:
        The model.

    Raises:
        ConfigError: Keras cannot make the model from the file; the error says what to give.
        StateMismatchError: The weights do not fit the model.
    """
    if isinstance(into, type):
        raise ConfigError(
            f"{into.__name__} is a class, and the files do not say how to make one of it",
            where="load(into=)",
            fix=f"make and build it as for training: load(into={into.__name__}(...))",
        )
    files = [path for name in ("model.keras", "model.weights.h5") if (path := folder / name).is_file()]
    if into is None:
        return _made(folder, files)
    if files:
        try:
            into.load_weights(files[0])
        except ValueError as error:
            raise StateMismatchError(
                f"the model of the run does not fit this one: {str(error).splitlines()[0]}",
                where=str(files[0]),
                fix="make and build the model as the sites' script does",
            ) from None
        return into
    _assign(into, folder / "model.safetensors", partial=partial)
    return into


def _made(folder: Path, files: list[Path]) -> Any:
    fix = "make and build the model as for training: load(into=model)"
    if not files or files[0].suffix != ".keras":
        raise ConfigError(
            "there are weights alone, and no model.keras that describes the model", where=str(folder), fix=fix
        )
    try:
        return keras.saving.load_model(files[0], safe_mode=True)
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).rpartition("Exception encountered: ")[2].split())  # the innermost one
        raise ConfigError(
            f"Keras cannot make the model from the file: {reason[:300]}",
            where=str(files[0]),
            fix=f"register its classes with keras.saving.register_keras_serializable(), or {fix}",
        ) from None


def _assign(model: Any, file: Path, *, partial: bool) -> None:
    """Copy tensors into a built model by the names with which they travel. Changes nothing if they do not fit."""
    arrays = read_tensors(file)
    variables = {name: named.variable for name, named in named_variables(model).items()}
    lines = [
        f"{name}: {tuple(array.shape)} in the run, {tuple(variables[name].shape)} in the model"
        if name in variables
        else f"{name}: not in the model"
        for name, array in arrays.items()
        if name not in variables or tuple(variables[name].shape) != array.shape
    ]
    missing = [name for name in variables if name not in arrays]
    if lines:
        raise StateMismatchError(
            "the model of the run does not fit this one:\n    " + "\n    ".join(lines[:_SHOWN]),
            where=str(file),
            fix="make and build the model as the sites' script does",
        )
    if missing and not partial:
        raise StateMismatchError(
            f"the model of the run has no {', '.join(missing[:_SHOWN])}",
            where=str(file),
            fix="give the model with the values that they had at the sites, and partial=True to keep those",
        )
    with deriving_again(model):
        for name, array in arrays.items():
            assign(variables[name], array)
