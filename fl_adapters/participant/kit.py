"""A site's startup kit: the folder that tells a script which federation it belongs to.

The folder holds `kit.json`; `$FL_ADAPTERS_KIT` names it. Light on purpose: json and os, nothing of a framework.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeGuard

from fl_runtime.errors import ConfigError

KIT_VARIABLE = "FL_ADAPTERS_KIT"
KIT_FILE = "kit.json"
KIT_FORMAT = 1


@dataclass(frozen=True)
class Kit:
    """What `kit.json` says.

    index, count: this site's place among the sites of the job, 0 <= index < count.
    server: "host:port". token: this site's secret in a simulation; never print it. credentials: elsewhere, the folder
    of its key and certificate (a startup kit made by `provision`); relative to the kit's own folder in the file.
    run: folder of the run (`runs/<job>`) when `simulated`, else empty.
    patience_s: how long an unreachable server is waited for. folder: where the kit lies, "" for one that was not read
    from a folder.
    """

    job: str
    site: str
    index: int
    count: int
    server: str
    token: str
    run: str = ""
    simulated: bool = False
    patience_s: float = 30.0
    credentials: str = ""
    folder: str = field(default="", compare=False)

    def __repr__(self) -> str:
        return f"Kit(job={self.job!r}, site={self.site!r}, index={self.index}, count={self.count}, ...)"

    def save(self, folder: Path) -> Path:
        """Write `folder/kit.json`, readable by its owner alone. Returns `folder`."""
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = os.open(folder / KIT_FILE, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(file, "w", encoding="utf-8") as out:
            fields = {name: value for name, value in asdict(self).items() if name != "folder"}
            json.dump({"format": KIT_FORMAT, **fields}, out, indent=1)
        return folder


def current_kit(path: str | None = None) -> Kit | None:
    """The kit in folder `path`, else in `$FL_ADAPTERS_KIT`; None where neither is set: the script runs alone.

    Raises ConfigError when the folder is named but is not a kit.
    """
    folder = path or os.environ.get(KIT_VARIABLE)
    return read_kit(folder) if folder else None


def read_kit(folder: str | os.PathLike[str]) -> Kit:
    """The kit in `folder`. Raises ConfigError that names the file, the field and what to do."""
    file = Path(folder) / KIT_FILE
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        from fl_runtime.trust.files import unpack_first

        fix = unpack_first(file.parent) or f"pass a kit's folder, or unset {KIT_VARIABLE}"
        raise ConfigError("there is no startup kit here", where=str(file), fix=fix) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"the startup kit cannot be read: {error}", where=str(file), fix=_RENEW) from None
    return replace(_checked(fields, file), folder=str(folder))


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
    "patience_s": (int, float),
    "credentials": (str,),
}
_REQUIRED = ("job", "site", "index", "count", "server", "token")


def _checked(fields: object, file: Path) -> Kit:
    if not _is_object(fields):
        raise ConfigError("the startup kit is not a JSON object", where=str(file), fix=_RENEW)
    version = fields.pop("format", None)
    if version != KIT_FORMAT:
        raise ConfigError(
            f"the startup kit has format {version!r}; this version of fl-adapters reads format {KIT_FORMAT}",
            where=str(file),
            fix="upgrade fl-adapters, or get a kit made by the version that is installed here",
        )
    if fields.get("kind", "site") != "site":
        raise ConfigError(
            f"this is the startup kit of a {fields['kind']}", where=str(file), fix="a script needs the kit of a site"
        )
    known = {name: value for name, value in fields.items() if name in _TYPES}  # later kits may say more
    for name in _REQUIRED:
        if name not in known:
            raise ConfigError(f"the startup kit has no {name!r}", where=str(file), fix=_RENEW)
    for name, value in known.items():
        wrong_bool = isinstance(value, bool) and bool not in _TYPES[name]
        if wrong_bool or not isinstance(value, _TYPES[name]):
            raise ConfigError(f"{name!r} cannot be {value!r}", where=str(file), fix=_RENEW)
    kit = Kit(**known)
    if kit.credentials:
        kit = replace(kit, credentials=str((file.parent / kit.credentials).resolve()))
    if not 0 <= kit.index < kit.count:
        raise ConfigError(f"index {kit.index} is not below count {kit.count}", where=str(file), fix=_RENEW)
    return kit


def _is_object(value: object) -> TypeGuard[dict[str, Any]]:
    return isinstance(value, dict)
