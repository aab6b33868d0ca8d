"""Random numbers for privacy filters, from the operating system. They cannot be seeded, predicted or repeated.

Uniform numbers have 64 random bits, so Gaussian noise reaches 9.4 standard deviations; the missing tail has a
probability below 2^-64 per number. Noise is added in float64 and the sum is rounded once, to float32 or narrower. The
low bits of doubles, which a known attack reads, do not leave (Mironov 2012, "On significance of the least significant
bits for differential privacy").
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

import numpy as np

from fl_runtime.filters.base import largest
from fl_runtime.types import Array

BLOCK = 2**16
"""Number of elements that are processed at a time."""


def uniform(count: int) -> Array:
    """Draw `count` uniform float64 numbers from (0, 1]."""
    bits = np.frombuffer(os.urandom(8 * count), np.uint64).astype(np.float64)
    return (bits + 0.5) / 2.0**64


def gaussian(count: int) -> Array:
    """Draw `count` standard normal float64 numbers.

    Source: Box and Muller 1958, "A note on the generation of random normal deviates".
    """
    half = (count + 1) // 2
    radius = np.sqrt(-2.0 * np.log(uniform(half)))
    angle = 2.0 * math.pi * uniform(half)
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]


def laplace(count: int) -> Array:
    """Draw `count` float64 numbers from the Laplace distribution of scale 1: a random sign times an exponential."""
    signs = np.frombuffer(os.urandom(count), np.uint8).astype(np.float64) % 2 * 2 - 1
    return -np.log(uniform(count)) * signs


def bernoulli(probability: float) -> bool:
    """Return True with this probability."""
    return bool(uniform(1)[0] <= probability)


def random_subset(count: int, among: int) -> Array:
    """Draw `count` different indices below `among`, all subsets equally likely.

    Args:
        count: Size of the subset; if it is not below `among`, all indices are returned.
        among: Number of indices to choose from.

    Returns:
        The indices, ascending.
    """
    if count >= among:
        return np.arange(among)
    keys = np.frombuffer(os.urandom(8 * among), np.uint64)
    return np.sort(np.argpartition(keys, count)[:count])


def blocks(size: int) -> Iterator[slice]:
    """Yield slices of `BLOCK` elements that cover an array of `size` elements."""
    for start in range(0, size, BLOCK):
        yield slice(start, start + BLOCK)


def store_rounded(target: Array, values: Array) -> None:
    """Write float64 values into a real array, rounded to float32 or narrower and limited to the finite range.

    Args:
        target: The array to write to.
        values: float64, of the same shape.
    """
    limit = min(largest(target.dtype), largest(np.dtype(np.float32)))
    target[...] = np.clip(values, -limit, limit).astype(np.float32).astype(target.dtype)
