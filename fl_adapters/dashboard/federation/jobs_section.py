"""The section "Jobs": the federation's queue, a page for each job, its log, its results, and a form for new ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib import resources
from itertools import chain, islice
from urllib.parse import quote, unquote, urlsplit
from xml.etree.ElementTree import Element

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from fl_adapters.dashboard.audit_lines import asked_before
from fl_adapters.dashboard.federation.desk import Desk
from fl_adapters.dashboard.federation.event_log import event_files, event_line
from fl_adapters.dashboard.federation.parts import clock, standing
from fl_adapters.dashboard.federation.results import archive_of, pieces_of
from fl_adapters.dashboard.federation.rights import ACTS
from fl_adapters.dashboard.federation.view import Federation, Job, JobDetails
from fl_adapters.dashboard.forms import act, form_of
from fl_adapters.dashboard.log_pages import log_version, log_view
from fl_adapters.dashboard.page import crumbs, link, live, page, tabs
from fl_adapters.environments.progress.text import size_text
from fl_adapters.environments.report.document import Content, table, tag
from fl_adapters.environments.report.page import run_sections, run_summary
from fl_runtime.errors import ConfigError
from fl_runtime.trust import permissions

_SITES_LISTED, _FILES_LISTED = 200, 500
_SCRIPT = "job_file.js"
_START = "app: train\nrounds: 10\n"


class JobsSection:
    """Pages about the jobs of a federation. A `Section`.

    Args:
        desk: What the pages about a federation share. This section closes it.
    """

    title = "Jobs"
    path = "/jobs"

    def __init__(self, desk: Desk) -> None:
        self._desk, self._rights = desk, desk.connection.rights

    def routes(self) -> Sequence[Route]:
        """Return the routes of the queue, of jobs, logs, results and acts."""
        job = f"{self.path}/job/{{name}}"
        return [
            Route(self.path, self._list),
            Route(f"{self.path}/{_SCRIPT}", _script),
            Route(f"{self.path}/new", self._new),
            Route(f"{self.path}/new", self._submit, methods=["POST"]),
            Route(job, self._job),
            Route(job, self._act, methods=["POST"]),
            Route(f"{job}/log", self._log),
            Route(f"{job}/results.zip", self._archive),
            Route(f"{job}/files/{{file:path}}", self._file),
        ]

    def version(self, path: str) -> str:
        """Return what changes with what the server tells, and with the events of the job on a page."""
        if "before=" in urlsplit(path).query:
            return ""  # of jobs that have ended long ago
        number = str(self._desk.connection.seen.number)
        parts = urlsplit(path).path.removeprefix(f"{self.path}/job/").split("/")
        if len(parts) > 2 or not urlsplit(path).path.startswith(f"{self.path}/job/"):
            return number
        federation = self._desk.connection.seen.federation
        job = federation.job(unquote(parts[0])) if federation else None
        events = self._desk.follow(job) if job else None
        fault = str(events.fault) if events else ""
        files = event_files(events.folder) if events else []
        return f"{number} {log_version(path, files)} {fault}"

    def close(self) -> None:
        """Close the connection, and remove what was copied."""
        self._desk.close()

    # -- what there is -----------------------------------------------------------------------------------------

    def _list(self, request: Request) -> Response:
        before = asked_before(request)
        if before is not None:
            return self._earlier(request, before)
        seen = self._desk.connection.seen
        shown = _listed(seen.federation) or tag("p", "No jobs yet.")
        new = tag("p", link("Submit a job", f"{self.path}/new")) if self._rights.may("SubmitJob") else None
        return page(
            request,
            f"Jobs of {seen.federation.name}" if seen.federation else "Jobs",
            live("standing", standing(seen), spoken=True),
            _done(request),
            new,
            live("jobs", shown),
        )

    def _earlier(self, request: Request, before: int) -> Response:
        """The page of jobs that ended before those that the server lists by itself."""
        back = crumbs(link("Jobs", self.path), "older")
        return page(request, "Older jobs", back, _listed(self._desk.earlier(before)) or tag("p", "No job is older."))

    def _job(self, request: Request) -> Response:
        seen = self._desk.connection.seen
        details = self._desk.details(request.path_params["name"])
        job = details.job
        events = self._desk.follow(job)
        missing = events.fault if events is not None else None
        return page(
            request,
            job.name,
            crumbs(link("Jobs", self.path), job.name),
            live("standing", standing(seen), spoken=True),
            _done(request),
            live("state", _state(job)),
            live("acts", self._acts(job)),
            tag("p", link("Log", f"{_address(job.name)}/log")),
            live("curves", tag("p", missing.what, class_="bad") if missing else None, self._curves(request, job)),
            live("sites", _sites(job)),
            live("files", self._files(details)),
            tag("section", tag("h2", "Job file"), tag("pre", details.settings)),
        )

    def _curves(self, request: Request, job: Job) -> list[Element]:
        """What the events of a training tell, as the page of a run shows it: the one asked for, else the last."""
        found = self._desk.runs.trainings(job.name)
        asked = next((number for number in found if request.query_params.get("training") == str(number)), max(found))
        try:
            run = self._desk.runs.record(found[asked])
        except ConfigError:  # no event has arrived yet
            return []
        links = {f"Training {number}": f"{_address(job.name)}?training={number}" for number in found}
        trainings = tabs(links, request, f"Training {asked}", "Trainings of the script") if len(found) > 1 else None
        shown = replace(run, job={}, command={})  # the page has the job file in a place of its own
        made = [*run_summary(shown, open_state=job.state), *run_sections(shown)]
        return [trainings, *made] if trainings is not None else made

    def _acts(self, job: Job) -> list[Element]:
        made = []
        for may in self._rights.acts_on(job):
            typed = job.name if may.call == "DeleteJob" else ""
            fields = {"act": may.call}
            made.append(act(may.name, _address(job.name), fields, warning=may.warning, confirm=typed))
        return made

    def _files(self, details: JobDetails) -> list[Element]:
        if not details.files or not self._rights.may("Download"):
            return []
        address = _address(details.job.name)
        rows: list[list[Content]] = [
            [link(file.path, f"{address}/files/{quote(file.path)}"), size_text(file.size_bytes)]
            for file in details.files[:_FILES_LISTED]
        ]
        whole = tag("p", link("All as one archive", f"{address}/results.zip"))
        return [tag("section", tag("h2", "Results"), whole, table(["file", "size"], rows))]

    def _log(self, request: Request) -> Response:
        job = self._desk.job(request.path_params["name"])
        events = self._desk.follow(job)
        files = event_files(events.folder) if events is not None else []
        back = crumbs(link(job.name, _address(job.name)), "log")
        shown = log_view(request, files, f"Log of {job.name}", event_line)
        standing_now = live("standing", standing(self._desk.connection.seen), spoken=True)
        return page(request, f"Log of {job.name}", back, standing_now, shown)

    # -- results -----------------------------------------------------------------------------------------------

    def _archive(self, request: Request) -> Response:
        details = self._results(request)
        pieces = archive_of(self._desk.connection.transport, details.job.name, details.files)
        return StreamingResponse(pieces, media_type="application/zip", headers=_attached(f"{details.job.name}.zip"))

    def _file(self, request: Request) -> Response:
        details, path = self._results(request), request.path_params["file"]
        file = next((file for file in details.files if file.path == path), None)
        if file is None:
            raise ConfigError(f"the job has no file {path[:200]!r}", fix="choose one on the job's page")
        pieces = pieces_of(self._desk.connection.transport, details.job.name, file)
        first = list(islice(pieces, 1))  # so that a refusal is a page, and no broken download
        headers = {**_attached(path.rpartition("/")[2]), "content-length": str(file.size_bytes)}
        return StreamingResponse(chain(first, pieces), media_type="application/octet-stream", headers=headers)

    def _results(self, request: Request) -> JobDetails:
        details = self._desk.details(request.path_params["name"])
        if not details.files:
            raise ConfigError(f"the job {details.job.name} has no results", fix="wait for its end")
        return details

    # -- acts --------------------------------------------------------------------------------------------------

    async def _act(self, request: Request) -> Response:
        form = await form_of(request)
        return await run_in_threadpool(self._carry_out, request.path_params["name"], form.get("act", ""), form)

    def _carry_out(self, name: str, call: str, form: Mapping[str, str]) -> Response:
        if not any(known.call == call for known in ACTS):
            raise ConfigError(f"a job cannot be told to {call[:50]!r}", fix="use the buttons on the job's page")
        if call == "DeleteJob" and form.get("confirm") != name:
            raise ConfigError(f"{name} was not deleted: its name was not typed", fix="go back, and type its name")
        self._desk.connection.ask(call, job=name)
        there = self.path if call == "DeleteJob" else _address(name)
        return RedirectResponse(f"{there}?done={call}", 303)

    def _new(self, request: Request) -> Response:
        if not self._rights.may("SubmitJob"):
            raise permissions.denied(self._rights.who, "SubmitJob")
        box = tag("textarea", _START, id="job-file", name="file", required="", spellcheck="false")
        form = tag(
            "form",
            tag("label", tag("span", "Job file, as for `fl-adapters job submit`"), box),
            tag(
                "label",
                tag("span", "Or take it from a file"),
                tag("input", type="file", accept=".yml,.yaml", data_into="job-file"),
            ),
            tag(
                "label",
                tag("span", "Priority; jobs with a higher one start first"),
                tag("input", type="number", name="priority", value="0", min="-100", max="100"),
            ),
            tag("button", "Submit the job", type="submit"),
            method="post",
            action=f"{self.path}/new",
        )
        script = tag("script", src=f"{self.path}/{_SCRIPT}", type="module")
        return page(request, "Submit a job", crumbs(link("Jobs", self.path), "new"), form, script)

    async def _submit(self, request: Request) -> Response:
        form = await form_of(request)
        try:
            priority = int(form.get("priority") or 0)
        except ValueError:
            raise ConfigError("the priority is not a whole number", fix="use -100 to 100") from None
        name = await run_in_threadpool(partial(self._desk.submit, form.get("file", ""), priority))
        return RedirectResponse(f"{_address(name)}?done=SubmitJob", 303)


def _script(request: Request) -> Response:
    text = resources.files("fl_adapters.dashboard.federation").joinpath(_SCRIPT).read_bytes()
    return Response(text, media_type="text/javascript", headers={"cache-control": "no-cache"})


def _listed(federation: Federation | None) -> list[Element]:
    """The table of jobs, with a link to those that ended earlier; nothing if there are no jobs."""
    if federation is None or not federation.jobs:
        return []
    columns = ["job", "state", "progress", "sites", "submitted by", "submitted"]
    older = tag("p", link("Older jobs", f"{JobsSection.path}?before={federation.older}")) if federation.older else None
    shown = table(columns, [_row(job) for job in federation.jobs], numbers_from=9)
    return [shown, older] if older is not None else [shown]


def _row(job: Job) -> list[Content]:
    sites = ", ".join(job.sites) if len(job.sites) < 5 else f"{len(job.sites)} sites"
    style = {"finished": "good", "failed": "bad"}.get(job.state)
    state = tag("span", job.says, class_=f"long {style or ''}".strip())
    return [link(job.name, _address(job.name)), state, _bar(job), sites, job.submitted_by, clock(job.submitted_at)]


def _bar(job: Job) -> Element | None:
    share = job.progress
    if share is None:
        return None
    return tag("progress", class_="progress", max=1, value=share, aria_label=f"rounds of {job.name}")


def _state(job: Job) -> list[Element]:
    times = [("submitted", job.submitted_at), ("started", job.started_at), ("ended", job.ended_at)]
    when = ", ".join(f"{what} {clock(at)}" for what, at in times if at)
    made = [tag("p", tag("strong", job.says), " ", _bar(job), role="status")]
    if job.error is not None and job.error.fix:
        made.append(tag("p", f"What to do: {job.error.fix}"))
    return [*made, tag("p", f"{job.app}, by {job.submitted_by}; {when}", class_="soft")]


def _sites(job: Job) -> list[Element]:
    if job.ended:
        return []
    states = job.site_states or dict.fromkeys(job.sites, job.state)
    rows: list[list[Content]] = [[name, state] for name, state in islice(states.items(), _SITES_LISTED)]
    return [tag("section", tag("h2", "Sites at this moment"), table(["site", "state"], rows, numbers_from=2))]


def _done(request: Request) -> Element | None:
    """What was just done, by the address that the browser was sent to."""
    done = request.query_params.get("done", "")
    said = {"SubmitJob": "in the queue", **{known.call: known.done for known in ACTS}}.get(done)
    return tag("p", tag("strong", f"The job is {said}.", class_="good"), role="status") if said else None


def _address(name: str) -> str:
    return f"{JobsSection.path}/job/{quote(name, '')}"


def _attached(name: str) -> dict[str, str]:
    return {"content-disposition": f"attachment; filename*=UTF-8''{quote(name, '')}"}
