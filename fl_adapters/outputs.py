"""Output folders of a simulated site: moved below the run, so that sites on one machine do not share them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from fl_runtime.errors import ConfigError


def claimed_path(run: Path, site: str, path: str) -> str:
    """A relative path moves to run/sites/<site>/<path>; an absolute one belongs to the first site that claims it.

    Raises ConfigError when another site of the run has claimed an absolute path. Paths within this site's own
    folder come back unchanged.
    """
    own = run / "sites" / site
    if not os.path.isabs(path):
        return str(own / path)
    if Path(path).is_relative_to(own):
        return path
    claims = run / "claims"
    claims.mkdir(parents=True, exist_ok=True)
    claim = claims / hashlib.sha256(os.path.realpath(path).encode()).hexdigest()[:16]
    try:
        with open(claim, "x", encoding="utf-8") as file:
            file.write(site)
        return path
    except FileExistsError:
        owner = claim.read_text(encoding="utf-8")
    if owner == site:
        return path
    raise ConfigError(
        f"{owner} and {site} would both write to {path}",
        where=f"{site}, output folder of the trainer",
        fix="give a relative path (it is moved below runs/<job>/sites/<site>), or put fl_adapters.site().name into it",
    )
