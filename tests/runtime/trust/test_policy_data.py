"""Where a site's policy says that its own data lie: what its scripts are told, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from study import Study

import fl_adapters
from fl_adapters.cli.doctor.kit_checks import kit_checks
from fl_adapters.cli.site.assignment import Assignment
from fl_adapters.cli.site.check import plan_for
from fl_adapters.cli.site.command import CommandError, command_kit, data_for
from fl_adapters.participant.kit import read_kit
from fl_adapters.participant.policy_gate import KitPolicyGate
from fl_runtime.errors import ConfigError
from fl_runtime.trust.policy import read_policy


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The startup kit of a site. No server runs."""
    return Study(tmp_path_factory.mktemp("study")).kits / "north"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.csv"
    path.write_text("1,2\n")
    return path


def ruled(kit: Path, text: str) -> KitPolicyGate:
    (kit / "policy.yml").write_text(text)
    return KitPolicyGate(kit)


def test_a_path_holds_for_all_apps_or_for_one(kit: Path, rows: Path) -> None:
    gate = ruled(kit, f"data: {rows}")
    assert data_for(gate, "tumour") == data_for(gate, "stroke") == str(rows)
    gate = ruled(kit, f"data: {{tumour: {rows}, web: 's3://bucket/x'}}")
    assert [data_for(gate, app) for app in ("tumour", "web", "stroke")] == [str(rows), "s3://bucket/x", ""]
    assert data_for(ruled(kit, ""), "tumour") == ""


def test_data_that_are_not_there_are_refused_and_the_server_hears_no_path(kit: Path, tmp_path: Path) -> None:
    gate = ruled(kit, f"data: {tmp_path}/gone.csv")
    with pytest.raises(CommandError, match=r"there are no data at .*gone\.csv") as caught:
        data_for(gate, "tumour")
    assert "policy" in caught.value.where
    assert "mounted" in caught.value.fix
    assert str(tmp_path) not in caught.value.reason.public


def test_a_relative_path_is_refused_when_the_policy_is_read(kit: Path) -> None:
    (kit / "policy.yml").write_text("data: rows.csv")
    with pytest.raises(ConfigError, match=r"'rows\.csv' is not an absolute path"):
        read_policy(kit / "policy.yml")


def test_a_jobs_command_and_a_script_with_the_kit_itself_are_told(kit: Path, rows: Path, tmp_path: Path) -> None:
    ruled(kit, f"data: {rows}")
    job = Assignment("tumour-1", "tumour", "", 0, 2, {})
    own = command_kit(read_kit(kit), job, None, data=str(rows), supervised=True).save(tmp_path / "kit")
    assert fl_adapters.site(str(own)).data == fl_adapters.site(str(kit)).data == str(rows)
    rows.unlink()
    for folder in (own, kit):
        with pytest.raises(ConfigError, match="there are no data at"):
            fl_adapters.site(str(folder))


def test_data_for_each_app_need_a_job(kit: Path, rows: Path) -> None:
    ruled(kit, f"data: {{tumour: {rows}}}")
    with pytest.raises(ConfigError, match="data for each app") as caught:
        fl_adapters.site(str(kit))
    assert "fl-adapters run" in caught.value.fix


def plan(kit: Path, folder: Path) -> dict[str, Any]:
    (folder / "job.yml").write_text("{name: tumour-1, app: tumour, rounds: 2}")
    return plan_for(kit, folder / "job.yml", "")


def test_site_check_shows_the_data_and_refuses_what_is_not_there(kit: Path, rows: Path, tmp_path: Path) -> None:
    ruled(kit, f"apps: {{tumour: echo}}\ndata: {{tumour: {rows}}}")
    found = plan(kit, tmp_path)
    assert (found["data"], found["refusals"]) == (str(rows), [])
    rows.unlink()
    (refusal,) = plan(kit, tmp_path)["refusals"]
    assert "there are no data at" in refusal["what"]


def test_doctor_looks_at_the_data(kit: Path, rows: Path) -> None:
    ruled(kit, f"data: {{tumour: {rows}, stroke: {rows}.gone}}")
    found = [check.status for check in kit_checks(kit) if check.name == "data"]
    assert found == ["ok", "problem"]
