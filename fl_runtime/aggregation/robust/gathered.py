"""An aggregator for strategies that need all updates of a round at once, without copying them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np

from fl_runtime.aggregation.fedavg import accumulator_dtype, blocks
from fl_runtime.errors import UpdateRefusedError
from fl_runtime.types import Allocate, Array, Arrays, Update, is_floating

Combine: TypeAlias = Callable[[Array, Array, Sequence[int]], Array]
"""combine(values, base, senders) -> the next values of a block.

values: [updates, elements], writable, in float32 or wider. base: [elements], the global model, in the same dtype.
senders: [updates], the index of the update that each row comes from. A complex number is two elements.
"""


class Gathered:
    """Collects the updates of a round and combines them block by block.

    The updates lie in files of the server, so only one block of each is in memory. Integer and boolean tensors become
    the lower median of the sites' values.

    Args:
        base: The global model of the round.
        allocate: Makes the arrays of the next global model.
        plan: Called once with all updates and the base; returns the function that combines blocks of float tensors.
    """

    def __init__(self, base: Arrays, allocate: Allocate, plan: Callable[[Sequence[Update], Arrays], Combine]) -> None:
        self._base, self._allocate, self._plan = base, allocate, plan
        self._updates: list[Update] = []

    def add(self, update: Update) -> None:
        """Take one update; its arrays must stay valid until `result` has returned."""
        if update.content != "weights":
            raise UpdateRefusedError(
                f"this strategy takes weights, but this update holds {update.content}", where=f"site {update.site}"
            )
        self._updates.append(update)

    def result(self) -> tuple[Arrays, Arrays]:
        """Combine the updates and return (arrays, extras); there are no extras."""
        combine = self._plan(self._updates, self._base)
        out, extras = self._allocate(self._base, {})
        for name, base, senders, values in tensors(self._updates, self._base):
            target = _flat(out[name])
            if not values:
                target[...] = base
            for block in blocks(base.size) if values else ():
                stack = stacked(values, block, base.dtype)
                if is_floating(base.dtype):
                    target[block] = combine(stack, base[block].astype(stack.dtype), senders)
                else:
                    target[block] = np.sort(stack, axis=0)[(len(stack) - 1) // 2]
        return out, extras


def tensors(updates: Sequence[Update], base: Arrays) -> Iterator[tuple[str, Array, list[int], list[Array]]]:
    """Yield the values of every tensor.

    Args:
        updates: The updates.
        base: The global model.

    Yields:
        Name, base, indices of the updates that hold the tensor, and their values; flat views, complex as pairs.
    """
    for name, array in base.items():
        senders = [i for i, update in enumerate(updates) if name in update.arrays]
        yield name, _flat(array), senders, [_flat(updates[i].arrays[name]) for i in senders]


def stacked(values: Sequence[Array], block: slice, dtype: np.dtype[Any]) -> Array:
    """Stack one block of every update: [updates, elements], in float32 or wider."""
    return np.stack([value[block] for value in values]).astype(accumulator_dtype(dtype), copy=False)


def _flat(array: Array) -> Array:
    """Return a flat view, with complex numbers as pairs of their parts."""
    flat = array.reshape(-1)
    return flat.view(flat.real.dtype) if flat.dtype.kind == "c" else flat
