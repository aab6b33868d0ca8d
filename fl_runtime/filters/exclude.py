"""Holding tensors back by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fl_runtime.errors import UpdateRefusedError
from fl_runtime.filters.base import FilterSettings, Layout, Point, matches, refuse
from fl_runtime.types import Arrays


@dataclass(frozen=True)
class ExcludeVars(FilterSettings):
    """Tensors whose name matches one of `names` do not leave the site; the server averages them over the sites that
    send them, and where no site does, its own stay as they are.

    names: patterns as the shell knows them (`*`, `?`, `[abc]`), such as "head.*". At `site_in` it is the arriving
    values that are not taken: the site goes on with the values that it has. `keep_local` of a job or a script does
    more (such a tensor is not even named at the handshake); this is for a site that holds back more than the others.

    After `ExcludeVars` of NVIDIA FLARE.
    """

    points: ClassVar[tuple[Point, ...]] = ("site_out", "site_in")
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        given = [self.names] if isinstance(self.names, str) else self.names
        if not isinstance(given, (list, tuple)) or not given or not all(isinstance(name, str) for name in given):
            raise refuse(f"ExcludeVars: names is {self.names!r}", 'give patterns such as ["head.*"]')
        object.__setattr__(self, "names", tuple(given))

    def excludes(self, name: str) -> bool:
        return matches(name, self.names)

    def layout(self, layout: Layout) -> Layout:
        return {name: spec for name, spec in layout.items() if not self.excludes(name)}

    def encode(self, arrays: Arrays) -> Arrays:
        return {name: array for name, array in arrays.items() if not self.excludes(name)}

    def decode(self, arrays: Arrays, layout: Layout) -> Arrays:
        if any(self.excludes(name) for name in arrays):
            raise UpdateRefusedError("a tensor is there that was said to be held back")
        return arrays
