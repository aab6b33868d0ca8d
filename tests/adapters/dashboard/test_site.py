"""A site's own page: its jobs and policy, decisions about what was shown, and nothing of an admin's."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from dashboards import Reader, dashboard_of, opened
from study import project

from fl_adapters.cli.pages.dashboard import _sections
from fl_adapters.cli.pages.site_section import SiteSection
from fl_adapters.cli.site.assignment import Assignment
from fl_adapters.cli.site.records import JobFolder
from fl_adapters.participant.policy_gate import KitPolicyGate
from fl_runtime.errors import ConfigError
from fl_runtime.trust.authority import Authority
from fl_runtime.trust.kits import write_kit
from fl_runtime.types import RunSettings

HOSTILE = "<script>alert(1)</script>\x1b[31m"


def waiting(kit: Path, name: str = "tumour", rounds: int = 2) -> Assignment:
    settings = json.loads(json.dumps(asdict(RunSettings(name, ("north", "south"), rounds))))
    told = {"job": name, "app": HOSTILE, "submitted_by": "", "index": 0, "count": 2, "settings": settings}
    job = Assignment.of(told)
    JobFolder(kit / "jobs" / name).write(job, "waits for approval", HOSTILE)
    return job


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    authority = Authority.create(tmp_path / "authority", project())
    write_kit(tmp_path / "north", authority, authority.project.participant("north"))
    (tmp_path / "north/policy.yml").write_text("approve: ask\nmin_cohort: 2\n")
    return tmp_path / "north"


@pytest.fixture
def reader(kit: Path) -> Iterator[Reader]:
    with dashboard_of(SiteSection(kit, kit)) as reader:
        yield reader


def seen(page: str) -> str:
    found = re.search(r'name="seen" value="(\w+)"', page)
    assert found, page
    return found[1]


@pytest.mark.parametrize("decision", ["approve", "refuse"])
def test_a_job_that_waits_is_decided_for_the_daemon(reader: Reader, kit: Path, decision: str) -> None:
    job = waiting(kit)
    assert "waits for approval" in reader.page("/site")
    fields = {"seen": seen(reader.page("/site/job/tumour")), "decision": decision, "reason": "no vote"}
    assert reader.ask("/site/decide/tumour", "POST", fields)[0] == 303
    found = KitPolicyGate(kit).decision_on(job.settings)
    assert found is not None and found.approved == (decision == "approve")
    assert found.reason == ("" if found.approved else "no vote")


def test_a_job_that_changed_after_it_was_shown_is_not_decided(reader: Reader, kit: Path) -> None:
    waiting(kit)
    shown = seen(reader.page("/site/job/tumour"))
    changed = waiting(kit, rounds=99)
    status, _, text = reader.ask("/site/decide/tumour", "POST", {"seen": shown, "decision": "approve"})
    assert status == 400 and "has changed since it was shown" in text
    assert KitPolicyGate(kit).decision_on(changed.settings) is None


def test_on_an_open_page_a_job_that_changes_keeps_what_was_shown(reader: Reader, kit: Path, chromium: Any) -> None:
    waiting(kit)
    with opened(chromium, reader, "/site/job/tumour") as tab:
        shown = tab.locator("input[name=seen]").first.input_value()
        changed = waiting(kit, rounds=99)
        JobFolder(kit / "jobs/tumour").write(changed, "waits for approval", "another reason")
        tab.locator("#state", has_text="another reason").wait_for()  # the page was brought up to date
        assert tab.locator("input[name=seen]").first.input_value() == shown
    status, _, text = reader.ask("/site/decide/tumour", "POST", {"seen": shown, "decision": "approve"})
    assert status == 400 and "has changed since it was shown" in text


def test_hostile_texts_do_nothing_and_no_act_of_an_admin_is_there(reader: Reader, kit: Path) -> None:
    waiting(kit)
    JobFolder(kit / "jobs/tumour").log.write_text(HOSTILE)
    for path in ("/site", "/site/job/tumour"):
        text = reader.page(path)
        assert "<script>alert" not in text and "\x1b" not in text and "alert(1)" in html.unescape(text)
    assert "min_cohort" in reader.page("/site")
    for path in ("/project", "/jobs", "/sites", "/audit"):
        assert reader.ask(path)[0] == 404
    assert reader.ask("/site/job/..%2F..")[0] in (400, 404)


def test_the_command_shows_what_its_options_name(kit: Path, tmp_path: Path) -> None:
    def titles(kit: Path | None, project: Path | None) -> list[str]:
        return [section.title for section in _sections(tmp_path, kit, None, project, None)]

    assert titles(None, None) == ["Runs"]
    assert titles(kit, None) == ["Site"]
    assert titles(None, kit.parent) == ["Project"]


def test_enter_in_the_reason_to_refuse_cannot_approve(reader: Reader, kit: Path) -> None:
    waiting(kit)
    (form,) = [form for form in reader.page("/site/job/tumour").split("<form")[1:] if 'name="reason"' in form]
    assert 'value="refuse"' in form and 'value="approve"' not in form


def test_the_sites_own_audit_log_is_paged_and_grows_on_the_page(reader: Reader, kit: Path) -> None:
    assert "No lines yet" in reader.page("/site/audit")
    gate = KitPolicyGate(kit)
    for number in range(250):
        gate.record(f"act {number}", note=HOSTILE)
    address, shown = "/site/audit", list[int]()
    while address:
        text = html.unescape(page := reader.page(address))
        assert "<script>alert" not in page and "\x1b" not in page
        shown += [int(number) for number in re.findall(r"act (\d+)", text)]
        older = re.search(r'href="(/site/audit\?before=\d+)"', text)
        address = older[1] if older else ""
    assert shown == list(range(249, -1, -1))
    section = SiteSection(kit, kit)
    before, paged = section.version("/site/audit"), section.version("/site/audit?before=99")
    gate.record("act 250")
    assert section.version("/site/audit") != before
    assert section.version("/site/audit?before=99") == paged
    assert reader.ask("/site/audit?before=999999999999999")[0] == 200
    assert reader.ask("/site/audit?before=-1")[0] == 200


def lines_of(text: str) -> list[str]:
    found = re.search(r'<pre[^>]*class="log"[^>]*>(.*?)</pre>', text, re.S)
    assert found, text
    return html.unescape(found[1]).splitlines()


def walked(reader: Reader, address: str, link: str) -> list[list[str]]:
    """The lines of each page of a log, along the links with a name."""
    pages = []
    while address:
        text = reader.page(address)
        pages.append(lines_of(text))
        found = re.search(rf'href="([^"]+)">{link}<', text)
        address = html.unescape(found[1]) if found else ""
    return pages


def test_a_jobs_log_is_paged_through_all_of_its_files(reader: Reader, kit: Path) -> None:
    waiting(kit)
    folder = JobFolder(kit / "jobs/tumour")
    written = [f"line {number} {HOSTILE} \u20ac" for number in range(1800)]
    (folder.path / "log.2.txt").write_text("\n".join(written[:900]) + "\n")
    (folder.path / "log.1.txt").write_text("\n".join(written[900:1700]) + "\n")
    folder.log.write_text("\n".join(written[1700:]) + "\n")
    assert "/site/job/tumour/log" in reader.page("/site/job/tumour")
    pages = walked(reader, "/site/job/tumour/log", "Older lines")
    shown = [line for page in reversed(pages) for line in page]
    assert [line.split()[1] for line in shown] == [str(number) for number in range(1800)]
    assert len(pages) > 3 and max(map(len, pages)) <= 500
    forwards = [line for page in walked(reader, "/site/job/tumour/log?after=0", "Newer lines") for line in page]
    assert forwards == shown
    text = reader.page("/site/job/tumour/log")
    assert "<script>alert" not in text and "\x1b" not in text


def test_jobs_of_a_daemon_with_a_state_folder_are_shown_with_the_option(kit: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    waiting(state, "elsewhere")
    with dashboard_of(*_sections(tmp_path, kit, state, None, None)) as reader:
        assert "elsewhere" in reader.page("/site")
        job = reader.page("/site/job/elsewhere")
        fields = {"seen": seen(job), "decision": "approve"}
        assert reader.ask("/site/decide/elsewhere", "POST", fields)[0] == 303
    assert (state / "jobs/elsewhere/approval.json").exists()
    with pytest.raises(ConfigError, match="no such folder"):
        _sections(tmp_path, kit, tmp_path / "typo", None, None)
    with pytest.raises(ConfigError, match="goes with the kit of a site"):
        _sections(tmp_path, None, state, None, None)
