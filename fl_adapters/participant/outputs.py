"""The folders of a site: its own one in a job, and the outputs of a simulated site, which are moved below the run."""

from __future__ import annotations

import hashlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from fl_adapters.participant.kit import Kit
from fl_runtime.errors import ConfigError

PERSONAL = "personal"
"""Name of the folder, in a site's own folder, of its exported personal model."""

PERSONAL_FILE = "personal.safetensors"
"""Name of the file, in a site's own folder, with the weights of its personal model after the last round."""

RESTART = "restart"
"""Name of the folder, in a site's own folder, of its restart points."""


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


def own_folder(kit: Kit, job: str) -> Path:
    """Return the folder for state that stays at a site during a job.

    Args:
        kit: The site's startup kit.
        job: Name of the job.

    Returns:
        runs/<job>/sites/<site> in a simulation and under a site daemon, else a folder of the startup kit.
    """
    if kit.run:
        return Path(kit.run, "sites", kit.site)
    return Path(kit.credentials or kit.folder, "jobs", job)


def placed(kit: Kit | None, folder: str) -> str:
    """Return the folder that a framework writes to in place of the one that the script names.

    Args:
        kit: The site's startup kit; None for a script that runs alone.
        folder: Folder that the script names, or an earlier result of this function.

    Returns:
        `folder` itself, unless the run has a folder. Then a folder in the working directory is moved below the site's
        own folder, and `claimed_path` decides about others. Remote folders ("s3://...") are not moved. If
        `folder` exists, the moved one is made.

    Raises:
        ConfigError: Another site of the simulation writes to the same folder.
    """
    if kit is None or not kit.run or "://" in folder:
        return folder
    run = Path(kit.run).resolve()
    absolute = Path(folder).expanduser().resolve()
    if absolute.is_relative_to(run / "sites" / kit.site):
        return folder
    here = Path.cwd().resolve()  # frameworks make relative paths absolute before we see them
    path = os.path.relpath(absolute, here) if absolute.is_relative_to(here) else str(absolute)
    moved = os.path.normpath(claimed_path(run, kit.site, path))
    if absolute.is_dir():  # what exists under the old name is expected under the new one
        os.makedirs(moved, exist_ok=True)
    return moved


class SavesApart:
    """Where the files lie that a script saves by a path of its own, in `trainer.save_model("final")` for example.

    Sites of a simulation run in the same working directory, and would overwrite each other's.

    Args:
        kit: The site's startup kit.
        saver: Call that saves, for the message: "trainer.save_model".
    """

    def __init__(self, kit: Kit, saver: str) -> None:
        self._kit, self._saver = kit, saver
        self._moved: dict[str, str] = {}

    def written(self, path: str) -> str:
        """Return the path to write to, and say so on stderr if it is another one.

        Args:
            path: Path that the script gives.

        Returns:
            What `placed` returns.

        Raises:
            ConfigError: Another site of the simulation writes to the same path.
        """
        if path not in self._moved:
            self._moved[path] = placed(self._kit, path)
            if self._moved[path] != path:
                print(
                    f"fl-adapters: {self._saver}({path!r}) writes to {self._moved[path]}: "
                    f"{'simulated sites' if self._kit.simulated else 'jobs'} share the working directory",
                    file=sys.stderr,
                    flush=True,
                )
        return self._moved[path]

    def read(self, path: str) -> str:
        """Return the path to read from.

        Args:
            path: Path that the script gives.

        Returns:
            Where `written` has moved it, or `path` itself.
        """
        return self._moved.get(path, path)


def claimed_path(run: Path, site: str, path: str) -> str:
    """Return a path that only one site of a simulation writes to.

    Args:
        run: Folder of the run.
        site: Name of the site.
        path: Path that the site wants to write to.

    Returns:
        run/sites/<site>/<path> for a relative path. Paths in this site's own folder are unchanged. An absolute path,
        or one that leads upwards ("../out"), is unchanged too, and belongs to the first site that claims it.

    Raises:
        ConfigError: Another site of the run has claimed the path.
    """
    own = run / "sites" / site
    if not os.path.isabs(path) and os.path.normpath(path).split(os.sep)[0] != os.pardir:
        return str(own / path)
    if Path(path).is_relative_to(own):
        return path
    claims = run / "claims"
    claims.mkdir(parents=True, exist_ok=True)
    claim = claims / hashlib.sha256(os.path.realpath(path).encode()).hexdigest()[:16]
    own_claim = claims / f"{claim.name}.{site}"
    own_claim.write_text(site, encoding="utf-8")
    try:
        os.link(own_claim, claim)  # atomic: nobody reads a claim without its owner's name
        return path
    except FileExistsError:
        owner = claim.read_text(encoding="utf-8")
    finally:
        own_claim.unlink()
    if owner == site:
        return path
    raise ConfigError(
        f"{owner} and {site} would both write to {path}",
        where=f"{site}, output folder of the trainer",
        fix="give a relative path (it is moved below runs/<job>/sites/<site>), or use fl_adapters.site().name in it",
    )
