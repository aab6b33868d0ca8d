"""What sites tell of their local training within a round: checked, shown to listeners, and not kept."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

from fl_runtime.errors import ProtocolError
from fl_runtime.server.calls import limits
from fl_runtime.server.run import Run
from fl_runtime.wire.fl.v1 import federation_pb2 as pb

MAX_TRAIN_S = 1e9
"""Longest training of one round, in seconds: about thirty years."""

_SHORTEST_S = 0.5


class StepReports:
    """Passes on how far the sites' local training is, as events of the kind "steps".

    Args:
        run: The run.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._told: dict[str, float] = {}  # site -> when it was listened to last, in monotonic seconds

    def take(self, site: str, attempt: int, steps: pb.TrainingSteps, sent: Mapping[str, tuple[str, int, str]]) -> None:
        """Check a report and emit its event.

        Reports on another round than the site's, and those that come within half a second, have no effect.

        Args:
            site: Name of the site.
            attempt: Number of its process.
            steps: The report.
            sent: The last task that each site was sent: kind, round and stage.

        Raises:
            ProtocolError: The numbers cannot be those of a training, or the site does not take part.
            AbortedError: Another process of the site has taken over.
        """
        state, membership = self._run.state, self._run.membership
        done, total = (limits.check_count(number, "steps") for number in (steps.done, steps.total))
        if total and done > total:
            raise ProtocolError(f"{site} says that it has made {done} of {total} steps")
        train_s = check_train_s(steps.train_s)
        with state.lock:
            membership.caller(site, attempt, takes_part=True)
            now = time.monotonic()
            kind, number, _ = sent.get(site, ("train", steps.round, ""))  # this server may have been restarted
            if (kind, number) != ("train", steps.round) or now - self._told.get(site, -math.inf) < _SHORTEST_S:
                return
            if not 1 <= steps.round <= (state.plan.rounds or 0):
                return
            self._told[site] = now
        state.events.emit("steps", steps.round, site, done=done, total=total or None, train_s=round(train_s, 3))


def check_train_s(seconds: float) -> float:
    """Return the seconds that a site says it has trained.

    Args:
        seconds: The value from the network.

    Raises:
        ProtocolError: It is not a duration.
    """
    if not 0 <= seconds <= MAX_TRAIN_S:  # not a number is neither
        raise ProtocolError(f"a site says that it has trained for {seconds:g} s; at most {MAX_TRAIN_S:g} s can be")
    return seconds
