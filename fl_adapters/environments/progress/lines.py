"""Printer of one line for each round of a run, and for each site that joins or drops out."""

from __future__ import annotations

import time
from typing import IO, Protocol

from fl_adapters.environments.progress.text import counted, metrics_text, size_text, training_text, waiting_text
from fl_adapters.environments.progress.view import RunView
from fl_runtime.transport.waiting import duration_text
from fl_runtime.types import Event


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
                rounds = counted(data["rounds"], "round") if data["rounds"] else "sums"
                sites = counted(len(data["sites"]), "site")
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
        of_rounds = f"/{rounds}" if rounds else ""  # a server that goes on with a run has not seen its start
        metrics = "" if rounds == 0 else f"{metrics_text(self.view.metrics[event.round])}, "
        missing = f", without {', '.join(data['missing'])}" if data["missing"] else ""
        self._write(
            f"{self.view.unit} {event.round}{of_rounds}: {metrics}"
            f"{counted(len(data['sites']), 'site')}{missing}, up {size_text(data['bytes_up'])}, "
            f"down {size_text(data['bytes_down'])}, {data['seconds']:.2f} s"
        )

    def _to_stream(self, out: IO[str]) -> LineWriter:
        def write(text: str, *, site: str = "", warning: bool = False) -> None:
            seconds = f"[{time.monotonic() - self.view.began:6.1f} s]"
            print(f"{seconds} {'warning: ' if warning else ''}{text}", file=out, flush=True)

        return write
