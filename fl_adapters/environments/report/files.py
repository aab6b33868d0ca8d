"""Writes the pages of runs to files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fl_adapters.environments.report.comparison import Summary, comparison_page, summaries
from fl_adapters.environments.report.page import run_page
from fl_adapters.environments.report.record import read_run, read_trainings
from fl_runtime.trust.files import write_file

REPORT = "report.html"


def write_report(folder: Path, out: Path | None = None) -> Path:
    """Write the report of a run: curves, costs, sites, filters and settings in one file that needs no network.

    Args:
        folder: Folder of the run, which holds events.jsonl. The run may still be under way.
        out: File to write; default `report.html` in the folder.

    Returns:
        The file.

    Raises:
        ConfigError: There is no run in the folder.
        StoreError: The file cannot be written.
    """
    written = out or folder / REPORT
    trainings = read_trainings(folder)
    write_file(written, run_page(trainings[0], trainings).encode())
    return written


def write_comparison(folders: Sequence[Path], out: Path) -> tuple[Path, list[Summary]]:
    """Write a page that shows several runs side by side.

    Args:
        folders: Folders of the runs.
        out: File to write.

    Returns:
        The file, and a summary of each run.

    Raises:
        ConfigError: There is no run in one of the folders.
        StoreError: The file cannot be written.
    """
    items = summaries([read_run(folder) for folder in folders])
    write_file(out, comparison_page(items).encode())
    return out, items
