"""Sums that fail: what is wrong with them, and which sites' updates are to blame."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from fl_runtime.aggregation.fedavg import blocks
from fl_runtime.errors import FederationError, HandshakeError, ProtocolError, RoundFailedError, UpdateRefusedError
from fl_runtime.server.models import Model
from fl_runtime.store.blobs import Blob
from fl_runtime.types import Array, Update, is_floating
from fl_runtime.wire.dtypes import dtype_of
from fl_runtime.wire.finite import inspect, largest_value

log = logging.getLogger(__name__)

_TRIED = 16
"""Number of sites, those with the largest norms, without each of which a sum is tried."""


class SumFailedError(RoundFailedError):
    """Updates that were accepted one by one make no model together.

    Attributes:
        error: What the aggregator raised; this error itself if the result is not finite.
        infinite: Whether the result is not finite, or too large to go on with.
    """

    def __init__(
        self, what: str, *, where: str = "", fix: str = "", error: FederationError | None = None, infinite: bool = False
    ) -> None:
        super().__init__(what, where=where, fix=fix)
        self.error, self.infinite = error or self, infinite


@contextmanager
def combining(round: int) -> Iterator[None]:
    """Turn what an aggregator raises in the block because of the updates into SumFailedError."""
    try:
        yield
    except (RoundFailedError, UpdateRefusedError, ProtocolError, HandshakeError) as error:
        raise SumFailedError(error.what, where=error.where, fix=error.fix, error=error) from error
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        log.exception("the updates of round %s cannot be combined", round)
        what = f"the updates of round {round} cannot be combined: {error!r}"
        cause = FederationError(what, fix="see the server's log; the run can be continued")
        raise SumFailedError(what, fix=cause.fix, error=cause) from error


def checked_digests(
    blob: Blob, strategy_state: Blob | None, round: int, updates: Iterable[Update], base: Model | None
) -> bytes:
    """Check a finished sum before it is committed, and compute the digests of its tensors in the same pass.

    Args:
        blob: The next global model.
        strategy_state: What the strategy keeps beside it, or None.
        round: Number of the round.
        updates: The updates that were summed.
        base: The global model of the round; None if there is none to compare with.

    Returns:
        The digests, in the order of the manifest.

    Raises:
        SumFailedError: A value is not finite, as when updates are finite but their sum overflows, or a tensor has
            become too large to go on with. The message names the sites whose updates have the largest norms.
    """
    what = ""
    try:
        for part in filter(None, (blob, strategy_state)):
            arrays, extras = part.views()
            inspected = inspect(arrays, extras, f"round {round}")
            if part is blob:
                found = inspected
            what = what or too_large(part, inspected.largest, base)
    except UpdateRefusedError as error:
        what = f"is not finite: {error.what}"
    if what:
        raise SumFailedError(
            f"the new global model {what}; the largest updates came from {_largest(updates)}",
            where=f"round {round}",
            fix="look at the logs of these sites; lower their learning rate, or leave them out with min_sites",
            infinite=True,
        )
    specs = blob.manifest.tensors
    return b"".join(found.tensors[spec.extra, spec.name][1] for spec in specs)


def is_usable(blob: Blob, strategy_state: Blob | None, base: Model | None) -> bool:
    """Return whether `checked_digests` would accept a sum."""
    for part in filter(None, (blob, strategy_state)):
        views = dict(zip((False, True), part.views(), strict=True))
        largest = {(extra, name): largest_value(a) for extra, arrays in views.items() for name, a in arrays.items()}
        if not all(map(math.isfinite, largest.values())) or too_large(part, largest, base):
            return False
    return True


def too_large(part: Blob, largest: Mapping[tuple[bool, str], float], base: Model | None) -> str:
    """Find tensors whose values have become so large that their squares would not be finite.

    Nobody could train such a model, or sum the next updates: one site's finite values would end the run a round later.
    Tensors that were as large before are left alone, such as masks, and narrow dtypes, which are summed in a wider one.

    Args:
        part: The next global model, or what the strategy keeps beside it.
        largest: The largest absolute value of each of its tensors.
        base: The global model of the round; None if there is none to compare with.

    Returns:
        What is wrong, as the end of a sentence; empty if nothing is.
    """
    before: dict[tuple[bool, str], Array] = {}
    for blob in (base.blob, base.strategy_state) if base else ():
        for extra, arrays in zip((False, True), blob.views() if blob else ({}, {}), strict=True):
            before |= {(extra, name): array for name, array in arrays.items()}
    found = []
    for spec in part.manifest.tensors if base else ():
        key = spec.extra, spec.name
        limit = _limit(dtype_of(spec.dtype))
        if largest[key] > limit and (key not in before or largest_value(before[key]) <= limit):
            found.append(f"{spec.name} (up to {largest[key]:.3g}, more than {limit:.3g})")
    return f"is too large to go on with: {', '.join(found[:3])}" if found else ""


def _limit(dtype: np.dtype[Any]) -> float:
    """The largest value whose square is finite in a dtype; infinite for dtypes narrower than float32."""
    if dtype.kind == "c" or dtype == np.float32 or dtype.name == "bfloat16":
        return math.sqrt(float(np.finfo(np.float32).max))
    return math.sqrt(float(np.finfo(np.float64).max)) if dtype == np.float64 else math.inf


def norms_of(updates: Iterable[Update]) -> dict[str, float]:
    """Compute how large each site's updates are.

    Args:
        updates: Updates as they arrived; a site may have sent several.

    Returns:
        Site -> the largest Euclidean norm over all floating-point tensors of one of its updates, extras included.
    """
    norms: dict[str, float] = {}
    for update in updates:
        norms[update.site] = max(_norm([*update.arrays.values(), *update.extras.values()]), norms.get(update.site, 0.0))
    return norms


def sites_to_blame(
    norms: Mapping[str, float], works_without: Callable[[Collection[str]], bool], *, infinite: bool
) -> list[str]:
    """Find the sites without whose updates a failed sum would make a model.

    A site is blamed for what it changes, not for its norm: with it the sum of the same others fails, without it the sum
    works. Only a minority can be to blame. Of two sites, one can be if the sum is not finite: only its own values can
    make it so.

    Args:
        norms: Norm of each site's update; those with the largest are tried first.
        works_without: Sums the updates again without those of some sites, and says whether they make a model.
        infinite: Whether the sum failed because it is not finite.

    Returns:
        The sites; none if nobody can be told.
    """
    order = sorted(norms, key=lambda site: (-norms[site], site))
    most = max((len(order) - 1) // 2, 1 if infinite and len(order) > 1 else 0)
    if not most:
        return []
    single = [site for site in order[:_TRIED] if works_without([site])]
    if single or most == 1 or not works_without(order[:most]):
        return single
    fails, works = 1, most  # the number of sites left out: several have to be
    while works - fails > 1:
        middle = (fails + works) // 2
        if works_without(order[:middle]):
            works = middle
        else:
            fails = middle
    return [order[works - 1]]


def _largest(updates: Iterable[Update]) -> str:
    """The three sites whose updates have the largest norms, with these norms."""
    norms = norms_of(updates)
    largest = sorted(norms, key=lambda site: (-norms[site], site))[:3]
    return ", ".join(f"{site} (norm {norms[site]:.3g})" for site in largest)


def _norm(arrays: Iterable[Array]) -> float:
    """The Euclidean norm over floating-point arrays. It is scaled, so that squares do not overflow."""
    flat = [array.reshape(-1) for array in arrays if is_floating(array.dtype)]
    scale = max((float(part.max()) for part in _magnitudes(flat)), default=0.0)
    squares = (float(np.sum(np.square(part / scale))) for part in _magnitudes(flat))
    return scale * math.sqrt(sum(squares)) if scale else 0.0


def _magnitudes(flat: Sequence[Array]) -> Iterator[Array]:
    """Absolute values in float64, block by block."""
    for array in flat:
        wide = np.complex128 if array.dtype.kind == "c" else np.float64
        for block in blocks(array.size):
            yield np.abs(array[block].astype(wide))
