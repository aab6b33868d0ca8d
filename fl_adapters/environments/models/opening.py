"""Opens an exported model with the call of the framework that trained it."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fl_runtime.errors import ConfigError
from fl_runtime.store.tensorfile import read_tensors
from fl_runtime.text import parse_json

Which = Literal["final", "best"]

_TENSORS = "model.safetensors"
_HEADER_BYTES = 100 * 2**20
FOLDERS: Mapping[Which, str] = {"final": "model", "best": "best"}
"""Which model -> its folder within that of the run."""
_WRITERS = {
    "modules.json": "hf",  # of sentence-transformers, which has a config.json too
    "adapter_config.json": "hf",
    "config.json": "hf",
    "model.keras": "keras",
    "model.weights.h5": "keras",
    "model.ckpt": "lightning",
    "model.ubj": "xgboost",
}
"""Name of a file -> the adapter that writes it, and opens it. The first that is there counts."""
_KINDS = {
    "keras": "keras",  # first: on its PyTorch backend, a model of Keras is a module of PyTorch too
    "xgboost": "xgboost",
    "lightning": "lightning",
    "pytorch_lightning": "lightning",
    "peft": "hf",
    "transformers": "hf",
    "sentence_transformers": "hf",
    "torch": "torch",
}
"""Package of a class, or of one that it extends -> the adapter that loads into it."""


def load_model(run: Path, into: Any = None, *, which: Which = "final", partial: bool = False) -> Any:
    """Open a model that a training has left, with the call of its framework. Nothing is unpickled.

    Args:
        run: Folder of the training, such as `runs/<job>`, or one that `fl-adapters job download` has filled.
        into: See `NotebookView.load`.
        which: "final" for the last global model, "best" for that of the best round.
        partial: See `NotebookView.load`.

    Returns:
        The model; see `NotebookView.load`.

    Raises:
        ConfigError: There is no such model, or it cannot be opened in this way. The error says what to do.
        StateMismatchError: The model does not fit `into`.
        ImportError: The framework is not installed.
    """
    if which not in FOLDERS:
        raise ConfigError(f"there is no model {which!r}", where="load(which=)", fix='choose "final" or "best"')
    folder = run / FOLDERS[which]
    if not any(folder.glob("*")):
        raise _missing(run, which)
    adapter = _adapter(folder, into)
    if adapter:
        return import_module(f"fl_adapters.{adapter}.opening").open_model(folder, into, partial=partial)
    if not (folder / _TENSORS).is_file():
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:8])
        raise ConfigError(
            "no adapter knows the files of this model", where=f"{folder}: {found}", fix="open them as they were written"
        )
    return {name: np.array(array) for name, array in read_tensors(folder / _TENSORS).items()}


def _adapter(folder: Path, into: Any) -> str:
    """Name of the adapter that opens a model; "" for plain arrays. An adapter is found by name, not imported here."""
    files = next((adapter for file, adapter in _WRITERS.items() if (folder / file).is_file()), "")
    if into is None:
        return files or ("torch" if (folder / _TENSORS).is_file() and _is_of_torch(folder / _TENSORS) else "")
    given = into if isinstance(into, type) else type(into)
    packages = {base.__module__.partition(".")[0] for base in given.__mro__}
    kind = next((adapter for package, adapter in _KINDS.items() if package in packages), "")
    if not kind:
        raise ConfigError(
            f"a model cannot be loaded into {'the class' if given is into else 'a'} {given.__name__}",
            where="load(into=)",
            fix="give a model of PyTorch, Keras or XGBoost, or nothing",
        )
    if kind == "torch" and (folder / "adapter_config.json").is_file():
        return "hf"  # the module is the adapter's base
    return kind


def _missing(run: Path, which: Which) -> ConfigError:
    if which == "best" and any((run / FOLDERS["final"]).glob("*")):
        return ConfigError(
            "the run has no best model, since no round has a score",
            where=str(run),
            fix='report metrics of the global model, or load the final one: load(which="final")',
        )
    return ConfigError(
        f"there is no {which} model in {run}",
        where=str(run / FOLDERS[which]),
        fix="name the folder of a run that has ended, or fetch it: fl-adapters job download",
    )


def _is_of_torch(path: Path) -> bool:
    """Whether PyTorch has written a file of tensors, as its metadata say. The server's own file names the job, too."""
    with open(path, "rb") as file:
        length = min(int.from_bytes(file.read(8), "little"), _HEADER_BYTES)
        try:
            metadata = parse_json(file.read(length), limit_chars=_HEADER_BYTES)["__metadata__"]
            return bool(metadata["format"] == "pt" and "job" not in metadata)
        except (ValueError, KeyError, TypeError):
            return False
