"""Writes the results of a run as `.keras` files."""

from __future__ import annotations

import os
import warnings
from typing import Any


def export(model: Any, folder: str) -> None:
    """Write `folder/model.keras`, which `keras.saving.load_model` opens.

    If Keras cannot save the architecture, write `model.weights.h5` for `load_weights`, with a warning.
    """
    os.makedirs(folder, exist_ok=True)
    try:
        model.save(os.path.join(folder, "model.keras"))
    except (NotImplementedError, TypeError, ValueError) as error:
        path = os.path.join(folder, "model.weights.h5")
        model.save_weights(path)
        warnings.warn(f"Keras cannot save this model as a whole ({error}); its weights are in {path}", stacklevel=2)
