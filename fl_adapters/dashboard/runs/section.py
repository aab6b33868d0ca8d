"""The section "Runs": a list of the runs in a folder, a page for each with live curves, their logs and comparisons."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote, urlsplit
from xml.etree.ElementTree import Element

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from fl_adapters.dashboard.log_pages import log_version, log_view
from fl_adapters.dashboard.page import crumbs, link, live, page, tabs
from fl_adapters.dashboard.runs.folder import Overview, RunsFolder
from fl_adapters.environments.report.comparison import comparison_sections, summaries
from fl_adapters.environments.report.document import table, tag
from fl_adapters.environments.report.page import run_page, run_sections, run_summary
from fl_runtime.errors import ConfigError
from fl_runtime.transport.waiting import duration_text

_MOST_COMPARED = 12
_SHOWN = {
    "": ("Metrics by round", "Warnings"),
    "sites": ("Time and bytes", "Sites", "Each model on each site's data", "Filters"),
    "settings": ("Use the model", "Settings", "Run it again"),
}
"""Sections of the report by the part of a run's page."""
_REPORT_HEADERS = {"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"}


class RunsSection:
    """Pages about the runs in a folder. A `Section`.

    Args:
        folder: Folder that holds those of runs, such as `runs`.
    """

    title = "Runs"
    path = "/runs"

    def __init__(self, folder: Path) -> None:
        self._runs = RunsFolder(folder)

    def routes(self) -> Sequence[Route]:
        """Return the routes of the list, of runs, logs, reports and comparisons."""
        return [
            Route(self.path, self._list),
            Route(f"{self.path}/compare", self._compare),
            Route(f"{self.path}/report/{{name:path}}", self._report),
            Route(f"{self.path}/log/{{site}}/{{name:path}}", self._log),
            Route(f"{self.path}/run/{{name:path}}", self._run),
        ]

    def version(self, path: str) -> str:
        """Return what changes with the files that a page shows."""
        parts = urlsplit(path)
        _, _, rest = parts.path.removeprefix(self.path).partition("/")
        kind, _, name = rest.partition("/")
        match kind:
            case "":
                return " ".join(f"{name}:{self._runs.version(name)}" for name in self._runs.names())
            case "compare":
                return " ".join(self._runs.version(name) for field, name in parse_qsl(parts.query) if field == "run")
            case "log":
                return self._log_version(name, path)
            case "run":
                return " ".join(map(self._runs.version, self._runs.trainings(unquote(name)).values()))
        return ""

    def close(self) -> None:
        """Do nothing: no file stays open."""

    def _list(self, request: Request) -> Response:
        if runs := self._runs.overviews():
            columns = ["compare", "run", "state", "rounds", "best", "sites", "began", "time"]
            where = tag("p", f"In {self._runs.folder}, the newest first.", class_="soft")
            listed = table(columns, [_row(run) for run in runs], numbers_from=8)
            content = [where, listed, tag("p", tag("button", "Compare the ticked runs"))]
        else:
            start = tag("pre", "fl-adapters simulate train.py --sites 3 --rounds 5")
            content = [tag("p", f"No runs in {self._runs.folder} yet. Start one:"), start]
        return page(request, "Runs", tag("form", live("runs", content), action=f"{self.path}/compare"))

    def _run(self, request: Request) -> Response:
        name, shown = request.path_params["name"], request.query_params.get("show", "")
        with self._runs.unchanged():
            run = self._runs.record(name)
            content: list[Element] = list(run_sections(run, _SHOWN.get(shown, _SHOWN[""])))
            summary = run_summary(run, open_state=self._runs.state(run))
        if shown == "sites":
            content += self._outputs(name)
        here = f"{self.path}/run/{_quoted(name)}"
        parts = {"Curves": here, "Sites and costs": f"{here}?show=sites", "Settings": f"{here}?show=settings"}
        return page(
            request,
            run.name,
            crumbs(link("Runs", self.path), name),
            live("trainings", self._trainings(request, name)),
            live("summary", summary),
            tabs(parts, request),
            live("sections", content),
            tag("p", link("The report: all of it in one file to keep or send", f"{self.path}/report/{_quoted(name)}")),
        )

    def _trainings(self, request: Request, name: str) -> Element | None:
        """The navigation between the trainings of a script, if it trains more than once."""
        found = self._runs.trainings(name)
        links = {f"Training {number}": f"{self.path}/run/{_quoted(path)}" for number, path in found.items()}
        here = next((f"Training {number}" for number, path in found.items() if path == name), "")
        return tabs(links, request, here, "Trainings of the script") if len(found) > 1 else None

    def _outputs(self, name: str) -> list[Element]:
        """The section with links to the output of each site, if there is any."""
        sites = self._runs.logs(name)
        items = [tag("li", link(site, f"{self.path}/log/{quote(site, '')}/{_quoted(name)}")) for site in sites]
        return [tag("section", tag("h2", "Output of the sites"), tag("ul", items))] if items else []

    def _log(self, request: Request) -> Response:
        name, site = request.path_params["name"], request.path_params["site"]
        found = self._runs.logs(name)
        if site not in found:
            raise ConfigError(f"there is no output of site {site[:100]!r}", fix="choose a site on the run's page")
        back = crumbs(link(name, f"{self.path}/run/{_quoted(name)}"), "output")
        shown = log_view(request, [found[site]], f"Output of {site}")
        return page(request, f"Output of {site}", back, shown, tag("p", str(found[site]), class_="soft"))

    def _log_version(self, rest: str, path: str) -> str:
        site, _, name = rest.partition("/")
        try:
            return log_version(path, [self._runs.logs(unquote(name))[unquote(site)]])
        except (ConfigError, KeyError):
            return ""

    def _report(self, request: Request) -> Response:
        with self._runs.unchanged():
            text = run_page(self._runs.record(request.path_params["name"]))
        return HTMLResponse(text, headers=_REPORT_HEADERS)

    def _compare(self, request: Request) -> Response:
        names = list(dict.fromkeys(request.query_params.getlist("run")))
        if len(names) < 2 or len(names) > _MOST_COMPARED:
            raise ConfigError(
                f"{len(names)} runs are ticked, and a comparison shows 2 to {_MOST_COMPARED}",
                fix="go back to the list of runs, and tick the runs to compare",
            )
        with self._runs.unchanged():
            content = list(comparison_sections(summaries([self._runs.record(name) for name in names])))
        back = crumbs(link("Runs", self.path), "comparison")
        return page(request, f"Comparison of {len(names)} runs", back, live("comparison", content))


def _row(run: Overview) -> list[Element | str | None]:
    rounds = f"{run.finished} of {run.planned}" if run.planned else str(run.finished)
    bar: Element | None = None
    if run.state == "running" and run.planned:
        bar = tag(
            "progress", class_="progress", max=run.planned, value=run.finished, aria_label=f"rounds of {run.name}"
        )
    style = {"finished": "good", "failed": "bad"}.get(run.state)
    state = tag("span", run.state, **({"class_": style} if style else {}))
    began = time.strftime("%d %b %H:%M", time.localtime(run.began)) if run.began else ""
    box = tag("input", type="checkbox", name="run", value=run.name, aria_label=f"Compare {run.name}")
    shown = link(run.name, f"/runs/run/{_quoted(run.name)}")
    return [
        box,
        shown,
        state,
        tag("span", rounds, " ", bar),
        run.best,
        str(run.sites),
        began,
        duration_text(run.last - run.began),
    ]


def _quoted(name: str) -> str:
    return quote(name, safe="/")
