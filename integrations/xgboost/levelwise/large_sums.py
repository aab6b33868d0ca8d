"""Sums of whole numbers that may be more than one call of a sum should hold."""

from __future__ import annotations

import numpy as np

from fl_adapters.loop.federation import Federation
from fl_runtime.types import Array


def summed(federation: Federation, name: str, own: Array, most: int) -> Array:
    """Sum whole numbers over all sites, in several calls if there are many.

    Args:
        federation: Sums over all sites.
        name: Name of the array, the same at all sites.
        own: Whole numbers of this site below 2^53, float64, of the same shape at all sites.
        most: Most numbers in one call.

    Returns:
        The total, of the same shape.
    """
    flat = own.reshape(-1)
    parts = [flat[at : at + most] for at in range(0, len(flat), most)]
    return np.concatenate([federation.sum({name: part}, integers=True)[name] for part in parts]).reshape(own.shape)
