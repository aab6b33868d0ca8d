"""The filter `Quantize`: send numbers in 16, 8 or 4 bits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import ml_dtypes
import numpy as np

from fl_runtime.errors import UpdateRefusedError
from fl_runtime.filters.base import (
    AUX,
    FilterSettings,
    Layout,
    LazyArrays,
    Point,
    check_number,
    is_real,
    largest,
    refuse,
)
from fl_runtime.types import Array, Arrays

_HALVES: dict[str, np.dtype[Any]] = {"fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
_LEVELS = {"int8": 127, "int4": 7}
_SCALE = f"{AUX}scale"
_FLOAT32 = np.dtype(np.float32)


@dataclass(frozen=True)
class Quantize(FilterSettings):
    """Encodes numbers in 16, 8 or 4 bits; the receiver decodes them.

    At `site_out` (default) the differences to the global model are encoded. At `server_out` it is the difference of the
    global model to what the sites hold, which is the last one as they decoded it (fl_runtime/server/broadcast.py). The
    server keeps its exact model and applies the sites' changes to it. The first and the final model travel whole, as
    does the model of a site that does not hold the last one. Integer tensors travel as they are.

    "fp16" and "bf16" round to nearest, ties to even; fp16 limits values to +-65504. "int8" and "int4" work on blocks of
    consecutive numbers x: s = max|x| / L travels as float32, and each x as round(x / s), with L = 127 or 7. The error
    of a number is at most s / 2. With the default block a number takes 8.125 or 4.125 bits. Encoding: tensor `w`
    becomes `w` (int8, or uint8 with two 4-bit numbers per byte) and `w|scale` (float32, one per block).

    Sources: Dettmers et al. 2022, "8-bit optimizers via block-wise quantization" (blocks); Seide et al. 2014, "1-bit
    stochastic gradient descent", and Karimireddy et al. 2019, "Error feedback fixes SignSGD" (error feedback).

    Attributes:
        to: "fp16", "bf16", "int8" or "int4".
        block: Numbers per block for "int8" and "int4", from 8 to 2^20.
        error_feedback: At `site_out`: whether the error of the encoding is added to the site's next update. At
            `server_out` it always is part of the next difference.

    Raises:
        ConfigError: If an argument is out of range.
    """

    points: ClassVar[tuple[Point, ...]] = ("site_out", "server_out")
    to: Literal["fp16", "bf16", "int8", "int4"] = "int8"
    block: int = 256
    error_feedback: bool = True

    def __post_init__(self) -> None:
        if self.to not in (*_HALVES, *_LEVELS):
            raise refuse(f"Quantize: to is {self.to!r}", 'give one of "fp16", "bf16", "int8", "int4"')
        check_number(self, "block", self.block, least=8, most=2**20)
        if not isinstance(self.block, int) or not isinstance(self.error_feedback, bool):
            raise refuse(
                f"Quantize: block is {self.block!r} and error_feedback is {self.error_feedback!r}",
                "give a whole number for block, and true or false for error_feedback",
            )

    def layout(self, layout: Layout) -> Layout:
        """Return the layout of encoded arrays, see `EncodingFilter.layout`."""
        encoded: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {}
        for name, (dtype, shape) in layout.items():
            if not is_real(dtype):
                encoded[name] = dtype, shape
            elif self.to in _HALVES:
                encoded[name] = _HALVES[self.to], shape
            else:
                size = int(np.prod(shape, dtype=np.int64))
                packed = self.to == "int4"
                encoded[name] = (np.dtype(np.uint8), ((size + 1) // 2,)) if packed else (np.dtype(np.int8), shape)
                encoded[name + _SCALE] = _FLOAT32, (-(-size // self.block),)
        return encoded

    def encode(self, arrays: Arrays) -> Arrays:
        """Quantise arrays, see `EncodingFilter.encode`."""
        return dict(self._encoded(arrays))

    def _encoded(self, arrays: Arrays) -> Iterator[tuple[str, Array]]:
        for name, array in arrays.items():
            if not is_real(array.dtype):
                yield name, array
            elif self.to in _HALVES:
                half = _HALVES[self.to]
                limit = largest(half)
                yield name, np.clip(array, -limit, limit).astype(half)
            else:
                codes, scale = _coded(array.reshape(-1), self.block, _LEVELS[self.to])
                yield name, _packed(codes) if self.to == "int4" else codes.reshape(array.shape)
                yield name + _SCALE, scale

    def decode(self, arrays: Arrays, layout: Layout) -> Arrays:
        """Reverse the quantisation, see `EncodingFilter.decode`."""
        return LazyArrays(layout, lambda name: self._decoded(name, arrays, *layout[name]))

    def _decoded(self, name: str, arrays: Arrays, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
        array = arrays[name]
        if not is_real(dtype):
            return array
        if self.to in _HALVES:
            return array.astype(dtype)
        scale = arrays[name + _SCALE]
        if scale.size and not (np.isfinite(scale).all() and scale.min() >= 0):
            raise UpdateRefusedError(f"the scales of tensor {name!r} are not finite numbers of at least 0")
        size = int(np.prod(shape, dtype=np.int64))
        values = (_unpacked(array, size) if self.to == "int4" else array.reshape(-1)).astype(np.float32)
        full = size - size % self.block
        with np.errstate(over="ignore"):  # if a site's numbers overflow here, the server refuses the update
            values[:full].reshape(-1, self.block)[...] *= scale[: full // self.block, None]
            if full < size:
                values[full:] *= scale[-1]
        return values.astype(dtype, copy=False).reshape(shape)


def _coded(flat: Array, block: int, levels: int) -> tuple[Array, Array]:
    """Return int8 codes, and one float32 scale per block."""
    codes = np.empty(flat.size, np.int8)
    scale = np.empty(-(-flat.size // block), np.float32)
    step = block * max(1, 2**16 // block)
    for start in range(0, flat.size, step):
        part = flat[start : start + step].astype(np.float32)
        padded = np.zeros(-(-part.size // block) * block, np.float32)
        padded[: part.size] = part
        rows = padded.reshape(-1, block)
        steps = np.max(np.abs(rows), axis=1) / np.float32(levels)
        scale[start // block : start // block + len(steps)] = steps
        with np.errstate(divide="ignore", invalid="ignore"):
            quotient = np.where(steps[:, None] > 0, rows / steps[:, None], np.float32(0))
        rounded = np.clip(np.rint(quotient), -levels, levels).astype(np.int8)
        codes[start : start + part.size] = rounded.reshape(-1)[: part.size]
    return codes, scale


def _packed(codes: Array) -> Array:
    """Pack numbers from -7 to 7, each plus 8, two to a byte, the first in the low half."""
    halves = (codes + 8).astype(np.uint8)
    if len(halves) % 2:
        halves = np.append(halves, np.uint8(8))
    packed: Array = halves[0::2] | halves[1::2] << 4
    return packed


def _unpacked(packed: Array, size: int) -> Array:
    halves = np.empty(2 * len(packed), np.int8)
    halves[0::2] = (packed & 15).astype(np.int8) - 8
    halves[1::2] = (packed >> 4).astype(np.int8) - 8
    return halves[:size]
