"""Each role in a real browser: what is on the page, what its buttons do, and what is refused, by the table alone."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dashboards import Reader, dashboard_of, opened
from federation_bench import Site, at_once
from study import ADMINS, Study, readdressed, until

from fl_adapters.cli.pages.dashboard import _sections
from fl_runtime.errors import FederationError, PermissionDeniedError
from fl_runtime.trust.permissions import TABLE

W = {"w": np.zeros(3, np.float32)}
CALLS = {"Abort": "AbortJob", "Resume": "ResumeJob", "Delete": "DeleteJob"}
APPLIES = {
    "finished": {"DeleteJob"},
    "aborted": {"ResumeJob", "DeleteJob"},
    "running": {"AbortJob"},
    "queued": {"AbortJob"},
}
JOBS = {
    "lena-done": ("lena", "finished"),
    "lena-ended": ("lena", "aborted"),
    "lars-ended": ("lars", "aborted"),
    "lena-runs": ("lena", "running"),
    "lars-waits": ("lars", "queued"),
}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Study]:
    """A federation with jobs of two leads of two organisations, in all states that have acts."""
    with Study(tmp_path_factory.mktemp("roles")) as study:
        for name, (submitter, state) in JOBS.items():
            study.job(name, by=submitter)
            if state == "finished":
                sites = [study.site(site) for site in study.sites]
                at_once(sites, partial(Site.take_part, arrays=W, change=lambda task: W, job=name))
                assert study.server.wait_for_job(name, 30)
            elif state == "aborted":
                study.admin("ada").ask("AbortJob", job=name)
            assert state_of(study, name) == state
        yield study


def state_of(study: Study, job: str) -> str:
    """What the server says; "" once the job is deleted."""
    return next((str(record.state) for record in study.server.queue.records() if record.settings.name == job), "")


def permitted(name: str, call: str, submitter: str) -> bool:
    """Whether the table lets an admin make a call about a job of somebody."""
    organisation, role = ADMINS[name]
    scope = TABLE[call].allowed.get(role)
    fits = {"any": True, "organisation": organisation == ADMINS[submitter][0], "own": name == submitter}
    return scope is not None and fits[scope]


def dashboard_by_kit(study: Study, name: str, folder: Path) -> Any:
    return dashboard_of(*_sections(folder, readdressed(study, name), None, None, None))


def controls(tab: Any) -> set[str]:
    """What can be pressed or typed into on a page, besides links."""
    texts = tab.locator("main button, main summary, main input:not([type=hidden]), main textarea").all_inner_texts()
    return {text for text in texts if not text.startswith("Yes, ")} - {""}


@pytest.mark.parametrize("name", ADMINS)
def test_a_page_offers_what_the_table_allows_and_the_rest_is_refused_by_hand(
    study: Study, chromium: Any, tmp_path: Path, name: str
) -> None:
    role = ADMINS[name][1]
    with dashboard_by_kit(study, name, tmp_path) as reader:
        until(lambda: "lars-waits" in reader.page("/jobs"), "the jobs")
        with opened(chromium, reader, "/jobs") as tab:
            audit = ["Audit"] if role in TABLE["ReadAudit"].allowed else []
            assert tab.locator("header li").all_inner_texts() == ["Jobs", "Sites", *audit]
            submits = role in TABLE["SubmitJob"].allowed
            assert tab.get_by_role("link", name="Submit a job").count() == submits
            for job, (submitter, state) in JOBS.items():
                tab.goto(f"{reader.origin}/jobs/job/{job}")
                offered = {CALLS[text] for text in controls(tab)}
                assert offered == {call for call in APPLIES[state] if permitted(name, call, submitter)}, job
                archive = state in ("finished", "aborted") and role in TABLE["Download"].allowed
                assert tab.get_by_role("link", name="All as one archive").count() == archive
            tab.goto(f"{reader.origin}/sites")
            assert controls(tab) == set()

        before = {job: state_of(study, job) for job in JOBS}
        for job, (submitter, _) in JOBS.items():
            for call in CALLS.values():
                if not permitted(name, call, submitter):
                    status, _, text = reader.ask(f"/jobs/job/{job}", "POST", {"act": call, "confirm": job})
                    assert (status, f"may not {TABLE[call].does}" in text) == (400, True), text
                    assert "use a kit with another role" in text
        if not submits:
            fields = {"file": "app: train\nname: sneaked\n", "priority": "0"}
            status, _, text = reader.ask("/jobs/new", "POST", fields)
            assert (status, "may not submit a job" in text) == (400, True)
            assert "may not submit a job" in reader.ask("/jobs/new")[2]
            assert state_of(study, "sneaked") == ""
        if not audit:
            assert reader.ask("/audit")[0] == 404
        assert {job: state_of(study, job) for job in JOBS} == before


@pytest.mark.parametrize(("name", "submitter"), [("ada", "lars"), ("olga", "lena"), ("lena", "lena"), ("lars", "lars")])
def test_what_is_offered_is_done(study: Study, chromium: Any, tmp_path: Path, name: str, submitter: str) -> None:
    job = f"for-{name}"
    study.job(job, by=submitter)
    with (
        dashboard_by_kit(study, name, tmp_path) as reader,
        opened(chromium, reader, f"/jobs/job/{job}") as tab,
    ):
        for label, states in (("Abort", ("aborted",)), ("Resume", ("queued", "running")), ("Abort", ("aborted",))):
            tab.get_by_text(label, exact=True).click()
            tab.get_by_role("button", name=f"Yes, {label.lower()}").click()
            tab.get_by_text("The job is ").wait_for()
            assert state_of(study, job) in states
        if not permitted(name, "DeleteJob", submitter):
            assert controls(tab) == {"Resume"}
            return
        tab.get_by_text("Delete", exact=True).click()
        tab.get_by_label(f"Type {job} to confirm").fill(job)
        tab.get_by_role("button", name="Yes, delete").click()
        tab.get_by_text("The job is deleted.").wait_for()
        assert state_of(study, job) == ""


def test_the_kit_of_a_site_sees_its_own_page_alone(study: Study, chromium: Any, tmp_path: Path) -> None:
    with dashboard_by_kit(study, "north", tmp_path) as reader:
        with opened(chromium, reader, "/site") as tab:
            assert tab.locator("header li").all_inner_texts() == ["Site"]
            assert controls(tab) == set()
        by_hand(reader)
    client = study.admin("north")
    for call in ("SubmitJob", "AbortJob", "ResumeJob", "DeleteJob", "ReadAudit", "Watch", "Revoke"):
        assert "site" not in TABLE[call].allowed
        with pytest.raises(FederationError, match=f"may not {TABLE[call].does}") as refused:
            client.ask(call, job="lena-runs")
        assert isinstance(refused.value, PermissionDeniedError)
    assert state_of(study, "lena-runs") == "running"


def by_hand(reader: Reader) -> None:
    for path in ("/jobs", "/jobs/new", "/jobs/job/lena-runs", "/sites", "/audit", "/project", "/runs"):
        status, _, text = reader.ask(path)
        assert (status, "there is no such page" in text) == (404, True)
        assert reader.ask(path, "POST", {"act": "AbortJob"})[0] == 404
