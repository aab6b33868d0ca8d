"""The section "Site" of the dashboard: a site's jobs, decisions about those that wait, their logs, and its policy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit
from xml.etree.ElementTree import Element

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from fl_adapters.cli.site.decide import describe, settings_text, take_decision
from fl_adapters.cli.site.records import JobFolder, job_folders
from fl_adapters.dashboard.audit_lines import SHOWN, asked_before, audit_table, read_lines
from fl_adapters.dashboard.forms import form_of
from fl_adapters.dashboard.log_pages import log_version, log_view
from fl_adapters.dashboard.page import crumbs, link, live, page
from fl_adapters.environments.logs import tail
from fl_adapters.environments.report.document import Content, table, tag
from fl_runtime.errors import ConfigError
from fl_runtime.store.lock import is_locked
from fl_runtime.text import printable
from fl_runtime.trust.audit import lines_before
from fl_runtime.trust.audit.lines import LOG_FILE
from fl_runtime.trust.kits import StartupKit, read_kit
from fl_runtime.trust.policy import Policy
from fl_runtime.trust.policy.rules import read_policy

_LOG_LINES = 200
_SHOWN_CHARS = 2000
_LOG = {"class_": "log", "tabindex": "0", "role": "region", "aria_label": "End of the job's log"}


class SiteSection:
    """Pages about one site, from what its daemon keeps in its folders. A `Section`; it calls no server.

    Args:
        kit: Folder in which the site's kit is used.
        state: Folder of the daemon's state.
    """

    title = "Site"
    path = "/site"

    def __init__(self, kit: Path, state: Path) -> None:
        self._kit: StartupKit = read_kit(kit, kind="site")
        self._state = state

    def routes(self) -> Sequence[Route]:
        """Return the routes of the list, the audit log, of jobs, their logs and decisions."""
        return [
            Route(self.path, self._list),
            Route(f"{self.path}/audit", self._audit),
            Route(f"{self.path}/job/{{name}}", self._job),
            Route(f"{self.path}/job/{{name}}/log", self._log),
            Route(f"{self.path}/decide/{{name}}", self._decide, methods=["POST"]),
        ]

    def version(self, path: str) -> str:
        """Return what changes with what a page shows: jobs, policy and the daemon, a log, or the audit log."""
        parts = urlsplit(path)
        if parts.path == f"{self.path}/audit":
            return "" if "before=" in parts.query else log_version(path, [self._kit.folder / LOG_FILE])
        if parts.path.startswith(f"{self.path}/job/") and parts.path.endswith("/log"):
            name = unquote(parts.path.removeprefix(f"{self.path}/job/").removesuffix("/log"))
            return next((log_version(path, f.logs) for f in job_folders(self._state) if f.path.name == name), "")
        files = [self._kit.policy_file]
        for folder in job_folders(self._state):
            files += [folder.path / "site.json", folder.path / "approval.json", folder.log]
        times = " ".join(str(file.stat().st_mtime_ns) if file.exists() else "-" for file in files)
        return f"{is_locked(self._kit.folder)} {times}"

    def close(self) -> None:
        """Do nothing: no file stays open."""

    def _list(self, request: Request) -> Response:
        rows = [self._row(folder) for folder in job_folders(self._state)]
        jobs = (
            table(("job", "submitted by", "app", "state", "why"), rows, 5, wrap=True) if rows else tag("p", "None yet.")
        )
        policy = table(("rule", "value"), _policy_rows(read_policy(self._kit.policy_file)), 2, wrap=True)
        identity = self._kit.identity
        return page(
            request,
            f"Site {identity.name} of {identity.federation}",
            live("daemon", self._daemon(), spoken=True),
            tag("h2", "Jobs"),
            live("jobs", jobs),
            tag("h2", "Policy"),
            tag("p", f"What {self._kit.policy_file} says beside the defaults. It overrules every job."),
            live("policy", policy),
            tag("p", link("Audit log of this site", f"{self.path}/audit")),
        )

    def _daemon(self) -> Element | None:
        """What the page says while no daemon works for the site."""
        if is_locked(self._kit.folder) is not False:
            return None
        start = f"Jobs wait until `fl-adapters site --kit {self._kit.folder}` is started."
        return tag("p", tag("strong", "No daemon of this site is running.", class_="bad"), f" {start}")

    def _row(self, folder: JobFolder) -> Sequence[str | Element]:
        job, record = folder.read()
        texts = [job.submitter, job.app, str(record["state"]), str(record.get("reason") or "")]
        return link(job.job, f"{self.path}/job/{quote(job.job, safe='')}"), *(printable(text, 500) for text in texts)

    def _job(self, request: Request) -> Response:
        folder = self._folder(request.path_params["name"])
        job, record = folder.read()
        shown = self._shown(folder)
        rows = [(name, printable(text, _SHOWN_CHARS)) for name, text in shown.items() if name != "settings"]
        waits = record["state"] == "waits for approval"
        log = printable("\n".join(tail(folder.log, _LOG_LINES)), 200_000, lines=True)
        return page(
            request,
            f"Job {job.job}",
            crumbs(link("Site", self.path), job.job),
            live("daemon", self._daemon(), spoken=True),
            live("state", tag("p", f"State: {record['state']}. {printable(str(record.get('reason') or ''), 500)}")),
            table(("asked", "for"), rows, 2, wrap=True),
            # a region of this name stays as it is if the job changes: what was not shown cannot be approved
            live(f"decision-{_digest(shown)}", _decision(job.job, shown) if waits else None),
            tag("h2", "Log"),
            tag("p", link("The whole log", f"{self.path}/job/{quote(job.job, safe='')}/log")),
            live("log", tag("pre", log or "The command has written nothing.", **_LOG)),
        )

    def _log(self, request: Request) -> Response:
        folder = self._folder(request.path_params["name"])
        name = folder.path.name
        back = crumbs(link("Site", self.path), link(name, f"{self.path}/job/{quote(name, safe='')}"), "log")
        return page(request, f"Log of {name}", back, log_view(request, folder.logs, f"Log of {name}"))

    def _audit(self, request: Request) -> Response:
        identity, before = self._kit.identity, asked_before(request)
        content: list[Content] = [tag("p", "No lines yet: the site's daemon writes them.")]
        if (self._kit.folder / LOG_FILE).exists():
            found = lines_before(self._kit.folder, SHOWN, before)
            content = audit_table(read_lines({"lines": found.entries, "begin": found.begin}), f"{self.path}/audit")
        check = "`fl-adapters audit verify` checks that no line is missing."
        return page(
            request,
            f"Audit log of {identity.name}",
            crumbs(link("Site", self.path), "audit"),
            tag("p", f"What {self._kit.folder / LOG_FILE} says. {check}", class_="soft"),
            live("lines", content),
        )

    async def _decide(self, request: Request) -> Response:
        return await run_in_threadpool(self._decided, request.path_params["name"], await form_of(request))

    def _decided(self, name: str, form: Mapping[str, str]) -> Response:
        shown = self._shown(self._folder(name))
        if form.get("seen") != _digest(shown):
            raise ConfigError(
                f"the job {name[:64]} has changed since it was shown", fix="look at it again, then decide"
            )
        approved = form.get("decision") == "approve"
        if not approved and form.get("decision") != "refuse":
            raise ConfigError("nothing was decided", fix="choose to approve or to refuse the job")
        reason = "" if approved else form.get("reason", "")[:500]
        take_decision(self._kit.folder, self._state, name, approved=approved, reason=reason, seen=shown)
        return RedirectResponse(f"{self.path}/job/{quote(name, safe='')}", 303)

    def _folder(self, name: str) -> JobFolder:
        found = next((folder for folder in job_folders(self._state) if folder.path.name == name), None)
        if found is None:
            raise ConfigError(f"there is no job {printable(name, 64)} at this site", fix="choose one of the list")
        return found

    def _shown(self, folder: JobFolder) -> dict[str, str]:
        policy, (job, _) = read_policy(self._kit.policy_file), folder.read()
        return {**describe(job, policy.exchange, policy.filters), "settings": settings_text(job)}


def _digest(shown: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()


def _decision(job: str, shown: Mapping[str, str]) -> Element:
    """Two forms, so that Enter in the reason to refuse cannot approve."""
    reason = tag("input", name="reason", maxlength=500, autocomplete="off")
    label = tag("label", tag("span", "Reason to refuse; the server and the other sites can read it"), reason)
    forms = []
    for decision, content in (("approve", []), ("refuse", [label])):
        seen = tag("input", type="hidden", name="seen", value=_digest(shown))
        button = tag("button", f"{decision.title()} {job}", type="submit", name="decision", value=decision)
        address = f"/site/decide/{quote(job, safe='')}"
        forms.append(tag("form", seen, content, button, method="post", action=address))
    return tag("div", forms)


def _policy_rows(policy: Policy) -> list[tuple[str, str]]:
    """Rules that the policy sets, by name, each with its value as it would be written."""
    values = policy.model_dump(mode="json", exclude_defaults=True)
    return [(name, printable(json.dumps(value, ensure_ascii=False), _SHOWN_CHARS)) for name, value in values.items()]
