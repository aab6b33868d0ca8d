"""The dashboard's pages about a federation: over HTTP for every role, and in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation_bench import at_once
from page_checks import faults_of
from promptness import PROMPT_S
from study import ADMINS, Study, readdressed, until

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from dashboards import Reader, dashboard_of, events_of, opened

from fl_adapters.dashboard.federation.connection import FederationConnection
from fl_adapters.dashboard.federation.rights import ACTS, Rights
from fl_adapters.dashboard.federation.sections import federation_sections, sections_of
from fl_runtime.errors import ConfigError
from fl_runtime.trust.identity import Identity
from fl_runtime.trust.permissions import TABLE

W = {"w": np.zeros(3, np.float32)}
HOSTILE = "<img src=x onerror=document.title='hacked'><script>document.title='hacked'</script>\x1b[2J"


def post(reader: Reader, path: str, **fields: str) -> tuple[int, str]:
    """Send a form. Returns the status, and where the browser is sent or what it is shown."""
    status, headers, text = reader.ask(path, "POST", fields)
    return status, headers.get("location") or text


def downloaded(reader: Reader, path: str) -> tuple[bytes, str]:
    """Return a file and the name that the browser gives it."""
    connection = HTTPConnection(reader.host, timeout=30)
    connection.request("GET", path, headers={"Cookie": reader.cookie})
    answer = connection.getresponse()
    assert answer.status == 200
    return answer.read(), answer.headers["content-disposition"]


def test_the_dashboard_of_a_kit_is_that_of_its_admin_and_a_sites_kit_has_none(study: Study) -> None:
    sections = federation_sections(readdressed(study, "mina"))
    assert [section.title for section in sections] == ["Jobs", "Sites"]
    with dashboard_of(*sections) as reader:
        until(lambda: "2 rounds" in reader.page("/jobs"), "the finished job in the list")
    with pytest.raises(ConfigError, match="admin"):
        federation_sections(study.kits / "north")


@contextmanager
def seen_by(study: Study, name: str) -> Iterator[Reader]:
    """The dashboard of a federation, with the certificate of an admin."""
    organisation, role = ADMINS[name]
    who = Identity("study", "admin", name, organisation, role)  # type: ignore[arg-type]
    connection = FederationConnection(study.transport(name), Rights(who))
    with dashboard_of(*sections_of(connection)) as reader:
        until(lambda: connection.seen.federation, "the server's first answer")
        yield reader


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Study]:
    """A federation with a job that has finished."""
    with Study(tmp_path_factory.mktemp("pages")) as study:
        study.job("done", rounds=2)
        at_once([study.site(site) for site in study.sites], lambda s: s.take_part(W, lambda task: W, job="done"))
        assert study.server.wait_for_job("done", 30)
        yield study


def offered(page: str) -> set[str]:
    return set(re.findall(r'name="act" value="([A-Za-z]+)"', page))


def by_the_table(name: str, call: str, submitter: str) -> bool:
    organisation, role = ADMINS[name]
    scope = TABLE[call].allowed.get(role)
    return {
        "any": True,
        "organisation": organisation == ADMINS[submitter][0],
        "own": name == submitter,
        None: False,
    }[scope]


@pytest.mark.parametrize("name", ADMINS)
def test_each_role_sees_and_can_do_what_the_table_of_permissions_says(study: Study, name: str) -> None:
    job = f"of-lars-for-{name}"
    study.job(job, by="lars")
    role = ADMINS[name][1]
    with seen_by(study, name) as reader:
        page = reader.page(f"/jobs/job/{job}")
        states = {"done": ("lena", "finished"), job: ("lars", "running")}
        for shown, (submitter, state) in states.items():
            allowed = {act.call for act in ACTS if state in act.states and by_the_table(name, act.call, submitter)}
            assert offered(reader.page(f"/jobs/job/{shown}")) == allowed
        listed = reader.page("/jobs")
        assert ("Submit a job" in listed) == (role in TABLE["SubmitJob"].allowed)
        assert ('href="/audit"' in listed) == (role in TABLE["ReadAudit"].allowed)
        assert reader.ask("/audit")[0] == (200 if role in TABLE["ReadAudit"].allowed else 404)
        assert "results.zip" in reader.page("/jobs/job/done")

        status, answer = post(reader, f"/jobs/job/{job}", act="AbortJob")  # whether or not it was offered
        if by_the_table(name, "AbortJob", "lars"):
            assert (status, answer) == (303, f"/jobs/job/{job}?done=AbortJob")
            assert "The job is aborted." in reader.page(answer)
        else:
            assert status == 400
            assert "may not abort a job" in answer
            assert "use a kit with another role" in answer
            study.admin("ada").ask("AbortJob", job=job)
        status, answer = post(reader, "/jobs/new", file=f"app: train\nname: by-{name}\nrounds: 1\n", priority="5")
        if role in TABLE["SubmitJob"].allowed:
            assert (status, answer) == (303, f"/jobs/job/by-{name}?done=SubmitJob")
            assert "app: train" in reader.page(answer)
            study.admin("ada").ask("AbortJob", job=f"by-{name}")
        else:
            assert (status, "may not submit a job" in answer) == (400, True)
        assert "north" in reader.page("/sites")
        assert page


def test_a_lead_submits_resumes_downloads_and_deletes_and_nothing_happens_unasked(study: Study, tmp_path: Path) -> None:
    study.job("mine", by="lena")
    with seen_by(study, "lena") as reader:
        assert reader.ask("/jobs/job/mine", "POST", {"act": "AbortJob"}, Origin="http://evil.example")[0] == 403
        assert reader.ask("/jobs/job/mine?act=AbortJob")[0] == 200
        assert study.admin("lena").ask("ShowJob", job="mine")["state"] == "running"
        assert post(reader, "/jobs/job/mine", act="AbortJob")[0] == 303
        assert offered(reader.page("/jobs/job/mine")) == {"ResumeJob", "DeleteJob"}
        assert post(reader, "/jobs/job/mine", act="ResumeJob")[0] == 303
        assert study.admin("lena").ask("ShowJob", job="mine")["state"] == "running"
        assert "has not ended" in post(reader, "/jobs/job/mine", act="DeleteJob", confirm="mine")[1]
        assert post(reader, "/jobs/job/mine", act="AbortJob")[0] == 303
        assert "its name was not typed" in post(reader, "/jobs/job/mine", act="DeleteJob", confirm="other")[1]
        assert post(reader, "/jobs/job/mine", act="DeleteJob", confirm="mine") == (303, "/jobs?done=DeleteJob")
        assert "there is no job" in reader.ask("/jobs/job/mine")[2]

        for text, says in (("rounds: [", "is not valid YAML"), ("rounds: -1\napp: x", "rounds"), ("", "not a table")):
            status, answer = post(reader, "/jobs/new", file=text)
            assert (status, says in answer) == (400, True), answer
            assert "fl-dashboard-" not in answer, "no path of this machine"

        data, named = downloaded(reader, "/jobs/job/done/files/model/model.safetensors")
        assert data == (study.runs / "done/model/model.safetensors").read_bytes()
        assert named == "attachment; filename*=UTF-8''model.safetensors"
        archive = tmp_path / "done.zip"
        archive.write_bytes(downloaded(reader, "/jobs/job/done/results.zip")[0])
        shutil.unpack_archive(archive, tmp_path)
        assert (tmp_path / "done/events.jsonl").read_bytes() == (study.runs / "done/events.jsonl").read_bytes()
        assert reader.ask("/jobs/job/done/files/server/journal.db")[0] == 400
        until(lambda: "round finished in round 2" in reader.page("/jobs/job/done/log"), "the log")


def test_the_page_of_a_job_shows_the_curves_of_each_training(study: Study) -> None:
    study.job("folds", rounds=1)
    at_once([study.site(site) for site in study.sites], lambda s: s.take_part(W, lambda task: W, job="folds"))
    assert study.server.wait_for_job("folds", 30)
    for number, rounds in ((2, 3), (3, 5)):  # as the server leaves those of a script that trains more than once
        later = study.runs / "folds" / str(number)
        later.mkdir()
        (later / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events_of(2, rounds)))
    with seen_by(study, "mina") as reader:
        page = until(lambda: "5 of 5" in (text := reader.page("/jobs/job/folds")) and text, "the last training")
        assert '<a href="/jobs/job/folds?training=3" aria-current="page">Training 3<' in page
        second = reader.page("/jobs/job/folds?training=2")
        assert "3 of 3" in second and '?training=2" aria-current="page">Training 2<' in second
        assert "<polyline" in page and "<polyline" in second
        assert "1 of 1" in reader.page("/jobs/job/folds?training=1")
        assert "5 of 5" in reader.page("/jobs/job/folds?training=../1")
        assert "Training 1" not in reader.page("/jobs/job/done")


def test_jobs_that_ended_long_ago_are_paged_through_in_a_browser(study: Study, chromium: Any) -> None:
    admin, names = study.admin("ada"), [f"past-{number}" for number in range(1, 26)]
    for name in names:
        study.job(name)
        admin.ask("AbortJob", job=name)
    with seen_by(study, "lena") as reader:
        until(lambda: names[-1] in reader.page("/jobs"), "the last job")
        with opened(chromium, reader, "/jobs", viewport={"width": 400, "height": 800}) as tab:
            assert _jobs_on(tab) == names[:4:-1]
            tab.get_by_role("link", name="Older jobs").press("Enter")
            tab.get_by_role("heading", level=1, name="Older jobs").wait_for()
            assert _jobs_on(tab)[:5] == names[4::-1]
            assert faults_of(tab) == []
            tab.get_by_role("link", name=names[0], exact=True).click()
            tab.get_by_text("aborted").first.wait_for()
        status, _, text = reader.ask("/jobs?before=1")
        assert (status, "No job is older." in text) == (200, True)
    for name in names:
        admin.ask("DeleteJob", job=name)


def test_a_log_longer_than_a_page_is_paged_through(study: Study) -> None:
    study.job("talks")
    running = study.server.queue.job("talks")
    assert running is not None
    for number in range(1200):
        running.server.trainings.note_line("north", "info", f"line {number} {HOSTILE}")
    study.admin("ada").ask("AbortJob", job="talks")
    with seen_by(study, "mina") as reader:
        until(lambda: "line 1199" in reader.page("/jobs/job/talks/log"), "the last line")
        address, pages = "/jobs/job/talks/log", list[list[int]]()
        while address:
            text = reader.page(address)
            assert "<script>document" not in text and "\x1b" not in text
            pages.insert(0, [int(number) for number in re.findall(r"line (\d+)", text)])
            older = re.search(r'href="([^"]+)">Older lines<', text)
            address = older[1] if older else ""
        assert [number for page in pages for number in page] == list(range(1200))
        assert len(pages) > 2 and max(map(len, pages)) <= 500
        assert "Newest lines" in reader.page("/jobs/job/talks/log?after=0")


def test_in_a_browser_a_job_is_submitted_by_keyboard_followed_within_a_second_and_aborted(
    study: Study, chromium: Any, tmp_path: Path
) -> None:
    file = tmp_path / "tumour.yml"
    file.write_text("app: train\nname: typed\nrounds: 2\n")
    narrow = {"width": 400, "height": 800}
    with (
        seen_by(study, "ada") as reader,
        opened(chromium, reader, "/jobs", viewport=narrow) as page,
    ):
        page.get_by_role("link", name="Submit a job").focus()
        page.keyboard.press("Enter")
        page.get_by_label("Or take it from a file").set_input_files(file)
        until(lambda: "typed" in page.locator("#job-file").input_value(), "the file's text in the form")
        page.get_by_role("button", name="Submit the job").focus()
        page.keyboard.press("Enter")
        page.get_by_text("The job is in the queue.").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")

        page.goto(f"{reader.origin}/jobs/job/typed")
        page.wait_for_load_state("load")
        sites = [study.site(name) for name in study.sites]
        for site in sites:
            site.join("typed")
        at_once(sites, lambda site: site.register(W))
        tasks = dict(zip((site.name for site in sites), at_once(sites, lambda site: site.start(W)), strict=True))
        study.server.queue.job("typed").server.trainings.note_line("north", "info", HOSTILE)  # type: ignore[union-attr]
        for site in sites:
            site.submit(tasks[site.name], W, metrics={"train_loss": 0.25})
        at = time.monotonic()
        page.get_by_text("round 2 of 2").first.wait_for(timeout=10_000)
        page.get_by_role("heading", name="Metrics by round").wait_for(timeout=10_000)
        assert time.monotonic() - at < 2 * PROMPT_S, "an event is shown within a second, and drawn"
        _look(page, tmp_path, "job")

        page.goto(f"{reader.origin}/jobs/job/typed/log")
        page.get_by_text("<img src=x").wait_for()
        assert page.title().startswith("Log of typed")
        page.goto(f"{reader.origin}/jobs/job/typed")
        page.get_by_text("Abort", exact=True).focus()
        page.keyboard.press("Enter")
        page.get_by_role("button", name="Yes, abort").focus()
        page.keyboard.press("Enter")
        page.get_by_text("The job is aborted.").wait_for()
        for name in ("jobs", "sites", "audit"):
            page.goto(f"{reader.origin}/{name}")
            page.locator("table").wait_for()
            assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), name
            _look(page, tmp_path, name)


def _jobs_on(tab: Any) -> list[str]:
    return [str(name) for name in tab.locator("tbody td:first-child").all_inner_texts()]


def _look(page: object, folder: Path, name: str) -> None:
    page.screenshot(path=folder / f"{name}.png", full_page=True)  # type: ignore[attr-defined]
