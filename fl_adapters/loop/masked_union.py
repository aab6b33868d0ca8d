"""The union of the sites' texts out of masked sums, so that neither the server nor a site learns who has which text.

Every site puts its texts into a table of cells, and the tables are summed: an invertible Bloom lookup table (Goodrich
and Mitzenmacher 2011, https://arxiv.org/abs/1101.2245). A text is added to three cells, as a 1, a checksum, and its
bytes as numbers. In a cell of the total that has one distinct text, all numbers are those of the text, times the number
of sites that have it. So the text can be read there and taken out of its two other cells, and so on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fl_runtime.errors import ProtocolError
from fl_runtime.types import Array

Summing = Callable[[Mapping[str, Array]], Mapping[str, Array]]
"""Sums named arrays of whole numbers over all sites."""

_SIZES = tuple(8 * 2**power for power in range(10))
"""Bytes of a text and its end. A text is in the table of the smallest size that holds it."""
_END = b"\x01"
_PLACES = 3
"""Number of cells of a text."""
_CELLS_A_TEXT, _SPARE_CELLS = 1.5, 30
_CHECK_WORDS = 2
_NUMBERS_A_SUM = 2**21
_MOST_TRIES = 8
_COUNTS = "texts of a union, by length"


def masked_union(sum_over_sites: Summing, texts: Iterable[str]) -> list[str]:
    """Return the union of the sites' texts. All sites call it together.

    It takes two sums, and more if there are many texts. If the cells did not suffice, which all sites see in the same
    totals, a sum is made again with twice as many.

    Args:
        sum_over_sites: Sums arrays of whole numbers, float64, over all sites.
        texts: Texts of this site, of at most 1,000 characters.

    Returns:
        The distinct texts of all sites, sorted.

    Raises:
        ProtocolError: The totals hold no texts, since a site has added something else.
    """
    own: dict[int, list[bytes]] = {size: [] for size in _SIZES}
    for text in set(texts):
        data = text.encode() + _END
        own[next(size for size in _SIZES if len(data) <= size)].append(data)
    counts = np.array([len(own[size]) for size in _SIZES], float)
    totals = sum_over_sites({_COUNTS: counts})[_COUNTS]
    wanted = {size: round(count) for size, count in zip(_SIZES, totals, strict=True) if count}
    parts = math.ceil(sum(_cells(count) * _width(size) for size, count in wanted.items()) / _NUMBERS_A_SUM)
    found: set[bytes] = set()
    for part in range(parts):
        mine = {size: _of_part(own[size], size, part, parts) for size in wanted}
        found |= _part_of_union(sum_over_sites, mine, {size: -(-count // parts) for size, count in wanted.items()})
    return sorted(data.removesuffix(_END).decode() for data in found)


def _part_of_union(
    sum_over_sites: Summing, own: Mapping[int, Sequence[bytes]], wanted: Mapping[int, int]
) -> set[bytes]:
    """Return the union of texts of which there are about so many of each size, counted once a site."""
    for attempt in range(_MOST_TRIES):
        tables = {size: _Table.empty(size, _cells(count) << attempt, attempt) for size, count in wanted.items()}
        for size, table in tables.items():
            table.add(own[size])
        totals = sum_over_sites({f"texts of up to {size} bytes": table.cells for size, table in tables.items()})
        read = [table.read(totals[f"texts of up to {size} bytes"]) for size, table in tables.items()]
        if None not in read:
            return {data for texts in read for data in texts or ()}
    raise ProtocolError(
        f"the union of the sites' texts cannot be read after {_MOST_TRIES} sums",
        where="union",
        fix="use the same version of fl-adapters at every site; if they do, a site adds something else than texts",
    )


@dataclass(frozen=True)
class _Table:
    """The cells of the texts of one size.

    Attributes:
        cells: A row of whole numbers a cell, as float64, in three parts of the same length; a text has a cell in each.
        salt: What the places of texts depend on.
    """

    cells: Array
    salt: int

    @classmethod
    def empty(cls, size: int, cells: int, salt: int) -> _Table:
        return cls(np.zeros((cells - cells % _PLACES, _width(size))), salt)

    def add(self, texts: Sequence[bytes]) -> None:
        rows = _rows_of(_words_of(texts, self.cells.shape[1] - 1 - _CHECK_WORDS))
        for places in self._places(rows):
            np.add.at(self.cells, places, rows)

    def read(self, total: Array) -> list[bytes] | None:
        """Return the texts in a total of such tables; None if some cannot be read."""
        left = total.astype(np.int64)
        found: list[bytes] = []
        while True:
            counts, rows = self._single_texts(left)
            if not len(rows):
                return None if left.any() else found
            for places in self._places(rows):
                np.subtract.at(left, places, counts[:, np.newaxis] * rows)
            texts = [row.astype("<u4").tobytes().rstrip(b"\0") for row in rows[:, 1 + _CHECK_WORDS :]]
            if not all(map(_is_text, texts)):
                return None
            found += texts

    def _single_texts(self, left: Array) -> tuple[Array, Array]:
        """Return the texts that are alone in a cell, each once: how many sites have it, and its row."""
        places = np.flatnonzero(left[:, 0] > 0)
        counts = left[places, 0]
        rows, rest = np.divmod(left[places], counts[:, np.newaxis])
        alone = (rest == 0).all(axis=1) & (rows >= 0).all(axis=1) & (rows < 2**32).all(axis=1)
        places, counts, rows = places[alone], counts[alone], rows[alone]
        alone = (rows == _rows_of(rows[:, 1 + _CHECK_WORDS :])).all(axis=1) & (self._places(rows) == places).any(axis=0)
        counts, rows = counts[alone], rows[alone]
        _, first = np.unique(rows[:, 1] | rows[:, 2] << 32, return_index=True)
        return counts[first], rows[first]

    def _places(self, rows: Array) -> Array:
        """Return the cells of texts: an array of shape (3, texts)."""
        length = len(self.cells) // _PLACES
        words = rows[:, 1:]
        salts = [_PLACES * self.salt + part + 1 for part in range(_PLACES)]
        hashed = [part * length + _hashes(words, salt) % np.uint64(length) for part, salt in enumerate(salts)]
        return np.stack(hashed).astype(np.int64)


def _cells(texts: int) -> int:
    return math.ceil(_CELLS_A_TEXT * texts) + _SPARE_CELLS


def _width(size: int) -> int:
    return 1 + _CHECK_WORDS + size // 4


def _of_part(texts: Sequence[bytes], size: int, part: int, parts: int) -> list[bytes]:
    chosen = _hashes(_words_of(texts, size // 4), 0) % np.uint64(parts) == part
    return [text for text, mine in zip(texts, chosen, strict=True) if mine]


def _words_of(texts: Sequence[bytes], words: int) -> Array:
    """Return the bytes of texts as numbers below 2^32, a row a text."""
    data = b"".join(text.ljust(4 * words, b"\0") for text in texts)
    return np.frombuffer(data, "<u4").reshape(len(texts), words).astype(np.int64)


def _rows_of(words: Array) -> Array:
    """Return what texts add to their cells: a 1, a checksum of two numbers, and the texts as numbers."""
    check = _hashes(words, 0)
    head = [np.ones_like(check), check & np.uint64(2**32 - 1), check >> np.uint64(32)]
    return np.column_stack([*(column.astype(np.int64) for column in head), words])


def _hashes(words: Array, salt: int) -> Array:
    """Return a hash of 64 bits of each row, with the mixing step of SplitMix64."""
    state = np.full(len(words), salt, np.uint64)
    for column in words.T.astype(np.uint64):
        state = (state ^ column) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ state >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ state >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    return state


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return data.endswith(_END)
