"""Writes the results of a run as `.keras` files."""

from __future__ import annotations

import os
import warnings
from contextlib import suppress
from typing import Any

_REASON_CHARS = 160


def export(model: Any, folder: str) -> None:
    """Write `folder/model.keras`, which `keras.saving.load_model` opens.

    If Keras cannot save the architecture, there is no such file: `model.weights.h5` for `load_weights` is written in
    its place, and a warning says so.

    Args:
        model: The built model.
        folder: The folder, which is made if need be.
    """
    os.makedirs(folder, exist_ok=True)
    partial, built = os.path.join(folder, "partial.keras"), model.built
    model.built = True  # Keras never says so of a model without call(), though its variables exist, and refuses to save
    try:
        model.save(partial)
        os.replace(partial, os.path.join(folder, "model.keras"))
    except (NotImplementedError, TypeError, ValueError, AttributeError) as error:
        path = os.path.join(folder, "model.weights.h5")
        model.save_weights(path)
        name, reason = type(model).__name__, " ".join(str(error).split())[:_REASON_CHARS]
        mark = "" if built else ", set its built = True,"
        warnings.warn(
            f"Keras cannot save this {name} as a whole, so there is no model.keras ({reason}). Its weights are in "
            f"{path}; make the model as before{mark} and call load_weights",
            stacklevel=2,
        )
    finally:
        model.built = built
        with suppress(FileNotFoundError):  # Keras leaves an empty file behind
            os.remove(partial)
