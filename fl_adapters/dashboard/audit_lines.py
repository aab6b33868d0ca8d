"""The lines of an audit log, of the server or of a site, as bounded and printable values, and their page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from fl_adapters.dashboard.page import link
from fl_adapters.environments.report.document import Content, table, tag
from fl_runtime.errors import PermissionDeniedError
from fl_runtime.text import printable
from fl_runtime.trust.identity import Identity

SHOWN = 100
"""Lines on a page."""
_MOST_LINES = 500
_KNOWN = ("number", "time", "who", "action", "outcome", "rule", "error")
_COLUMNS = ["time (UTC)", "what", "who", "outcome", "more", "line"]


@dataclass(frozen=True)
class AuditLine:
    """A line of the audit log.

    Attributes:
        number: Its number; 0 if it cannot be read.
        time: When, as text in UTC.
        who: Who asked for it; "server" for the server itself.
        action: What was done or asked for.
        outcome: "done", "refused" or "damaged".
        facts: What else the line says.
    """

    number: int
    time: str
    who: str
    action: str
    outcome: str
    facts: str


@dataclass(frozen=True)
class AuditPage:
    """Lines of the audit log that follow each other.

    Attributes:
        lines: The lines, the newest first.
        begin: Where the oldest of them begins in the log, in bytes; 0 if no line is older.
    """

    lines: tuple[AuditLine, ...]
    begin: int


def read_lines(told: Mapping[str, Any]) -> AuditPage:
    """Read lines of a log, as the server's answer to `ReadAudit` has them.

    Args:
        told: `lines`, the fields of each, the oldest first; and `begin`, where that one begins.

    Returns:
        The lines.
    """
    return AuditPage(
        tuple(_line(fields) for fields in reversed(told["lines"][-_MOST_LINES:])), max(int(told["begin"]), 0)
    )


def asked_before(request: Request) -> int | None:
    """Return where the lines begin that follow those asked for; None to show the newest ones.

    Args:
        request: The request of a page with `audit_table`.
    """
    before = request.query_params.get("before", "")
    return int(before) if before.isascii() and before.isdecimal() and len(before) < 16 else None


def audit_table(shown: AuditPage, address: str) -> list[Content]:
    """Make the table of lines, with a link to those before them.

    Args:
        shown: The lines.
        address: Path of the page.

    Returns:
        The content of the page.
    """
    older = [tag("p", link("Older lines", f"{address}?before={shown.begin}"))] if shown.begin else []
    return [table(_COLUMNS, [_row(line) for line in shown.lines], numbers_from=9), *older]


def _row(line: AuditLine) -> list[Content]:
    style = {} if line.outcome == "done" else {"class_": "bad"}
    outcome = tag("span", line.outcome, **style)
    at = line.time[:19].replace("T", " ")
    return [at, line.action, line.who, outcome, tag("span", line.facts, class_="long"), str(line.number or "")]


def _line(fields: Mapping[str, Any]) -> AuditLine:
    try:
        who = str(Identity.from_uri(fields["who"])) if fields.get("who") else "server"
    except PermissionDeniedError:
        who = printable(str(fields["who"]), 200)
    facts = {key: value for key, value in fields.items() if key not in _KNOWN}
    texts = [str(fields[key]) for key in ("rule", "error") if fields.get(key)]
    texts += [f"{key} {value if isinstance(value, str) else json.dumps(value)}" for key, value in facts.items()]
    number = fields.get("number")
    return AuditLine(
        number if type(number) is int else 0,
        printable(str(fields.get("time", "")), 40),
        who,
        printable(str(fields.get("action", "")), 100),
        printable(str(fields.get("outcome", "")), 20),
        printable("; ".join(texts), 1000),
    )
