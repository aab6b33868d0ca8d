"""The passphrase of an authority's key: nothing is signed without it, and changing it changes nothing else."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from study import project
from typer.testing import CliRunner

from fl_adapters.cli.app import app
from fl_runtime.errors import ConfigError
from fl_runtime.trust.authority import Authority
from fl_runtime.trust.certificates import fingerprint, new_key, read_request
from fl_runtime.trust.kits import make_request, read_kit, write_kit

SECRET = "correct horse"
VARIABLE = "FL_ADAPTERS_AUTHORITY_PASSPHRASE"


def run(*args: str | Path, secret: str | None = None) -> tuple[int, str]:
    done = CliRunner().invoke(app, list(map(str, args)), env={VARIABLE: secret})
    return done.exit_code, done.output


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    return Authority.create(tmp_path / "authority", project(), SECRET.encode()).folder


def test_the_key_on_disk_is_of_no_use_without_the_passphrase(authority: Path) -> None:
    assert b"ENCRYPTED" in (authority / "ca.key").read_bytes()
    north = Authority(authority).project.participant("north")
    with pytest.raises(ConfigError, match="has a passphrase"):
        Authority(authority).issue(north, new_key().public_key())
    with pytest.raises(ConfigError, match="does not open"):
        Authority(authority, lambda: b"wrong").issue(north, new_key().public_key())
    assert not list(Authority(authority).issued())
    Authority(authority, SECRET.encode).issue(north, new_key().public_key())
    assert [item.identity for item in Authority(authority).issued()] == [north]


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl")
def test_openssl_opens_the_key_with_the_passphrase_alone(authority: Path) -> None:
    command = ["openssl", "pkey", "-in", str(authority / "ca.key"), "-noout", "-passin"]
    assert subprocess.run([*command, f"pass:{SECRET}"], capture_output=True).returncode == 0
    assert subprocess.run([*command, "pass:wrong"], capture_output=True).returncode != 0


def test_every_command_that_signs_asks_for_it_and_those_that_read_do_not(authority: Path, tmp_path: Path) -> None:
    opened = Authority(authority, SECRET.encode)
    for name in ("north", "south"):
        write_kit(tmp_path / name, opened, opened.project.participant(name), with_key=name == "north")
    request = make_request(tmp_path / "south")
    projects = tmp_path / "project.yml"
    fields = opened.project.model_dump(mode="json")
    fields["sites"] = [*fields["sites"], {"name": "west", "organisation": "west-hospital"}]
    projects.write_text(yaml.safe_dump(fields))
    (tmp_path / "kits").mkdir()
    authority = authority.rename(tmp_path / "kits/authority")
    at = ("--authority", authority)
    secret_file = tmp_path / "secret"
    secret_file.write_text(f"{SECRET}\n")
    before = sorted(authority.rglob("*"))

    assert run("cert", "list", *at)[0] == 0
    compared = fingerprint(read_request(request.read_bytes())[1])
    signing: list[tuple[str | Path, ...]] = [
        ("cert", "sign", request, *at, "--fingerprint", compared),
        ("cert", "renew", "north", *at, "--out", tmp_path / "renewed"),
        ("cert", "revoke", "north", *at),
        ("provision", projects, "--out", tmp_path / "kits"),
    ]
    for command in signing:
        for secret, says in ((None, "has a passphrase"), ("wrong", "does not open"), ("", "is empty")):
            status, output = run(*command, secret=secret)
            assert (status, says in output) == (1, True), (command, secret, output)
    assert sorted(set(authority.rglob("*")) - {authority / ".lock"}) == before
    assert not (tmp_path / "kits/west").exists(), "no half of a kit"

    assert run(*signing[0], secret=SECRET)[0] == 0
    for command in signing[1:]:
        assert run(*command, "--passphrase-file", secret_file)[0] == 0, command
    assert read_kit(tmp_path / "kits/west").identity.name == "west"


def test_changing_it_keeps_the_authority_and_ends_the_old_passphrase(authority: Path, tmp_path: Path) -> None:
    (tmp_path / "old").write_text(SECRET)
    (tmp_path / "new").write_text("battery staple\n")
    command = ("authority", "passphrase", "--authority", authority)
    before = Authority(authority).fingerprint

    assert "no terminal" in run(*command, secret=SECRET)[1]
    assert "does not open" in run(*command, "--new-file", tmp_path / "new", secret="wrong")[1]
    done = CliRunner().invoke(
        app,
        [*map(str, command), "--passphrase-file", str(tmp_path / "old"), "--new-file", str(tmp_path / "new"), "--json"],
    )
    assert json.loads(done.stdout.splitlines()[-1]) == {"authority": before, "encrypted": True}
    with pytest.raises(ConfigError, match="does not open"):
        Authority(authority, SECRET.encode).sign(b"")
    assert Authority(authority, lambda: b"battery staple").sign(b"")

    assert run(*command, "--remove", secret="battery staple")[0] == 0
    assert Authority(authority).sign(b"")
    assert (authority / "ca.key").stat().st_mode & 0o777 == 0o600


def test_provision_encrypts_a_new_authority_if_it_is_given_one(tmp_path: Path) -> None:
    (tmp_path / "project.yml").write_text(yaml.safe_dump(project().model_dump(mode="json")))
    for secret, out in ((SECRET, "locked"), (None, "open")):
        status, output = run("provision", tmp_path / "project.yml", "--out", tmp_path / out, secret=secret)
        assert status == 0, output
        assert (b"ENCRYPTED" in (tmp_path / out / "authority/ca.key").read_bytes()) == (out == "locked")
    assert b"ENCRYPTED" not in (tmp_path / "locked/north/key.pem").read_bytes()
