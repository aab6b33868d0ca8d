"""Commands `fl-adapters site approve` and `site refuse`: what somebody at the site says about a job."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fl_adapters.cli.output import console_for, report_errors, show_json
from fl_adapters.cli.site.assignment import Assignment
from fl_adapters.cli.site.records import JobFolder, job_folders
from fl_adapters.extras import needs_trust_extra
from fl_runtime.errors import ConfigError
from fl_runtime.text import printable

_SHOWN_CHARS = 2000  # of each value, which the server has sent
_EVERYTHING = "what the script chooses"


def run(kit: Path, named_state: Path | None, job: str, as_json: bool, *, approved: bool, reason: str = "") -> int:
    """Show a job that waits, and write the decision about it. Returns exit status 0."""
    console = console_for(as_json)
    with report_errors(as_json), needs_trust_extra():
        from fl_runtime.trust.working_kit import working_kit

        kit = working_kit(kit, named_state)
        assignment, shown = take_decision(kit, named_state or kit, job, approved=approved, reason=reason)
        for name, value in shown.items():
            console.print(f"{name:>13}  {printable(value, _SHOWN_CHARS)}", highlight=False, soft_wrap=True)
        decision = "approved" if approved else "refused"
        console.print(f"{job}: {decision}", highlight=False)
        if as_json:
            show_json({"decision": decision, "reason": reason, **shown, "settings": dict(assignment.settings)})
    return 0


def take_decision(
    kit: Path, state: Path, job: str, *, approved: bool, reason: str = "", seen: Mapping[str, Any] | None = None
) -> tuple[Assignment, dict[str, str]]:
    """Write what somebody has decided about a job that waits.

    Args:
        kit: Folder in which the site's kit is used.
        state: Folder of the daemon's state.
        job: Name of the job.
        approved: Whether the site takes part.
        reason: Why not.
        seen: The texts that the person has seen, as `describe` makes them; None to decide on those of now.

    Returns:
        The job, and the texts about it.

    Raises:
        ConfigError: The job does not wait, or is not what the person has seen.
    """
    from fl_adapters.participant.policy_gate import KitPolicyGate
    from fl_runtime.trust.approval import decide

    gate = KitPolicyGate(kit, state / "jobs")
    folder = _folder_of(state, job)
    assignment, record = folder.read()
    if record["state"] != "waits for approval":
        raise ConfigError(
            f"the job {job} does not wait for approval: {record['state']}", fix=_waiting(state) or "nothing to do"
        )
    shown = describe(assignment, gate.policy.exchange, gate.policy.filters)
    if seen is not None and seen != {**shown, "settings": settings_text(assignment)}:
        raise ConfigError(f"the job {job} has changed since it was shown", fix="look at it again, and decide then")
    decide(folder.path, assignment.settings, approved=approved, reason=reason)
    decision = "approved" if approved else "refused"
    gate.record(f"job {decision} by a person", job=job, reason=reason, settings=dict(assignment.settings))
    return assignment, shown


def settings_text(job: Assignment) -> str:
    """Return all settings of a job as one text, by which another one of the same name is told apart.

    Args:
        job: The job.
    """
    return json.dumps(dict(job.settings), sort_keys=True)


def describe(
    job: Assignment, exchange: Sequence[str] | None, site_filters: Sequence[Mapping[str, Any]]
) -> dict[str, str]:
    """Return what a person should know of a job before it runs at the site.

    Args:
        job: The job.
        exchange: The policy's patterns of tensors that may leave the site; None for all.
        site_filters: The policy's filters.

    Returns:
        Texts by name, in the order in which they are shown.
    """
    settings = job.settings
    sites = [str(name) for name in settings.get("sites") or ()]
    others = [name for index, name in enumerate(sites) if index != job.index]
    return {
        "job": job.job,
        "submitted by": job.submitter,
        "app": job.app,
        "strategy": str(settings.get("strategy") or _EVERYTHING),
        "rounds": str(settings.get("rounds") or _EVERYTHING),
        "partners": ", ".join(others) if sites else f"{job.count - 1} other sites",
        "exchange": _patterns(settings.get("exchange")),
        "kept here": _patterns(settings.get("keep_local"), "nothing"),
        "site allows": _patterns(exchange, "all tensors"),
        "filters": _filters(settings.get("filters")),
        "site filters": _filters(site_filters),
        "needs": ", ".join(f"{name}: {value:g}" for name, value in (settings.get("resources") or {}).items()) or "-",
        "cross-site": "other sites evaluate this site's model" if settings.get("cross_site") else "no",
    }


def _patterns(value: Any, none: str = _EVERYTHING) -> str:
    if not value:
        return none
    return value if isinstance(value, str) else ", ".join(str(item) for item in value)


def _filters(filters: Any) -> str:
    if not filters:
        return "none"
    parts = []
    for item in filters:
        arguments = ", ".join(f"{name}={value}" for name, value in item.items() if name != "name")
        parts.append(f"{item.get('name', '?')}({arguments})")
    return "; ".join(parts)


def _folder_of(state: Path, job: str) -> JobFolder:
    folder = next((folder for folder in job_folders(state) if folder.path.name == job), None)
    if folder is None:
        raise ConfigError(
            f"there is no job {job} at this site",
            where=str(state / "jobs"),
            fix=_waiting(state) or "see `fl-adapters status`; give --state if the daemon has one",
        )
    return folder


def _waiting(state: Path) -> str:
    """The jobs that wait for a decision, as a sentence; "" if there are none."""
    waiting = [folder.path.name for folder in job_folders(state) if folder.read()[1]["state"] == "waits for approval"]
    return f"these jobs wait for approval: {', '.join(waiting)}" if waiting else ""
