"""Every kind of page with hostile texts in it: nothing runs, nothing breaks, and keyboard and screen reader suffice."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dashboards import Reader, dashboard_of, events_of, opened
from federation_bench import at_once
from page_checks import faults_of, keyboard_faults_of
from study import Study, readdressed, until

from fl_adapters.cli.pages.site_section import SiteSection
from fl_adapters.cli.site.assignment import Assignment
from fl_adapters.cli.site.records import JobFolder
from fl_adapters.dashboard.federation.sections import federation_sections
from fl_adapters.dashboard.provisioning.desk import ProjectDesk
from fl_adapters.dashboard.provisioning.section import ProjectSection
from fl_adapters.dashboard.runs.section import RunsSection
from fl_runtime.types import RunSettings

W = {"w": np.zeros(3, np.float32)}
SCRIPT = "\"'><img src=x onerror=\"document.title='hacked'\"></script><script>document.title='hacked'</script>"
HOSTILE = f"{SCRIPT}\u202eright to left\u200f\x1b[31m{'x' * 3000}"
METRIC = f"{SCRIPT}{'m' * 190}"[:200]  # the longest name that a server takes
JOB = "a" + "b" * 63
PAGES = [
    "/runs", "/runs/run/hostile", "/runs/run/hostile?show=sites", "/runs/run/hostile?show=settings",
    "/runs/log/north/hostile", "/runs/compare?run=hostile&run=plain",
    "/jobs", "/jobs/new", f"/jobs/job/{JOB}", f"/jobs/job/{JOB}/log", "/jobs/job/done", "/sites", "/audit",
    "/project", "/site", "/site/job/tumour", "/site/job/tumour/log", "/site/audit",
]  # fmt: skip


def runs(folder: Path) -> Path:
    for name, sites in (("hostile", (HOSTILE, f"other {HOSTILE}")), ("plain", ("north", "south"))):
        events = list(events_of(rounds=3, names=sites))
        for event in events:
            if name == "hostile" and event["data"].get("metrics"):
                event["data"]["metrics"][METRIC] = 0.5
        log = folder / name / "sites" / "north" / "log.txt"
        log.parent.mkdir(parents=True)
        log.write_text(HOSTILE)
        (folder / name / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


def waiting(kit: Path) -> Path:
    settings = json.loads(json.dumps(asdict(RunSettings("tumour", ("north", "south"), 2))))
    told = {"job": "tumour", "app": HOSTILE, "submitted_by": "", "index": 0, "count": 2, "settings": settings}
    JobFolder(kit / "jobs/tumour").write(Assignment.of(told), "waits for approval", HOSTILE)
    JobFolder(kit / "jobs/tumour").log.write_text(HOSTILE)
    return kit


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    """A dashboard with every section."""
    folder = tmp_path_factory.mktemp("pages")
    with Study(folder / "study") as study:
        study.job("done")
        metrics = {METRIC: 0.5}
        at_once(
            [study.site(site) for site in study.sites],
            lambda site: site.take_part(W, lambda task: W, job="done", metrics=metrics),
        )
        assert study.server.wait_for_job("done", 30)
        study.job(JOB)
        running = study.server.queue.job(JOB)
        assert running is not None
        running.server.trainings.note_line("north", "info", HOSTILE)
        sections = [
            RunsSection(runs(folder / "runs")),
            *federation_sections(readdressed(study, "ada")),
            ProjectSection(ProjectDesk(study.kits, lambda: b"")),
            SiteSection(waiting(study.kits / "north"), study.kits / "north"),
        ]
        with dashboard_of(*sections) as reader:
            until(lambda: JOB in reader.page("/jobs"), "the jobs")
            until(lambda: "xxx" in reader.page(f"/jobs/job/{JOB}/log"), "the line of the site")
            yield reader


@pytest.fixture(scope="module", params=[1280, 400])
def tab(request: pytest.FixtureRequest, reader: Reader, chromium: Any) -> Iterator[Any]:
    with opened(chromium, reader, "/runs", viewport={"width": request.param, "height": 900}) as tab:
        yield tab


@pytest.mark.parametrize("path", PAGES)
def test_a_page_with_hostile_texts_is_whole_named_and_walked_by_keyboard(
    tab: Any, reader: Reader, path: str, tmp_path: Path
) -> None:
    tab.goto(reader.origin + path)
    tab.wait_for_load_state("load")
    tab.screenshot(path=tmp_path / "page.png", full_page=True)
    assert faults_of(tab) == []
    assert keyboard_faults_of(tab) == []
    assert "hacked" not in tab.title()
    assert not set("\u202e\u200f\x1b") & set(tab.locator("body").inner_text())


def test_the_checks_find_what_is_wrong(tab: Any, reader: Reader) -> None:
    tab.goto(reader.origin + "/runs")
    tab.evaluate(
        """() => document.querySelector("main").insertAdjacentHTML("beforeend", `<h4>deep</h4><input id="content">
           <div style="width: 3000px"><button style="outline: none"></button></div>
           <table><tr><td>1</td></tr></table>`)"""
    )
    found = " ".join(faults_of(tab))
    for fault in ("headings jump", "an id twice", "pixels wide", "a button without", "a textbox without", "a table"):
        assert fault in found
    tab.evaluate("document.querySelector('main button[style]').tabIndex = 1")
    assert [fault.partition(":")[0] for fault in keyboard_faults_of(tab)][-1].startswith("the order is")
