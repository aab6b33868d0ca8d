"""Progress of jobs as one of their sites knows it: its own rounds and steps, and the metrics over all sites."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from fl_adapters.cli.live import LiveRuns
from fl_adapters.cli.site.feed import JobFeed
from fl_adapters.environments.progress import RunView, metrics_text
from fl_adapters.participant.kit import Kit
from fl_runtime.client.control import ControlClient
from fl_runtime.client.local_training import TrainingNote
from fl_runtime.client.roots import RenewingTransport
from fl_runtime.errors import FederationError
from fl_runtime.text import is_metric_name
from fl_runtime.trainings import number_of
from fl_runtime.transport.waiting import duration_text
from fl_runtime.types import Event

_MOST_METRICS = 100
_LOOK_S = 1.0
_ASK_S = 30.0  # between two questions for the metrics over all sites; each is a line of the audit log


class OwnProgress:
    """Turns the notes of a job's script, and the server's status, into the view of a run with one site.

    Attributes:
        view: The state of the run.
    """

    def __init__(self, view: RunView, site: str) -> None:
        """Begin to follow a job.

        Args:
            view: The view to keep up to date.
            site: Name of the site.
        """
        self.view, self._site = view, site
        self._training, self._began = 0, time.monotonic()

    def take_note(self, note: TrainingNote | None) -> bool:
        """Take what the script has noted.

        Args:
            note: The note; None if there is none yet.

        Returns:
            Whether another round has begun.
        """
        if note is None:
            return False
        if number_of(note.job) != self._training:
            self._training = number_of(note.job)
            self._tell("started", rounds=note.rounds, sites=[self._site], training=self._training)
        changed = note.round > self.view.round
        now = time.monotonic()
        if changed:
            if self.view.round:
                self._tell("round_finished", self.view.round, metrics={}, seconds=now - self._began)
            self._began = now
            self._tell("round_started", note.round, sites=[self._site])
            self._tell("task_sent", note.round, bytes=0)
        site = self.view.sites[self._site]
        if note.round:
            site.state = "training" if note.trains else "waiting"
            if not note.trains and site.steps is not None:
                site.steps = site.of_steps or site.steps
        if note.done and note.trains:
            self._tell("steps", note.round, done=note.done, total=note.total or None, train_s=note.train_s)
        return changed

    def take_status(self, job: Mapping[str, Any]) -> None:
        """Take the metrics over all sites from the server's status of the job.

        Args:
            job: The job there. What cannot be read is passed over.
        """
        newest = job.get("newest")
        if not isinstance(newest, Mapping) or job.get("training", 1) != max(self._training, 1):
            return
        number, values = newest.get("round"), newest.get("metrics")
        if isinstance(number, int) and isinstance(values, Mapping):
            known = {n: float(v) for n, v in values.items() if is_metric_name(n) and isinstance(v, int | float)}
            self.view.metrics[number] = dict(list(known.items())[:_MOST_METRICS])

    def _tell(self, kind: str, round: int = 0, **data: Any) -> None:
        self.view(Event(kind, time.time(), round, self._site, data))


class SiteScreen:
    """Screen of the jobs that run at a site. Without a terminal it does nothing."""

    def __init__(self, runs: LiveRuns | None, feed: JobFeed, site: str) -> None:
        """Make the screen.

        Args:
            runs: Where the jobs are shown; None for nowhere.
            feed: Knows the metrics over all sites, and asks for them where they are shown.
            site: Name of the site.
        """
        self._runs, self._feed, self._site = runs, feed, site
        self._jobs: dict[str, OwnProgress] = {}
        self._asked_at = -_ASK_S

    def show(self, notes: Mapping[str, TrainingNote | None]) -> None:
        """Show where the jobs stand that run now.

        Args:
            notes: Name of each -> what its script has noted.
        """
        if self._runs is None:
            return
        for job in self._jobs.keys() - notes.keys():
            self._jobs.pop(job).view.ended = True
        changed = False
        for job, note in notes.items():
            if job not in self._jobs:
                self._jobs[job] = OwnProgress(self._runs.view_of(job), self._site)
            progress = self._jobs[job]
            changed |= progress.take_note(note)
            progress.take_status(self._feed.seen[1].get(job, {}) if self._feed.seen else {})
        closed = any(progress.view.round > 1 for progress in self._jobs.values())  # so that there are metrics
        if changed and closed and time.monotonic() - self._asked_at > _ASK_S:
            self._asked_at = time.monotonic()
            self._feed.look()


class OwnLines:
    """Lines of `fl-adapters run` about the rounds of its command, which may write to the same terminal."""

    def __init__(self, kit: Kit, job: str, folder: Path, say: Callable[[str], None]) -> None:
        """Begin to follow the command.

        Args:
            kit: The site's startup kit.
            job: Name of the job.
            folder: Folder of the command's own kit, where its script leaves notes.
            say: Shows a line.
        """
        self._job, self._folder, self._say = job, folder, say
        self._progress = OwnProgress(RunView(job=job), kit.site)
        self._kit = kit
        self._said_at = -_ASK_S

    def until_ended(self, process: subprocess.Popen[bytes]) -> int:
        """Show a line when a round begins, at most one in half a minute.

        Args:
            process: The command.

        Returns:
            Its exit status.
        """
        while True:
            try:
                return process.wait(_LOOK_S)
            except subprocess.TimeoutExpired:
                changed = self._progress.take_note(TrainingNote.read(self._folder))
                if changed and time.monotonic() - self._said_at >= _ASK_S:
                    self._said_at = time.monotonic()
                    self._say(self._line())

    def _line(self) -> str:
        view = self._progress.view
        if view.round > 1:
            transport = RenewingTransport.of_kit(Path(self._kit.credentials), self._kit.addresses)
            # closed at once, as the command has a connection of its own, whose calls decide when to give up
            with suppress(FederationError), closing(ControlClient(transport)) as control:
                jobs = control.ask("Status").get("jobs", ())
                self._progress.take_status(next((job for job in jobs if job.get("job") == self._job), {}))
        line = f"{self._job}: {view.unit} {view.round}" + (f" of {view.rounds}" if view.rounds else "")
        if view.left_s:
            line += f", about {duration_text(view.left_s)} left"
        known = [number for number in sorted(view.metrics) if view.metrics[number]]
        return f"{line}; all sites in round {known[-1]}: {metrics_text(view.metrics[known[-1]])}" if known else line
