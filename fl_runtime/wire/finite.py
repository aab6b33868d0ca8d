"""What may enter an average: finite numbers, with a weight. The site checks before it sends; the server, too."""

from __future__ import annotations

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
    """Tensors that have been gone through once: they hold no NaN and no infinite value, and these are their digests.

    It speaks of the very arrays that were given to `inspect`, while nobody writes to them.
    """

    tensors: Mapping[tuple[bool, str], tuple[Array, bytes]]

    def digest(self, array: Array, name: str, *, extra: bool) -> bytes | None:
        """xxh3-64 of its bytes; None for an array that has not been gone through."""
        seen, digest = self.tensors.get((extra, name), (None, None))
        return digest if seen is array else None

    def covers(self, arrays: Arrays, extras: Arrays) -> bool:
        """Whether it speaks of all of these."""
        return all(
            self.digest(array, name, extra=extra) is not None
            for extra, tensors in ((False, arrays), (True, extras))
            for name, array in tensors.items()
        )


def inspect(arrays: Arrays, extras: Arrays, where: str) -> Inspected:
    """Look for NaN and infinite values and make the digests, in one pass over the memory. UpdateRefusedError naming the
    tensors that hold such values."""
    found: dict[tuple[bool, str], tuple[Array, bytes]] = {}
    bad = []
    for extra, tensors in ((False, arrays), (True, extras)):
        for name, array in tensors.items():
            digest, finite = _gone_through(array, name)
            found[extra, name] = array, digest
            if not finite:
                bad.append(name)
    refuse(bad, where)
    return Inspected(found)


def _gone_through(array: Array, name: str) -> tuple[bytes, bool]:
    """The digest of its bytes as they travel, and whether it is finite. ConfigError for a dtype that cannot travel."""
    flat = np.ascontiguousarray(array, dtype_of(dtype_name(array.dtype, tensor=name))).reshape(-1)
    digest, finite = xxhash.xxh3_64(), True
    for start in range(0, flat.size, _BLOCK):
        block = flat[start : start + _BLOCK]
        digest.update(block.view(np.uint8).data)
        finite = finite and is_finite(block)
    return digest.digest(), finite


def check_finite(arrays: Arrays, where: str) -> None:
    """UpdateRefusedError naming the tensors that hold NaN or infinite values."""
    refuse([name for name, array in arrays.items() if not is_finite(array)], where)


def check_weight(num_examples: float, where: str) -> None:
    """UpdateRefusedError for a number of examples that cannot be the weight of an update."""
    if num_examples < 1 or num_examples != int(num_examples):
        raise UpdateRefusedError(
            f"num_examples is {num_examples}; the weight of an update must be a whole number above zero",
            where=where,
            fix="check that the site's training set is not empty, or pass num_examples=",
        )


def refuse(bad: Sequence[str], where: str) -> None:
    """UpdateRefusedError naming these tensors, if there are any."""
    if bad:
        shown = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        raise UpdateRefusedError(
            f"NaN or infinite values in {shown}",
            where=where,
            fix="lower the learning rate or clip gradients; keep tensors that are infinite on purpose at the site "
            "with keep_local",
        )


def is_finite(array: Array) -> bool:
    """Whether no element is NaN or infinite."""
    if not is_floating(array.dtype) or array.size == 0:
        return True
    if array.dtype.kind == "c":
        return is_finite(array.real) and is_finite(array.imag)
    flat = array.reshape(-1)
    for start in range(0, flat.size, _BLOCK):
        block = flat[start : start + _BLOCK]
        if block.dtype.kind == "V" or block.dtype.itemsize < 4:
            block = block.astype(np.float32)
        # min and max carry NaN and infinities along, and need no array of booleans
        if not (np.isfinite(block.max()) and np.isfinite(block.min())):
            return False
    return True
