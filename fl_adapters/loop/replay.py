"""The results of a block's calls so far, kept at the site so that a script that is started again can get them anew."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fl_adapters.participant.state_file import read_state, write_state
from fl_runtime.aggregation.sums.call import Call, read_texts
from fl_runtime.aggregation.sums.strategy import CALL, SITES, TEXTS, VALUES
from fl_runtime.errors import ProtocolError
from fl_runtime.types import Array, Task

_MOST_BYTES = 2**30
"""Size of the results of one block from which on no more of them are kept. A script started again is refused then."""


@dataclass(frozen=True)
class Result:
    """The result of one call.

    Attributes:
        call: What the sites called.
        values: The total of a sum, float64, one dimension.
        texts: The union of texts.
        sites: Names of the sites whose values are in it.
    """

    call: Call
    values: Array
    texts: tuple[str, ...]
    sites: tuple[str, ...]


class Replay:
    """The results of one block, by the number of the call.

    A script that is started again after its process died makes its calls from the beginning. It gets the results of
    those that are over from here; a task brings the newest one. They are kept beyond the end of the block, since the
    script may die in a later one.
    """

    def __init__(self, folder: Path | None, site: str, *, fresh: bool = True) -> None:
        """Find the results that an earlier process has kept.

        Args:
            folder: Where they are kept; None if this site runs alone.
            site: Name of the site, for errors.
            fresh: Whether files in the folder belong to another run.
        """
        self._folder, self._site = folder, site
        self._number = self._bytes = 0
        self._newest: tuple[int, Result] | None = None
        if folder is not None and fresh:
            shutil.rmtree(folder, ignore_errors=True)

    def next_number(self) -> int:
        """Return the number of the next call, from 1."""
        self._number += 1
        return self._number

    def learn(self, task: Task) -> None:
        """Take and keep the result that a task brings.

        Args:
            task: The task. Its arrays are copied.

        Raises:
            ProtocolError: The server sends no such result.
        """
        if task.version < 1:
            return
        result = _result_of(task)
        self._newest = task.version, result
        if self._folder is not None and self._bytes < _MOST_BYTES and not self._file(task.version).exists():
            self._bytes += write_state(self._file(task.version), _to_state(task))

    def knows(self, number: int) -> bool:
        """Return whether the result of a call is there.

        Args:
            number: Number of the call.
        """
        if self._newest is not None and self._newest[0] == number:
            return True
        return self._folder is not None and self._file(number).exists()

    def result(self, number: int) -> Result:
        """Return the result of a call.

        Args:
            number: Number of the call; `knows(number)` is true.
        """
        if self._newest is not None and self._newest[0] == number:
            return self._newest[1]
        return _parsed(read_state(self._file(number)), self._site)

    def _file(self, number: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{number}.safetensors"


def _to_state(task: Task) -> dict[str, Any]:
    return {name: np.copy(array) for part in (task.arrays, task.extras) for name, array in part.items()}


def _result_of(task: Task) -> Result:
    return _parsed(_to_state(task), f"task of round {task.round}")


def _parsed(arrays: dict[str, Array], where: str) -> Result:
    """Read a result, which the server has sent."""
    try:
        call, values = Call.from_array(arrays[CALL]), arrays[VALUES]
        texts = read_texts(arrays[TEXTS]) if call.kind == "union" else []
        sites = read_texts(arrays[SITES])
        if values.shape != (call.size,) or values.dtype != np.float64 or not np.isfinite(values).all():
            raise ProtocolError("the total does not fit the call")
    except (KeyError, ProtocolError) as error:
        raise ProtocolError(
            f"the server sends a total that cannot be read: {error}",
            where=where,
            fix="use the same version of fl-adapters at the server and at every site",
        ) from None
    return Result(call, values, tuple(texts), tuple(sites))
