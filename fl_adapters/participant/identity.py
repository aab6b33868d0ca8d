"""The place of this process in the federation, for splitting data and for logging: `fl_adapters.site()`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

from fl_adapters.extras import needs_trust_extra
from fl_adapters.participant.kit import Kit, current_kit
from fl_adapters.participant.outputs import PERSONAL, own_folder
from fl_runtime.errors import ConfigError

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


@dataclass(frozen=True)
class Site:
    """The place of this process in the federation.

    Attributes:
        name: Name of the site; "local" without a startup kit.
        index: Number of the site among those of the job, from 0.
        count: Number of sites in the job.
        job: Name of the job; "" without a startup kit.
        data: Path or address of this site's own data: `--data` of a simulation, `data` in the policy of a site in
            production. None if nobody has said, and without a startup kit.
        personal: Folder of this site's personal model in the framework's format, after a training with the strategy
            "ditto". None without a startup kit.
        training: Which training of the site's script a session belongs to, from 1.
    """

    name: str
    index: int
    count: int
    job: str
    data: str | None = None
    personal: Path | None = field(default=None, compare=False)
    training: int = field(default=1, compare=False)


_virtual: ContextVar[Site | None] = ContextVar("virtual site", default=None)


@contextmanager
def standing_at(place: Site) -> Iterator[None]:
    """Let `site()` return `place` within a `with` block, in a worker that several virtual sites share.

    Args:
        place: The virtual site that the worker currently stands for.
    """
    token = _virtual.set(place)
    try:
        yield
    finally:
        _virtual.reset(token)


def site(kit: str | None = None) -> Site:
    """Return the place of this process in the federation.

    Args:
        kit: Folder of the site's startup kit. Default: `$FL_ADAPTERS_KIT`.

    Returns:
        The site; `Site(name="local", index=0, count=1, job="")` without a kit.

    Raises:
        ConfigError: The kit cannot be read, or the site's own data are not where it says.

    Example:
        ```python
        import fl_adapters

        place = fl_adapters.site()
        file = place.data or "train.csv"  # alone, data is None
        examples = list(range(1000))[place.index :: place.count]
        ```
    """
    virtual = _virtual.get()
    if virtual is not None and kit is None:
        return virtual
    current = current_kit(kit)
    if current is None:
        return Site(name="local", index=0, count=1, job="")
    folder = own_folder(current, current.job) / PERSONAL if current.job else None
    return Site(current.site, current.index, current.count, current.job, own_data(current), folder)


def own_data(kit: Kit) -> str | None:
    """Return where the data of a kit's site lie, as the simulation or the site's policy says.

    Args:
        kit: The startup kit of this process.

    Returns:
        An absolute path or an address; None if nobody has said.

    Raises:
        ConfigError: The path does not exist, or the policy has data for single apps and the kit is that of no job.
    """
    if kit.data:
        return place_of_data(kit.data, where=f"data of {kit.site}", fix="put the data back there")
    if not kit.credentials or kit.job:
        return None
    with needs_trust_extra():  # a script that was started with the site's kit itself
        from fl_runtime.trust.policy import POLICY_FILE, read_policy
    path = Path(kit.credentials, POLICY_FILE)
    data = read_policy(path).data
    if data is not None and not isinstance(data, str):
        fix = "start the script by `fl-adapters run` or `fl-adapters site`, which know the app of the job"
        raise ConfigError(
            "the policy has data for each app, and this script was started for none", where=str(path), fix=fix
        )
    return None if data is None else place_of_data(data, where=f"data, in {path}", fix=POLICY_DATA_FIX)


POLICY_DATA_FIX = "correct the path in the site's policy, or put the data there; is a disk not mounted?"


def place_of_data(data: str, *, where: str, fix: str) -> str:
    """Return where data lie, after a look whether they are there.

    Args:
        data: A path, or an address such as "s3://bucket/north", at which nobody looks.
        where: Who has said so, for the error.
        fix: What to do if the path does not exist.

    Returns:
        The path as an absolute one, or the address as it is.

    Raises:
        ConfigError: The path does not exist.
    """
    if is_address(data):
        return data
    path = os.path.abspath(os.path.expanduser(data))
    if not os.path.exists(path):
        raise ConfigError(f"there are no data at {path}", where=where, fix=fix)
    return path


def is_address(data: str) -> bool:
    """Whether data are at an address such as "s3://bucket/north", not at a path."""
    return _ADDRESS.match(data) is not None
