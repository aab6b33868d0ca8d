"""What sites say of global models: taken, pooled, told to all; and the end of a run that gets no better."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from fl_runtime.aggregation.metrics.pooling import plain, to_json
from fl_runtime.errors import ProtocolError
from fl_runtime.types import Metrics, Report

if TYPE_CHECKING:
    from fl_runtime.server.run import Run


def score(run: Run, report: Report, attempt: int) -> None:
    with run.lock:
        run.check_attempt(report.site, attempt)
        crossed = run.cross_site.knows(run, report.version)
        newest = run.model.version if run.model else 0
        if report.version > newest and not crossed:
            raise ProtocolError(f"a score of model {report.version}, but the newest is {newest}")
        run.journal.scored(report.version, report.site, to_json(report.metrics), report.num_examples)
        run.scores.report(report.version, report.site, report.metrics, report.num_examples)
        run.events.emit(
            "cross_score" if crossed else "report",
            report.version,
            report.site,
            metrics=plain(report.metrics),
            num_examples=report.num_examples,
        )
        expected = evaluators(run, report.version)
        if not crossed and expected and expected <= run.scores.reported(report.version):
            settle(run, report.version)
        run.changed.notify_all()


def wait_for_scores(
    run: Run, name: str, attempt: int, version: int, beat_s: float | None
) -> Iterator[tuple[Metrics, bool] | None]:
    """Yields (metrics of all sites together, whether the run ends here) of a version, once all have reported on it,
    and None every `beat_s` before that.

    Who has not within half of a round's time is no longer waited for.
    """
    deadline = time.monotonic() + run.settings.deadline_s / 2
    while True:
        with run.lock:
            run.check_attempt(name, attempt)
            if not run.scores.settled(version):
                if evaluators(run, version) <= run.scores.reported(version) or time.monotonic() > deadline:
                    settle(run, version)
                else:
                    run.published.wait(min(1.0, run.settings.deadline_s / 2, beat_s or math.inf))
            over = run.scores.settled(version)
            found = run.scores.of(version), run.rounds is not None and version >= run.rounds
        if over:
            yield found
            return
        if beat_s is not None:
            yield None


def evaluators(run: Run, version: int) -> set[str]:
    """Active sites that have promised to score each global model, as far as they get this one."""
    asked = run.open if run.open and run.open.round == version + 1 else None
    active = [m for m in run.members.values() if m.active and (asked is None or asked.takes(m.name))]
    return {m.name for m in active if m.registration and m.registration.evaluates}


def settle(run: Run, version: int) -> None:
    """The metrics of a round are complete, or as complete as they will get: tell the listeners, once."""
    if run.scores.settle(version):
        best = run.best.version if run.best else None
        leading = version if run.scores.better(version, best) else best
        run.events.emit("scored", version, metrics=run.scores.of(version), best_round=leading)
        _stop_out_of_patience(run, version)
        run.published.notify_all()


def _stop_out_of_patience(run: Run, version: int) -> None:
    terms, newest = run.terms, run.model.version if run.model else 0
    by = run.settings if run.settings.patience else terms
    if not by.patience or run.buffer or version != newest or run.rounds is None or version >= run.rounds:
        return
    if run.scores.patience_spent(version, by.patience, by.min_delta):
        run.rounds = version
        run.journal.agreed(version, terms)
        run.changed.notify_all()
