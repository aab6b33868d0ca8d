"""The area under the ROC curve over all sites, from counts in cells of scores, with a bound on its error."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fl_adapters.loop.federation import Federation

from .cells import spread, tiles
from .inputs import Codes, Numbers, ScoreKind

_STEPS = 1024
_CHUNK_BITS = 16
MOST_CELLS, LEAST_CELLS = 2048, 64
_MOST_NUMBERS = 4_000_000


@dataclass(frozen=True)
class Curve:
    """One ROC curve at this site.

    Attributes:
        scores: Score of each row.
        positive: Whether each row is of the positive class.
    """

    scores: Numbers
    positive: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Grid:
    """Cells of scores, the same at all sites.

    Attributes:
        edges: Edges between the cells, ascending; a score on an edge is in the cell above it.
        tied: Whether all rows in a cell, over all sites, have one and the same score.
    """

    edges: Numbers
    tied: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Area:
    """An area under the ROC curve.

    Attributes:
        value: The middle of what is possible.
        error: Largest difference to the exact area.
    """

    value: float
    error: float


def first_edges(kind: ScoreKind) -> Numbers:
    """Return the edges of cells that suit scores of any distribution roughly."""
    if kind == "probability":
        inside = np.linspace(-1, 1, _STEPS + 1)[1:-1]
        odds = inside / (1 - np.abs(inside))
        return np.unique(1 / (1 + np.exp(-odds)))
    powers = np.exp2(np.arange(-20.0, 41.0))
    above = (powers[:, None] * (1 + np.arange(8) / 8)).ravel()
    return np.concatenate([-above[::-1], [0.0], above])


def cells_for(curves: int, segments: int) -> int:
    """Return into how many cells the scores of each curve are refined, so that all counts fit into one message."""
    return int(np.clip(_MOST_NUMBERS // max(1, 4 * curves * segments), LEAST_CELLS, MOST_CELLS))


def common_grids(federation: Federation, curves: list[Curve], kind: ScoreKind, cells: int, least: int) -> list[Grid]:
    """Agree on cells for each curve: finer where all sites together have more rows.

    Args:
        federation: The federation.
        curves: The curves; without rows at a site that stays out.
        kind: What the scores are.
        cells: Number of cells to refine into.
        least: Least number of rows whose count may leave this site.

    Returns:
        A grid for each curve.
    """
    if not curves:
        return []
    rough = first_edges(kind)
    own = [spread(_counts(rough, curve.scores), least) for curve in curves]
    totals = federation.sum({"rough": np.array(own)})["rough"]
    edges = [_refined(rough, total, cells) for total in totals]
    marks = {f"ties {number}": _marks(edges[number], curve.scores, least) for number, curve in enumerate(curves)}
    added = federation.sum(marks)
    return [Grid(edges[number], _tied(added[f"ties {number}"])) for number in range(len(curves))]


def counted(grid: Grid, curve: Curve, segments: list[Codes], least: int) -> Numbers:
    """Count rows of this site by class and cell.

    Args:
        grid: The cells.
        curve: Scores and classes of this site's rows.
        segments: For each segment the numbers of its rows.
        least: Least number of rows in a tile of cells.

    Returns:
        Counts [4, segments, cells]: positives in the first and in the last cell of their tiles, and negatives likewise.
    """
    cell = np.searchsorted(grid.edges, curve.scores, "right")
    size = len(grid.edges) + 1
    found = np.zeros((4, len(segments), size))
    for number, rows in enumerate(segments):
        chosen = curve.positive[rows]
        for part, mask in ((0, chosen), (2, ~chosen)):
            counts = np.bincount(cell[rows][mask], minlength=size).astype(np.float64)
            found[part, number], found[part + 1, number] = tiles(counts, least)
    return found


def area(counts: Numbers, tied: npt.NDArray[np.bool_]) -> Area | None:
    """Return the area under the ROC curve, or None if there is only one class.

    Args:
        counts: Counts of all sites [4, cells], as `counted` makes them.
        tied: Whether all rows of a cell have the same score.
    """
    positive, negative = counts[0].sum(), counts[2].sum()
    if not positive or not negative:
        return None
    least = _pairs(counts[0], counts[3], np.where(tied, 0.5, 0.0)) / (positive * negative)
    most = _pairs(counts[1], counts[2], np.where(tied, 0.5, 1.0)) / (positive * negative)
    return Area(float((least + most) / 2), float(max(0.0, (most - least) / 2)))


def points(counts: Numbers, edges: Numbers, most: int = 101) -> list[tuple[float, float, float]]:
    """Return points of a ROC curve: threshold, false positive rate, true positive rate; the strictest first."""
    positives, negatives = (counts[0] + counts[1]) / 2, (counts[2] + counts[3]) / 2
    if not positives.sum() or not negatives.sum():
        return []
    true = np.cumsum(positives[::-1])[:-1] / positives.sum()
    false = np.cumsum(negatives[::-1])[:-1] / negatives.sum()
    places = np.arange(len(edges))
    if len(edges) > most:  # evenly along the curve
        along = np.linspace(0, 1, most)
        places = np.unique(np.searchsorted((true + false) / 2, along).clip(0, len(edges) - 1))
    return [(float(edges[::-1][i]), float(false[i]), float(true[i])) for i in places]


def _pairs(positives: Numbers, negatives: Numbers, same_cell: Numbers) -> float:
    below = np.concatenate([[0.0], np.cumsum(negatives)[:-1]])
    return float((positives * (below + negatives * same_cell)).sum())


def _counts(edges: Numbers, scores: Numbers) -> Numbers:
    return np.bincount(np.searchsorted(edges, scores, "right"), minlength=len(edges) + 1).astype(np.float64)


def _refined(rough: Numbers, counts: Numbers, cells: int) -> Numbers:
    """Divide cells in proportion to their rows, and drop edges between cells without rows."""
    filled, total = counts > 0, counts.sum()
    kept = rough[filled[:-1] | filled[1:]]
    inner = [kept]
    for cell in np.flatnonzero(filled[1:-1]) + 1:  # the outermost cells have no end
        parts = 1 + round(cells * float(counts[cell]) / float(total))
        inner.append(np.linspace(rough[cell - 1], rough[cell], parts + 1)[1:-1])
    return np.unique(np.concatenate(inner))


def _marks(edges: Numbers, scores: Numbers, least: int) -> Numbers:
    """Return what shows, added over sites, in which cells all rows have one score.

    A site tells the score of a cell, in chunks with their squares, if at least `least` of its rows share it and it has
    no others there.

    Returns:
        Numbers [2 + 2 * chunks, cells]: whether the cell holds several scores, whether it holds one, and its chunks.
    """
    cell, size = np.searchsorted(edges, scores, "right"), len(edges) + 1
    one = np.zeros(size)
    one[cell] = scores
    rows = np.bincount(cell, minlength=size)
    differing = np.bincount(cell, scores != one[cell], minlength=size)
    alone = (rows >= max(1, least)) & (differing == 0)
    bits = (one + 0.0).view(np.uint64)
    chunks = [
        ((bits >> np.uint64(shift)) & np.uint64((1 << _CHUNK_BITS) - 1)).astype(np.float64) * alone
        for shift in range(0, 64, _CHUNK_BITS)
    ]
    return np.array([(rows > 0) & ~alone, alone, *chunks, *(chunk**2 for chunk in chunks)], np.float64)


def _tied(marks: Numbers) -> npt.NDArray[np.bool_]:
    several, sites = marks[0], marks[1]
    chunks, squares = marks[2 : 2 + 64 // _CHUNK_BITS], marks[2 + 64 // _CHUNK_BITS :]
    equal = (sites * squares == chunks**2).all(axis=0)  # no variance between the sites
    tied: npt.NDArray[np.bool_] = (several == 0) & (sites > 0) & equal
    return tied
