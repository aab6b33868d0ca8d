"""What participants may write to the audit log: so many bytes each in full, and the rest in lines that sum it up."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from fl_runtime.errors import FederationError
from fl_runtime.trust.audit import AuditLog, rule_of
from fl_runtime.trust.identity import Identity

BYTES, BYTES_PER_S = 2**16, 2**14 / 60
"""Bytes of lines about one action of one participant that are written in full: at once, and per second."""
SUM_S = 10.0
"""How often what was not written in full is summed up, in seconds."""

_LINE_BYTES = 500  # of a line, without what is particular to it
_RULES_EACH = 50  # rules of one participant's refusals that are summed up apart


@dataclass
class _More:
    """Lines of one kind that were not written in full."""

    who: Identity | None
    action: str
    rule: str
    error: str
    since: float
    count: int = 0


class AuditSummary:
    """Writes what participants cause to an audit log. May be used by any thread.

    A participant that calls in a loop fills neither the log nor the time of those who read it. Each action has an
    allowance of its own, so that nobody can hide one behind many others. What is beyond it is counted, and written as
    one line: "and 312 more like it".

    Attributes:
        log: The log itself, for lines that no participant can repeat at will.
        refusals: Number of refusals since the server was started, by the class of their errors.
    """

    def __init__(self, log: AuditLog) -> None:
        self.log = log
        self.refusals: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._left: dict[tuple[str, str], tuple[float, float]] = {}
        self._more: dict[tuple[str, str, str], _More] = {}

    def write(self, action: str, who: Identity | None = None, *, rule: str = "", error: str = "", **facts: Any) -> None:
        """Append a line, or count it. See `AuditLog.write`.

        Args:
            action: What was done or asked for.
            who: Who asked for it.
            rule: The rule by which it was refused; empty if it was done.
            error: The message with which it was refused; empty if it was done.
            facts: Further fields of the line.

        Raises:
            StoreError: If the log cannot be written.
        """
        nbytes = _LINE_BYTES + len(rule) + len(error) + len(json.dumps(facts, default=str))
        if self._fits(who.uri if who else "", action, nbytes):
            self.log.write(action, who, rule=rule, error=error, **facts)
        else:
            self._count(who, action, rule, error)

    def refused(
        self, who: Identity | None, action: str, error: FederationError, *, once: bool = False, **facts: Any
    ) -> None:
        """Append a refusal, or count it. See `AuditLog.refused`.

        Args:
            who: Who was refused.
            action: What was asked for.
            error: The refusal.
            once: Write only the first refusal of this kind in full, and sum up the others.
            facts: Further fields of the line.

        Raises:
            StoreError: If the log cannot be written.
        """
        rule = rule_of(error)
        with self._lock:
            self.refusals[type(error).__name__] += 1
        if not once or not self._count(who, action, rule, error.what, counted=0):
            self.write(action, who, rule=rule, error=error.what, **facts)

    def sum_up(self, *, everything: bool = False) -> None:
        """Write the lines that sum up what was counted since `SUM_S`, or all that is left.

        Raises:
            StoreError: If the log cannot be written.
        """
        due = time.monotonic() - SUM_S
        with self._lock:
            ready = [key for key, more in self._more.items() if everything or more.since <= due]
            lines = [more for key in ready if (more := self._more.pop(key)).count > 0]
        for more in lines:
            text = f"and {more.count} more like it"
            error = f"{more.error}; {text}" if more.rule or more.error else ""
            self.log.write(more.action, more.who, rule=more.rule, error=error, summary=text, count=more.count)

    def _fits(self, name: str, action: str, nbytes: int) -> bool:
        """Whether the allowance is not used up. The last line may exceed it, so that one of any length is written."""
        now = time.monotonic()
        with self._lock:
            left, at = self._left.get((name, action), (float(BYTES), now))
            left = min(left + (now - at) * BYTES_PER_S, BYTES)
            fits = left > 0
            self._left[name, action] = left - nbytes if fits else left, now
        return fits

    def _count(self, who: Identity | None, action: str, rule: str, error: str, *, counted: int = 1) -> bool:
        """Count a line. Returns whether others of its kind are being counted already."""
        name = who.uri if who else ""
        with self._lock:
            if sum(key[0] == name for key in self._more) >= _RULES_EACH:
                rule = "several rules" if rule else ""
            before = self._more.get((name, action, rule))
            more = before or _More(who, action, rule, error, time.monotonic())
            more.count += 1 if before else counted
            self._more[name, action, rule] = more
        return before is not None
