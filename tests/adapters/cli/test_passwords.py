"""Passwords of kits come from a variable, a file or a prompt, and are refused on the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from study import until
from typer.testing import CliRunner

import fl_adapters
from fl_adapters.cli.app import app
from fl_runtime.trust.provisioning.archive import read_archive

PROJECT = """
federation: study
server: {address: "127.0.0.1:18443"}
sites: [{name: north, organisation: north-hospital}]
"""
SECRET = "correct-horse-battery"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "project.yml").write_text(PROJECT)
    return tmp_path


def provisioned(folder: Path, *options: str, **variables: str) -> tuple[int, str]:
    words = ["provision", str(folder / "project.yml"), "--out", str(folder / "kits"), "--zip", "--json", *options]
    done = CliRunner().invoke(app, words, env=variables)
    return done.exit_code, done.output


@pytest.mark.parametrize("typed", [["--password", SECRET], [f"--password={SECRET}"]])
def test_a_password_on_the_command_line_is_refused_and_not_repeated(folder: Path, typed: list[str]) -> None:
    for words in (["provision", str(folder / "project.yml"), "--zip"], ["unpack", "north.zip"]):
        done = CliRunner().invoke(app, [*words, *typed, "--json"])
        assert done.exit_code == 1
        error = json.loads(done.stdout.splitlines()[-1])["error"]
        assert "cannot be given on the command line" in error["what"]
        assert "set $FL_ADAPTERS_PASSWORD, pass --password-file FILE, or let the command ask" in error["fix"]
        assert SECRET not in done.output
        assert "--password " not in CliRunner().invoke(app, [words[0], "--help"]).output
    assert not (folder / "kits").exists()


def test_a_password_comes_from_a_variable_or_a_private_file(folder: Path) -> None:
    status, output = provisioned(folder, FL_ADAPTERS_PASSWORD=SECRET)
    assert status == 0, output
    read_archive(folder / "kits/north.zip", folder / "one", SECRET)

    file = folder / "secret.txt"
    file.write_text(f"{SECRET}\nsomething else\n")
    file.chmod(0o640)
    unpack = ["unpack", str(folder / "kits/north.zip"), "--out", str(folder / "two"), "--password-file", str(file)]
    done = CliRunner().invoke(app, unpack)
    assert done.exit_code == 1
    assert f"chmod 600 {file}" in done.output
    file.chmod(0o600)
    assert CliRunner().invoke(app, unpack).exit_code == 0
    file.write_text("\n")
    assert "no password in its first line" in CliRunner().invoke(app, unpack).output


def test_without_a_terminal_the_command_says_how_to_give_the_password(folder: Path) -> None:
    provisioned(folder, FL_ADAPTERS_PASSWORD=SECRET)
    done = CliRunner().invoke(app, ["unpack", str(folder / "kits/north.zip")], env={"FL_ADAPTERS_PASSWORD": ""})
    assert done.exit_code == 1
    assert "no terminal to ask at" in done.output
    assert "$FL_ADAPTERS_PASSWORD" in done.output


def test_at_a_terminal_the_password_is_asked_for_and_not_shown(folder: Path) -> None:
    pty, termios = pytest.importorskip("pty"), pytest.importorskip("termios")
    provisioned(folder, FL_ADAPTERS_PASSWORD=SECRET)
    ours, theirs = pty.openpty()
    packages = str(Path(fl_adapters.__file__).parents[1])
    process = subprocess.Popen(
        [sys.executable, "-m", "fl_adapters.cli", "unpack", str(folder / "kits/north.zip")],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "PYTHONPATH": packages, "FL_ADAPTERS_PASSWORD": ""},
        start_new_session=True,
    )
    os.close(theirs)
    shown = b""
    with suppress(OSError):  # Linux reports the other end's closing as an error
        while part := os.read(ours, 1000):
            asked = b"Password of north.zip" in shown
            shown += part
            if not asked and b"Password of north.zip" in shown:
                until(lambda: not termios.tcgetattr(ours)[3] & termios.ECHO, "the echo to be off")  # drops what came
                os.write(ours, f"{SECRET}\n".encode())
    os.close(ours)
    assert process.wait(60) == 0
    assert (folder / "kits/north/kit.json").exists()
    assert SECRET.encode() not in shown
