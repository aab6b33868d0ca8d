"""Opens the trees that a run has left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import xgboost

from fl_runtime.aggregation.trees.checks import check_global_model
from fl_runtime.aggregation.trees.document import TreeModel
from fl_runtime.errors import ConfigError

_FILE = "model.ubj"


def open_model(folder: Path, into: Any = None, *, partial: bool = False) -> Any:
    """Open `model.ubj` in the folder of a model, after a check that XGBoost can read it safely.

    Args:
        folder: Folder of the model.
        into: A Booster or an estimator, which gets the trees in place, or the class of one. Default: a new Booster.
        partial: Does not matter: trees travel whole.

    Returns:
        The Booster or the estimator.

    Raises:
        ConfigError: There is no such file, or `into` cannot hold trees.
        ProtocolError: The file could crash or hang XGBoost.
    """
    path = folder / _FILE
    if not path.is_file():
        raise ConfigError(f"there is no {_FILE}", where=str(folder), fix="load it into a model of its own framework")
    given = xgboost.Booster() if into is None else into() if isinstance(into, type) else into
    if not callable(getattr(given, "load_model", None)):
        raise ConfigError(
            f"trees cannot be loaded into a {type(given).__name__}",
            where="load(into=)",
            fix="give a Booster or an estimator of XGBoost, or nothing",
        )
    document = path.read_bytes()
    check_global_model(TreeModel.from_document(document), set())
    given.load_model(bytearray(document))
    return given
