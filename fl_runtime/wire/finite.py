"""What may enter an average: finite numbers, with a weight. The site checks before it sends; the server, too."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fl_runtime.errors import UpdateRefusedError
from fl_runtime.types import Array, Arrays, is_floating

_BLOCK = 2**17


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
