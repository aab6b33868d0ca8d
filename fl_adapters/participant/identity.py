"""Where am I? For splitting data in a simulation and for logging; `fl_adapters.site()` is this `site`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

from fl_adapters.participant.kit import current_kit
from fl_adapters.participant.outputs import PERSONAL, own_folder


@dataclass(frozen=True)
class Site:
    """This process's place in the federation.

    index, count: its number among the sites of the job, 0 <= index < count. job: the job's name, "" standalone.
    personal: folder of this site's personal model, in the framework's format, once a training with the strategy
    `ditto` has ended; None standalone.
    """

    name: str
    index: int
    count: int
    job: str
    personal: Path | None = field(default=None, compare=False)


_virtual: ContextVar[Site | None] = ContextVar("virtual site", default=None)


@contextmanager
def standing_at(place: Site) -> Iterator[None]:
    """Within this, `site()` is `place`: a worker that virtual sites share is one of them after the other."""
    token = _virtual.set(place)
    try:
        yield
    finally:
        _virtual.reset(token)


def site(kit: str | None = None) -> Site:
    """The site that this process is: from the kit in folder `kit`, else in `$FL_ADAPTERS_KIT`.

    Without a kit the script runs alone: `Site(name="local", index=0, count=1, job="")`.
    Raises ConfigError when the kit cannot be read.
    """
    virtual = _virtual.get()
    if virtual is not None and kit is None:
        return virtual
    found = current_kit(kit)
    if found is None:
        return Site(name="local", index=0, count=1, job="")
    folder = own_folder(found, found.job) / PERSONAL if found.job else None
    return Site(name=found.site, index=found.index, count=found.count, job=found.job, personal=folder)
