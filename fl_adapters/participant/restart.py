"""Exact restarts: a site saves its state at each round boundary and continues from there after its process died.

A restart point is the state between two rounds, saved after local training and before the update is sent. So for
every update that the server has accepted, the point after it is on disk. The point before it is needed as well, since
an update that was not accepted is made again. Older points are not needed: the server is never further back, unless
it was restored from a backup. A site whose points are all newer begins without one, and says so.

A trainer that saves checkpoints of its own within a round has a point there too. A process that dies in the round then
goes on from that point, and not from the round's beginning.
"""

from __future__ import annotations

import hashlib
import logging
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from fl_adapters.adapter import Snapshot
from fl_adapters.participant.options import Every
from fl_adapters.participant.state_file import State, read_state, write_state
from fl_runtime.errors import ConfigError, ProtocolError
from fl_runtime.trainings import training_name
from fl_runtime.types import Arrays, Task

log = logging.getLogger(__name__)

_SUFFIX = ".safetensors"
_WITHIN = "within-"


class RestartPoints:
    """The last two restart points of one site, as files in a folder. Used by one thread."""

    def __init__(self, folder: Path, *, fresh: bool) -> None:
        self._folder = folder
        if fresh:
            for file in (*self._files(), *self._within()):
                file.unlink(missing_ok=True)

    @property
    def empty(self) -> bool:
        """Whether there is no point yet."""
        return not self._files()

    def save(self, done: Task | None, state: State) -> int:
        """Save the state after the training for `done` (None: before round 1). Return the file's size in bytes."""
        files = self._files()
        number = int(files[-1].name.removesuffix(_SUFFIX)) + 1 if files else 0
        trained_task = [done.round, done.stage] if done else None
        path = self._folder / f"{number:08d}{_SUFFIX}"
        older = files[:-1]
        size = write_state(path, [trained_task, state], recycled=older[0] if older else None)
        for file in older[1:]:
            file.unlink(missing_ok=True)
        if done is not None:
            self._forget_within(keep=done)
        return size

    def save_within(self, task: Task, state: State) -> int:
        """Save the state in the middle of the training for `task`. Return the file's size in bytes."""
        path = self._within_path(task)
        size = write_state(path, state)
        self._forget_within(keep=task)
        return size

    def within(self, task: Task) -> State | None:
        """Return the state in the middle of the training for `task`, or None if none was saved."""
        path = self._within_path(task)
        if task.kind == "train" and path.exists():
            return read_state(path)
        for other in self._within():
            log.warning(
                "the restart point %s of this site is not used: the federation is in round %s",
                other.name.removesuffix(_SUFFIX),
                task.round,
            )
        return None

    def before(self, task: Task) -> State | None:
        """Return the state to begin `task` with, or None if there is none.

        A point after that task itself is deleted: its update was not accepted, so the training is repeated. So are
        points after later tasks, which a server that was restored from a backup has lost.
        """
        for file in reversed(self._files()):
            trained_task, state = read_state(file)
            later = trained_task is not None and trained_task[0] > task.round
            if task.kind != "train" or not (later or trained_task == [task.round, task.stage]):
                return state
            file.unlink()
        log.warning(
            "the restart points of this site are all newer than round %s of the server, which was restored from a "
            "backup. The site begins with the global weights alone, so the bits differ from those of one go",
            task.round,
        )
        return None

    def _forget_within(self, *, keep: Task) -> None:
        """Delete points within other rounds: a server that was restored may send such a round again, with other sites.

        The point within `keep` stays until the server has accepted that update.
        """
        for file in self._within():
            if file != self._within_path(keep):
                file.unlink(missing_ok=True)

    def _within(self) -> list[Path]:
        return [*self._folder.glob(f"{_WITHIN}*{_SUFFIX}")] if self._folder.is_dir() else []

    def _within_path(self, task: Task) -> Path:
        return self._folder / f"{_WITHIN}{task.round}-{task.stage}{_SUFFIX}"

    def _files(self) -> list[Path]:
        """Return the files of points in the order in which they were saved."""
        files = self._folder.glob(f"*{_SUFFIX}") if self._folder.is_dir() else []
        return sorted(file for file in files if file.name.removesuffix(_SUFFIX).isdigit())


@runtime_checkable
class SavesWithinRound(Protocol):
    """A snapshot of a trainer that may have points within a round.

    Attributes:
        restart_cost: What a restart repeats, as a clause for the user.
    """

    restart_cost: str


WHOLE_ROUND = "a restart repeats the round from its beginning"
"""What a restart costs where there are no points within a round."""

SINCE_CHECKPOINT = "a restart repeats the steps since the last checkpoint"
"""What a restart costs where a trainer saves checkpoints at moments that are not known before."""


def since_checkpoint(steps: float, option: str) -> str:
    """Say what a restart costs where a trainer saves checkpoints at regular steps.

    Args:
        steps: Optimizer steps between two checkpoints.
        option: What the user set for it, such as "save_steps".
    """
    return f"a restart repeats at most {steps:g} steps, those since the last checkpoint ({option})"


class SiteRestart:
    """What lets one site continue exactly after its process died, in jobs with `exact_restart`.

    Attributes:
        task: The task that arrived last; None before the first.
    """

    def __init__(self, folder: Path, *, fresh: bool) -> None:
        """Open the site's restart points.

        Args:
            folder: Folder of this site for restart points alone.
            fresh: Whether this is the site's first process in the run, so that points in the folder are deleted.
        """
        self._points, self._fresh = RestartPoints(folder, fresh=fresh), fresh
        self._snapshot: Snapshot | None = None
        self.task: Task | None = None

    def begin(self, snapshot: Snapshot | None, local_round: int) -> None:
        """Save the first point, in the first process of the site.

        Args:
            snapshot: Saves and loads the adapter's state. None saves nothing.
            local_round: Number of rounds that this site has trained.
        """
        self._snapshot = snapshot
        if snapshot is not None:
            cost = snapshot.restart_cost if isinstance(snapshot, SavesWithinRound) else WHOLE_ROUND
            print(f"fl-adapters: exact_restart: {cost}", file=sys.stderr)
        if self._points.empty:
            self.save(None, local_round, {})

    def save(self, done: Task | None, local_round: int, held_back: Arrays) -> None:
        """Save a point before an update is sent.

        Args:
            done: The task whose training is done; None before the first round.
            local_round: Number of rounds that this site has trained.
            held_back: Tensors that stay at the site and which its filters must remember.
        """
        if self._snapshot is not None:
            state = {"turn": local_round, "held_back": dict(held_back), "own": self._snapshot.save()}
            self._points.save(done, state)

    def save_within(self, own: State) -> None:
        """Save a point in the middle of the current round, at a checkpoint of the trainer.

        Args:
            own: The adapter's state, with the weights in training. Borrowed for the call.
        """
        if self.task is not None:
            self._points.save_within(self.task, own)

    def load(self, task: Task) -> tuple[int, Arrays] | None:
        """Load the point before `task`, or the one within it, into the adapter of a process that replaces another.

        Args:
            task: The task that this process begins with.

        Returns:
            The number of rounds that this site has trained, and the tensors that its filters must remember. None if
            there is nothing to load.
        """
        point = None if self._fresh or self._snapshot is None else self._points.before(task)
        if point is None or self._snapshot is None:
            return None
        if task.kind == "initial" and point["turn"]:
            raise ProtocolError(
                f"the server asks for this site's initial weights, but the site has trained {point['turn']} rounds",
                where=task.job,
                fix="ask the server's operator; if it was restored to before round 1, delete the restart points",
            )
        within = self._points.within(task)
        self._snapshot.load(point["own"] if within is None else within)
        return point["turn"], point["held_back"]


def round_seed(seed: int | None, site: str, task: Task, training: int = 1) -> int:
    """Return the seed of one site's round: the same whenever the round is repeated.

    Args:
        seed: The job's seed.
        site: Name of the site.
        task: The task of the round.
        training: Which training of the site's script the round belongs to.

    Returns:
        A number from 0 to 2**63 - 1.
    """
    text = f"{seed or 0}/{training_name(site, training)}/{task.round}/{task.stage}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


def part_seed(seed: int, *place: str | int) -> int:
    """Return the seed of one part of a round, such as one of its steps.

    Args:
        seed: Seed of the round.
        place: The kind of the part, and its numbers.

    Returns:
        A number from 0 to 2**63 - 1.
    """
    text = "/".join(map(str, (seed, *place)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


def not_restartable(reason: str, fix: str, *, where: str = "the trainer") -> ConfigError:
    """Make the error for a training that cannot be restarted exactly.

    Args:
        reason: Why not.
        fix: What to change in the script or in the job.
        where: What the reason is about, such as "fit".
    """
    return ConfigError(f"exact_restart is not possible here: {reason}", where=where, fix=fix)


def require_whole_epochs(every: Every, framework: str, *, where: str = "the trainer") -> None:
    """Refuse rounds that end within an epoch, for a framework that can begin an epoch's data only at its start.

    Args:
        every: The local budget of a round.
        framework: Name of the framework, for the message.
        where: The call that trains, for the message.

    Raises:
        ConfigError: If the budget is in steps.
    """
    if every.epochs is None:
        raise not_restartable(
            f"{framework} can begin an epoch's data only at its start, and with a budget in steps rounds end within "
            "epochs",
            'count the round in epochs: every="epoch"',
            where=where,
        )


def seed_python(seed: int) -> None:
    """Seed the global random states of Python and NumPy.

    Args:
        seed: Any number of at least 0; NumPy gets its lowest 32 bits.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)


@dataclass(frozen=True)
class FunctionSnapshot:
    """A `Snapshot` made of two functions.

    Attributes:
        save: Returns the state between two rounds.
        load: Restores a state that `save` returned in an earlier process.
    """

    save: Callable[[], State]
    load: Callable[[State], None]
