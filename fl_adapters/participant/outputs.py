"""Output folders of a simulated site: moved below the run, so that sites on one machine do not share them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from fl_adapters.participant.kit import Kit
from fl_runtime.errors import ConfigError

PERSONAL = "personal"
"""Folder, within a site's own, of its personal model in the framework's format, once training is over."""

PERSONAL_FILE = "personal.safetensors"
"""Within a site's own folder: the weights of its personal model after the last round."""

RESTART = "restart"
"""Folder, within a site's own, of what it needs to go on after its process died (`exact_restart`)."""


def own_folder(kit: Kit, job: str) -> Path:
    """Where a site keeps what stays with it during a job: runs/<job>/sites/<site> in a simulation, else within its
    startup kit."""
    if kit.simulated:
        return Path(kit.run, "sites", kit.site)
    return Path(kit.credentials or kit.folder, "jobs", job)


def placed(kit: Kit | None, folder: str) -> str:
    """Where a framework may write what it was told to write to `folder`: unchanged but for a simulated site.

    A folder within the working directory, relative or not, moves below the site's own; for one elsewhere, see
    `claimed_path`. Remote folders ("s3://...") stay. May be called again with its result.
    """
    if kit is None or not kit.simulated or "://" in folder:
        return folder
    run = Path(kit.run).resolve()
    absolute = Path(folder).expanduser().resolve()
    if absolute.is_relative_to(run / "sites" / kit.site):
        return folder
    here = Path.cwd().resolve()  # frameworks make relative paths absolute before we see them
    path = os.path.relpath(absolute, here) if absolute.is_relative_to(here) else str(absolute)
    return os.path.normpath(claimed_path(run, kit.site, path))


def claimed_path(run: Path, site: str, path: str) -> str:
    """A relative path moves to run/sites/<site>/<path>; an absolute one, or one that leads upwards ("../out"),
    belongs to the first site that claims it.

    Raises ConfigError when another site of the run has claimed it. Paths within this site's own folder come back
    unchanged.
    """
    own = run / "sites" / site
    if not os.path.isabs(path) and os.path.normpath(path).split(os.sep)[0] != os.pardir:
        return str(own / path)
    if Path(path).is_relative_to(own):
        return path
    claims = run / "claims"
    claims.mkdir(parents=True, exist_ok=True)
    claim = claims / hashlib.sha256(os.path.realpath(path).encode()).hexdigest()[:16]
    mine = claims / f"{claim.name}.{site}"
    mine.write_text(site, encoding="utf-8")
    try:
        os.link(mine, claim)  # whole at once: nobody reads a claim without its owner's name
        return path
    except FileExistsError:
        owner = claim.read_text(encoding="utf-8")
    finally:
        mine.unlink()
    if owner == site:
        return path
    raise ConfigError(
        f"{owner} and {site} would both write to {path}",
        where=f"{site}, output folder of the trainer",
        fix="give a relative path (it is moved below runs/<job>/sites/<site>), or put fl_adapters.site().name into it",
    )
