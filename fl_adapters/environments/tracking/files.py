"""Files of a run that trackers upload."""

from __future__ import annotations

from pathlib import Path

from fl_adapters.environments.models import FOLDERS
from fl_runtime.trainings import EVENTS, HISTORY

_FILES = ("report.html", HISTORY, EVENTS, "job.yml", "outcome.json", "cross_site.csv")


def artifacts(folder: Path) -> tuple[list[Path], list[Path]]:
    """Find what a run has left.

    Args:
        folder: Folder of the run.

    Returns:
        The files that are its record, and the folders of its exported models.
    """
    files = [folder / name for name in _FILES if (folder / name).is_file()]
    return files, [folder / name for name in FOLDERS.values() if (folder / name).is_dir()]
