"""`fl-adapters new` without running what it writes: its files, their form, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fl_adapters.cli.app import app
from fl_adapters.cli.scripts.new import FRAMEWORKS, write
from fl_adapters.job import Job
from fl_runtime.errors import ConfigError

FILES = {"train.py", "job.yml", "README.md", "test_train.py"}


def new(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        app(["new", *words], prog_name="fl-adapters")
    return int(end.value.code or 0), *capsys.readouterr()


def test_it_writes_four_files_and_says_what_comes_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, _ = new(capsys, "torch", "My tumour")
    assert status == 0
    assert {path.name for path in (tmp_path / "My tumour").iterdir()} == FILES
    assert "simulate --job job.yml" in out.splitlines()[-1]
    assert 'apps: {my-tumour: "python train.py"}' in (tmp_path / "My tumour" / "README.md").read_text()
    status, out, _ = new(capsys, "torch", "other", "--json")
    fields = json.loads(out)
    assert {Path(file).name for file in fields["files"]} == FILES
    assert (fields["framework"], fields["folder"]) == ("torch", "other")


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = new(capsys, "--help")
    assert status == 0
    assert "fl-adapters new torch" in out.partition("Examples:")[2]
    assert all(name in out for name in FRAMEWORKS)


def test_nothing_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(ConfigError, match=r"README\.md exists already"):
        write("torch", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_an_unknown_template_and_a_file_in_the_way_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = new(capsys, "kears", str(tmp_path / "x"))
    assert status == 1
    assert "did you mean keras?" in err
    (tmp_path / "file").touch()
    status, _, err = new(capsys, "keras", str(tmp_path / "file"))
    assert status == 1
    assert "cannot write" in err


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("templates")
    for name in FRAMEWORKS:
        write(name, folder / name)
    return folder


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_a_template_is_short_and_its_job_is_one(written: Path, name: str) -> None:
    assert Job.from_file(written / name / "job.yml").app == "train.py"
    readme = [line for line in (written / name / "README.md").read_text().splitlines() if line]
    assert len(readme) <= 13  # ten of text and commands, beside the title and the fence
    assert "$" not in "".join(line.removeprefix("$ ") for line in readme)
    script = (written / name / "train.py").read_text()
    assert len(script.splitlines()) < 100
    assert "site()" in script
    assert "place.data" in script


def test_the_scripts_are_clean(written: Path) -> None:
    ruff: Any = [sys.executable, "-m", "ruff"]
    check = [*ruff, "check", "--isolated", "--line-length=120", "--select=E,F,B,UP,SIM,RUF", str(written)]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    form = [*ruff, "format", "--isolated", "--line-length=120", "--check", str(written)]
    done = subprocess.run(form, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
