"""The error of a failed simulation shows what went wrong first, and gives advice that can help."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fl_adapters.environments.logs import last_error, tail
from fl_adapters.environments.outcome import SiteExit, run_error
from fl_runtime.errors import QuorumError
from fl_runtime.types import RunSettings

DEEP = """
import sys

def inner():
    raise FileNotFoundError("no such file: parts/site-1.csv")

def deep(n):
    if n:
        return deep(n - 1) if n % 2 else middle(n - 1)
    try:
        inner()
    except FileNotFoundError as error:
        raise RuntimeError("the loader failed") {cause}

def middle(n):
    return deep(n)

try:
    deep(30)
except RuntimeError:
    raise SystemError("training failed"){end}
"""


def log_of(tmp_path: Path, script: str) -> Path:
    """The log of a script that this interpreter runs."""
    path, log = tmp_path / "train.py", tmp_path / "log.txt"
    path.write_text(script)
    with log.open("w") as out:
        subprocess.run([sys.executable, path], stdout=out, stderr=subprocess.STDOUT, check=False)
    return log


@pytest.mark.parametrize("cause", ["", "from error"])
def test_the_root_cause_of_chained_errors_is_shown(tmp_path: Path, cause: str) -> None:
    log = log_of(tmp_path, DEEP.format(cause=cause, end=""))
    rows = log.read_text().splitlines()
    assert not any("no such file" in row for row in rows[-20:])
    shown = tail(log)
    assert len(shown) == 20
    assert shown[1].strip().startswith("File ") and shown[1].endswith("in inner")
    assert "FileNotFoundError: no such file: parts/site-1.csv" in shown
    assert shown[-1] == "SystemError: training failed"
    assert last_error(shown) == "FileNotFoundError: no such file: parts/site-1.csv"


def test_a_launchers_prefix_hides_nothing(tmp_path: Path) -> None:
    plain = log_of(tmp_path, DEEP.format(cause="", end=""))
    prefixed = tmp_path / "torchrun.txt"
    prefixed.write_text("".join(f"[rank0]: {row}\n" for row in plain.read_text().splitlines()))
    assert tail(prefixed) == [row if row == "..." else f"[rank0]: {row}" for row in tail(plain)]


def test_an_error_above_later_output_is_shown(tmp_path: Path) -> None:
    noise = (
        "import atexit\natexit.register(lambda: [print('freeing', i) for i in range(50)])\nraise KeyError('label')\n"
    )
    shown = tail(log_of(tmp_path, noise))
    assert "KeyError: 'label'" in shown and shown[-1] == "freeing 49"


def test_a_log_without_an_error_is_shown_as_it_is(tmp_path: Path) -> None:
    log = log_of(tmp_path, "for i in range(30): print('step', i)")
    assert tail(log) == [f"step {i}" for i in range(10, 30)]
    assert last_error(tail(log)) == "step 29"
    assert tail(tmp_path / "none.txt") == []


def ended(site: str, *log: str, status: int = 1, first: bool = False) -> SiteExit:
    return SiteExit(
        site, status, joined=True, clean=False, first=first, when="before round 1", log=Path(site), tail=log
    )


LOST = QuorumError("only 1 site is left")
SETTINGS = RunSettings(name="test", sites=("site-1", "site-2"), min_sites=2, rounds=2)


def test_where_every_site_fails_alike_fewer_sites_are_no_advice() -> None:
    exits = [
        ended(site, f"FileNotFoundError: runs/{site}/part-{number}.csv", first=site == "site-1")
        for number, site in enumerate(SETTINGS.sites)
    ]
    error = run_error(LOST, exits, SETTINGS)
    assert error is not None
    assert "site-1's process ended before round 1: exit status 1; every other site's ended alike" in error.what
    assert error.fix == "correct the error in the log"


@pytest.mark.parametrize("other", ["QuorumError: only 1 site is left before round 1", "KeyError: 'label'"])
def test_where_one_site_fails_the_others_may_go_on(other: str) -> None:
    error = run_error(LOST, [ended("site-1", "ValueError: no", first=True), ended("site-2", other)], SETTINGS)
    assert error is not None
    assert "set min_sites below 2 to continue without a site" in error.fix
    assert "alike" not in error.what
