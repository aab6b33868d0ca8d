"""The signed list of members: sites and admins come and go while the server runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from federation_bench import at_once, started
from study import Study, project, until
from typer.testing import CliRunner

from fl_adapters.cli.app import app
from fl_runtime.client.control import ControlClient
from fl_runtime.errors import ConfigError, FederationError, PermissionDeniedError
from fl_runtime.trust.authority import Authority, save_project, signed_members
from fl_runtime.trust.kits import write_kit
from fl_runtime.trust.project import MEMBERS, Members, read_members

W = {"w": np.zeros(3, np.float32)}


def provisioned(study: Study, sites: tuple[str, ...]) -> Authority:
    """Change the project's sites, and sign who takes part, as `provision` does."""
    save_project(study.authority.folder, project(sites=sites))
    study.authority = Authority(study.authority.folder)
    return study.authority


def sent(study: Study) -> Any:
    """Send both lists to the server, as `cert` commands with an admin's kit do."""
    lists = {"crl": study.authority.crl.decode(), "members": signed_members(study.authority).decode()}
    return study.admin().ask("Revoke", **lists)


def refused(call: Callable[[], object]) -> FederationError:
    with pytest.raises(FederationError) as caught:
        call()
    return caught.value


def test_a_site_that_is_added_takes_part_without_a_restart(study: Study) -> None:
    authority = provisioned(study, ("north", "south", "west"))
    write_kit(study.kits / "west", authority, authority.project.participant("west"))
    error = refused(lambda: study.admin("west").ask("Status"))
    assert isinstance(error, PermissionDeniedError)
    assert "site west of west-hospital may not call: it is not a member of the federation" in error.what
    assert "rule members" in error.where
    study.job("before")
    assert study.server.queue.record("before").settings.sites == ("north", "south")

    sent(study)
    assert study.admin("west").ask("Status")["sites"] == ["north", "south", "west"]
    study.admin("lena").ask("AbortJob", job="before")
    study.job("after")
    finals = at_once([study.site(name) for name in ("north", "south", "west")], lambda site: site.take_part(W, plus))
    assert [final["w"][0] for final in finals] == [2, 2, 2]


def plus(task: Any) -> Any:
    return {"w": task.arrays["w"] + np.float32(1)}


def test_a_revoked_site_is_off_the_list_and_no_default_job_waits_for_it(study: Study) -> None:
    study.job("running", min_sites=1)
    sites = {name: study.site(name) for name in study.sites}
    started(sites.values(), W)
    study.job("waiting", min_sites=1)
    study.authority.revoke("south")
    assert sent(study) == {"ended": ["south"]}
    assert study.admin("mina").ask("Status")["sites"] == ["north"]
    study.admin("lena").ask("AbortJob", job="running")
    until(lambda: study.server.queue.record("waiting").state == "running", "the job that waited with south")
    assert study.site("north").take_part(W, plus, job="waiting")["w"].tolist() == [2, 2, 2]
    study.job("next")
    assert study.server.queue.record("next").settings.sites == ("north",)
    with pytest.raises(ConfigError, match="not in this federation: south"):
        study.job("named", sites=["south"])

    key = study.authority.project.participant("south")
    write_kit(study.folder / "again", study.authority, key)  # `provision --again south`
    sent(study)
    assert study.admin("mina").ask("Status")["sites"] == ["north", "south"]


def test_who_is_removed_is_out_at_once_and_its_job_goes_on(study: Study) -> None:
    study.job(min_sites=1)
    sites = {name: study.site(name) for name in study.sites}
    tasks = started(sites.values(), W)
    provisioned(study, ("north",))
    (study.kits / "server" / MEMBERS).write_bytes(
        signed_members(study.authority)
    )  # a running server reads the file again
    until(lambda: study.admin("mina").ask("Status")["sites"] == ["north"], "the list to be read")
    error = refused(lambda: sites["south"].submit(tasks["south"], W))
    assert "not a member" in error.what
    assert sites["north"].submit(tasks["north"], plus(tasks["north"])) == "used"
    assert sites["north"].client.next_task().round == 2
    assert any(entry["action"] == "list of members read" for entry in study.log())


def test_lists_that_are_forged_or_old_are_refused_and_the_one_in_force_stays(study: Study, tmp_path: Path) -> None:
    old = signed_members(study.authority)
    provisioned(study, ("north", "south", "west"))
    other = Authority.create(tmp_path / "other", project(sites=("mallory",)))
    changed = json.loads(signed_members(study.authority))
    changed["members"] = changed["members"].replace("west", "evil")
    crl = study.authority.crl.decode()
    for bad in (signed_members(other).decode(), json.dumps(changed), "{}", "[" * 100_000):
        error = refused(lambda bad=bad: study.admin().ask("Revoke", crl=crl, members=bad))  # type: ignore[misc]
        assert "not a list of members signed by this federation's authority" in error.what
    sent(study)
    error = refused(lambda: study.admin().ask("Revoke", crl=study.authority.crl.decode(), members=old.decode()))
    assert "older than the one in force" in error.what
    assert refused(lambda: study.admin("lena").ask("Revoke", members="")).code == "permission-denied"
    (study.kits / "server" / MEMBERS).write_bytes(old)
    assert study.admin("mina").ask("Status")["sites"] == ["north", "south", "west"]
    study.server.close()
    with pytest.raises(ConfigError, match="older than the one in force"):
        study.start()
    (study.kits / "server" / MEMBERS).write_bytes(signed_members(study.authority))
    study.start()


def test_a_list_stays_in_force_when_its_root_is_retired(study: Study, tmp_path: Path) -> None:
    kit = study.kits / "server"
    first = Members(kit, "study", lambda: study.authority.roots, ())
    assert first.sites == ("north", "south")
    other = Authority.create(tmp_path / "other", project())
    assert Members(kit, "study", lambda: other.roots, ()).sites == ("north", "south")
    changed = replace(read_members(signed_members(study.authority), "study", "", None), number=2**40)
    with pytest.raises(ConfigError, match="not a list of members"):
        first.install(changed.signed(other.newest_root.key, "study"))


def test_provision_tells_a_running_server_and_doctor_of_a_site_asks_it(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FL_ADAPTERS_KIT", raising=False)
    fields = project(address=study.address, sites=("north", "south", "west")).model_dump(mode="json")
    (tmp_path / "project.yml").write_text(yaml.safe_dump(fields))
    done = CliRunner().invoke(app, ["provision", str(tmp_path / "project.yml"), "--out", str(study.kits)])
    assert done.exit_code == 0, done.output
    west = ControlClient(study.transport("west"))
    until(lambda: _known(west), "the server to know west")
    checked = CliRunner().invoke(app, ["doctor", "--kit", str(study.kits / "west"), "--json"])
    checks = {item["name"]: item for item in json.loads(checked.stdout.splitlines()[-1])["checks"]}
    assert checks["membership"]["status"] == "ok", checks


def _known(west: ControlClient) -> bool:
    try:
        return "west" in west.ask("Status")["sites"]
    except PermissionDeniedError:
        return False
