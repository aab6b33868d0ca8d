"""Output folders of Lightning: those of a simulated site are moved below its run."""

from __future__ import annotations

import os
from typing import Any

from fl_adapters.participant.kit import Kit
from fl_adapters.participant.outputs import placed

from .trainer import move_logger, set_root_folder


def move(trainer: Any, kit: Kit | None) -> None:
    """Move default_root_dir, the folders of file loggers, and explicit checkpoint folders. May be called again.

    Raises ConfigError for an absolute path, outside the working directory, that another site has claimed.
    """
    if kit is None or not kit.simulated:
        return
    set_root_folder(trainer, placed(kit, trainer.default_root_dir))
    for logger in trainer.loggers:
        move_logger(logger, lambda folder: placed(kit, folder))
    for checkpoint in trainer.checkpoint_callbacks:
        if getattr(checkpoint, "dirpath", None):
            checkpoint.dirpath = placed(kit, os.fspath(checkpoint.dirpath))
