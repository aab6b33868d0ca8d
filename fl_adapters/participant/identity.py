"""The place of this process in the federation, for splitting data and for logging: `fl_adapters.site()`."""

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
    """The place of this process in the federation.

    Attributes:
        name: Name of the site; "local" without a startup kit.
        index: Number of the site among those of the job, from 0.
        count: Number of sites in the job.
        job: Name of the job; "" without a startup kit.
        personal: Folder of this site's personal model in the framework's format, after a training with the strategy
            "ditto". None without a startup kit.
        training: Which training of the site's script a session belongs to, from 1.
    """

    name: str
    index: int
    count: int
    job: str
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
        ConfigError: The kit cannot be read.

    Example:
        ```python
        import fl_adapters

        place = fl_adapters.site()
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
    return Site(name=current.site, index=current.index, count=current.count, job=current.job, personal=folder)
