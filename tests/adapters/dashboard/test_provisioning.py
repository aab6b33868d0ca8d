"""Provisioning in the dashboard: a project is made, kits are handed out, certificates renewed and revoked."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from dashboards import Reader, dashboard_of, opened
from study import Study, readdressed
from typer.testing import CliRunner

from fl_adapters.cli.app import app
from fl_adapters.cli.pages.dashboard import _sections
from fl_adapters.dashboard.provisioning.desk import ProjectDesk
from fl_adapters.dashboard.provisioning.section import ProjectSection
from fl_runtime.errors import FederationError
from fl_runtime.trust.authority import Authority
from fl_runtime.trust.kits import read_kit
from fl_runtime.trust.project import MEMBERS, read_members
from fl_runtime.trust.provisioning.archive import read_archive
from fl_runtime.trust.provisioning.lock import changing

NEW = {"federation": "study", "address": "fl.example.org:8443", "site": "north", "organisation": "north-hospital"}


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    with dashboard_of(ProjectSection(ProjectDesk(tmp_path / "kits", lambda: b""))) as reader:
        yield reader


def act(reader: Reader, name: str, status: int = 200, /, **fields: str) -> str:
    found, _, text = reader.ask(f"/project/{name}", "POST", fields)
    assert found == status, text
    return html.unescape(text)


def password_in(text: str) -> str:
    found = re.search(r'value="((?:[a-z0-9]{5}-){4}[a-z0-9]{5})"', text)
    assert found, text
    return found[1]


def test_a_project_is_made_and_its_life_is_that_of_the_commands(reader: Reader, tmp_path: Path) -> None:
    kits = tmp_path / "kits"
    assert "Make a project" in reader.page("/project")
    act(reader, "create", 303, **NEW)
    act(reader, "add", 303, name="ada", organisation="north-hospital", role="project-admin")
    act(reader, "add", 303, name="south", organisation="south-hospital", role="site")

    password = password_in(act(reader, "kit", name="south"))
    assert password not in reader.page("/project")
    assert not any(password.encode() in path.read_bytes() for path in kits.rglob("*") if path.is_file())
    _, headers, _ = reader.ask("/project/certificate/south")
    assert headers["content-disposition"] == 'attachment; filename="south.pem"'
    read_archive(kits / "south.zip", tmp_path / "south", password)
    first = read_kit(tmp_path / "south", kind="site").certificate
    assert "has had a kit" in act(reader, "kit", 400, name="south")

    assert "fl-adapters cert install south.pem" in act(reader, "renew", name="south")
    renewed = reader.ask("/project/certificate/south")[2]
    (tmp_path / "south.pem").write_text(renewed)
    line = ["cert", "install", str(tmp_path / "south.pem"), "--kit", str(tmp_path / "south")]
    assert CliRunner().invoke(app, line).exit_code == 0
    assert read_kit(tmp_path / "south").certificate.not_after >= first.not_after

    for typed in ("", "north", "South"):
        assert "nothing was done" in act(reader, "revoke", 400, name="south", confirm=typed)
    authority = Authority(kits / "authority")
    assert not authority.revoked()
    assert "Certificates revoked: 2" in act(reader, "revoke", name="south", confirm="south")
    assert len(authority.revoked()) == 2
    members = read_members((kits / "authority" / MEMBERS).read_bytes(), "study", "", None)
    assert members.sites == ("north",)
    again = password_in(act(reader, "kit", name="south", again="yes", confirm="south"))
    assert again != password
    read_archive(kits / "south.zip", tmp_path / "second", again)
    assert [item.serial for item in authority.counting("south")] == [read_kit(tmp_path / "second").certificate.serial]


def test_the_certificate_that_ends_first_stands_first(reader: Reader, tmp_path: Path) -> None:
    act(reader, "create", 303, **NEW)
    for name in ("south", "east"):
        act(reader, "add", 303, name=name, organisation=name, role="site")
        act(reader, "kit", name=name)
    authority = Authority(tmp_path / "kits/authority")
    authority.renew("south", days=400)
    text = reader.page("/project")
    assert text.index(">east<") < text.index(">south<") < text.index(">north<")
    ends = list(authority.counting("south"))[-1].not_after - timedelta(days=0)
    assert f"{ends:%Y-%m-%d}" in text


def test_what_a_command_changes_meanwhile_waits_and_is_seen(
    reader: Reader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    act(reader, "create", 303, **NEW)
    folder = tmp_path / "kits/authority"
    monkeypatch.setattr("fl_runtime.trust.provisioning.lock._WAIT_S", 0.0)
    with changing(folder):
        assert "another command is changing this authority" in act(
            reader, "add", 400, name="east", organisation="east", role="site"
        )
    line = ["provision", str(folder / "project.yml"), "--out", str(tmp_path / "kits"), "--zip"]
    assert CliRunner().invoke(app, line).exit_code == 0
    text = reader.page("/project")
    assert "north.zip" in text and "Revoke north" in text and "Hand out a kit" not in text


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", "../north", "a b", "", "x" * 65, "\x1b[31m", "global"])
def test_a_name_that_could_harm_is_refused_and_escaped(reader: Reader, tmp_path: Path, name: str) -> None:
    act(reader, "create", 303, **NEW)
    before = (tmp_path / "kits/authority/project.yml").read_bytes()
    status, _, text = reader.ask("/project/add", "POST", {"name": name, "organisation": "o", "role": "site"})
    assert status == 400 and "<script>" not in text
    assert (tmp_path / "kits/authority/project.yml").read_bytes() == before
    for path in ("archive", "certificate"):
        assert reader.ask(f"/project/{path}/..%2Fauthority%2Fca")[0] in (400, 404)
    assert reader.ask("/project/kit", "POST", {"name": "x" * 20_000})[0] == 400


def test_a_kit_is_handed_out_in_a_browser_by_keyboard_at_400_pixels(
    reader: Reader, chromium: Any, tmp_path: Path
) -> None:
    narrow = {"width": 400, "height": 800}
    with opened(chromium, reader, "/project", viewport=narrow, accept_downloads=True) as tab:
        for name, value in NEW.items():
            tab.focus(f"input[name={name}]")
            tab.keyboard.type(value)
        tab.keyboard.press("Enter")
        tab.wait_for_selector("#participants")
        assert tab.evaluate("document.documentElement.scrollWidth") <= 400
        tab.get_by_role("button", name="Hand out a kit to north").focus()
        tab.keyboard.press("Enter")
        password = tab.input_value("#password")
        with tab.expect_download() as download:
            tab.click("#download")
        download.value.save_as(tmp_path / "north.zip")
        tab.screenshot(path=tmp_path / "kit.png")
        tab.get_by_role("link", name="Back to the project").click()
        tab.wait_for_selector("text=Revoke north")
        tab.screenshot(path=tmp_path / "project.png", full_page=True)
    secret = tmp_path / "password"
    secret.write_text(password)
    secret.chmod(0o600)
    line = ["unpack", str(tmp_path / "north.zip"), "--out", str(tmp_path / "north"), "--password-file", str(secret)]
    assert CliRunner().invoke(app, line).exit_code == 0
    assert read_kit(tmp_path / "north", kind="site").identity.name == "north"


def test_what_is_revoked_is_in_force_at_the_running_server_at_once(tmp_path: Path) -> None:
    with Study(tmp_path) as study:
        lars = study.admin("lars")
        assert lars.ask("Status")["federation"] == "study"
        sections = _sections(tmp_path, readdressed(study, "ada"), None, study.kits, None)
        assert [section.title for section in sections] == ["Project", "Jobs", "Sites", "Audit"]
        with dashboard_of(*sections) as reader:
            assert 'action="/project/tell"' in reader.page("/project")
            assert "The server has taken the list" in act(reader, "revoke", name="lars", confirm="lars")
            with pytest.raises(FederationError, match="revoked"):
                lars.ask("Status")
            study.server.close()
            text = act(reader, "revoke", name="south", confirm="south")
            assert "THE SERVER HAS NOT TAKEN THE LIST" in text and "Certificates revoked: 1" in text
            study.start(study.address)
            assert "The server has taken the list" in act(reader, "tell")
            with pytest.raises(FederationError, match="revoked"):
                study.admin("south").ask("Status")


def test_a_kit_that_may_not_revoke_tells_nothing(tmp_path: Path) -> None:
    with Study(tmp_path) as study:
        with dashboard_of(*_sections(tmp_path, readdressed(study, "lena"), None, study.kits, None)) as reader:
            page = html.unescape(reader.page("/project"))
            assert "/project/tell" not in page and "--kit ADMIN_KIT" in page
            assert "no server is connected" in act(reader, "tell", 400)
            assert "the server still accepts them" in act(reader, "revoke", name="lars", confirm="lars")
        assert study.admin("lars").ask("Status")["federation"] == "study"
