"""Permissions: the table of who may make which call. docs/permissions.md is generated from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from fl_runtime.errors import PermissionDeniedError
from fl_runtime.trust.identity import ROLES, Identity

Scope: TypeAlias = Literal["itself", "own", "organisation", "any"]
"""What a call may concern: the caller itself, its own jobs, jobs of its organisation, or any job."""


@dataclass(frozen=True)
class Rule:
    """The permissions for one call.

    Attributes:
        does: What the call does, as the continuation of "may".
        allowed: Kind of participant, or role of an admin -> what the call may concern.
    """

    does: str
    allowed: Mapping[str, Scope]


_SITE: Mapping[str, Scope] = {"site": "itself"}
_ADMINS: Mapping[str, Scope] = dict.fromkeys(ROLES, "any")
_EVERYBODY: Mapping[str, Scope] = {**_SITE, **dict.fromkeys(ROLES, "itself")}

TABLE: Mapping[str, Rule] = {
    "Assignment": Rule("learn which job waits for this site", _SITE),
    "RefuseJob": Rule("say that this site does not take part in a job", _SITE),
    "TellLog": Rule("show a line of its own log to those who follow a job", _SITE),
    "Join": Rule("join a job as one of its sites", _SITE),
    "Register": Rule("register the tensors it exchanges", _SITE),
    "Attend": Rule("keep its session open", _SITE),
    "Next": Rule("fetch a task and the global model", _SITE),
    "Submit": Rule("send an update", _SITE),
    "Score": Rule("send metrics of a global model", _SITE),
    "Files": Rule("send the small files that the final model needs beside its weights", _SITE),
    "Tunnel": Rule("exchange streams of bytes with the job's other sites", _SITE),
    "Leave": Rule("leave a job", _SITE),
    "Status": Rule("see sites, jobs and rounds", {"site": "any", **_ADMINS}),
    "ShowJob": Rule("see a job's settings, state and result files", {"site": "itself", **_ADMINS}),
    "Watch": Rule("follow the events of a job", _ADMINS),
    "Download": Rule("download the result files of a job that has ended", {"site": "itself", **_ADMINS}),
    "SubmitJob": Rule("submit a job", {"project-admin": "any", "lead": "own"}),
    "AbortJob": Rule(
        "abort a job; answered when it has ended",
        {"project-admin": "any", "organisation-admin": "organisation", "lead": "own"},
    ),
    "Roots": Rule("learn of new roots, and get its certificate under them", _EVERYBODY),
    "HandOutRoots": Rule("have new roots of the authority handed out", {"project-admin": "any"}),
    "ResumeJob": Rule(
        "put a job that failed or was aborted back into the queue",
        {"project-admin": "any", "organisation-admin": "organisation", "lead": "own"},
    ),
    "DeleteJob": Rule(
        "delete a job that has ended, with its results",
        {"project-admin": "any", "lead": "own"},
    ),
    "Revocations": Rule("fetch the revocation list", _EVERYBODY),
    "ReadAudit": Rule("read the server's audit log", {"project-admin": "any"}),
    "Revoke": Rule("put newer lists of revoked certificates and of members in force", {"project-admin": "any"}),
}
"""Call -> rule. Calls that are missing here are refused to everyone."""


def check(caller: Identity, call: str) -> None:
    """Check that a participant may make a call at all.

    Args:
        caller: Who makes the call, as its certificate says.
        call: Name of the call, a key of `TABLE`.

    Raises:
        PermissionDeniedError: If the table does not allow it.
    """
    rule = TABLE.get(call)
    if rule is None or _holder(caller) not in rule.allowed:
        raise denied(caller, call)


def check_job(caller: Identity, call: str, submitter: Identity) -> None:
    """Check that a participant may make a call about a particular job.

    Args:
        caller: Who makes the call, as its certificate says.
        call: Name of the call, a key of `TABLE`.
        submitter: Who submitted the job.

    Raises:
        PermissionDeniedError: If the table does not allow it for this job.
    """
    check(caller, call)
    scope = TABLE[call].allowed[_holder(caller)]
    own = caller.name == submitter.name
    fits = {"any": True, "organisation": caller.organisation == submitter.organisation, "own": own, "itself": own}
    if not fits[scope]:
        raise denied(caller, call, f", only {_SCOPES[scope]}; this one was submitted by {submitter}")


def may(caller: Identity, call: str, submitter: Identity | None = None) -> bool:
    """Return whether a participant may make a call, so that it is offered to nobody else.

    Args:
        caller: Who would make the call.
        call: Name of the call, a key of `TABLE`.
        submitter: Who submitted the job that the call concerns; None for calls about no particular job.
    """
    try:
        if submitter is None:
            check(caller, call)
        else:
            check_job(caller, call, submitter)
    except PermissionDeniedError:
        return False
    return True


def denied(caller: Identity, call: str, detail: str = "") -> PermissionDeniedError:
    """Make the error for a refused call, to be raised by the caller of this function."""
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
    """Return the contents of docs/permissions.md."""
    holders = ("site", *ROLES)
    lines = [
        "# Who may do what",
        "",
        "For admins who assign roles. Generated from `fl_runtime/trust/permissions.py` by `make permissions`; do not",
        "edit. The server checks every call against this table before it reads the messages. The caller's certificate",
        "alone says who it is. A site's policy can be stricter: see [production.md](production.md).",
        "",
        f"| call | to | {' | '.join(holders)} |",
        f"|---|---|{'---|' * len(holders)}",
    ]
    for call, rule in TABLE.items():
        cells = [_SCOPES[rule.allowed[holder]] if holder in rule.allowed else "" for holder in holders]
        lines.append(f"| `{call}` | {rule.does} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
