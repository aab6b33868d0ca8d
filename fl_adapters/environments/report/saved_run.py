"""A run that has ended, opened again from its folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fl_adapters.environments.report.notebook import NotebookView
from fl_adapters.environments.report.record import read_run


@dataclass(frozen=True)
class SavedRun(NotebookView):
    """A training whose files lie in a folder, after its process has ended or on another machine.

    Attributes:
        folder: The folder.
    """

    folder: Path


def open_run(folder: str | Path) -> SavedRun:
    """Open what a run has left: in a later session, or after `fl-adapters job download`.

    Args:
        folder: Folder of the run, such as `runs/<job>`; `runs/<job>/2` for the second training of a script.

    Returns:
        The run, with `history`, `plot()` and `load()`. A notebook shows its report.

    Raises:
        ConfigError: There is no run in the folder.

    Example:
        ```python
        import fl_adapters

        model = fl_adapters.open_run("runs/train").load()
        ```
    """
    path = Path(folder)
    if not any((path / name).is_dir() for name in ("model", "best")):  # a site keeps models alone
        read_run(path)  # an error now, not at the first look
    return SavedRun(path)
