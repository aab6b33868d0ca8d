"""The startup kit of a site: the folder that tells a script which federation it belongs to, and as whom.

The folder holds the file `kit.json`, and `$FL_ADAPTERS_KIT` names it.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeGuard

from fl_adapters.extras import needs_trust_extra
from fl_runtime.errors import ConfigError
from fl_runtime.trainings import training_folder
from fl_runtime.version import check_format, stamp

KIT_VARIABLE = "FL_ADAPTERS_KIT"
"""Environment variable with the folder of the startup kit."""

KIT_FILE = "kit.json"
"""Name of the file in a kit's folder that `read_kit` reads."""

MANIFEST = "manifest.json"
"""Name of the signed list of files in a kit that `fl-adapters provision` made."""

KIT_FORMAT = 1
"""Format number that this version reads and writes."""


@dataclass(frozen=True)
class Kit:
    """The contents of `kit.json`.

    Attributes:
        job: Name of the job.
        site: Name of the site.
        index: Number of the site among those of the job, from 0.
        count: Number of sites in the job.
        server: Address of the server, "host:port".
        token: Secret of the site in a simulation, "" elsewhere. Never print it.
        run: Folder of the run, below which the script's outputs and models go: runs/<job> in a simulation, a folder
            of the site's own under a site daemon, else "".
        simulated: Whether the site belongs to a simulation on this machine, whose sites share the run's folder.
        supervised: Whether a site daemon starts the script again if it dies. The daemon then tells the server of
            its end.
        patience_s: Seconds for which the site waits for a server that cannot be reached, unless a job says otherwise.
        own_patience: Whether the site has chosen `patience_s` itself, so that it holds in every job.
        credentials: Folder of the site's key and certificate, made by `provision`; "" in a simulation. In the file, it
            is relative to the kit's folder.
        servers: Addresses of all servers, if several stand in for each other; else empty.
        data: Path or address of the site's own data; "" if nobody has said.
        folder: Folder that the kit was read from; "" if it was not read from one.
    """

    job: str
    site: str
    index: int
    count: int
    server: str
    token: str
    run: str = ""
    simulated: bool = False
    supervised: bool = False
    patience_s: float = 30.0
    own_patience: bool = False
    credentials: str = ""
    servers: tuple[str, ...] = ()
    data: str = ""
    folder: str = field(default="", compare=False)

    def __repr__(self) -> str:
        return f"Kit(job={self.job!r}, site={self.site!r}, index={self.index}, count={self.count}, ...)"

    @property
    def addresses(self) -> tuple[str, ...]:
        """Addresses at which the server may be, at least one."""
        return self.servers or (self.server,)

    def of_training(self, number: int) -> Kit:
        """Return the kit for a training of the site's script, from 1. Its run has a folder of its own."""
        return replace(self, run=str(training_folder(Path(self.run), number))) if self.run else self

    def save(self, folder: Path) -> Path:
        """Write the kit to a folder. Only the owner of the file may read it.

        Args:
            folder: Folder for `kit.json`. Created if it does not exist.

        Returns:
            The folder.
        """
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = os.open(folder / KIT_FILE, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(file, "w", encoding="utf-8") as out:
            fields = {name: value for name, value in asdict(self).items() if name != "folder"}
            json.dump({**stamp(KIT_FORMAT), **fields}, out, indent=1)
        return folder


def current_kit(path: str | None = None) -> Kit | None:
    """Return the startup kit of this process.

    Args:
        path: Folder of the kit. Default: `$FL_ADAPTERS_KIT`.

    Returns:
        The kit; None if no folder is named, so that the script runs alone.

    Raises:
        ConfigError: The named folder is not a kit of a site.
    """
    folder = path or os.environ.get(KIT_VARIABLE)
    return read_kit(folder) if folder else None


def read_kit(folder: str | os.PathLike[str]) -> Kit:
    """Read a startup kit.

    Args:
        folder: Folder with `kit.json`.

    Returns:
        The kit.

    Raises:
        ConfigError: The folder is not a kit of a site. The message names file and field.
    """
    file = kit_in_use(Path(folder)) / KIT_FILE
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        from fl_runtime.trust.files import unpack_first

        fix = unpack_first(file.parent) or f"pass a kit's folder, or unset {KIT_VARIABLE}"
        raise ConfigError("there is no startup kit here", where=str(file), fix=fix) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"the startup kit cannot be read: {error}", where=str(file), fix=_RENEW) from None
    kit = replace(_checked(fields, file), folder=str(file.parent))
    _check_authentic(kit, file)
    return kit


def kit_in_use(folder: Path) -> Path:
    """Return where a kit is used: the working kit, if `provision` made the kit and it cannot be written, else itself.

    Args:
        folder: Folder of the kit.
    """
    if not (folder / MANIFEST).exists():
        return folder
    with needs_trust_extra():
        from fl_runtime.trust.working_kit import working_kit
    return working_kit(folder)


def _check_authentic(kit: Kit, file: Path) -> None:
    """Raise ConfigError for a kit that was changed after it was made, or that would connect without any secret."""
    if (file.parent / MANIFEST).exists():
        with needs_trust_extra():
            from fl_runtime.trust.kits import read_unsigned
        read_unsigned(file.parent)
    if not kit.credentials and not kit.token:
        raise ConfigError(
            "this startup kit has neither a certificate nor a secret: nothing would be encrypted, and no policy held",
            where=str(file),
            fix=_RENEW,
        )


_RENEW = "get a fresh kit, or start the simulation again; the file is not meant to be edited"
_TYPES: dict[str, tuple[type, ...]] = {
    "job": (str,),
    "site": (str,),
    "index": (int,),
    "count": (int,),
    "server": (str,),
    "token": (str,),
    "run": (str,),
    "simulated": (bool,),
    "supervised": (bool,),
    "patience_s": (int, float),
    "own_patience": (bool,),
    "credentials": (str,),
    "servers": (list,),
    "data": (str,),
}
_REQUIRED = ("job", "site", "index", "count", "server", "token")


def _checked(fields: object, file: Path) -> Kit:
    if not _is_object(fields):
        raise ConfigError("the startup kit is not a JSON object", where=str(file), fix=_RENEW)
    check_format(
        fields.pop("format", "missing"), KIT_FORMAT, "the startup kit", where=str(file), version=fields.get("version")
    )
    if fields.get("kind", "site") != "site":
        raise ConfigError(
            f"this is the startup kit of a {fields['kind']}", where=str(file), fix="a script needs the kit of a site"
        )
    known = {name: value for name, value in fields.items() if name in _TYPES}  # later versions may write more fields
    for name in _REQUIRED:
        if name not in known:
            raise ConfigError(f"the startup kit has no {name!r}", where=str(file), fix=_RENEW)
    for name, value in known.items():
        wrong_bool = isinstance(value, bool) and bool not in _TYPES[name]
        if wrong_bool or not isinstance(value, _TYPES[name]):
            raise ConfigError(f"{name!r} cannot be {value!r}", where=str(file), fix=_RENEW)
    if known.get("credentials"):
        from fl_runtime.types import PRODUCTION_PATIENCE_S  # late: it imports numpy, and this file is read by `--help`

        known = {"patience_s": PRODUCTION_PATIENCE_S, **known}  # kits of earlier versions have none
    kit = Kit(**{**known, "servers": tuple(map(str, known.get("servers", ())))})
    if kit.credentials:
        kit = replace(kit, credentials=str((file.parent / kit.credentials).resolve()))
    if not 0 <= kit.index < kit.count:
        raise ConfigError(f"index {kit.index} is not below count {kit.count}", where=str(file), fix=_RENEW)
    return kit


def _is_object(value: object) -> TypeGuard[dict[str, Any]]:
    return isinstance(value, dict)
