"""Where Lightning writes: the folders of a simulated site are moved below its run."""

from __future__ import annotations

import os
from typing import Any

from fl_adapters.participant.kit import Kit
from fl_adapters.participant.outputs import placed

_FOLDERS_OF_A_LOGGER = ("_root_dir", "_save_dir")  # of TensorBoardLogger and CSVLogger, which number their versions


def move(trainer: Any, kit: Kit | None) -> None:
    """Move default_root_dir, the folders of file loggers, and explicit checkpoint folders. May be called again.

    Raises ConfigError for an absolute path, outside the working directory, that another site has claimed.
    """
    if kit is None or not kit.simulated:
        return
    trainer._default_root_dir = placed(kit, trainer.default_root_dir)
    for logger in trainer.loggers:
        for name in _FOLDERS_OF_A_LOGGER:
            if isinstance(folder := getattr(logger, name, None), str):
                setattr(logger, name, placed(kit, folder))
    for checkpoint in trainer.checkpoint_callbacks:
        if getattr(checkpoint, "dirpath", None):
            checkpoint.dirpath = placed(kit, os.fspath(checkpoint.dirpath))
