"""Checks for NaN, infinite values and the weight of an update, used by sites before sending and by the server."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from fl_runtime.errors import UpdateRefusedError
from fl_runtime.types import Array, Arrays, is_floating
from fl_runtime.wire.dtypes import dtype_name, dtype_of

_BLOCK = 2**17


@dataclass(frozen=True)
class Inspected:
    """Digests of tensors that `inspect` found to be finite.

    It is valid for the array objects that were given to `inspect`, and only until someone writes to them.

    Attributes:
        tensors: (whether the tensor is an extra, name) -> (the array, xxh3-64 of its bytes).
        largest: (whether the tensor is an extra, name) -> the largest absolute value; see `largest_value`.
    """

    tensors: Mapping[tuple[bool, str], tuple[Array, bytes]]
    largest: Mapping[tuple[bool, str], float]

    def digest(self, array: Array, name: str, *, extra: bool) -> bytes | None:
        """Return the xxh3-64 of an inspected array, or None for any other array object.

        Args:
            array: The array itself; an equal copy does not count.
            name: Its tensor name.
            extra: Whether it is one of the update's extras.

        Returns:
            Eight bytes, or None.
        """
        inspected, digest = self.tensors.get((extra, name), (None, None))
        return digest if inspected is array else None

    def covers(self, arrays: Arrays, extras: Arrays) -> bool:
        """Whether all of these arrays were inspected."""
        return all(
            self.digest(array, name, extra=extra) is not None
            for extra, tensors in ((False, arrays), (True, extras))
            for name, array in tensors.items()
        )


def inspect(arrays: Arrays, extras: Arrays, where: str) -> Inspected:
    """Check that tensors are finite and compute their digests, in one pass over the memory.

    Args:
        arrays: The weights of an update.
        extras: The arrays that travel beside them.
        where: Location for the error message, such as the site and round.

    Returns:
        The digests, so that sending need not read the memory again.

    Raises:
        UpdateRefusedError: If tensors hold NaN or infinite values; the message names them.
        ConfigError: If a dtype cannot be sent.
    """
    inspected: dict[tuple[bool, str], tuple[Array, bytes]] = {}
    largest: dict[tuple[bool, str], float] = {}
    for extra, tensors in ((False, arrays), (True, extras)):
        for name, array in tensors.items():
            digest, largest[extra, name] = _digest_and_largest(array, name)
            inspected[extra, name] = array, digest
    refuse([name for (_, name), value in largest.items() if not math.isfinite(value)], where)
    return Inspected(inspected, largest)


def _digest_and_largest(array: Array, name: str) -> tuple[bytes, float]:
    """Return the digest of the little-endian bytes, and the largest absolute value."""
    flat = np.ascontiguousarray(array, dtype_of(dtype_name(array.dtype, tensor=name))).reshape(-1)
    digest, largest = xxhash.xxh3_64(), 0.0
    for start in range(0, flat.size, _BLOCK):
        block = flat[start : start + _BLOCK]
        digest.update(block.view(np.uint8).data)
        if math.isfinite(largest):
            largest = _larger(largest, largest_value(block))
    return digest.digest(), largest


def check_finite(arrays: Arrays, where: str) -> None:
    """Refuse arrays that hold NaN or infinite values.

    Args:
        arrays: Tensors to check.
        where: Location for the error message.

    Raises:
        UpdateRefusedError: If any value is not finite; the message names the tensors.
    """
    refuse([name for name, array in arrays.items() if not is_finite(array)], where)


def check_weight(num_examples: float, where: str) -> None:
    """Refuse a number of examples that cannot be the weight of an update.

    Args:
        num_examples: Number of training examples behind the update.
        where: Location for the error message.

    Raises:
        UpdateRefusedError: If it is not a whole number of at least 1.
    """
    if num_examples < 1 or num_examples != int(num_examples):
        raise UpdateRefusedError(
            f"num_examples is {num_examples}; the weight of an update must be a whole number above zero",
            where=where,
            fix="check that the site's training set is not empty, or pass num_examples=",
        )


def refuse(bad: Sequence[str], where: str) -> None:
    """Raise UpdateRefusedError for tensors that are not finite; do nothing for an empty list.

    Args:
        bad: Names of tensors with NaN or infinite values.
        where: Location for the error message.

    Raises:
        UpdateRefusedError: If `bad` is not empty; the message names the first five.
    """
    if bad:
        names = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        raise UpdateRefusedError(
            f"NaN or infinite values in {names}",
            where=where,
            fix="lower the learning rate or clip gradients; if a tensor is infinite on purpose, exclude it from the "
            "exchange with keep_local",
        )


def is_finite(array: Array) -> bool:
    """Whether an array holds no NaN and no infinite value; always true for integers and booleans."""
    return math.isfinite(largest_value(array))


def largest_value(array: Array) -> float:
    """Find the largest absolute value in an array.

    Args:
        array: The array, of any shape and dtype. Of complex numbers, their parts count.

    Returns:
        The value; infinite or NaN if there is one that is. 0.0 for integers, booleans and empty arrays.
    """
    if not is_floating(array.dtype) or array.size == 0:
        return 0.0
    if array.dtype.kind == "c":
        return _larger(largest_value(array.real), largest_value(array.imag))
    flat, largest = array.reshape(-1), 0.0
    for start in range(0, flat.size, _BLOCK):
        block = flat[start : start + _BLOCK]
        if block.dtype.kind == "V" or block.dtype.itemsize < 4:
            block = block.astype(np.float32)
        # min and max propagate NaN and infinities, and need no temporary array
        largest = _larger(largest, max(float(block.max()), -float(block.min())))
        if not math.isfinite(largest):
            break
    return largest


def _larger(one: float, other: float) -> float:
    """The larger of two absolute values; NaN if one is."""
    return one if one >= other or math.isnan(one) else other
