"""The own lines of servers and daemons: what each carries, where they go, and how files are rotated."""

from __future__ import annotations

import json
import logging
import os
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fl_adapters.cli.log_lines import LogOptions, say, written_lines
from fl_adapters.environments.progress import ProgressLines
from fl_runtime.errors import ConfigError, StoreError
from fl_runtime.types import Event


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def test_a_line_carries_clock_level_job_and_site(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "logs" / "server.log"
    with written_lines("server", LogOptions("json", file)):
        say("study: serving at 0.0.0.0:8443")
        lines = ProgressLines(partial(say, job="tumour-1"))
        lines(Event("joined", 0.0, 0, "north", {"attempt": 2}))
        lines(Event("warning", 0.0, 1, "", {"text": "all sites read the same data"}))
    served, joined, warned = lines_of(file)
    fields = {"level": "info", "from": "server", "site": "", "job": "", "text": "study: serving at 0.0.0.0:8443"}
    assert served == {"time": pytest.approx(os.stat(file).st_mtime, abs=60), **fields}
    assert (joined["job"], joined["site"], joined["text"]) == (
        "tumour-1",
        "north",
        "north joined again (attempt 2)",
    )
    assert (warned["level"], warned["job"], warned["text"]) == ("warning", "tumour-1", "all sites read the same data")
    assert capsys.readouterr().err.splitlines() == file.read_text("utf-8").splitlines()


def test_text_has_the_same_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with written_lines("server", LogOptions()):
        say("a name from the network: \x1b[2J\n2026-12-02 00:00:00 info server: forged", job="tumour-1")
    (line,) = capsys.readouterr().err.splitlines()
    assert "\x1b" not in line and " info server tumour-1: a name from the network: " in line


def test_other_packages_have_their_warnings_in_the_file_and_nothing_else(tmp_path: Path) -> None:
    file, other = tmp_path / "log", logging.getLogger("somebody.else")
    other.setLevel(logging.DEBUG)
    with written_lines("north", LogOptions("json", file), site="north"):
        other.info("not for the people at the site")
        other.warning("the port %s is in use\x1b", 8443)
        logging.getLogger("fl_runtime.store").warning("the disk is slow")
        try:
            raise ValueError("bad")
        except ValueError:
            other.exception("a call failed")
    found = [(line["level"], line["site"], line["text"]) for line in lines_of(file)]
    assert found[:2] == [("warning", "north", "the port 8443 is in use\\x1b"), ("warning", "north", "the disk is slow")]
    level, _, text = found[2]
    assert level == "error" and text.startswith("a call failed: ValueError('bad') at ") and "test_log_lines.py" in text


def test_loggers_are_as_they_were_afterwards(tmp_path: Path) -> None:
    loggers = [logging.getLogger(name) for name in ("", "fl_adapters", "fl_runtime")]
    before = [(list(logger.handlers), logger.propagate) for logger in loggers]
    with written_lines("north", LogOptions("text", tmp_path / "log")):
        pass
    assert [(list(logger.handlers), logger.propagate) for logger in loggers] == before


def test_files_are_rotated_by_size_and_so_many_are_kept(tmp_path: Path) -> None:
    file = tmp_path / "server.log"
    with written_lines("server", LogOptions.of("json", file, 0.001, 2)):
        for number in range(60):
            say(f"line {number:04d} {'x' * 80}")
    files = [file, tmp_path / "server.log.1", tmp_path / "server.log.2"]
    assert sorted(tmp_path.iterdir()) == files
    assert all(0 < path.stat().st_size <= 1000 for path in files)
    numbers = [int(line["text"].split()[1]) for path in reversed(files) for line in lines_of(path)]
    assert numbers == list(range(60 - len(numbers), 60)), "the newest lines, in order, and none twice"


def test_the_error_that_ends_a_server_is_in_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "log"
    with pytest.raises(StoreError), written_lines("server", LogOptions("json", file)):
        raise StoreError("the journal cannot be read or written", where="/data")
    (line,) = lines_of(file)
    assert line["level"] == "error" and "the journal cannot be read or written" in line["text"]
    assert capsys.readouterr().err == "", "the command itself shows it there"


def test_a_full_disk_is_told_once_and_ends_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full")
    link = tmp_path / "log"
    link.symlink_to(full)
    with written_lines("server", LogOptions("text", link, file_bytes=0)):
        say("first")
        say("second")
    told = capsys.readouterr().err.splitlines()
    assert [line for line in told if "cannot be written" in line] == [
        f"the log file {link} cannot be written: [Errno 28] No space left on device"
    ]
    assert len([line for line in told if line.endswith((": first", ": second"))]) == 2


def test_an_unknown_form_and_a_file_that_cannot_be_made_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--log-format cannot be 'xml'"):
        LogOptions.of("xml", None, 10.0, 3)
    (tmp_path / "file").touch()
    with pytest.raises(StoreError) as error, written_lines("server", LogOptions("text", tmp_path / "file" / "log")):
        pass
    assert str(tmp_path / "file" / "log") in str(error.value)


def test_an_error_that_a_thread_does_not_catch_goes_to_the_log(tmp_path: Path) -> None:
    def fail() -> None:
        raise ValueError("no such tensor")

    before, file = threading.excepthook, tmp_path / "log"
    with written_lines("server", LogOptions("json", file)):
        thread = threading.Thread(target=fail, name="fl-rounds-1")
        thread.start()
        thread.join(10)
    line = json.loads(file.read_text().splitlines()[-1])
    assert line["level"] == "error"
    assert "thread fl-rounds-1 has ended with an error: ValueError('no such tensor') at " in line["text"]
    assert threading.excepthook is before
