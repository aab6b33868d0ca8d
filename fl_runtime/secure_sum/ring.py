"""Fixed-point numbers modulo 2^b: how values become integers whose sum is exact, whatever the order of the sites.

A value x becomes round(x * 2^f) modulo 2^b, rounded to the nearest integer, ties to even. Negative values take the
upper half of the range (two's complement). Numbers modulo 2^128 or 2^256 are rows of uint64, the lowest first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import numpy as np

from fl_runtime.errors import ConfigError, UpdateRefusedError
from fl_runtime.types import Array

_MAX_FRACTION_BITS = 512  # 2^-512 is far from the limits of float64
_WORDS: dict[int, np.dtype[Any]] = {32: np.dtype("<u4"), **dict.fromkeys((64, 128, 256), np.dtype("<u8"))}
_DOES_NOT_FIT = "a value is not finite, or too large for the sum"


@dataclass(frozen=True)
class Ring:
    """Integers modulo 2^bits that stand for multiples of 2^-fraction_bits.

    Attributes:
        bits: 32 (arrays of uint32), 64 (uint64), 128 or 256 (uint64 with a last dimension of 2 or 4, the lowest first).
        fraction_bits: Number of binary digits after the point, from 0 to 512.

    Raises:
        ConfigError: If one of both is out of range.
    """

    bits: Literal[32, 64, 128, 256]
    fraction_bits: int

    def __post_init__(self) -> None:
        if self.bits not in _WORDS:
            raise ConfigError(f"bits={self.bits!r} is not a size of a secure sum", fix="use 32, 64, 128 or 256")
        if not 0 <= self.fraction_bits <= _MAX_FRACTION_BITS:
            raise ConfigError(
                f"fraction_bits={self.fraction_bits!r} is out of range", fix=f"use 0 to {_MAX_FRACTION_BITS}"
            )

    @classmethod
    def for_sum(
        cls,
        sites: int,
        bound: float,
        weight: float = 0.0,
        bits: Literal[32, 64, 128, 256] = 64,
        least_fraction_bits: int = 0,
    ) -> Ring:
        """Return the finest ring in which a weighted sum over sites cannot wrap around.

        Site i adds w_i * x_i with |x_i| <= bound, and the weights w_i >= 0 sum up to at most `weight`. Rounding moves
        each site's value by at most half a unit. So the sum fits if bound * weight * 2^f + sites / 2 < 2^(bits - 1).

        Args:
            sites: Number of sites that add a vector.
            bound: Largest absolute value of an element before it is weighted.
            weight: Largest sum of the weights; 0 for a sum without weights, in which each site counts once.
            bits: 32, 64, 128 or 256.
            least_fraction_bits: Binary digits after the point that the caller needs.

        Returns:
            The ring.

        Raises:
            ConfigError: If a number is not positive and finite, or the sum would not fit.
        """
        for name, value in (("sites", sites), ("bound", bound), ("weight", weight or 1)):
            if not math.isfinite(value) or value <= 0:
                raise ConfigError(f"{name}={value!r} of a secure sum is not a positive number", fix=f"change {name}")
        total = weight or sites
        room = 2 ** (bits - 1) - 1 - (sites + 1) // 2
        fraction_bits = min(_whole_log2(room / (Fraction(bound) * Fraction(total))), _MAX_FRACTION_BITS)
        if fraction_bits < least_fraction_bits:
            raise ConfigError(
                f"a sum of values up to bound={bound:g} with weights that sum up to {total:g} does not fit into "
                f"{bits} bits with {least_fraction_bits} binary digits after the point",
                fix="use more bits, a smaller bound (clip the values) or smaller weights",
            )
        return cls(bits, fraction_bits)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of encoded arrays."""
        return _WORDS[self.bits]

    @property
    def words(self) -> int:
        """Number of words of 64 bits in a number; 1 with bits=32 too."""
        return max(1, self.bits // 64)

    def zeros(self, shape: tuple[int, ...]) -> Array:
        """Return the encoding of zeros, to which vectors are added.

        Args:
            shape: Shape of the decoded array.

        Returns:
            A new array of the ring; with bits=128 or 256 it has one more dimension, of size `words`.
        """
        return np.zeros((*shape, self.words) if self.words > 1 else shape, self.dtype)

    def encode(self, values: Array) -> Array:
        """Return values as integers of the ring.

        Args:
            values: Numbers: floating point of up to 64 bits (bfloat16 too), integers or booleans.

        Returns:
            A new array of the ring.

        Raises:
            UpdateRefusedError: If a value is not finite or does not fit. Call `count_beyond` before, to say which
                tensor it is.
            ConfigError: If the array does not hold real numbers.
        """
        array = _numbers(values)
        if array.dtype.kind == "f":
            return self._of_floats(array)
        negative = array < 0
        magnitude = np.where(negative, np.negative(array.view(np.uint64)), array.view(np.uint64))
        return self._signed(self._shifted(magnitude), negative)

    def decode(self, total: Array) -> Array:
        """Return the numbers that integers of the ring stand for.

        Args:
            total: An array of the ring.

        Returns:
            A new array of float64, each number rounded once, to the nearest, ties to even.
        """
        if self.words > 1:
            return _decode_words(total, self.fraction_bits)
        signed = total.view(np.int32 if self.bits == 32 else np.int64)
        decoded: Array = signed.astype(np.float64) * 2.0**-self.fraction_bits  # exact, as for all powers of 2
        return decoded

    def add_into(self, total: Array, vector: Array) -> None:
        """Add a vector to a total in place, modulo 2^bits.

        Args:
            total: An array of the ring, changed in place.
            vector: An array of the ring of the same shape.
        """
        if self.words == 1:
            np.add(total, vector, out=total)
            return
        carry: Array | None = None
        for word in range(self.words):
            sums = total[..., word]
            sums += vector[..., word]
            over = sums < vector[..., word]
            if carry is not None:
                sums += carry
                over |= sums < carry
            carry = over

    def subtract_from(self, total: Array, vector: Array) -> None:
        """Subtract a vector from a total in place, modulo 2^bits.

        Args:
            total: An array of the ring, changed in place.
            vector: An array of the ring of the same shape.
        """
        if self.words == 1:
            np.subtract(total, vector, out=total)
            return
        borrow: Array | None = None
        for word in range(self.words):
            rest = total[..., word]
            under = rest < vector[..., word]
            rest -= vector[..., word]
            if borrow is not None:
                under |= rest < borrow
                rest -= borrow
            borrow = under

    def _of_floats(self, array: Array) -> Array:
        with np.errstate(over="ignore", invalid="ignore"):
            scaled = np.asarray(array * 2.0**self.fraction_bits)
            np.rint(scaled, out=scaled)
            magnitude = np.abs(scaled)
        if array.size and not magnitude.max() < 2.0 ** (self.bits - 1):  # False for NaN
            raise UpdateRefusedError(_DOES_NOT_FIT, fix="clip the values to the bound of the sum")
        if self.words == 1:
            return scaled.astype(np.int64).view(np.uint64).astype(self.dtype, copy=False)
        words: list[Array] = []
        for word in reversed(range(self.words)):  # exact: each step leaves the low ones of the 53 binary digits
            part = np.floor(magnitude * 2.0 ** (-64 * word))
            magnitude = magnitude - part * 2.0 ** (64 * word)
            words.insert(0, part.astype(np.uint64))
        return self._signed(np.stack(words, axis=-1), scaled < 0)

    def _shifted(self, magnitude: Array) -> Array:
        """Return whole numbers times 2^f."""
        shift, limit = self.fraction_bits, 2 ** (self.bits - 1)
        if magnitude.size and int(magnitude.max()) << shift >= limit:
            raise UpdateRefusedError(_DOES_NOT_FIT, fix="clip the values to the bound of the sum")
        if shift >= self.bits:
            magnitude, shift = np.zeros_like(magnitude), 0  # no other number fits
        if self.words == 1:
            return magnitude << np.uint64(shift)
        place, within = divmod(shift, 64)
        words = [np.zeros_like(magnitude) for _ in range(self.words + 1)]
        words[place] = magnitude << np.uint64(within)
        if within:
            words[place + 1] = magnitude >> np.uint64(64 - within)  # none in the word beyond the last, since it fits
        return np.stack(words[: self.words], axis=-1)

    def _signed(self, magnitude: Array, negative: Array) -> Array:
        if self.words == 1:
            return np.where(negative, np.negative(magnitude), magnitude).astype(self.dtype)
        return np.where(negative[..., np.newaxis], _negated(magnitude), magnitude)


def count_beyond(values: Array, bound: float) -> int:
    """Return how many values cannot be part of a sum with this bound.

    Args:
        values: Numbers as in `Ring.encode`.
        bound: Largest absolute value.

    Returns:
        The number of elements that are not finite, or whose absolute value is larger than the bound.

    Raises:
        ConfigError: If the array does not hold real numbers.
    """
    array = _numbers(values)
    within = (array <= bound) & (array >= -bound)  # False for NaN
    return int(within.size - np.count_nonzero(within))


def _numbers(values: Array) -> Array:
    """Return an array as float64, int64 or uint64."""
    array = np.asarray(values)
    if array.dtype.kind in "iub":
        return np.ascontiguousarray(array, np.uint64 if array.dtype == np.uint64 else np.int64).reshape(array.shape)
    if array.dtype.kind == "c" or not np.can_cast(array.dtype, np.float64):
        raise ConfigError(f"an array of {array.dtype} cannot be part of a secure sum", fix="use real numbers")
    return array.astype(np.float64)


def _whole_log2(ratio: Fraction) -> int:
    """Return the largest f with 2^f <= ratio, or -1 if that is negative."""
    return (ratio.numerator // ratio.denominator).bit_length() - 1


def _negated(number: Array) -> Array:
    """Return minus a number of several words."""
    flipped = ~number
    carry = np.ones(number.shape[:-1], bool)
    for word in range(number.shape[-1]):
        flipped[..., word] += carry
        carry &= flipped[..., word] == 0
    return flipped


def _decode_words(total: Array, fraction_bits: int) -> Array:
    negative = total[..., -1] >> np.uint64(63) == 1
    magnitude = np.where(negative[..., np.newaxis], _negated(total), total)
    upper, lower, exponent = _two_highest([magnitude[..., word] for word in range(total.shape[-1])])
    for step in (32, 16, 8, 4, 2, 1):  # moves the number up until its highest digit is that of `upper`
        low = upper >> np.uint64(64 - step) == 0
        upper = np.where(low, upper << np.uint64(step) | lower >> np.uint64(64 - step), upper)
        lower = np.where(low, lower << np.uint64(step), lower)
        exponent = exponent - np.where(low, step, 0)
    upper = upper | (lower != 0)  # the last digit stands for all below it, so that float64 rounds once
    decoded: Array = np.ldexp(upper.astype(np.float64), exponent - fraction_bits)
    return np.where(negative, -decoded, decoded)


def _two_highest(words: Sequence[Array]) -> tuple[Array, Array, Array]:
    """Return the highest word that is not 0, the one below it, and the exponent of the first.

    The last binary digit of the second stands for all words below it.
    """
    upper, lower, rest = words[0], np.zeros_like(words[0]), np.zeros(words[0].shape, bool)
    exponent = np.zeros(words[0].shape, np.int64)
    for number, word in enumerate(words[1:], 1):
        higher = word != 0
        rest = np.where(higher, rest | (lower != 0), rest)
        lower, upper = np.where(higher, upper, lower), np.where(higher, word, upper)
        exponent = np.where(higher, 64 * number, exponent)
    return upper, lower | rest, exponent
