"""Where MONAI's handlers write: the folders of a simulated site are moved below its run."""

from __future__ import annotations

import os
from typing import Any

from monai.handlers import CheckpointSaver, MetricsSaver

from fl_adapters.participant.kit import Kit
from fl_adapters.participant.outputs import placed

from .engine import attached

_CHECKPOINTS = ("_final_checkpoint", "_key_metric_checkpoint", "_interval_checkpoint")


def move(engine: Any, kit: Kit | None) -> None:
    """Move the folders of the CheckpointSavers and MetricsSavers of an engine. May be called again.

    Raises ConfigError for an absolute path, outside the working directory, that another site has claimed.
    """
    if kit is None or not kit.simulated:
        return
    for saver in (*attached(engine, CheckpointSaver), *attached(engine, MetricsSaver)):
        saver.save_dir = placed(kit, os.fspath(saver.save_dir))
        for name in _CHECKPOINTS:
            checkpoint = getattr(saver, name, None)
            if checkpoint is not None:  # each has a disk saver of its own, made with the folder of that time
                disk = checkpoint.save_handler
                disk.dirname = type(disk.dirname)(saver.save_dir)  # text in older releases of Ignite, else a Path
                os.makedirs(saver.save_dir, exist_ok=True)
