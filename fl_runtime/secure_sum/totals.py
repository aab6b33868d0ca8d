"""The sums of `fl_adapters.sums` under masks: which whole numbers stand for the values of a call.

Nobody knows how large the values of the sites are, and to agree on it would tell something of them. So the numbers have
256 bits, enough for the values of statistics and estimators at any scale. Values of a call that says that they are
integers have 64 bits.
"""

from __future__ import annotations

from fl_runtime.errors import UpdateRefusedError
from fl_runtime.secure_sum.ring import Ring
from fl_runtime.types import Array

LARGEST_VALUE = 1e36
"""Largest absolute value of one site in a masked sum."""

WORDS = 4
"""Number of words of 64 bits that hide one value, unless the call says that its values are integers."""

LARGEST_INTEGER = 2**53
"""Integers below this are exact in float64."""


def ring_of_totals(sites: int, *, integers: bool = False) -> Ring:
    """Return the ring of a sum over so many sites.

    Args:
        sites: Number of sites of the job.
        integers: Whether the values are whole numbers below 2^53.

    Returns:
        The ring. Its unit is below 1e-37 for up to 1000 sites, so values of 1e-21 and more keep all digits of float64.
        That of integers has 64 bits for up to 1000 sites, else 128.
    """
    if integers:
        return Ring(64 if sites * LARGEST_INTEGER < 2**63 else 128, 0)
    return Ring.for_sum(sites, LARGEST_VALUE, bits=256)


def shape_of_masked(call_size: int, ring: Ring) -> tuple[int, ...]:
    """Return the shape of the masked values of a call.

    Args:
        call_size: Number of values.
        ring: The ring of the call.
    """
    return (call_size, ring.words) if ring.words > 1 else (call_size,)


def encoded_values(values: Array, ring: Ring, where: str) -> Array:
    """Return the values of a call as whole numbers, not masked yet.

    Args:
        values: float64, one dimension.
        ring: The ring of the run.
        where: Site and call, for the error.

    Returns:
        A new array of the ring.

    Raises:
        UpdateRefusedError: A value is too large, or is not finite.
    """
    largest = float(max(values.max(), -values.min())) if values.size else 0.0
    if not largest <= LARGEST_VALUE:  # True for NaN
        raise UpdateRefusedError(
            f"a masked sum takes values up to {LARGEST_VALUE:g}, and there is {largest:g}",
            where=where,
            fix="rescale the values before sum(...)",
        )
    return ring.encode(values)
