"""A data set that is divided among sites: its parts, a table of counts, a picture, and files for `--data`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fl_adapters.participant.identity import site
from fl_adapters.participant.kit import current_kit
from fl_runtime.errors import ConfigError, did_you_mean
from fl_runtime.types import Array

from .files import write_part
from .pictures import draw
from .rows import count_rows, select

_MOST_LABELS = 10


@dataclass(frozen=True)
class Partition:
    """A data set that is divided among sites. Every row belongs to one of them.

    `parts["site-1"]` or `parts[0]` is the data of a site, of the same type as the whole, and a loop over the partition
    gives those of each site. `print(parts)` shows a table of counts, and notebooks a picture.

    Attributes:
        sites: Names of the sites, in order.
        rows: Numbers of the rows of each site, ascending.
        data: The data set.
        title: How it was divided.
        labels: Names of the labels, in order; empty if no label is known.
        label_of_row: For each row the number of its label.

    Example:
        >>> import numpy as np
        >>> from fl_adapters.partition import iid
        >>> parts = iid(np.arange(10), sites=["north", "south"], seed=0)
        >>> [len(parts["north"]), len(parts["south"])]
        [5, 5]
    """

    sites: tuple[str, ...]
    rows: tuple[Array, ...]
    data: Any = field(repr=False)
    title: str = ""
    labels: tuple[str, ...] = ()
    label_of_row: Array | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.sites)

    def __getitem__(self, which: str | int) -> Any:
        return select(self.data, self.rows[self._number(which)])

    def __iter__(self) -> Iterator[Any]:
        return (select(self.data, rows) for rows in self.rows)

    def _number(self, which: str | int) -> int:
        if isinstance(which, int):
            return range(len(self.sites))[which]  # IndexError, as of a list
        if which not in self.sites:
            fix = f"{did_you_mean(which, self.sites)}the sites are {', '.join(self.sites)}"
            raise ConfigError(f"there is no part for the site {which!r}", where=self.title, fix=fix)
        return self.sites.index(which)

    def mine(self) -> Any:
        """Return the part of the site that this process belongs to, in a simulation.

        Returns:
            The part; all data if the script runs alone.

        Raises:
            ConfigError: The simulation has other sites than the partition, or this is a site of a real federation,
                whose data are its own and not to be divided.
        """
        kit = current_kit()
        if kit is not None and kit.credentials:
            raise ConfigError(
                "data are divided among the sites of a simulation, and this is a site of a federation",
                where=f"{self.title}, at {kit.site}",
                fix="let the script read fl_adapters.site().data, and divide only where it is None; for a "
                "ProofOfConcept write the parts to files, and name them with data=",
            )
        place = site()
        if not place.job:
            return self.data
        if place.count != len(self.sites):
            raise ConfigError(
                f"the data are divided among {len(self.sites)} sites, the simulation has {place.count}",
                where=self.title,
                fix="leave sites out in the script, or simulate with the same sites",
            )
        return self[place.name if place.name in self.sites else place.index]

    @cached_property
    def counts(self) -> dict[str, dict[str, int]]:
        """Number of rows of each label, by site. Without labels all rows count as "rows"."""
        if self.label_of_row is None:
            return {name: {"rows": len(rows)} for name, rows in zip(self.sites, self.rows, strict=True)}
        found = [np.bincount(self.label_of_row[rows], minlength=len(self.labels)) for rows in self.rows]
        return {
            name: dict(zip(self.labels, numbers.tolist(), strict=True))
            for name, numbers in zip(self.sites, found, strict=True)
        }

    def shown_counts(self, most: int = _MOST_LABELS) -> dict[str, dict[str, int]]:
        """Return the counts with at most so many labels: of more, the rarest together as "others".

        Args:
            most: Largest number of labels, at least 2.

        Returns:
            Site -> label -> number of rows.
        """
        if len(self.labels) <= most:
            return self.counts
        totals = {label: sum(of_site[label] for of_site in self.counts.values()) for label in self.labels}
        frequent = set(sorted(totals, key=lambda label: -totals[label])[: most - 1])
        shown = {}
        for name, numbers in self.counts.items():
            kept = {label: number for label, number in numbers.items() if label in frequent}
            shown[name] = {**kept, f"{len(self.labels) - len(kept)} others": sum(numbers.values()) - sum(kept.values())}
        return shown

    def __str__(self) -> str:
        shown = self.shown_counts()
        labels = list(next(iter(shown.values()))) if self.labels else []
        sums = {label: sum(row[label] for row in shown.values()) for label in labels}
        lines = [["site", "rows", *labels]]
        for name, row in {**shown, "all": sums or {"rows": count_rows(self.data)}}.items():
            lines.append([name, *map(str, (sum(row.values()), *(row[label] for label in labels)))])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        texts = [[cell.rjust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
        names = [line[0].ljust(widths[0]) for line in lines]
        return "\n".join([self.title, *(" ".join([name, *text[1:]]) for name, text in zip(names, texts, strict=True))])

    def save_picture(self, path: str | Path) -> Path:
        """Draw a bar for each site, with a piece for each label, into an SVG file that every browser shows.

        Args:
            path: The file, such as "parts.svg".

        Returns:
            The file.

        Raises:
            ConfigError: The name of the file does not end in `.svg`.
        """
        path = Path(path)
        if path.suffix.lower() != ".svg":
            raise ConfigError(f"{path} is no SVG file", where="save_picture", fix=f"write {path.with_suffix('.svg')}")
        path.write_text(draw(self.title, self.shown_counts()), encoding="utf-8")
        return path

    def write(self, pattern: str | Path) -> dict[str, Path]:
        """Write the part of each site into a file of its own, for `fl-adapters simulate --data PATTERN`.

        Args:
            pattern: The files, with {site} for the name of the site: "parts/{site}.csv". A table of pandas may be
                `.csv` or `.parquet`, an array `.npy` or `.csv`, a tuple of arrays `.npz` (`arr_0`, `arr_1`, ...). A
                data set of `datasets` is a folder, "parts/{site}", which its `load_from_disk` opens.

        Returns:
            Site -> its file. Folders are made, and files of an earlier call replaced.

        Raises:
            ConfigError: The pattern has no {site}, or data of this type cannot be such a file.
        """
        if "{site}" not in str(pattern):
            raise ConfigError(f"all sites would share {pattern}", where="write", fix="write 'parts/{site}.csv'")
        written = {}
        for name, part in zip(self.sites, self, strict=True):
            written[name] = Path(str(pattern).replace("{site}", name))
            write_part(part, written[name])
        return written

    def _repr_html_(self) -> str:
        return draw(self.title, self.shown_counts())
