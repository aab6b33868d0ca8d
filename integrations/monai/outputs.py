"""Output folders of MONAI's handlers: those of a simulated site are moved below its run."""

from __future__ import annotations

import os
from typing import Any

from monai.handlers import CheckpointSaver, MetricsSaver

from fl_adapters.participant.kit import Kit
from fl_adapters.participant.outputs import placed

from .trainer import attached, checkpoints_of


def move(engine: Any, kit: Kit | None) -> None:
    """Move the folders of the CheckpointSavers and MetricsSavers of an engine. May be called again.

    Raises ConfigError for an absolute path, outside the working directory, that another site has claimed.
    """
    if kit is None or not kit.run:
        return
    savers = attached(engine, CheckpointSaver)
    for saver in (*savers, *attached(engine, MetricsSaver)):
        saver.save_dir = placed(kit, os.fspath(saver.save_dir))
    for saver in savers:
        for checkpoint in checkpoints_of(saver):  # each was made with the folder as it was then
            disk = checkpoint.save_handler
            disk.dirname = type(disk.dirname)(saver.save_dir)  # str in older releases of Ignite, else Path
            os.makedirs(saver.save_dir, exist_ok=True)
