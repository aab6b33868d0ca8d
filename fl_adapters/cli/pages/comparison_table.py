"""Tables that compare runs on a terminal: a row for each run, and below each other what has no room side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rich import box
from rich.table import Table

_WIDEST = 24  # of a column; longer text takes several lines
_FRAME = 3  # columns of the terminal between two columns of the table


def comparison_tables(names: Sequence[str], columns: Mapping[str, Sequence[str]], width: int) -> Iterator[Table]:
    """Lay out a comparison of runs.

    Args:
        names: Names of the runs.
        columns: By heading, a cell for each run.
        width: Columns of the terminal.

    Yields:
        Tables with a row for each run. There is more than one where the columns do not fit side by side.
    """
    first = min(max(len(name) for name in ["run", *names]), max(_WIDEST, width * 2 // 5))
    blocks: list[list[str]] = [[]]
    left = width - first - _FRAME
    for heading, cells in columns.items():
        needed = _width_of([heading, *cells]) + _FRAME
        if blocks[-1] and needed > left:
            blocks.append([])
            left = width - first - _FRAME
        blocks[-1].append(heading)
        left -= needed
    for block in blocks:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("run", overflow="fold", max_width=first)
        for heading in block:
            table.add_column(heading, justify="right", overflow="fold", max_width=_WIDEST)
        for at, name in enumerate(names):
            table.add_row(name, *(columns[heading][at] for heading in block))
        yield table


def _width_of(cells: Sequence[str]) -> int:
    return min(max(len(cell) for cell in cells), _WIDEST)
