"""The site daemon `fl-adapters site`: runs every job that includes its site, as the site's policy allows."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from fl_adapters.cli.live import live_runs
from fl_adapters.cli.log_lines import STDERR, LogOptions, say, written_lines
from fl_adapters.cli.monitoring.page import MonitoringPages
from fl_adapters.cli.site.activity import Activity
from fl_adapters.cli.site.assignment import Assignment
from fl_adapters.cli.site.command import CommandError, command_for, command_kit, data_for, quoted
from fl_adapters.cli.site.feed import JobFeed, LogLine, Refusal
from fl_adapters.cli.site.jobs import RESTARTS, SiteJob, end_reason, is_over
from fl_adapters.cli.site.leftovers import end_leftovers
from fl_adapters.cli.site.own_progress import SiteScreen
from fl_adapters.cli.site.records import JobFolder, JobState, check_state
from fl_adapters.cli.site.resources import Capacity
from fl_adapters.environments.processes import SiteProcesses, describe_status, free_ports, orphans, site_environment
from fl_adapters.extras import needs_metrics_extra
from fl_adapters.participant.departure import ScriptNote
from fl_adapters.participant.kit import KIT_VARIABLE, Kit
from fl_adapters.participant.kit import read_kit as read_script_kit
from fl_adapters.participant.policy_gate import KitPolicyGate, LeaveReason
from fl_runtime.client.control import ControlClient
from fl_runtime.client.local_training import TrainingNote
from fl_runtime.client.roots import RenewingTransport
from fl_runtime.errors import FederationError, PermissionDeniedError, StoreError
from fl_runtime.store.lock import FolderLock, lock_owner
from fl_runtime.trust.audit import AuditLog
from fl_runtime.trust.kits import read_kit

_LOOK_S = 0.2
_LOOK_AT_LOGS_S = 1.0
_UNANSWERED_S = 20.0  # so long the server may take to say whether a job still runs
_MOST_JOBS = 100  # that have not ended; the server could name any number
_SETTLED_S = 5.0  # for so long after its end a job is not taken again: the server may not have heard of the end yet


@dataclass(frozen=True)
class DaemonOptions:
    """Options of the command.

    Attributes:
        kit: Folder of the site's startup kit.
        state: Folder for jobs, logs and decisions.
        restarts: Number of times that a script that has died is started again.
        grace_s: Seconds that scripts have to save when the daemon is stopped.
        log: Where the daemon's own lines go.
        metrics: Address of the pages `/healthz` and `/metrics`; "" for none.
    """

    kit: Path
    state: Path
    restarts: int = RESTARTS
    grace_s: float = 30.0
    log: LogOptions = STDERR
    metrics: str = ""


class SiteDaemon:
    """Runs the jobs of a site until it is stopped. Used by one thread, beside that of its `JobFeed`.

    Attributes:
        activity: What it has done so far.
    """

    def __init__(
        self,
        options: DaemonOptions,
        kit: Kit,
        audit: AuditLog,
        processes: SiteProcesses,
        feed: JobFeed,
        wake: threading.Event,
        screen: SiteScreen,
    ) -> None:
        """Prepare the daemon.

        Args:
            options: Options of the command.
            kit: The site's startup kit.
            audit: The site's audit log.
            processes: Starts and watches the scripts, by the names of their jobs.
            feed: The connection to the server.
            wake: Is set when the feed has news.
            screen: Shows the jobs that run.
        """
        self._options, self._kit, self._processes, self._feed, self._wake = options, kit, processes, feed, wake
        self._audit, self._gate = audit, KitPolicyGate(options.kit, options.state / "jobs", audit)
        self._jobs: dict[str, SiteJob] = {}
        self._settled: dict[str, float] = {}
        self._logs_seen, self._screen = 0.0, screen
        self.activity = Activity()

    @property
    def jobs(self) -> tuple[SiteJob, ...]:
        """The jobs that have not ended."""
        return tuple(self._jobs.values())

    def run(self, stop: threading.Event) -> None:
        """Work until `stop` is set. Scripts then have `grace_s` seconds to save; their jobs go on at the next start.

        Args:
            stop: Ends the work.
        """
        while not stop.is_set():
            self._wake.clear()
            self._hear()
            for job in self.jobs:
                self._advance(job)
            for name, status in self._processes.ended():
                self._ended(self._jobs[name], status)
            self._rotate_logs()
            now = time.monotonic()
            self._settled = {name: at for name, at in self._settled.items() if now - at < _SETTLED_S}
            capacity = self._capacity()
            self.activity.look(self.jobs, capacity.slots)
            self._feed.update([*self._jobs, *self._settled], capacity.told())
            self._wake.wait(_LOOK_S)
        if self._processes.running:
            say(f"stopping: {', '.join(self._processes.running)} may save for {self._options.grace_s:g} s")
        self._processes.stop(self._options.grace_s)

    # -- what the server says ----------------------------------------------------------------------------------

    def _hear(self) -> None:
        while self._feed.arrived:
            job = self._feed.arrived.popleft()
            if job.job in self._jobs or job.job in self._settled:
                continue
            if len(self._jobs) >= _MOST_JOBS:
                say(f"not taken, since {_MOST_JOBS} jobs have not ended here", job.job)
                continue
            self._take(job)
        while self._feed.heard:
            self._settle(self._feed.heard.popleft())

    def _take(self, assignment: Assignment) -> None:
        """Check a new job against the policy. A refusal is told to the server at once."""
        name = assignment.job
        folder = JobFolder(self._options.state / "jobs" / name)
        say(f"job of {assignment.submitter} for the app {assignment.app}", name)
        job = SiteJob(assignment, folder, self._gate)
        self._jobs[name] = job
        try:
            job.gate = KitPolicyGate(self._options.kit, self._options.state / "jobs", self._audit)
            job.gate.check_job(assignment.settings)
            job.command = command_for(job.gate, assignment.app)
            job.data = data_for(job.gate, assignment.app)
            if lacks := Capacity.of(job.gate.policy.resources).lacks(assignment.needs):
                self._refuse(job, LeaveReason.own(lacks))
                return
            if job.gate.decision_on(assignment.settings) is None:
                job.phase = "waits for approval"
                say(f"waits until somebody says: fl-adapters site approve {name}{self._where()}", name)
                self._share(job, "the job waits for approval at the site")
            self._record(job, "waits for approval" if job.phase == "waits for approval" else "waits for room")
        except CommandError as error:
            self._refuse(job, error.reason, str(error))
        except PermissionDeniedError as error:
            self._refuse(job, LeaveReason.of(error), str(error))
        except StoreError as error:
            self._refuse(job, LeaveReason(error.what, "it cannot write its own files", error), str(error))
        except FederationError as error:
            self._refuse(job, LeaveReason(error.what, "its policy cannot be applied to this job", error), str(error))

    def _where(self) -> str:
        """Options that the person who approves must give too."""
        state = "" if self._options.state == self._options.kit else f" --state {self._options.state}"
        return f" --kit {self._options.kit}{state}"

    def _settle(self, name: str) -> None:
        job = self._jobs.pop(name, None)
        if job is not None:
            job.free()
            self._settled[name] = time.monotonic()

    # -- a job moves on ----------------------------------------------------------------------------------------

    def _advance(self, job: SiteJob) -> None:
        if job.phase not in ("running", "leaving") and self._is_over_there(job):
            self._end(job, "ended", "the job has ended at the server")
            say("has ended at the server", job.name)
            self._settle(job.name)
            return
        if job.phase == "waits for approval":
            self._look_for_decision(job)
        if job.phase == "waits for room":
            self._find_room(job)
        if job.phase == "pausing" and self._may_resume(job) and self._start(job):
            self.activity.restarts += 1

    def _is_over_there(self, job: SiteJob) -> bool:
        """Whether the server, asked since the job's last change here, does not run it any more."""
        seen = self._feed.seen
        return seen is not None and seen[0] >= job.since and job.name not in seen[1]

    def _may_resume(self, job: SiteJob) -> bool:
        """Whether a pause is over, and the server says that the job still runs, or does not answer."""
        seen, waited_s = self._feed.seen, time.monotonic() - job.resumes_at
        if seen is not None and seen[0] >= job.since:
            return waited_s >= 0 and job.name in seen[1]
        return waited_s > _UNANSWERED_S

    def _look_for_decision(self, job: SiteJob) -> None:
        try:
            decision = job.gate.decision_on(job.assignment.settings)
        except FederationError as error:
            self._refuse(job, LeaveReason(error.what, "its decision about the job cannot be read", error), str(error))
            return
        if decision is not None and decision.approved:
            say("approved", job.name)
            self._share(job, "somebody at the site has approved the job")
            job.phase, job.since = "waits for room", time.monotonic()
            job.resumes_at = job.since
            self._feed.look()
        elif decision is not None:
            said = f": {decision.reason}" if decision.reason else ""
            self._refuse(job, LeaveReason.own(f"somebody at the site has refused the job{said}"))

    def _find_room(self, job: SiteJob) -> None:
        """Start a job's command if there is a place for it."""
        taken = [other.place for other in self._jobs.values() if other.place is not None]
        place = self._capacity().place(job.assignment.needs, taken)
        occupied = None if place is None else job.gate.free_slot()  # `fl-adapters run` may occupy places too
        if place is None or occupied is None or not self._may_resume(job):
            return
        job.place, job.occupied = place, occupied
        if self._start(job):
            self._record(job, "running")
            say(f"runs {quoted(job.command)}, output in {job.folder.log}", job.name)
            self._share(job, "its command runs")

    def _start(self, job: SiteJob) -> bool:
        """Start a job's command in its place. If that is not possible, the site takes no part."""
        assert job.place is not None
        slots, folder = self._capacity().slots, job.folder
        try:
            folder.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            own = command_kit(self._kit, job.assignment, folder.path, data=job.data, supervised=True)
            kit = own.save(folder.kit)
            ScriptNote.renew(folder.kit)
            self.activity.begin_job(job.name, folder.note)
            environment = site_environment(kit, slots, free_ports(1)[0], job.place.visible_devices)
            self._processes.start(job.name, job.command, environment, folder.log)
        except OSError as error:
            reason = f"{job.command[0]} cannot be started: {error.strerror}"
            self._refuse(job, LeaveReason(reason, "its command cannot be started"))
            return False
        job.begin()
        self._audit_line("command started", job=job.name, command=list(job.command))
        return True

    def _ended(self, job: SiteJob, status: int) -> None:
        """Settle a job whose script has ended, or start it again."""
        note = job.folder.note
        self.activity.count_bytes(job.name, note)
        self._audit_line("command ended", job=job.name, status=status)
        if is_over(status, note):
            assert note is not None
            left = note.state == "left"
            self._end(job, "left" if left else "finished", note.reason)
            say(f"has left: {note.reason}" if left else "finished", job.name)
            self._share(job, "its command has left the job" if left else "its command has finished")
            self._settle(job.name)
            return
        if status == 0:
            self._leave(job, status)
            return
        pause_s = job.pause_s()
        if job.deaths > self._options.restarts:
            self._leave(job, status)
            return
        self._feed.look()
        told = (
            f"its command ended ({describe_status(status)}); started again in {pause_s:g} s, "
            f"{job.deaths} of {self._options.restarts} times"
        )
        say(f"{told}; see {job.folder.log}", job.name, warning=True)
        self._share(job, told, "warning")

    def _leave(self, job: SiteJob, status: int) -> None:
        reason = end_reason(status, job.folder.note, job.deaths)
        self._give_up(job, reason, "left")

    def _refuse(self, job: SiteJob, reason: LeaveReason, shown: str = "") -> None:
        if isinstance(reason.error, FederationError):
            _record_refusal(job.gate, reason.error, 1)
        self._audit_line("job refused", job=job.name, reason=reason.text)
        self._give_up(job, reason, "refused", shown)

    def _give_up(self, job: SiteJob, reason: LeaveReason, state: JobState, shown: str = "") -> None:
        """Tell the server that the site takes no part in a job, or no longer."""
        job.phase = "leaving"
        job.free()
        say(f"{state}: {shown or reason.text}", job.name)
        visible = reason.public
        with suppress(FederationError):  # without its audit log or policy, the site says no more than is public
            visible = job.gate.record_leaving(reason, early=True)
        self._end(job, state, reason.text)
        self._feed.refuse(Refusal(job.name, visible, job.folder.note))

    # -- the site ----------------------------------------------------------------------------------------------

    def _capacity(self) -> Capacity:
        """What the site has for jobs, by its policy as it is now; as it was last if it cannot be read."""
        return Capacity.of(self._gate.policy.resources)

    def _record(self, job: SiteJob, state: JobState, reason: str = "") -> None:
        try:
            job.folder.write(job.assignment, state, reason)
        except (FederationError, OSError) as error:  # a full disk must not end the daemon
            say(f"cannot be recorded: {error}", job.name, warning=True)

    def _end(self, job: SiteJob, state: JobState, reason: str) -> None:
        """Record that a job is over at this site."""
        self.activity.end_job(job.name, state)
        self._record(job, state, reason)

    def _share(self, job: SiteJob, text: str, level: str = "info") -> None:
        """Show a line to those who follow a job, if the policy allows it. It may hold nothing of data or scripts."""
        if self._gate.policy.share_logs:
            self._feed.share(LogLine(job.name, text, level))

    def _audit_line(self, action: str, **facts: Any) -> None:
        try:
            self._gate.record(action, **facts)
        except FederationError as error:  # a full disk must not end the daemon
            say(f"the audit log cannot be written: {error}", warning=True)

    def _rotate_logs(self) -> None:
        if time.monotonic() - self._logs_seen < _LOOK_AT_LOGS_S:
            return
        self._logs_seen = time.monotonic()
        for name in self._processes.running:
            folder = self._jobs[name].folder
            folder.rotate_log()
            self.activity.count_bytes(name, folder.note)
        self._screen.show({name: TrainingNote.read(self._jobs[name].folder.kit) for name in self._processes.running})


def run_daemon(options: DaemonOptions) -> dict[str, str]:
    """Run the daemon until SIGTERM or Ctrl-C.

    Args:
        options: Options of the command.

    Returns:
        The jobs that have not ended, and where they stand. They go on at the next start.

    Raises:
        StoreError: Another daemon runs with this kit.
        NewerFormatError: A later version has written the jobs of the site.
        ConfigError: The kit or its policy cannot be used.
    """
    options = replace(options, kit=options.kit.resolve(), state=options.state.resolve())
    read_kit(options.kit, kind="site")
    check_state(options.state)
    kit, audit = read_script_kit(options.kit), AuditLog(options.kit, options.kit)
    gate = KitPolicyGate(options.kit, options.state / "jobs", audit)
    audit.ship_to(gate.policy.syslog)
    os.environ.pop(KIT_VARIABLE, None)
    with ExitStack() as things:
        name = gate.identity.name
        console = Console(stderr=True, markup=False, emoji=False)
        runs = things.enter_context(live_runs(console)) if options.log.style == "text" else None
        things.enter_context(written_lines(name, options.log, site=name))
        lock = _locked(options.kit)
        things.callback(lock.close)
        things.callback(audit.close)
        end_leftovers(options.state / "jobs")
        processes = SiteProcesses(lock.descriptors)
        things.callback(processes.close)
        wake, stop = threading.Event(), things.enter_context(_stopped_by_signals())
        control = ControlClient(RenewingTransport.of_kit(options.kit, kit.addresses))
        feed = JobFeed(control, gate.witness(), say, wake, partial(_record_refusal, gate))
        things.callback(feed.close)
        daemon = SiteDaemon(options, kit, audit, processes, feed, wake, SiteScreen(runs, feed, name))
        if options.metrics:
            things.enter_context(_pages(options, daemon, feed, audit))
        say(f"{gate.identity} waits for jobs of {gate.identity.federation} at {' or '.join(kit.addresses)}")
        gate.record("site daemon started", process=os.getpid())
        daemon.run(stop)
        gate.record("site daemon stopped", jobs=[job.name for job in daemon.jobs])
        return {job.name: job.phase for job in daemon.jobs}


def _record_refusal(gate: KitPolicyGate, error: FederationError, answers: int) -> None:
    """Record that the site cannot use an answer of the server, or several since the last line about that."""
    try:
        gate.refusals.record("assignment", error, answers=answers)
    except FederationError as full:  # a full disk must not end the daemon
        say(f"the audit log cannot be written: {full}", warning=True)


@contextmanager
def _pages(options: DaemonOptions, daemon: SiteDaemon, feed: JobFeed, audit: AuditLog) -> Iterator[None]:
    """Serve the pages of monitoring for the block."""
    with needs_metrics_extra():
        from fl_adapters.cli.monitoring.site_metrics import SiteMetrics
    page = SiteMetrics(options.kit, options.state, daemon.activity, feed.contact, audit)
    with closing(MonitoringPages(options.metrics, page.page, page.health.faults)) as pages:
        say(f"metrics at http://{pages.address}/metrics")
        yield


def _locked(kit: Path) -> FolderLock:
    """Lock the kit. The helper process of a daemon that was killed holds its lock until its scripts are gone."""
    busy = "another site daemon runs with this kit"
    deadline = time.monotonic() + 2 * orphans.GRACE_S
    again = False
    while True:
        try:
            return FolderLock(kit, busy)
        except StoreError:
            owner = lock_owner(kit)
            # the first attempt may have met a dashboard, which holds the lock while it asks whether a daemon does
            if again and (owner is None or _is_alive(owner) or time.monotonic() > deadline):
                raise
        again = True
        time.sleep(_LOOK_S)


def _is_alive(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


@contextmanager
def _stopped_by_signals() -> Iterator[threading.Event]:
    """Give an event that SIGTERM and Ctrl-C set. A second Ctrl-C does what it always does."""
    stop = threading.Event()

    def on_signal(number: int, frame: object) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
