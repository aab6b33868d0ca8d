"""One training of a job: its run, the service that answers its sites, and the thread that drives it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from fl_runtime.server.calls.service import FederationService
from fl_runtime.server.courses.virtual import VirtualSites
from fl_runtime.server.records.events import Emitter
from fl_runtime.server.records.results import RunResult
from fl_runtime.server.registration import Member
from fl_runtime.server.run import Run
from fl_runtime.store.stores import FolderStore, Store
from fl_runtime.store.tensorfile import sync, write_tensors
from fl_runtime.transport.waiting import Clock, SystemClock
from fl_runtime.types import RunSettings, Strategy

_LAST_STEP_S = 30.0  # the sum or the write to the disk that the run may be in when it is closed


@dataclass(frozen=True)
class TrainingOptions:
    """What all trainings of a job have in common, beside its settings.

    Attributes:
        share: True if all sites run on this machine; see `Server`.
        strategy: A strategy to use in place of the one that the settings name.
        virtual: The sites, if they have no processes that call the server.
        clock: Measures absences and timeouts.
        store: Keeps the journals and the tensors.
    """

    share: bool = False
    strategy: Strategy | None = None
    virtual: VirtualSites | None = None
    clock: Clock = field(default_factory=SystemClock)
    store: Store = field(default_factory=FolderStore)


class Training:
    """One training of a job, from the beginning or from where its journal stands.

    Attributes:
        number: Its number, from 1.
        folder: Its folder. The folder `server` in it holds the journal and the models.
        run: Its run.
        service: Answers the calls of its sites.
        successor: The next training of the job, or None. Set and read under the lock of `run`.
        released: Set once no site can begin another training from here: the run has ended, and every site's script has
            ended or gone on.
    """

    def __init__(
        self,
        settings: RunSettings,
        folder: Path,
        number: int,
        emitter: Emitter,
        options: TrainingOptions,
        *,
        visited: bool = False,
    ) -> None:
        """Open the training's folder, or make it, and recover the run if its journal holds one.

        Args:
            settings: The job's settings, with the name of this training.
            folder: Its folder.
            number: Its number, from 1.
            emitter: Takes its events.
            options: What all trainings have in common.
            visited: True if others follow it, and it is only opened for a restarted site or for its results.

        Raises:
            ConfigError: The folder holds a run with other settings.
            StoreError: The folder cannot be written, or is damaged.
        """
        self.number, self.folder, self._visited = number, folder, visited
        self.run = Run(
            settings,
            folder / "server",
            emitter,
            options.store,
            options.strategy,
            options.virtual,
            options.clock,
        )
        self.run.recover()
        self.over_before = self.run.state.journal.reader.over()
        self.run.membership.on_departure = self._departed
        self.service = FederationService(self.run, share=options.share)
        self.successor: Training | None = None
        self.released = threading.Event()
        self._thread = threading.Thread(target=self._drive, name=f"fl-rounds-{number}", daemon=True)
        self._on_end: Callable[[Training], None] = _ignore

    def begin(self, on_end: Callable[[Training], None]) -> None:
        """Drive the run in a thread of its own.

        Args:
            on_end: Called by that thread when the run has ended, before `released` is set.
        """
        self._on_end = on_end
        self._thread.start()

    def precede(self, successor: Training) -> None:
        """Let `successor` follow. It does not wait for sites whose scripts have ended with this training."""
        with self.run.state.lock:
            self.successor = successor
            for member in self.run.membership.members.values():
                if member.gone and member.script != "resting":
                    self._departed(member)

    def moved_on(self, site: str) -> None:
        """Note that a site has begun another training, so that this one does not wait for the end of its script."""
        with self.run.state.lock:
            member = self.run.membership.members.get(site)
            if member is not None:
                member.script = ""
            self.run.state.changed.notify_all()

    def result(self) -> RunResult:
        """The rounds so far, with the validation metrics that sites have reported.

        Returns:
            A snapshot; it does not change while the run goes on.
        """
        state, scores = self.run.state, self.run.scoring.scores
        with state.lock:
            rounds = tuple(replace(r, metrics=scores.of(r.round)) for r in state.results)
            return RunResult(
                rounds=rounds,
                best_round=state.models.best_version,
                error=state.error,
                bytes_up=sum(r.bytes_up for r in rounds),
                bytes_down=sum(r.bytes_down for r in rounds),
                no_best=self.run.scoring.no_best(),
                files=self.run.files.summary(),
            )

    def export(self, folder: Path, which: Literal["final", "best"]) -> Path | None:
        """Write a global model as `folder`/model.safetensors, or in the strategy's own format; see `Server.export`.

        The small files that sites have sent beside the model go with it.
        """
        state = self.run.state
        with state.lock:
            model = state.models.newest if which == "final" else state.models.best
            if model is None or state.plan.strategy.open_ended:  # the totals of a script are no model
                return None
            durable = state.settings.durability == "power"
            self.run.files.write(folder, model.blob.views()[0])
            native_file = state.plan.strategy.export(model.blob.views()[0])
            if native_file is not None:
                name, content = native_file
                folder.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(content)
                if durable:
                    sync(folder / name)
                    sync(folder)
                return folder / name
            path = folder / "model.safetensors"
            metadata = {"format": "pt", "job": state.settings.name, "round": str(model.version)}
            write_tensors(path, model.blob.views()[0], metadata, durable=durable)
            return path

    @property
    def idle(self) -> bool:
        """Whether the training has ended well, and no site is in it."""
        with self.run.state.lock:
            return self.released.is_set() and self.run.state.error is None and not self.run.membership.joined()

    def close(self) -> None:
        """Stop the run where its journal stands. Nothing touches its files any more when this returns."""
        self.run.state.halt()
        if self._thread.is_alive():
            self._thread.join(_LAST_STEP_S)

    def _drive(self) -> None:
        state = self.run.state
        self.run.drive()
        self._on_end(self)
        if not self._visited:
            if self.successor is None and self.number != state.settings.trainings:
                self.run.rest()
            with state.lock:
                if self.successor is None and state.phase == "done" and not state.blobs.closed:
                    state.journal.over()
        self.released.set()

    def _departed(self, member: Member) -> None:
        """Tell the next training that a site will not come to it. Called under the run's lock."""
        if self.successor is None:
            return
        membership = self.successor.run.membership
        if membership.members[member.name].attempt == 0:
            count = "1 training" if self.number == 1 else f"{self.number} trainings"
            reason = f"its script ended after {count}" if member.script == "ended" else member.gone
            membership.mark_gone(member.name, reason, early=member.script != "ended")


def _ignore(training: Training) -> None:
    """Stand in for `on_end` before the training begins."""
