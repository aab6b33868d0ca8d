"""Sums of arrays that may be larger than one call of a sum should be."""

from __future__ import annotations

import numpy as np

from fl_adapters.loop.order import Summing
from fl_runtime.types import Array


def summed(federation: Summing, name: str, own: Array, most: int) -> Array:
    """Sum an array over all sites, in several calls if it is large.

    Args:
        federation: Sums over all sites.
        name: Name of the array, the same at all sites.
        own: The array of this site, float64, of the same shape at all sites.
        most: Most numbers in one call.

    Returns:
        The total, of the same shape.
    """
    flat = own.reshape(-1)
    parts = [flat[at : at + most] for at in range(0, len(flat), most)]
    return np.concatenate([federation.sum({name: part})[name] for part in parts]).reshape(own.shape)
