"""Error feedback: what an encoding lost stays at the site and is added to the next difference.

It is kept on disk too, a file per round, so that a site that is killed goes on with what it had after the last
round that it answered. Only the death of the process is covered, as everywhere.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np

from fl_runtime.errors import StoreError
from fl_runtime.filters.base import FilterHost, is_real
from fl_runtime.types import Array, Arrays


class ErrorFeedback:
    """What one site's encodings have lost so far. Real tensors alone."""

    def __init__(self, host: FilterHost) -> None:
        self._folder = host.folder
        self._stem = f"feedback-{host.job}-"
        self._lost: dict[str, Array] = {}
        self._loaded = False

    def add_to(self, arrays: Arrays, round: int) -> None:
        """Add what was lost before to this round's differences, in place."""
        if not self._loaded:
            self._loaded = True
            self._load(arrays, round)
        for name, lost in self._lost.items():
            if name in arrays:  # a tensor that is held back now keeps what it lost
                np.add(arrays[name], lost, out=arrays[name])

    def remember(self, wanted: Arrays, sent: Arrays, round: int) -> None:
        """wanted: the differences, with what was lost before. sent: what the other side will decode."""
        for name, array in wanted.items():
            if is_real(array.dtype):
                if name not in self._lost:
                    self._lost[name] = np.empty(array.shape, array.dtype)
                np.subtract(array, sent[name], out=self._lost[name])
        self._save(round)

    def _save(self, round: int) -> None:
        if self._folder is None:
            return
        path = self._path(round)
        partial = path.with_suffix(".partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(partial, "wb") as file:
                file.write(_digest(self._lost))
                for lost in self._lost.values():
                    file.write(np.ascontiguousarray(lost).reshape(-1).view(np.uint8).data)
            os.replace(partial, path)
            for number, old in self._files():
                if number < round - 1:  # the round before may have to be done again
                    old.unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(
                f"what an encoding lost cannot be kept: {error.strerror or error}",
                where=str(path),
                fix="free disk space, or use error_feedback: false",
            ) from error

    def _load(self, like: Arrays, round: int) -> None:
        """The newest file of a round before this one, if it is of the same tensors."""
        files = [(number, path) for number, path in self._files() if number < round]
        if not files:
            return
        lost = {name: np.zeros(a.shape, a.dtype) for name, a in like.items() if is_real(a.dtype)}
        with open(max(files)[1], "rb") as file:
            if file.read(16) != _digest(lost):
                return
            for array in lost.values():
                if file.readinto(array.reshape(-1).view(np.uint8).data) != array.nbytes:
                    return
        self._lost = lost

    def _path(self, round: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{self._stem}{round}.bin"

    def _files(self) -> list[tuple[int, Path]]:
        if self._folder is None:
            return []
        return [
            (int(number), path)
            for path in self._folder.glob(f"{self._stem}*.bin")
            if (number := path.stem.removeprefix(self._stem)).isdigit()
        ]


def _digest(arrays: Arrays) -> bytes:
    text = json_like(arrays)
    return hashlib.sha256(text.encode()).digest()[:16]


def json_like(arrays: Arrays) -> str:
    return "\n".join(f"{name} {array.dtype} {array.shape}" for name, array in arrays.items())
