"""The state of a run as its events tell it: for a screen, or for a line."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from fl_runtime.types import Event


@dataclass
class SiteView:
    """State of one site, as a row of the screen shows it.

    Attributes:
        state: What the site is doing, in one word or the exit status of its process.
        round: Number of the round that the site works on.
        loss: Loss of the global model on the site's validation data if the site reports it, else its training loss.
        reports_loss: Whether `loss` is a validation loss.
        examples: Training examples behind the site's last update.
        bytes_up: Bytes sent to the server since the start of the run.
        bytes_down: Bytes received from the server since the start of the run.
        seconds: Duration of the site's last round.
        failed: Whether the site dropped out, or its process failed.
        steps: Steps of its round so far; None if it has not told any.
        of_steps: Steps of its whole round; None if unknown.
        train_s: Seconds that it has trained in its round, as it says; None if unknown.
    """

    state: str = "starting"
    round: int = 0
    loss: float | None = None
    reports_loss: bool = False
    examples: int | None = None
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float | None = None
    failed: bool = False
    steps: int | None = None
    of_steps: int | None = None
    train_s: float | None = None

    @property
    def done(self) -> float:
        """Share of the site's round that is done, by its steps, from 0 to 1; 0 if unknown, 1 after its update."""
        if self.state in ("waiting", "final", "done"):
            return 1.0
        return min(self.steps / self.of_steps, 1.0) if self.steps and self.of_steps else 0.0

    @property
    def rate(self) -> float | None:
        """Steps a second in this round, or None if unknown."""
        return self.steps / self.train_s if self.steps and self.train_s else None

    @property
    def left_s(self) -> float | None:
        """Seconds until the site has trained its round, at this rate; None if unknown."""
        return (self.of_steps or 0) / self.rate * (1.0 - self.done) if self.rate and self.of_steps else None


@dataclass
class RoundView:
    """Who takes part in a round.

    Attributes:
        asked: Names of the sites that take part.
        answered: Names of those whose update is there.
        began: Time at which the round was opened, in seconds of `time.monotonic`.
    """

    asked: frozenset[str] = frozenset()
    answered: set[str] = field(default_factory=set)
    began: float = field(default_factory=time.monotonic)


@dataclass
class RunView:
    """Listener that keeps the current state of a run for a table or a line.

    Attributes:
        job: Name of the job.
        folder: The run's folder.
        sites: State of each site, by name.
        round: Number of the newest round.
        rounds: Number of rounds in all, or None before it is known; 0 in a training of sums, which ends when the sites
            leave it.
        training: Number of the training, from 1, for scripts that train more than once.
        metrics: Aggregated metrics by round of this training.
        best_round: The best round of this training so far, or None.
        best_metric: The metric that decides which round is the best; "" before a model has been scored.
        newest: Who takes part in the newest round, and whose update is there.
        closed: Number of rounds of this training that have been closed.
        durations_s: Seconds of each round that was closed while this view was kept, in order.
        ended: Whether the training has ended.
        began: Time at which this view was made, in seconds of `time.monotonic`.
        virtual: Whether the sites are virtual: a few workers train one after the other.
    """

    job: str = ""
    folder: str = ""
    sites: dict[str, SiteView] = field(default_factory=dict)
    round: int = 0
    rounds: int | None = None
    training: int = 1
    metrics: dict[int, dict[str, float]] = field(default_factory=dict)
    best_round: int | None = None
    best_metric: str = ""
    newest: RoundView = field(default_factory=RoundView)
    closed: int = 0
    durations_s: list[float] = field(default_factory=list)
    ended: bool = False
    began: float = field(default_factory=time.monotonic)
    virtual: bool = False

    @property
    def unit(self) -> str:
        """What a round of this training is called: "sum" if it has no number of rounds, else "round"."""
        return "sum" if self.rounds == 0 else "round"

    @property
    def done(self) -> float:
        """Share of the training that is done, from 0 to 1."""
        current = self.round_done if self.round > self.closed else 0.0
        return min(1.0, (self.closed + current) / self.rounds) if self.rounds else 0.0

    @property
    def round_done(self) -> float:
        """Share of the newest round that is done, from 0 to 1: updates, and the steps of sites that still train."""
        if not self.newest.asked or self.round <= self.closed:
            return 1.0 if self.newest.asked else 0.0
        training = sum(site.done for site in self._training)
        return min((len(self.newest.answered) + training) / len(self.newest.asked), 1.0)

    @property
    def round_left_s(self) -> float | None:
        """Seconds until the slowest site has trained the open round; None if no site has told enough of its steps.

        Virtual sites take turns, so those that are left need as long as those that are done, each.
        """
        if self.virtual:
            left = len(self.newest.asked) - len(self.newest.answered)
            return self._round_s / len(self.newest.answered) * left if self.newest.answered and left else None
        return max((site.left_s for site in self._training if site.left_s is not None), default=None)

    @property
    def left_s(self) -> float | None:
        """Seconds until the last round ends, if each takes as long as those before it.

        In round 1 that is as long as its slowest site needs for its steps. None if even that is unknown.
        """
        if self.durations_s:
            round_s = sum(self.durations_s) / len(self.durations_s)
        elif self.virtual:
            round_s = self._round_s + (self.round_left_s or 0.0) if self.newest.answered else 0.0
        else:
            steps = [site for site in self.sites.values() if site.rate and site.of_steps]
            round_s = max(((site.of_steps or 0) / (site.rate or 1) for site in steps), default=0.0)
        return round_s * self.rounds * (1.0 - self.done) if round_s and self.rounds else None

    @property
    def _training(self) -> list[SiteView]:
        """Sites that train the newest round, and not those that have its task still to come."""
        open_sites = [self.sites[name] for name in self.newest.asked - self.newest.answered if name in self.sites]
        return [site for site in open_sites if site.state == "training" and site.round == self.round]

    @property
    def _round_s(self) -> float:
        return time.monotonic() - self.newest.began

    def __call__(self, event: Event) -> None:
        data = event.data
        site = self.sites.setdefault(event.site, SiteView()) if event.site else SiteView()
        match event.kind:
            case "starting":
                self.job, self.folder, self.virtual = data["job"], data["folder"], data.get("virtual", False)
                self.sites.update({name: SiteView() for name in data["sites"]})
            case "joined":
                site.state, site.failed = "joined", False
            case "started":
                self.rounds, self.training, self.ended = data["rounds"], data.get("training", 1), False
                if self.training > 1:
                    self.round, self.metrics, self.closed, self.durations_s = 0, {}, 0, []
                    self.best_round, self.best_metric = None, ""
                    for view in self.sites.values():
                        view.loss, view.reports_loss = None, False
            case "round_started":
                self.round, self.newest = event.round, RoundView(frozenset(data["sites"]))
                self.closed = max(self.closed, event.round - 1)  # this view may have begun late
                for site in (self.sites.setdefault(name, SiteView()) for name in self.newest.asked if self.virtual):
                    site.state = "queued"
            case "task_sent":
                site.state, site.round = "final" if event.round in self.metrics else "training", event.round
                site.bytes_down += data["bytes"]
                if site.state == "training":
                    site.steps, site.train_s = 0 if site.of_steps else None, None
            case "steps" if event.round == site.round and site.state == "training":
                site.steps, site.of_steps, site.train_s = data["done"], data["total"], data["train_s"]
            case "update":
                self._update(site, event)
            case "report":
                if "loss" in data["metrics"]:
                    site.loss, site.reports_loss = data["metrics"]["loss"], True
            case "round_finished":
                self.metrics.setdefault(event.round, {}).update(data["metrics"])
                self.closed = max(self.closed, event.round)
                self.durations_s.append(data["seconds"])
            case "scored":
                self.metrics.setdefault(event.round, {}).update(data["metrics"])
                self.best_round, self.best_metric = data["best_round"], data.get("best_metric", "")
            case "finished" | "failed":
                self.ended = True
            case "left":
                site.state, site.failed = ("left", True) if data["early"] else ("done", False)
            case "restarted":
                site.state, site.failed = "restarted", False
            case "exited":
                site.state, site.failed = "done" if data["clean"] else str(data["status"]), not data["clean"]

    def _update(self, site: SiteView, event: Event) -> None:
        data = event.data
        site.bytes_up += data["bytes_up"]
        if data["status"] in ("used", "carried"):
            site.state, site.examples, site.seconds = "waiting", data.get("num_examples"), data["seconds"]
            if event.round == self.round:
                self.newest.answered.add(event.site)
            site.train_s = data.get("train_s", site.train_s)
            if site.steps is not None:
                site.steps = site.of_steps or site.steps
            if not site.reports_loss:
                site.loss = data["metrics"].get("train_loss", site.loss)
