"""What a run looks like while it goes on: a view kept up to date by events, and a plain line per round."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import IO

from fl_runtime.types import Event


@dataclass
class SiteView:
    """One site's row. loss: of the global model on its own validation data if it reports that, else its training
    loss. examples: of its last update; bytes since the start of the run; seconds: of its last round.
    """

    state: str = "starting"
    round: int = 0
    loss: float | None = None
    reports_loss: bool = False
    examples: int | None = None
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float | None = None


@dataclass
class RunView:
    """A listener that keeps what a table or a line shows. metrics: aggregated ones, by round."""

    job: str = ""
    folder: str = ""
    sites: dict[str, SiteView] = field(default_factory=dict)
    round: int = 0
    rounds: int | None = None
    metrics: dict[int, dict[str, float]] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    def __call__(self, event: Event) -> None:
        data = event.data
        site = self.sites.setdefault(event.site, SiteView()) if event.site else SiteView()
        match event.kind:
            case "starting":
                self.job, self.folder = data["job"], data["folder"]
                self.sites.update({name: SiteView() for name in data["sites"]})
            case "joined":
                site.state = "joined"
            case "started":
                self.rounds = data["rounds"]
            case "round_started":
                self.round = event.round
            case "task_sent":
                site.state, site.round = "final" if event.round in self.metrics else "training", event.round
                site.bytes_down += data["bytes"]
            case "update":
                self._update(site, event)
            case "report":
                if "loss" in data["metrics"]:
                    site.loss, site.reports_loss = data["metrics"]["loss"], True
            case "round_finished":
                self.metrics.setdefault(event.round, {}).update(data["metrics"])
            case "scored":
                self.metrics.setdefault(event.round, {}).update(data["metrics"])
            case "left":
                site.state = "left" if data["early"] else "done"
            case "restarted":
                site.state = "restarted"
            case "exited":
                site.state = "done" if data["clean"] else str(data["status"])

    def _update(self, site: SiteView, event: Event) -> None:
        data = event.data
        site.bytes_up += data["bytes_up"]
        if data["status"] in ("used", "carried"):
            site.state, site.examples, site.seconds = "waiting", data["num_examples"], data["seconds"]
            if not site.reports_loss:
                site.loss = data["metrics"].get("train_loss", site.loss)


class ProgressLines:
    """A listener that writes a line per round, and one when a site joins or drops out, to a stream."""

    def __init__(self, out: IO[str]) -> None:
        self._out = out
        self._view = RunView()
        self._evaluates = False
        self._failed = False  # what the other sites do then is no news
        self._pending: dict[int, Event] = {}  # finished rounds whose scores are still on their way

    def __call__(self, event: Event) -> None:
        self._view(event)
        data = event.data
        match event.kind:
            case "starting":
                self._say(f"{data['job']}: {data['command']} at {counted(len(data['sites']), 'site')}")
                self._say(f"results in {data['folder']}")
            case "joined":
                again = f" again (attempt {data['attempt']})" if data["attempt"] > 1 else ""
                self._say(f"{event.site} joined{again}")
            case "registered":
                self._evaluates |= data["evaluates"]
            case "started":
                self._say(f"{counted(data['rounds'], 'round')} with {counted(len(data['sites']), 'site')}")
            case "round_finished":
                self._pending[event.round] = event
                self._settle(event.round - 2 if self._evaluates else event.round)
            case "scored":
                self._settle(event.round)
            case "left" if data["early"] and not self._failed:
                self._say(f"{event.site} is out: {data['reason']}")
            case "restarted":
                self._say(f"{event.site}: {data['status']}; started again")
            case "exited" if data["tail"]:
                self._say("\n    | ".join([f"{event.site}: {data['status']}; {data['log']} ends with", *data["tail"]]))
            case "finished" | "failed":
                self._failed = event.kind == "failed"
                self._settle(self._view.round)

    def _settle(self, until: int) -> None:
        for number in [number for number in self._pending if number <= until]:
            self._round(self._pending.pop(number))

    def _round(self, event: Event) -> None:
        data = event.data
        missing = f", without {', '.join(data['missing'])}" if data["missing"] else ""
        self._say(
            f"round {event.round}/{self._view.rounds}: {metrics_text(self._view.metrics[event.round])}, "
            f"{counted(len(data['sites']), 'site')}{missing}, up {size_text(data['bytes_up'])}, "
            f"down {size_text(data['bytes_down'])}, {data['seconds']:.2f} s"
        )

    def _say(self, text: str) -> None:
        print(f"[{time.monotonic() - self._view.began:6.1f} s] {text}", file=self._out, flush=True)


def counted(number: int, thing: str) -> str:
    """1 round, 2 rounds."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def metrics_text(metrics: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in metrics.items()) or "no metrics"


def size_text(size_bytes: int) -> str:
    """1.2 MB: decimal units, as network tools have them."""
    size, unit = float(size_bytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
