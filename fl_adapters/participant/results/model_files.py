"""The small files that a model needs beside its weights: read from an export, made fit for others, sent to the server.

The server holds the weights and no framework. With these files its model opens as the site's own does. An adapter takes
part by returning `ModelFiles` from its export.
"""

from __future__ import annotations

import json
import ntpath
import os
import re
import stat
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from fl_adapters.participant.gate import Gate
from fl_runtime.client import FilesReceipt, SiteClient
from fl_runtime.errors import FederationError, ProtocolError
from fl_runtime.text import parse_json
from fl_runtime.types import Arrays
from fl_runtime.wire.manifest import Manifest
from fl_runtime.wire.model_files import MODEL_FILES, FileKind, check_contents, check_described, loads_code, names_code

_PATH_KEY = re.compile(r".*(path|file|dir|folder).*")
_SHOWN = 3


@dataclass(frozen=True)
class ModelFiles:
    """What an export has written to a folder.

    Attributes:
        folder: The folder. Files there whose names are in `fl_runtime.wire.model_files.MODEL_FILES` go with the model.
        weights: Name of each tensor in the framework's file of weights -> its shape. The files are sent only if all of
            them travel in the run: else the framework would open the server's model with other values in their place.
        weights_file: Name of that file, if it is not model.safetensors.
    """

    folder: Path
    weights: Mapping[str, tuple[int, ...]]
    weights_file: str = ""

    def missing_in(self, model: Arrays) -> list[str]:
        """Return the tensors of the framework's file that a global model lacks, or has in another shape.

        Args:
            model: The tensors that travel in the run.
        """
        return [name for name, shape in self.weights.items() if name not in model or model[name].shape != shape]


Export: TypeAlias = Callable[[str], ModelFiles | None]
"""Writes the live model to a folder in the framework's format. It may say which files go with the server's model."""


def send_files(found: ModelFiles, model: Arrays, gate: Gate, client: SiteClient) -> None:
    """Send the small files of an export to the server, as far as the site's policy allows, and say what was sent.

    Nothing here ends the run: what cannot be sent stays at the site, with a line that says why.

    Args:
        found: The export.
        model: The final model, as it travelled.
        gate: The site's gate.
        client: The connection to the server.
    """
    files, unfit = _fit_for_others(found.folder)
    for reason in unfit:
        _say(f"{reason}; it stays at this site")
    if not files:
        return
    if missing := found.missing_in(model):
        _say(
            f"{_listed(files)} stay at this site: the model has tensors that do not travel ({_listed(missing)}), so "
            "that the server's model is not complete. The one of this site is"
        )
        return
    released, kept = gate.release_files(files)
    for rule in dict.fromkeys(kept.values()):
        names = [name for name, its_rule in kept.items() if its_rule == rule]
        _say(f"{_listed(names)} stay at this site ({rule} in policy.yml), so the server's model is without them")
    if not released:
        return
    try:
        receipt = client.send_files(released, found.weights_file)
    except FederationError as error:
        _say(f"{_listed(released)} were not sent to the server: {error}")
    else:
        _say(_outcome(released, receipt))


def _outcome(files: Mapping[str, bytes], receipt: FilesReceipt | None) -> str:
    if receipt is None:
        return f"the server's version of fl-adapters does not take {_listed(files)}"
    size = sum(map(len, files.values()))
    sent = f"{', '.join(files)} ({size:,} bytes) went to the server with the model (share_files in policy.yml)"
    if receipt.status != "different":
        return sent
    return f"{sent}, where those of {receipt.kept_of} are kept: {_listed(receipt.differ)} of this site differ from them"


def _fit_for_others(folder: Path) -> tuple[dict[str, bytes], list[str]]:
    """The files of a folder as others can use them, by name; and for each that cannot leave, a clause that says why."""
    files: dict[str, bytes] = {}
    unfit: list[str] = []
    for name, kind in MODEL_FILES.items():
        try:
            data = _read(folder / name, kind.max_bytes)
            if data is None:
                continue
            files[name] = _portable_config(name, data) if kind is FileKind.CONFIG else data
            check_contents(name, files[name])
            check_described(Manifest.of(_arrays(files)))
        except (OSError, ValueError, ProtocolError) as error:
            files.pop(name, None)
            unfit.append(error.what if isinstance(error, ProtocolError) else f"{name} cannot be sent: {error}")
    return files, unfit


def _arrays(files: Mapping[str, bytes]) -> Arrays:
    return {name: np.frombuffer(data, np.uint8) for name, data in files.items()}


def _read(path: Path, max_bytes: int) -> bytes | None:
    """The contents of a regular file; None if there is none. Raises ValueError for a link, or if it is too large."""
    if path.is_symlink():
        raise ValueError("it is a link")
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is no file")
        if status.st_size > max_bytes:
            raise ValueError(f"it has {status.st_size} bytes; the limit is {max_bytes}")
        return file.read(max_bytes)


def _portable_config(name: str, data: bytes) -> bytes:
    """A configuration in which paths of this machine are cut to their last part, and no entry loads code.

    Such paths tell of the site and are of no use elsewhere. The bytes are the same if there is nothing to change.
    """
    value = parse_json(data, limit_chars=len(data))
    if key := names_code(value):
        _say(f"{name} goes without its entry {key}, which makes a framework load code")
    changed = _portable(value)
    return data if changed == value else json.dumps(changed, indent=2, ensure_ascii=False).encode() + b"\n"


def _portable(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {name: _portable(item, name) for name, item in value.items() if not loads_code(name, item)}
    if isinstance(value, list):
        return [_portable(item, key) for item in value]
    if isinstance(value, str) and _PATH_KEY.fullmatch(key) and _is_local(value):
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return value


def _is_local(path: str) -> bool:
    return os.path.isabs(path) or ntpath.isabs(path) or path.startswith(("~", ".")) or os.path.exists(path)


def _listed(names: Iterable[str]) -> str:
    given = list(names)
    return ", ".join(given[:_SHOWN]) + (f" and {len(given) - _SHOWN} more" if len(given) > _SHOWN else "")


def _say(text: str) -> None:
    print(f"fl-adapters: {text}", file=sys.stderr, flush=True)
