"""Shows the progress of a run: a view that events keep up to date, and a printer of one line per round."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import IO, Any, Protocol

from fl_runtime.transport.waiting import duration_text
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
        """Share of the steps of the site's round that are made, from 0 to 1; 0 if unknown."""
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
class RunView:
    """Listener that keeps the current state of a run for a table or a line.

    Attributes:
        job: Name of the job.
        folder: The run's folder.
        sites: State of each site, by name.
        round: Number of the newest round.
        rounds: Number of rounds in all, or None before it is known.
        training: Number of the training, from 1, for scripts that train more than once.
        metrics: Aggregated metrics by round of this training.
        best_round: The best round of this training so far, or None.
        best_metric: The metric that decides which round is the best; "" before a model has been scored.
        asked: Names of the sites that take part in the newest round.
        answered: Names of those whose update of the newest round is there.
        durations_s: Seconds of each finished round of this training, in order.
        began: Time at which this view was made, in seconds of `time.monotonic`.
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
    asked: frozenset[str] = frozenset()
    answered: set[str] = field(default_factory=set)
    durations_s: list[float] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    @property
    def done(self) -> float:
        """Share of the training that is done, from 0 to 1."""
        return min(1.0, (len(self.durations_s) + self.round_done) / self.rounds) if self.rounds else 0.0

    @property
    def round_done(self) -> float:
        """Share of the open round that is done, from 0 to 1: updates, and the steps of sites that still train."""
        if not self.asked or self.round <= len(self.durations_s):
            return 0.0
        training = (self.sites[name].done for name in self.asked - self.answered if name in self.sites)
        return min((len(self.answered) + sum(training)) / len(self.asked), 1.0)

    @property
    def round_left_s(self) -> float | None:
        """Seconds until the slowest site has trained the open round; None if no site has told enough of its steps."""
        open_sites = (self.sites[name] for name in self.asked - self.answered if name in self.sites)
        return max((site.left_s for site in open_sites if site.left_s is not None), default=None)

    @property
    def left_s(self) -> float | None:
        """Seconds until the last round ends, if each takes as long as those before it.

        In round 1 that is as long as its slowest site needs for its steps. None if even that is unknown.
        """
        if self.durations_s:
            round_s = sum(self.durations_s) / len(self.durations_s)
        else:
            steps = [site for site in self.sites.values() if site.rate and site.of_steps]
            round_s = max(((site.of_steps or 0) / (site.rate or 1) for site in steps), default=0.0)
        return round_s * self.rounds * (1.0 - self.done) if round_s and self.rounds else None

    def __call__(self, event: Event) -> None:
        data = event.data
        site = self.sites.setdefault(event.site, SiteView()) if event.site else SiteView()
        match event.kind:
            case "starting":
                self.job, self.folder = data["job"], data["folder"]
                self.sites.update({name: SiteView() for name in data["sites"]})
            case "joined":
                site.state, site.failed = "joined", False
            case "started":
                self.rounds, self.training = data["rounds"], data.get("training", 1)
                if self.training > 1:
                    self.round, self.metrics, self.durations_s = 0, {}, []
                    self.best_round, self.best_metric = None, ""
                    for view in self.sites.values():
                        view.loss, view.reports_loss = None, False
            case "round_started":
                self.round, self.asked, self.answered = event.round, frozenset(data["sites"]), set()
            case "task_sent":
                site.state, site.round = "final" if event.round in self.metrics else "training", event.round
                site.bytes_down += data["bytes"]
                site.steps = site.train_s = None
            case "steps" if event.round == site.round and site.state == "training":
                site.steps, site.of_steps, site.train_s = data["done"], data["total"], data["train_s"]
            case "update":
                self._update(site, event)
            case "report":
                if "loss" in data["metrics"]:
                    site.loss, site.reports_loss = data["metrics"]["loss"], True
            case "round_finished":
                self.metrics.setdefault(event.round, {}).update(data["metrics"])
                self.durations_s.append(data["seconds"])
            case "scored":
                self.metrics.setdefault(event.round, {}).update(data["metrics"])
                self.best_round, self.best_metric = data["best_round"], data.get("best_metric", "")
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
                self.answered.add(event.site)
            site.train_s = data.get("train_s", site.train_s)
            if site.steps is not None:
                site.steps = site.of_steps or site.steps
            if not site.reports_loss:
                site.loss = data["metrics"].get("train_loss", site.loss)


class LineWriter(Protocol):
    """Writes one line about a run.

    Args:
        text: The line.
        site: Name of the site that it is about; "" for none.
        warning: Whether something went wrong.
    """

    def __call__(self, text: str, *, site: str = "", warning: bool = False) -> None: ...


class ProgressLines:
    """Listener that writes one line for each round, and for each site that joins or drops out.

    Args:
        out: The stream for the lines, which begin with the seconds since the start; or a function that writes them.

    Attributes:
        view: The state of the run.
    """

    def __init__(self, out: IO[str] | LineWriter) -> None:
        self._write: LineWriter = out if callable(out) else self._to_stream(out)
        self.view = RunView()
        self._evaluates = False
        self._failed = False  # sites that leave after a failure are not worth a line
        self._pending: dict[int, Event] = {}  # finished rounds whose scores have not arrived yet

    def __call__(self, event: Event) -> None:
        self.view(event)
        data = event.data
        match event.kind:
            case "starting":
                self._write(f"{data['job']}: {data['command']} at {counted(len(data['sites']), 'site')}")
                self._write(f"results in {data['folder']}")
            case "joined":
                again = f" again (attempt {data['attempt']})" if data["attempt"] > 1 else ""
                self._write(f"{event.site} joined{training_text(data)}{again}", site=event.site)
            case "registered":
                self._evaluates |= data["evaluates"]
            case "started":
                rounds, sites = counted(data["rounds"], "round"), counted(len(data["sites"]), "site")
                self._write(f"{rounds} with {sites}{training_text(data)}")
            case "round_finished":
                self._pending[event.round] = event
                self._settle(event.round - 2 if self._evaluates else event.round)
            case "scored":
                self._settle(event.round)
            case "left" if data["early"] and not self._failed:
                self._write(f"{event.site} dropped out: {data['reason']}", site=event.site)
            case "warning":
                self._write(data["text"], warning=True)
            case "waiting":
                self._write(waiting_text(data))
            case "quorum":
                self._write(f"enough sites are here again, after {duration_text(data['waited_s'])}")
            case "restarted":
                self._write(f"{event.site}: {data['status']}; started again", site=event.site)
            case "exited" if data["tail"]:
                said = [f"{event.site}: {data['status']}; {data['log']} ends with", *data["tail"]]
                self._write("\n    | ".join(said), site=event.site)
            case "finished" | "failed":
                self._failed = event.kind == "failed"
                self._settle(self.view.round)
                if data.get("no_best"):
                    self._write(f"there is no best round: {data['no_best']}")

    def _settle(self, until: int) -> None:
        for number in [number for number in self._pending if number <= until]:
            self._round(self._pending.pop(number))

    def _round(self, event: Event) -> None:
        data = event.data
        rounds = self.view.rounds
        of_rounds = "" if rounds is None else f"/{rounds}"  # a server that goes on with a run has not seen its start
        missing = f", without {', '.join(data['missing'])}" if data["missing"] else ""
        self._write(
            f"round {event.round}{of_rounds}: {metrics_text(self.view.metrics[event.round])}, "
            f"{counted(len(data['sites']), 'site')}{missing}, up {size_text(data['bytes_up'])}, "
            f"down {size_text(data['bytes_down'])}, {data['seconds']:.2f} s"
        )

    def _to_stream(self, out: IO[str]) -> LineWriter:
        def write(text: str, *, site: str = "", warning: bool = False) -> None:
            seconds = f"[{time.monotonic() - self.view.began:6.1f} s]"
            print(f"{seconds} {'warning: ' if warning else ''}{text}", file=out, flush=True)

        return write


def training_text(data: Mapping[str, Any]) -> str:
    """Which training an event belongs to, as the end of a sentence; "" for the first one."""
    return f", training {data['training']}" if "training" in data else ""


def waiting_text(data: Mapping[str, Any]) -> str:
    """Whom a run waits for, and until when, from the data of a "waiting" event."""
    until = time.strftime("%d %b %H:%M", time.localtime(data["until"]))
    so_far, sites = duration_text(data["waited_s"]), ", ".join(data["sites"])
    return (
        f"waiting for {sites} ({so_far} so far, until {until} at the latest): {data['here']} of the "
        f"{counted(data['needed'], 'site')} that the job needs {'is' if data['here'] == 1 else 'are'} connected"
    )


def ordered_metrics(metrics: Collection[str], best_metric: str) -> list[str]:
    """Order metrics by how much they matter: the one that decides the best round, the loss, then the others.

    Args:
        metrics: Names of all metrics, in their order.
        best_metric: The metric that decides; "" for none.

    Returns:
        The names. Those of local training (`train_...`) and of traffic (`..._bytes`) come last.
    """
    first = [name for name in (best_metric, "loss") if name in metrics]
    rest = sorted(metrics, key=lambda name: name.startswith("train_") or name.endswith("_bytes"))
    return list(dict.fromkeys([*first, *rest]))


def counted(number: int, thing: str) -> str:
    """A number with its noun: "1 round", "2 rounds"."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def metrics_text(metrics: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in metrics.items()) or "no metrics"


def size_text(size_bytes: int) -> str:
    """A size such as "1.2 MB", in decimal units as network tools use them."""
    size, unit = float(size_bytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
