"""Where Lightning writes: the folders of a simulated site are moved below its run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fl_adapters.kit import Kit
from fl_adapters.outputs import claimed_path

_FOLDERS_OF_A_LOGGER = ("_root_dir", "_save_dir")  # of TensorBoardLogger and CSVLogger, which number their versions


def move(trainer: Any, kit: Kit | None) -> None:
    """Move default_root_dir, the folders of file loggers, and explicit checkpoint folders. May be called again.

    Raises ConfigError for an absolute path, outside the working directory, that another site has claimed.
    """
    if kit is None or not kit.simulated:
        return
    trainer._default_root_dir = _place(kit, trainer.default_root_dir)
    for logger in trainer.loggers:
        for name in _FOLDERS_OF_A_LOGGER:
            if isinstance(folder := getattr(logger, name, None), str):
                setattr(logger, name, _place(kit, folder))
    for checkpoint in trainer.checkpoint_callbacks:
        if getattr(checkpoint, "dirpath", None):
            checkpoint.dirpath = _place(kit, os.fspath(checkpoint.dirpath))


def _place(kit: Kit, folder: str) -> str:
    if "://" in folder:  # a remote file system: nothing of this machine
        return folder
    run = Path(kit.run).resolve()
    absolute = Path(folder).expanduser().resolve()
    if absolute.is_relative_to(run / "sites" / kit.site):
        return folder
    # ModelCheckpoint makes relative paths absolute before we see them: those below the working directory were
    here = Path.cwd().resolve()
    path = os.path.relpath(absolute, here) if absolute.is_relative_to(here) else str(absolute)
    return os.path.normpath(claimed_path(run, kit.site, path))
