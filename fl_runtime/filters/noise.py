"""Noise and choice from the operating system's randomness: nothing is seeded, nothing can be foreseen or repeated.

Uniform numbers have 64 random bits, so Gaussian noise reaches 9.4 standard deviations: what is cut off has a
probability below 2^-64 a number. Sums with noise are formed in float64 and rounded once, to the tensor's own dtype
or to float32, so the low bits of the double that a known attack reads (Mironov 2012, "On significance of the least
significant bits for differential privacy") do not leave.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

import numpy as np

from fl_runtime.filters.base import largest
from fl_runtime.types import Array

BLOCK = 2**16
"""Elements handled at a time."""


def uniform(count: int) -> Array:
    """float64 in (0, 1]."""
    bits = np.frombuffer(os.urandom(8 * count), np.uint64).astype(np.float64)
    return (bits + 0.5) / 2.0**64


def gaussian(count: int) -> Array:
    """Standard normal float64 (Box and Muller 1958, "A note on the generation of random normal deviates")."""
    half = (count + 1) // 2
    radius = np.sqrt(-2.0 * np.log(uniform(half)))
    angle = 2.0 * math.pi * uniform(half)
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]


def laplace(count: int) -> Array:
    """Laplace float64 of scale 1: a random sign before an exponential number."""
    signs = np.frombuffer(os.urandom(count), np.uint8).astype(np.float64) % 2 * 2 - 1
    return -np.log(uniform(count)) * signs


def bernoulli(probability: float) -> bool:
    """True with this probability."""
    return bool(uniform(1)[0] <= probability)


def chosen(count: int, among: int) -> Array:
    """`count` different indices below `among`, uniformly, in ascending order."""
    if count >= among:
        return np.arange(among)
    keys = np.frombuffer(os.urandom(8 * among), np.uint64)
    return np.sort(np.argpartition(keys, count)[:count])


def blocks(size: int) -> Iterator[slice]:
    for start in range(0, size, BLOCK):
        yield slice(start, start + BLOCK)


def store_rounded(target: Array, values: Array) -> None:
    """Write float64 values into a real array: rounded once, by way of float32, and kept within its finite range."""
    limit = min(largest(target.dtype), largest(np.dtype(np.float32)))
    target[...] = np.clip(values, -limit, limit).astype(np.float32).astype(target.dtype)
