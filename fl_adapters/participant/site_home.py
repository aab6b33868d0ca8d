"""The folder in which a site keeps what stays with it during a job."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class SiteHome:
    """A site's own folder in a job.

    Attributes:
        folder: Folder for state that stays at the site, such as control variates and personal models.
        sites: Number of sites in the job.
        fresh: Whether this is the site's first process in the run, so that files in the folder belong to another run.
    """

    folder: Path
    sites: int
    fresh: bool
