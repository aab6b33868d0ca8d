"""One run: its state, its membership and its course, and the calls of sites, which these answer."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from fl_runtime.errors import FederationError, UpdateRefusedError
from fl_runtime.server.courses.base import Course, Offer, Status, Upload
from fl_runtime.server.courses.buffered import Buffered
from fl_runtime.server.courses.cross_site import CrossEvaluation
from fl_runtime.server.courses.final import FinalModel
from fl_runtime.server.courses.initial import InitialModel
from fl_runtime.server.courses.joining import Joining
from fl_runtime.server.courses.rounds import Rounds
from fl_runtime.server.courses.scoring import Scoring
from fl_runtime.server.courses.secure_sum.course import SecureSum
from fl_runtime.server.courses.swarm import Swarm
from fl_runtime.server.courses.synchronous import Synchronous
from fl_runtime.server.courses.virtual import Virtual, VirtualSites
from fl_runtime.server.membership import Membership
from fl_runtime.server.records.events import Emitter
from fl_runtime.server.records.model_files import ModelFiles
from fl_runtime.server.records.site_metrics import DiscreetEvents
from fl_runtime.server.recovery import SitesAhead, reading, restore_plan, restore_results
from fl_runtime.server.registration import Member
from fl_runtime.server.state import RunState
from fl_runtime.store.stores import Store
from fl_runtime.transport.waiting import Clock, SystemClock
from fl_runtime.types import Report, RunSettings, Strategy, TaskKind

log = logging.getLogger(__name__)


class Run:
    """One run of a job. Its methods take the lock themselves and may be called by any thread.

    `drive` is the thread of the run; the other methods answer the calls of sites. What depends on how the run proceeds
    is asked of the course.

    Attributes:
        state: Journal, files, models, phase and results, behind the run's lock.
        membership: The sites.
        scoring: Scores of the global models.
        files: The small files that go with the final model.
        course: How the run proceeds. It is `Joining` until the sites have agreed.
        ended: Set once the run is over, whether it is done, failed or halted.
    """

    def __init__(
        self,
        settings: RunSettings,
        folder: Path,
        events: Emitter,
        store: Store,
        strategy: Strategy | None = None,
        virtual: VirtualSites | None = None,
        clock: Clock | None = None,
    ) -> None:
        """Open the run's folder, or make it.

        Args:
            settings: The job's settings.
            folder: Folder of the run.
            events: Where to emit the run's events.
            store: Keeps the journal and the files of tensors.
            strategy: A strategy to use in place of the one that `settings`, or else the sites' terms, name.
            virtual: The sites, if they have no processes that call the server.
            clock: Measures absences and timeouts; None for this machine's.
        """
        self.state = state = RunState(settings, folder, events, store, strategy)
        self.membership = Membership(state, clock or SystemClock())
        state.events = DiscreetEvents(events, self.membership.quorum.shown)
        self.scoring = Scoring(state, self.membership)
        self._cross_site = CrossEvaluation(state, self.membership, self.scoring)
        self._initial = InitialModel(state, self.membership, folder.parent)
        self._final = FinalModel(state, self.membership, self.scoring)
        self.files = ModelFiles(state)
        self._virtual = virtual
        self._ahead = SitesAhead(state.journal)
        self.course: Course = self._choose_course()
        self.ended = threading.Event()

    def _choose_course(self) -> Course:
        """The course of this run. This is the only place that decides about the mode."""
        state, membership, scoring, initial = self.state, self.membership, self.scoring, self._initial
        strategy = state.plan.strategy
        if self._virtual is not None:
            return Virtual(state, membership, scoring, initial, self._virtual)
        if state.plan.rounds is None:
            return Joining(state, membership, self._cross_site, self._agreed)
        if strategy.buffer is not None:
            return Buffered(state, membership, scoring, initial, strategy.buffer)
        rounds = Rounds(state, membership, scoring)
        if state.settings.secure_sum:
            return SecureSum(state, membership, scoring, rounds, initial, self._cross_site)
        if strategy.relayed:
            return Swarm(state, membership, rounds, initial, self._cross_site)
        return Synchronous(state, membership, rounds, initial, self._cross_site)

    def _agreed(self) -> Course:
        """Go on with the course that the sites have agreed on. Called under the lock."""
        self.course = self._choose_course()
        return self.course

    def recover(self) -> None:
        """Set a fresh run to where its journal stands, after a server was killed. An empty journal changes nothing.

        Raises StoreError if the journal or a file does not hold what was written. Every byte is read again for that.
        """
        state = self.state
        with reading(state.journal):
            restore_plan(state, self.membership)
            unfinished = restore_results(state, self.scoring.scores)
            self.course = self._choose_course()
            needed = self.course.recover(unfinished) | self._cross_site.recover()
            self.files.recover()
        state.blobs.sweep(needed | state.models.blob_names() | self.files.blob_names())

    def drive(self) -> None:
        """Take the run from where it stands to its end. An error ends the run, and every waiting site gets it."""
        try:
            self.course.drive()
            self._final.conclude()
            self._cross_site.conclude()
            self._farewell()
            self._forget_updates()
        except FederationError as error:
            self.state.fail(error)
        except Exception as error:
            log.exception("the thread of the run failed")
            self.state.fail(
                FederationError(f"the server failed: {error!r}", fix="see the server's log; the run can be continued")
            )
        finally:
            self.ended.set()

    def _forget_updates(self) -> None:
        """Delete the files of the sites' updates, which nobody needs any more."""
        with self.state.lock:
            self.files.close()
            self.state.blobs.forget(self.state.models.blob_names() | self.files.blob_names())

    def rest(self) -> None:
        """Wait until no site that has left may begin another training: each has begun it, or its script has ended."""
        with (
            suppress(FederationError),
            self.state.lock,
        ):  # a run that failed, or whose server is closed, is not waited for
            members = self.membership.members.values()
            self.membership.wait_until(lambda: all(m.script != "resting" for m in members), threading.TIMEOUT_MAX)

    def _farewell(self) -> None:
        """Serve until every site has taken what it wants and left."""
        with self.state.lock:
            self.membership.wait_until(lambda: not self.membership.joined(), self.state.settings.deadline_s)

    # -- tasks -----------------------------------------------------------------------------------------------

    def wait_for_task(
        self,
        name: str,
        attempt: int,
        best: bool,
        beat_s: float,
        *,
        evaluate: bool = False,
        done: str = "",
        held: int | None = None,
    ) -> Iterator[Offer | None]:
        """Wait until there is a task for a site.

        Args:
            name: Name of the site.
            attempt: Number of its process.
            best: Ask for the best model in place of the final one.
            beat_s: How often to yield None meanwhile, in seconds.
            evaluate: Ask for another site's model to be scored.
            done: See `Course.offer`.
            held: Version of the last model to train that the process has received, or None.

        Yields:
            None every `beat_s` seconds of waiting, then one offer, whose model is leased.
        """
        state = self.state
        if best:
            with state.lock:
                self._final.expect_no_score(name)
        while True:
            with state.lock:
                member = self.membership.caller(name, attempt)
                member.held = held
                offer = self._offer(member, best, evaluate, done)
                if offer is None:
                    state.published.wait(beat_s)
                    offer = self._offer(self.membership.caller(name, attempt), best, evaluate, done)
            yield offer
            if offer is not None:
                return

    def _offer(self, member: Member, best: bool, evaluate: bool, done: str) -> Offer | None:
        if evaluate:
            return self._cross_site.offer(member)
        if not member.active:
            return None
        if self.state.phase == "training":
            return self.course.offer(member, done)
        return self._initial.offer(member.name) or self._final.offer(member, best)

    def task_sent(self, kind: TaskKind, round: int, name: str, nbytes: int) -> None:
        """Note that a task has been sent to a site, in messages of `nbytes` bytes."""
        with self.state.lock:
            self._ahead.task_sent(name, round)
            self.course.task_sent(name, round, nbytes)
            self.state.events.emit("task_sent", round, name, task=kind, bytes=nbytes)

    # -- updates and reports ---------------------------------------------------------------------------------

    def check_attempt(self, name: str, attempt: int) -> None:
        """Raise the run's error if it failed, or another one if this process of the site does not take part in it."""
        with self.state.lock:
            self.membership.caller(name, attempt, takes_part=True)

    def admit(self, name: str, attempt: int, round: int, stage: str, num_examples: int) -> Status | None:
        """Decide about an update before its bytes are sent.

        Returns:
            None if the bytes are wanted, or else what the update counts as without them.

        Raises:
            UpdateRefusedError: The update has no weight.
            ProtocolError: The update is for a round that has not been opened, or the site does not take part.
        """
        with self.state.lock:
            self.membership.caller(name, attempt, takes_part=True)
            if num_examples <= 0:
                raise UpdateRefusedError(
                    f"num_examples is {num_examples}; the weight of an update must be above zero",
                    where=f"{name}, round {round}",
                    fix="check that the site's training set is not empty, or pass num_examples=",
                )
            if round == 0 and self._initial.wanted_from(name):
                return None
            if self._ahead.lost(name, round):
                return "late"
            return self.course.admit(name, attempt, round, stage)

    def accept(self, upload: Upload) -> Status:
        """Count an update whose bytes have been verified. Its file is taken over, and freed if it does not count."""
        state, update = self.state, upload.update
        with state.lock:
            try:
                status = self.admit(update.site, update.attempt, update.round, update.stage, update.num_examples)
            except FederationError:
                state.blobs.free(upload.blob)
                raise
            if status is not None:
                state.blobs.free(upload.blob)
                return status
            if self._initial.wanted_from(update.site):
                self._initial.commit(upload.blob)
                return "used"
            return self.course.accept(upload)

    def score(self, report: Report, attempt: int) -> bool:
        """Take a site's report on a global model or, after the last round, on another site's model.

        Returns:
            Whether it is the site's first report on that model.
        """
        with self.state.lock:
            self.membership.caller(report.site, attempt, takes_part=True)
            newest, rounds = self.state.models.version, self.state.plan.rounds
            if self._ahead.lost_model(report.version, newest) and newest != rounds:
                return False
            first = report.site not in self.scoring.scores.reported(report.version)
            if self._cross_site.covers(report.version):
                self._cross_site.report(report)
            else:
                self.scoring.report(report)
            self.state.changed.notify_all()
            return first
