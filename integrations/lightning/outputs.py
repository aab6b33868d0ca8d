"""Output folders of Lightning: those of a simulated site are moved below its run."""

from __future__ import annotations

import os
from typing import Any

from fl_adapters.participant.kit import Kit
from fl_adapters.participant.outputs import SavesApart, placed

from .trainer import move_logger, set_root_folder


class CheckpointsApart:
    """Lightning's `CheckpointIO` of a simulated site: what `trainer.save_checkpoint(path)` writes is the site's own."""

    def __init__(self, io: Any, kit: Kit) -> None:
        self._io, self._paths = io, SavesApart(kit, "trainer.save_checkpoint")

    def save_checkpoint(self, checkpoint: Any, path: Any, *args: Any, **options: Any) -> None:
        """Save to this site's own folder."""
        self._io.save_checkpoint(checkpoint, self._paths.written(os.fspath(path)), *args, **options)

    def load_checkpoint(self, path: Any, *args: Any, **options: Any) -> Any:
        """Load what this site has saved under `path`, or else what lies there."""
        return self._io.load_checkpoint(self._paths.read(os.fspath(path)), *args, **options)

    def remove_checkpoint(self, path: Any) -> None:
        """Remove what this site has saved under `path`, or else what lies there."""
        self._io.remove_checkpoint(self._paths.read(os.fspath(path)))

    def teardown(self) -> None:
        """End the plugin that saves."""
        self._io.teardown()


def move(trainer: Any, kit: Kit | None) -> None:
    """Move default_root_dir, the folders of file loggers, and explicit paths of checkpoints. May be called again.

    Raises ConfigError for an absolute path, outside the working directory, that another site has claimed.
    """
    if kit is None or not kit.run:
        return
    set_root_folder(trainer, placed(kit, trainer.default_root_dir))
    for logger in trainer.loggers:
        move_logger(logger, lambda folder: placed(kit, folder))
    for checkpoint in trainer.checkpoint_callbacks:
        if getattr(checkpoint, "dirpath", None):
            checkpoint.dirpath = placed(kit, os.fspath(checkpoint.dirpath))
    if not isinstance(trainer.strategy.checkpoint_io, CheckpointsApart):
        trainer.strategy.checkpoint_io = CheckpointsApart(trainer.strategy.checkpoint_io, kit)
