"""Exact restarts: what a site saves at each round boundary, and what it begins a round with after its process died.

A point is the site's state between two rounds: after the local work of one, before that work is sent. So whatever the
server has accepted, the point behind it is on disk. The point before it is kept as well: an update that was not
accepted is made again. Both are needed and no more, since the server is never further back.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fl_adapters.participant.state_file import State, read_state, write_state
from fl_runtime.types import Task

_SUFFIX = ".safetensors"


class RestartPoints:
    """The last two points of one site, in a folder of its own. Used by one thread."""

    def __init__(self, folder: Path, *, fresh: bool) -> None:
        """fresh: this is the site's first process in the run, so whatever lies in the folder is of another one."""
        self._folder = folder
        if fresh:
            for file in self._files():
                file.unlink(missing_ok=True)

    @property
    def empty(self) -> bool:
        """Whether no point has been saved yet."""
        return not self._files()

    def save(self, done: Task | None, state: State) -> int:
        """The state after the work for `done`; None: before the first round. Returns the file's bytes."""
        files = self._files()
        number = int(files[-1].name.removesuffix(_SUFFIX)) + 1 if files else 0
        behind = [done.round, done.stage] if done else None
        path = self._folder / f"{number:08d}{_SUFFIX}"
        older = files[:-1]
        size = write_state(path, [behind, state], recycled=older[0] if older else None)
        for file in older[1:]:
            file.unlink(missing_ok=True)
        return size

    def before(self, task: Task) -> State | None:
        """The state to begin `task` with; None: there is none. A point behind that task itself, whose update has not
        been accepted, is forgotten: the work is done again."""
        for file in reversed(self._files()):
            behind, state = read_state(file)
            if task.kind != "train" or behind != [task.round, task.stage]:
                return state
            file.unlink()
        return None

    def _files(self) -> list[Path]:
        """In the order in which they were saved."""
        found = self._folder.glob(f"*{_SUFFIX}") if self._folder.is_dir() else []
        return sorted(file for file in found if file.name.removesuffix(_SUFFIX).isdigit())


def round_seed(seed: int | None, site: str, task: Task) -> int:
    """What a site's round is seeded with, below 2**63: the same whenever it is done again. seed: the job's."""
    text = f"{seed or 0}/{site}/{task.round}/{task.stage}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


def seed_python(seed: int) -> None:
    """The global random states of Python and NumPy."""
    random.seed(seed)
    np.random.seed(seed % 2**32)


@dataclass(frozen=True)
class Keeping:
    """A Snapshot of two functions."""

    save: Callable[[], State]
    load: Callable[[State], None]
