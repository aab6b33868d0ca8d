"""A site's own page: its jobs and policy, decisions about what was shown, and nothing of an admin's."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from dashboards import Reader, dashboard_of
from study import project

from fl_adapters.cli.pages.dashboard import _sections
from fl_adapters.cli.pages.site_section import SiteSection
from fl_adapters.cli.site.assignment import Assignment
from fl_adapters.cli.site.records import JobFolder
from fl_adapters.participant.policy_gate import KitPolicyGate
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
        return [section.title for section in _sections(tmp_path, kit, project, None)]

    assert titles(None, None) == ["Runs"]
    assert titles(kit, None) == ["Site"]
    assert titles(None, kit.parent) == ["Project"]


def test_enter_in_the_reason_to_refuse_cannot_approve(reader: Reader, kit: Path) -> None:
    waiting(kit)
    (form,) = [form for form in reader.page("/site/job/tumour").split("<form")[1:] if 'name="reason"' in form]
    assert 'value="refuse"' in form and 'value="approve"' not in form
