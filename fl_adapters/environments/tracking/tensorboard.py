"""Writes a run's metrics to TensorBoard event files, below a folder of the user's choice. Needs no TensorBoard."""

from __future__ import annotations

import re
from pathlib import Path

from fl_adapters.environments.tracking.records import Begin, End, Metrics, Record
from fl_runtime.server.records.scalars import ScalarWriter


class TensorboardTracker:
    """Tracker that makes a folder with event files for each run: one curve for each metric.

    TensorBoard has no place for other files or for the state of a run.

    Args:
        folder: Folder that the runs' folders are made in, as for `tensorboard --logdir`.
    """

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder).expanduser().resolve()
        self._writers: dict[str, ScalarWriter] = {}

    def __call__(self, record: Record) -> None:
        """Write the metrics of a record; see `Tracker`."""
        name = record.run.name
        match record:
            case Begin():
                folder = self._folder / re.sub(r"[^A-Za-z0-9._-]", "-", name)
                self._writers[name] = ScalarWriter(folder)
            case Metrics(points=points):
                for point in points:
                    self._writers[name].add(point.name, point.value, point.round, point.time)
                self._writers[name].flush()
            case End():
                self._writers.pop(name).close()
