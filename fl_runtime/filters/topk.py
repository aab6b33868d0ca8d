"""Only the largest changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from fl_runtime.errors import UpdateRefusedError
from fl_runtime.filters.base import AUX, FilterSettings, Layout, LazyArrays, Point, check_number, is_real, refuse
from fl_runtime.types import Array, Arrays

_INDEX = f"{AUX}index"
_FLOAT32, _UINT32 = np.dtype(np.float32), np.dtype(np.uint32)


@dataclass(frozen=True)
class TopK(FilterSettings):
    """Of each tensor of n numbers, the k = max(1, ceil(ratio * n)) largest differences to the global model by size,
    as float32 with a 32-bit index each; the others count as zero.

    ratio: 0 < ratio <= 1, default 0.01 (a fiftieth of the bytes of float32). small: tensors of at most so many
    numbers travel whole, default 256. error_feedback (default on): what is not sent is kept at the site and added
    to the next difference. Integer tensors travel as they are. For still fewer bytes let Quantize follow.

    Aji and Heafield 2017, "Sparse communication for distributed gradient descent"; Stich et al. 2018, "Sparsified
    SGD with memory".
    """

    points: ClassVar[tuple[Point, ...]] = ("site_out",)
    ratio: float = 0.01
    small: int = 256
    error_feedback: bool = True

    def __post_init__(self) -> None:
        check_number(self, "ratio", self.ratio, above=0, most=1)
        check_number(self, "small", self.small, least=0)
        if not isinstance(self.error_feedback, bool):
            raise refuse(f"TopK: error_feedback is {self.error_feedback!r}", "give true or false")

    def layout(self, layout: Layout) -> Layout:
        found: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {}
        for name, (dtype, shape) in layout.items():
            kept = self._kept(name, dtype, shape)
            if kept is None:
                found[name] = dtype, shape
            else:
                found[name], found[name + _INDEX] = (_FLOAT32, (kept,)), (_UINT32, (kept,))
        return found

    def encode(self, arrays: Arrays) -> Arrays:
        found: dict[str, Array] = {}
        for name, array in arrays.items():
            kept = self._kept(name, array.dtype, array.shape)
            if kept is None:
                found[name] = array
            else:
                flat = array.reshape(-1)
                index = np.sort(np.argpartition(np.abs(flat), flat.size - kept)[flat.size - kept :])
                found[name], found[name + _INDEX] = flat[index].astype(np.float32), index.astype(np.uint32)
        return found

    def decode(self, arrays: Arrays, layout: Layout) -> Arrays:
        return LazyArrays(layout, lambda name: self._decoded(name, arrays, *layout[name]))

    def _decoded(self, name: str, arrays: Arrays, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
        if self._kept(name, dtype, shape) is None:
            return arrays[name]
        index = arrays[name + _INDEX]
        size = int(np.prod(shape, dtype=np.int64))
        if index[-1] >= size or (index[1:] <= index[:-1]).any():
            raise UpdateRefusedError(f"the indices of tensor {name!r} are not ascending within its {size} numbers")
        whole = np.zeros(size, dtype)
        whole[index] = arrays[name]
        return whole.reshape(shape)

    def _kept(self, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> int | None:
        """How many numbers of a tensor travel; None: all of it, as it is."""
        size = int(np.prod(shape, dtype=np.int64))
        if not is_real(dtype) or size <= max(self.small, 1):
            return None
        if size > 2**32:
            raise refuse(f"TopK: tensor {name!r} has {size} numbers, more than 32-bit indices tell apart", "split it")
        return min(size, max(1, int(np.ceil(self.ratio * size))))
