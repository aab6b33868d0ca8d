"""Who may make which call: one table. docs/permissions.md is made from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from fl_runtime.errors import PermissionDeniedError
from fl_runtime.trust.identity import ROLES, Identity

Scope: TypeAlias = Literal["itself", "own", "organisation", "any"]
"""What a call may concern: the caller alone; jobs that it submitted; jobs of its organisation; everything."""


@dataclass(frozen=True)
class Rule:
    """One call. allowed: the kind of participant, or an admin's role -> what the call may concern."""

    does: str
    allowed: Mapping[str, Scope]


_SITE: Mapping[str, Scope] = {"site": "itself"}
_ADMINS: Mapping[str, Scope] = dict.fromkeys(ROLES, "any")

TABLE: Mapping[str, Rule] = {
    "Assignment": Rule("learn which job waits for this site", _SITE),
    "Join": Rule("join a job as one of its sites", _SITE),
    "Register": Rule("say which tensors it exchanges", _SITE),
    "Attend": Rule("be seen to be there", _SITE),
    "Next": Rule("fetch a task and the global model", _SITE),
    "Submit": Rule("send an update", _SITE),
    "Score": Rule("send metrics of a global model", _SITE),
    "Tunnel": Rule("exchange streams of bytes with the job's other sites", _SITE),
    "Leave": Rule("leave a job", _SITE),
    "Status": Rule("see sites, jobs and rounds", {"site": "any", **_ADMINS}),
    "Watch": Rule("follow the events of a job", _ADMINS),
    "SubmitJob": Rule("submit a job", {"project-admin": "any", "lead": "own"}),
    "AbortJob": Rule(
        "abort a job; answered when it has ended",
        {"project-admin": "any", "organisation-admin": "organisation", "lead": "own"},
    ),
    "Revoke": Rule("put a newer revocation list in force", {"project-admin": "any"}),
}
"""Call -> rule. A call that is not here is nobody's."""


def check(caller: Identity, call: str) -> None:
    """PermissionDeniedError unless the table lets somebody like the caller make this call."""
    rule = TABLE.get(call)
    if rule is None or _holder(caller) not in rule.allowed:
        raise denied(caller, call)


def check_job(caller: Identity, call: str, submitter: Identity) -> None:
    """PermissionDeniedError unless the caller may do this to a job of that submitter."""
    check(caller, call)
    scope = TABLE[call].allowed[_holder(caller)]
    own = caller.name == submitter.name
    fits = {"any": True, "organisation": caller.organisation == submitter.organisation, "own": own, "itself": own}
    if not fits[scope]:
        raise denied(caller, call, f", only {_SCOPES[scope]}; this one is of {submitter}")


def denied(caller: Identity, call: str, detail: str = "") -> PermissionDeniedError:
    rule = TABLE.get(call)
    who = ", ".join(rule.allowed) if rule else "nobody"
    return PermissionDeniedError(
        f"{caller} may not {rule.does if rule else f'call {call}'}{detail}",
        where=f"rule permissions: {call} is for {who}",
        fix="use a kit with another role, or ask the project's admin; see docs/permissions.md",
    )


def _holder(identity: Identity) -> str:
    return identity.role or identity.kind


_SCOPES: Mapping[Scope, str] = {
    "itself": "for itself",
    "own": "its own jobs",
    "organisation": "jobs of its organisation",
    "any": "yes",
}


def as_markdown() -> str:
    """The table as docs/permissions.md shows it."""
    holders = ("site", *ROLES)
    lines = [
        "# Who may do what",
        "",
        "Made from `fl_runtime/trust/permissions.py` by `make permissions`; do not edit. The server checks every call",
        "against this table before anything of it is read. The caller is who its certificate says; a name within a",
        "message counts for nothing. A site's policy can narrow further: see [production.md](production.md).",
        "",
        f"| call | to | {' | '.join(holders)} |",
        f"|---|---|{'---|' * len(holders)}",
    ]
    for call, rule in TABLE.items():
        cells = [_SCOPES[rule.allowed[holder]] if holder in rule.allowed else "" for holder in holders]
        lines.append(f"| `{call}` | {rule.does} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
