"""Fewer bits per number."""

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
    """Numbers in 16, 8 or 4 bits. At `site_out` it is the difference to the global model that is sent this way, at
    `server_out` the model itself (the last one always travels whole). The other side decodes.

    to: "fp16" or "bf16" (rounded to nearest even; fp16 limits to +-65504), "int8" or "int4": of every `block`
    consecutive numbers, s = max|x| / L travels as float32 and each x as round(x / s), where L is 127 or 7; two
    4-bit numbers share a byte. Error of a number: at most s / 2. block: numbers, >= 8, default 256; with it int8
    takes 8.125 bits a number, int4 4.125. Integer tensors travel as they are.

    error_feedback (at `site_out`, default on): what the encoding lost is kept at the site and added to the next
    difference, so that nothing is lost for good, only late.

    Dettmers et al. 2022, "8-bit optimizers via block-wise quantization" (blocks); Seide et al. 2014, "1-bit
    stochastic gradient descent", and Karimireddy et al. 2019, "Error feedback fixes SignSGD" (error feedback).
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
            raise refuse("Quantize: block is a whole number and error_feedback true or false", "correct it")

    def layout(self, layout: Layout) -> Layout:
        found: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {}
        for name, (dtype, shape) in layout.items():
            if not is_real(dtype):
                found[name] = dtype, shape
            elif self.to in _HALVES:
                found[name] = _HALVES[self.to], shape
            else:
                size = int(np.prod(shape, dtype=np.int64))
                packed = self.to == "int4"
                found[name] = (np.dtype(np.uint8), ((size + 1) // 2,)) if packed else (np.dtype(np.int8), shape)
                found[name + _SCALE] = _FLOAT32, (-(-size // self.block),)
        return found

    def encode(self, arrays: Arrays) -> Arrays:
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
        return LazyArrays(layout, lambda name: self._decoded(name, arrays, *layout[name]))

    def _decoded(self, name: str, arrays: Arrays, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
        array = arrays[name]
        if not is_real(dtype):
            return array
        if self.to in _HALVES:
            return array.astype(dtype)
        scale = arrays[name + _SCALE]
        if scale.size and not (np.isfinite(scale).all() and scale.min() >= 0):
            raise UpdateRefusedError(f"the scales of tensor {name!r} are not finite numbers from zero up")
        size = int(np.prod(shape, dtype=np.int64))
        values = (_unpacked(array, size) if self.to == "int4" else array.reshape(-1)).astype(np.float32)
        whole = size - size % self.block
        with np.errstate(over="ignore"):  # what a site sends may overflow here: the server then refuses it
            values[:whole].reshape(-1, self.block)[...] *= scale[: whole // self.block, None]
            if whole < size:
                values[whole:] *= scale[-1]
        return values.astype(dtype, copy=False).reshape(shape)


def _coded(flat: Array, block: int, levels: int) -> tuple[Array, Array]:
    """(int8 codes, one float32 scale per block)."""
    codes = np.empty(flat.size, np.int8)
    scale = np.empty(-(-flat.size // block), np.float32)
    step = block * max(1, 2**16 // block)
    for start in range(0, flat.size, step):
        part = flat[start : start + step].astype(np.float32)
        padded = np.zeros(-(-part.size // block) * block, np.float32)
        padded[: part.size] = part
        rows = padded.reshape(-1, block)
        mine = np.max(np.abs(rows), axis=1) / np.float32(levels)
        scale[start // block : start // block + len(mine)] = mine
        with np.errstate(divide="ignore", invalid="ignore"):
            quotient = np.where(mine[:, None] > 0, rows / mine[:, None], np.float32(0))
        rounded = np.clip(np.rint(quotient), -levels, levels).astype(np.int8)
        codes[start : start + part.size] = rounded.reshape(-1)[: part.size]
    return codes, scale


def _packed(codes: Array) -> Array:
    """Two numbers from -7 to 7 a byte, the first in the low half, each plus 8."""
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
