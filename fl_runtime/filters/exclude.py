"""The filter `ExcludeVars`: hold back tensors by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fl_runtime.errors import UpdateRefusedError
from fl_runtime.filters.base import FilterSettings, Layout, Point, matches, refuse
from fl_runtime.types import Arrays


@dataclass(frozen=True)
class ExcludeVars(FilterSettings):
    """Holds back the tensors whose names match a pattern.

    At `site_out` (default) matching tensors do not leave the site. The strategy combines each tensor as if only the
    sites that send it had taken part in the round. So their shares of the examples add up to 1, and the median is
    theirs. A tensor that no site sends keeps its value in the global model, and its moments at the server. At `site_in`
    the arriving values of matching tensors are ignored, and the site continues with its own.

    Use `keep_local` of the job or the script if all sites hold back the same tensors: those are not even named at the
    handshake. This filter is for a site that holds back more than the others. `krum` and `trimmed-mean` compare whole
    updates: a site whose policy has this filter is refused before round 1. Named after the filter of NVIDIA FLARE.

    Attributes:
        names: Name patterns (`fnmatch`: `*`, `?`, `[abc]`), such as ["head.*"]; at least one.

    Raises:
        ConfigError: If `names` is not a non-empty list of patterns.
    """

    points: ClassVar[tuple[Point, ...]] = ("site_out", "site_in")
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        names = [self.names] if isinstance(self.names, str) else self.names
        if not isinstance(names, (list, tuple)) or not names or not all(isinstance(name, str) for name in names):
            raise refuse(f"ExcludeVars: names is {self.names!r}", 'give patterns such as ["head.*"]')
        object.__setattr__(self, "names", tuple(names))

    def excludes(self, name: str) -> bool:
        """Whether a tensor of this name is held back."""
        return matches(name, self.names)

    def layout(self, layout: Layout) -> Layout:
        """Return the layout without the tensors that are held back."""
        return {name: spec for name, spec in layout.items() if not self.excludes(name)}

    def encode(self, arrays: Arrays) -> Arrays:
        """Return the arrays without those that are held back."""
        return {name: array for name, array in arrays.items() if not self.excludes(name)}

    def decode(self, arrays: Arrays, layout: Layout) -> Arrays:
        """Return the arrays as they are. Raises UpdateRefusedError if one of them should have been held back."""
        unexpected = [name for name in arrays if self.excludes(name)]
        if unexpected:
            raise UpdateRefusedError(f"tensor {unexpected[0]!r} was sent although the update says it is held back")
        return arrays
