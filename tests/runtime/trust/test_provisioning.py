"""Provisioning by several processes at a time: the lock of the authority's folder, and who was left out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from study import project
from typer.testing import CliRunner

from fl_adapters.cli.app import app
from fl_runtime.errors import StoreError
from fl_runtime.trust.authority import Authority
from fl_runtime.trust.project import MEMBERS, read_members
from fl_runtime.trust.provisioning.lock import changing

HOLDS_THE_LOCK = """
import sys
from pathlib import Path
from fl_runtime.trust.provisioning.lock import changing

with changing(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Authority.create(tmp_path / "kits/authority", project()).folder


def run(*words: str) -> dict[str, object]:
    done = CliRunner().invoke(app, [*words, "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def test_one_process_at_a_time_changes_an_authority_and_the_other_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = [sys.executable, "-c", HOLDS_THE_LOCK, str(folder)]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdin and other.stdout
        assert other.stdout.readline() == "locked\n"
        with monkeypatch.context() as patch:
            patch.setattr("fl_runtime.trust.provisioning.lock._WAIT_S", 0.0)
            busy = rf"another command is changing this authority \(process {other.pid}\)"
            with pytest.raises(StoreError, match=busy), changing(folder):
                pytest.fail("two processes hold the lock")
        other.stdin.close()
        with changing(folder):  # waits for the other's end
            pass


@pytest.mark.parametrize(
    "words",
    [
        "provision {project} --out {kits}",
        "cert renew north --authority {folder}",
        "cert revoke north --authority {folder}",
        "cert crl --authority {folder}",
        "authority rotate --authority {folder}",
        "authority finish --authority {folder}",
        "authority passphrase --authority {folder} --remove",
    ],
)
def test_every_command_that_changes_an_authority_waits_for_its_turn(
    folder: Path, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fl_runtime.trust.provisioning.lock._WAIT_S", 0.0)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with changing(folder):
        line = words.format(folder=folder, kits=folder.parent, project=folder / "project.yml")
        done = CliRunner().invoke(app, line.split())
    assert done.exit_code == 1
    assert "another command is changing this authority" in done.stderr
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert {path: data for path, data in after.items() if path.name != ".lock"} == before


def test_a_missing_authority_is_named_and_not_created(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["cert", "crl", "--authority", str(tmp_path / "nowhere")])
    assert done.exit_code == 1
    assert "there is no certificate authority here" in done.stderr
    assert not (tmp_path / "nowhere").exists()


def test_a_project_file_that_leaves_somebody_out_says_so(folder: Path, tmp_path: Path) -> None:
    kits, file = folder.parent, tmp_path / "project.yml"
    file.write_text((folder / "project.yml").read_text().replace("- name: south\n  organisation: south-hospital\n", ""))
    done = CliRunner().invoke(app, ["provision", str(file), "--out", str(kits)])
    assert done.exit_code == 0, done.output
    assert "south is not in the project file, so it is no member any more" in " ".join(done.output.split())
    assert read_members((folder / MEMBERS).read_bytes(), "study", "", None).sites == ("north",)
    assert set(run("provision", str(file), "--out", str(kits))) >= {"kits", "unmade"}
