"""Models of a run in MLflow's own format, where the framework that made them is installed."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

from fl_adapters.environments.models import FOLDERS, load_model

_FLAVOURS = {"model.ubj": "xgboost", "model.keras": "keras"}
"""File of an exported model -> its framework, which has the same name as MLflow's module for it."""
_KINDS = {folder: which for which, folder in FOLDERS.items()}


def save_as_mlflow_model(folder: Path, out: Path) -> Path | None:
    """Write an exported model as an MLflow model, such as `mlflow.xgboost.load_model` opens.

    XGBoost and Keras have a flavour of their own. A model that is only weights, as of a PyTorch loop or of Lightning,
    has none: nothing but the script can build its module.

    Args:
        folder: Folder of an exported model, `runs/<job>/model` or `runs/<job>/best`.
        out: Folder to make.

    Returns:
        `out`; None if there is no flavour for this model, or if its framework or MLflow could not write it.
    """
    framework = next((name for file, name in _FLAVOURS.items() if (folder / file).is_file()), "")
    if not framework:
        return None
    try:
        model = load_model(folder.parent, which=_KINDS[folder.name])
        # with its version, which MLflow would otherwise find out by running the model in another process
        requirements = [f"{framework}=={sys.modules[framework].__version__}"]
        import_module(f"mlflow.{framework}").save_model(model, str(out), pip_requirements=requirements)
    except Exception as error:  # whatever a framework raises, the files themselves are still logged
        print(f"fl-adapters: tracking: {folder} goes to MLflow as plain files: {error!r:.300}", file=sys.stderr)
        return None
    return out
