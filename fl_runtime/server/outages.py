"""Outages of a run: whether enough sites are connected, and how long the run waits while they are not."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Collection, Mapping

from fl_runtime.errors import QuorumError
from fl_runtime.server.registration import Member
from fl_runtime.server.state import RunState
from fl_runtime.transport.waiting import Clock, Reminders

_OUTAGES_KEPT = 1_000
"""The last outages, which timeouts that began before them do not count."""


class Outages:
    """Whether enough sites are connected, over the life of a run. Its methods are called under the run's lock.

    A site that is absent is given up after `rejoin_s` while the others make a quorum. While they do not, the run has an
    outage: nobody is given up, and no timeout of the run passes, for at most `patience_s`. A run without `patience_s`,
    such as that of a simulation, has no outages.

    Attributes:
        clock: Measures absences and timeouts.
    """

    def __init__(self, state: RunState, members: Mapping[str, Member], clock: Clock) -> None:
        self._state, self._members, self.clock = state, members, clock
        settings = state.settings
        self._patience_s = 0.0 if settings.patience_s is None else max(settings.patience_s, settings.rejoin_s)
        self._short_since: float | None = None  # since when too few sites are connected
        self._met_since = -math.inf  # since when enough are
        self._past: deque[tuple[float, float]] = deque(maxlen=_OUTAGES_KEPT)  # begin and end of each outage
        self._reminders = Reminders()

    @property
    def needed(self) -> int:
        """The number of sites that make a quorum."""
        return max(self._state.settings.min_sites, 1)

    @property
    def waiting(self) -> bool:
        """Whether there is an outage that the run waits for the end of."""
        return self.patience_left_s > 0

    @property
    def patience_left_s(self) -> float:
        """For how many more seconds the run waits for the end of an outage; 0 if there is none."""
        return 0.0 if self._short_since is None else max(self._short_since + self._patience_s - self.clock.now(), 0.0)

    @property
    def lost(self) -> bool:
        """Whether the run stands still: there has been an outage for longer than `rejoin_s`."""
        since, rejoin_s = self._short_since, self._state.settings.rejoin_s
        return since is not None and self.waiting and self.clock.now() - since > rejoin_s

    def watch(self) -> None:
        """Look who is connected now, and emit an event if the run waits for others, or no longer does."""
        if not self._patience_s:
            return
        now, here = self.clock.now(), sum(self._is_there(m) for m in self._members.values())
        if here < self.needed and self._short_since is None:
            self._short_since, self._reminders = now, Reminders()
        elif here >= self.needed and self._short_since is not None:
            since, self._short_since, self._met_since = self._short_since, None, now
            self._past.append((since, min(now, since + self._patience_s)))
            self._state.published.notify_all()
            if self._reminders.any:
                self._state.events.emit("quorum", waited_s=now - since)
        if self._short_since is not None and self.waiting and self._reminders.due(now - self._short_since):
            self._emit_waiting(now - self._short_since, here)

    def gives_up(self, absent_since: float) -> bool:
        """Whether a site that has been absent since then is not waited for any more.

        Args:
            absent_since: Since when, in seconds of the clock.

        Returns:
            True if it has had `rejoin_s` to come back since the others make a quorum.
        """
        return not self.waiting and self._left_to_rejoin_s(absent_since) < 0

    def wakes_in_s(self, absences: Collection[float]) -> float:
        """After how many seconds something changes by itself: a site is given up, or a reminder is due.

        Args:
            absences: Since when each expected site that is absent has been so, in seconds of the clock.

        Returns:
            The seconds, infinite if nothing does.
        """
        if self._short_since is not None and self.waiting:
            waited_s = self.clock.now() - self._short_since
            return min(self._patience_s, self._reminders.next_s) - waited_s
        return max(min(map(self._left_to_rejoin_s, absences), default=math.inf), 0.0)

    def left_s(self, began: float, timeout_s: float) -> float:
        """How much of a timeout is left. Outages do not count once the sites have agreed.

        Args:
            began: When the timeout began, in seconds of the clock.
            timeout_s: Its length.

        Returns:
            The seconds that are left, at most `timeout_s`; 0 or less if it has passed.
        """
        now, paused_s = self.clock.now(), 0.0
        if self._state.plan.rounds is not None:
            under_way = [] if self._short_since is None else [(self._short_since, self._short_since + self._patience_s)]
            paused_s = sum(max(min(end, now) - max(begin, began), 0.0) for begin, end in [*self._past, *under_way])
        return timeout_s - (now - began - paused_s)

    def check(self, counted: Collection[str], when: str, reasons: str) -> bool:
        """Check that enough sites count.

        Args:
            counted: Names of the sites that count.
            when: When they are counted, for the error.
            reasons: Why the others are gone, for the error.

        Returns:
            True if they make a quorum. False if they do not, but the run waits for sites that would.

        Raises:
            QuorumError: They do not, and none that could come back is waited for any longer.
        """
        if len(counted) >= self.needed:
            return True
        may_come = {m.name for m in self._members.values() if not m.gone or m.script == "lost"}
        if self.waiting and len(may_come.union(counted)) >= self.needed:
            return False
        if not counted:
            raise QuorumError(f"no site is left {when}", where=reasons, fix="look at the logs of the sites")
        sites = "1 site is" if len(counted) == 1 else f"{len(counted)} sites are"
        raise QuorumError(
            f"only {sites} left {when}; the job needs at least {self.needed}",
            where=reasons,
            fix="look at the log of the site that left; lower min_sites to go on without it",
        )

    def _is_there(self, member: Member) -> bool:
        """Whether the run can go on with this site, or at its end need not wait for it."""
        if self._state.phase in ("final", "done"):
            expected = member.script == "resting" or not member.gone
            return member.absent_since is None if expected else member.script != "lost"
        return member.active and member.absent_since is None

    def _left_to_rejoin_s(self, absent_since: float) -> float:
        since = max(absent_since, self._met_since if self._short_since is None else -math.inf)
        return since + self._state.settings.rejoin_s - self.clock.now()

    def _emit_waiting(self, waited_s: float, here: int) -> None:
        absent = [m.name for m in self._members.values() if not self._is_there(m) and self._may_come(m)]
        until = time.time() + self._patience_s - waited_s
        self._state.events.emit("waiting", sites=absent, here=here, needed=self.needed, waited_s=waited_s, until=until)

    def _may_come(self, member: Member) -> bool:
        return not member.gone or member.script in ("resting", "lost")
