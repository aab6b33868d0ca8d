"""Output folders of a simulated site: moved below the run, so that sites on one machine do not share them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from fl_runtime.errors import ConfigError


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
