"""One site computes, all sites take its result: so that machines of different kinds end with the same bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from fl_runtime.errors import QuorumError

from .federation import Array, Federation

Ask = Callable[[Array], Mapping[str, Array]]


def from_leader(federation: Federation, values: Mapping[str, Array]) -> dict[str, Array]:
    """Return what the first site has computed.

    Args:
        federation: The federation.
        values: Name -> this site's own result; the shapes are the same at all sites.

    Returns:
        The first site's arrays.
    """
    first = federation.site.index == 0
    sent = {
        name: np.asarray(value, np.float64) if first else np.zeros(np.shape(value)) for name, value in values.items()
    }
    totals = federation.sum({**sent, "leaders": np.array([float(first)])})
    if totals["leaders"][0] != 1:
        raise QuorumError("the first site has left the run", fix="start the run again with all sites")
    return {name: np.asarray(totals[name]) for name in values}


def lead(
    federation: Federation, start: Array, answer: Callable[[Array], Mapping[str, Array]], drive: Callable[[Ask], Array]
) -> Array:
    """Run an iterative solver at the first site; the others answer its questions.

    Args:
        federation: The federation.
        start: An array with the shape of the points that are asked about.
        answer: Gives this site's summands at a point.
        drive: The solver. It gets a function that returns the totals over all sites at a point, and returns the
            solution, with the shape of `start`.

    Returns:
        The solution, with the same bits at all sites.
    """

    def tell(point: Array, more: bool) -> tuple[Array, bool]:
        told = from_leader(federation, {"point": point, "more": np.array([float(more)])})
        return told["point"], bool(told["more"][0])

    if federation.site.index == 0:

        def ask(point: Array) -> Mapping[str, Array]:
            point, _ = tell(point, True)
            return federation.sum(answer(point))

        return tell(drive(ask), False)[0]
    while True:
        point, more = tell(np.zeros_like(start, dtype=np.float64), False)
        if not more:
            return point
        federation.sum(answer(point))
