"""The filter `TopK`: send only the largest changes of each tensor."""

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
    """Sends the k = max(1, ceil(ratio n)) largest differences of each tensor of n numbers, compared by absolute value.

    Values travel as float32 with a 32-bit index each; the server takes the other differences as 0. Integer tensors
    travel whole. With the default ratio an update has about a fiftieth of its bytes in float32. `Quantize` may follow
    to reduce them further. Encoding: tensor `w` becomes `w` (float32, k) and `w|index` (uint32, k, ascending).

    Sources: Aji and Heafield 2017, "Sparse communication for distributed gradient descent"; Stich et al. 2018,
    "Sparsified SGD with memory".

    Attributes:
        ratio: Share of the differences to send, greater than 0 and at most 1.
        small: Tensors of at most this many numbers travel whole, at least 0.
        error_feedback: Whether differences that are not sent are added to the site's next update.

    Raises:
        ConfigError: If an argument is out of range.
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
        """Return the layout of encoded arrays, see `EncodingFilter.layout`."""
        encoded: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {}
        for name, (dtype, shape) in layout.items():
            count = self._sent_count(name, dtype, shape)
            if count is None:
                encoded[name] = dtype, shape
            else:
                encoded[name], encoded[name + _INDEX] = (_FLOAT32, (count,)), (_UINT32, (count,))
        return encoded

    def encode(self, arrays: Arrays) -> Arrays:
        """Select the largest differences, see `EncodingFilter.encode`."""
        encoded: dict[str, Array] = {}
        for name, array in arrays.items():
            count = self._sent_count(name, array.dtype, array.shape)
            if count is None:
                encoded[name] = array
            else:
                flat = array.reshape(-1)
                index = np.sort(np.argpartition(np.abs(flat), flat.size - count)[flat.size - count :])
                encoded[name], encoded[name + _INDEX] = flat[index].astype(np.float32), index.astype(np.uint32)
        return encoded

    def decode(self, arrays: Arrays, layout: Layout) -> Arrays:
        """Fill in zeros, see `EncodingFilter.decode`."""
        return LazyArrays(layout, lambda name: self._decoded(name, arrays, *layout[name]))

    def _decoded(self, name: str, arrays: Arrays, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
        if self._sent_count(name, dtype, shape) is None:
            return arrays[name]
        index = arrays[name + _INDEX]
        size = int(np.prod(shape, dtype=np.int64))
        if index[-1] >= size or (index[1:] <= index[:-1]).any():
            raise UpdateRefusedError(f"the indices of tensor {name!r} are not ascending numbers below {size}")
        dense = np.zeros(size, dtype)
        dense[index] = arrays[name]
        return dense.reshape(shape)

    def _sent_count(self, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> int | None:
        """Return how many numbers of a tensor travel, or None if it travels whole."""
        size = int(np.prod(shape, dtype=np.int64))
        if not is_real(dtype) or size <= max(self.small, 1):
            return None
        if size > 2**32:
            raise refuse(f"TopK: tensor {name!r} has {size} numbers, too many for 32-bit indices", "split the tensor")
        return min(size, max(1, int(np.ceil(self.ratio * size))))
