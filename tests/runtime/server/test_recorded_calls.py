"""Calls of admins and site daemons recorded with version 0.1.0: this version answers them, and reads those answers."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from record_calls import FILE, answers_to, scene
from study import Study
from typer.testing import CliRunner

from fl_adapters.cli.app import app
from fl_adapters.cli.job import federation
from fl_adapters.cli.site.assignment import Assignment
from fl_adapters.dashboard.federation.view import read_details, read_status
from fl_adapters.environments.remote import earlier_jobs
from fl_runtime.client.control import ControlClient
from fl_runtime.errors import ConfigError

CALLS: list[dict[str, Any]] = json.loads(
    (Path(__file__).parents[2] / "fixtures" / "0.1.0" / "calls.json").read_text("utf-8")
)
KEYED_BY_NAME = ("site_states", "site_versions", "versions", "misfits", "sites", "ended", "metrics")


def missing(before: Any, now: Any, where: str = "") -> list[str]:
    """Name what an older reader would look for in an answer, and not find, or find as something else."""
    if isinstance(before, dict):
        if not isinstance(now, dict):
            return [f"{where}: {now!r} is no object"]
        names = before if where.rpartition(".")[2] not in KEYED_BY_NAME else before.keys() & now.keys()
        return [fault for name in names for fault in missing(before[name], now.get(name), f"{where}.{name}")]
    if isinstance(before, list) and isinstance(now, list):
        pairs = zip(before[:1], now[:1], strict=False)
        return [fault for old, new in pairs for fault in missing(old, new, f"{where}[0]")]
    number = isinstance(before, (int, float)) and isinstance(now, (int, float))
    return [] if number or type(before) is type(now) else [f"{where}: {before!r} is {now!r} now"]


def test_this_server_answers_what_admins_and_daemons_of_version_0_1_0_ask(tmp_path: Path) -> None:
    recorded = iter(CALLS)
    with Study(tmp_path) as study:

        def say(by: str, method: str, **fields: Any) -> list[Any]:
            call = next(recorded)
            assert (by, method) == (call["by"], call["method"])
            answers = answers_to(study, by, method, call["fields"])
            assert len(answers) == len(call["answers"])
            if method == "Download":
                return answers
            faults = [f for old, new in zip(call["answers"], answers, strict=True) for f in missing(old, new)]
            assert not faults, f"{method}: {faults}"
            if method.endswith("Job"):
                same = [name for name in ("job", "state", "ended", "refused") if name in call["answers"][0]]
                assert [answers[0][name] for name in same] == [call["answers"][0][name] for name in same]
            return answers

        scene(study, say)
    assert next(recorded, None) is None


class Answered:
    """A transport on which the server of 0.1.0 answers: each call as it did the first time, or the time that is set."""

    def __init__(self, time: int = 0) -> None:
        self._time = time

    def call(self, method: str, requests: object) -> Any:
        found = [call["answers"] for call in CALLS if call["method"] == method]
        return _Answers(found[min(self._time, len(found) - 1)])

    def close(self) -> None: ...


class _Answers:
    def __init__(self, answers: list[Any]) -> None:
        self._answers = iter(base64.b64decode(a) if isinstance(a, str) else json.dumps(a).encode() for a in answers)

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        return next(self._answers)

    def cancel(self, *, broken: bool = False) -> None: ...


def client(time: int = 0) -> ControlClient:
    return ControlClient(Answered(time))  # type: ignore[arg-type]


def test_this_version_reads_what_a_server_of_version_0_1_0_answers() -> None:
    seen = read_status(client(2).ask("Status"))
    assert [(job.name, job.state) for job in seen.jobs] == [("second", "aborted"), ("first", "finished")]
    assert seen.older == 0
    with pytest.raises(ConfigError, match="with fl-adapters 0.1.0, tells only of the jobs that ended last"):
        earlier_jobs(client(2).ask, 5)
    details = read_details(client().ask("ShowJob", job="first"))
    assert details.job.app == "train" and FILE in [file.path for file in details.files]
    assignment = Assignment.of(client().ask("Assignment"))
    assert (assignment.job, assignment.index, assignment.count) == ("first", 0, 2)
    (event,) = client().answers("Watch", job="first")
    assert event["event"]["kind"] and list(client(1).follow("first"))[-1]["ended"]["job"] == "first"
    assert b"".join(client().stream("Download", job="first", file=FILE)).startswith(b"round,site,status")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["list"], ["first", "second", "aborted", "lead lena of north-hospital"]),
        (["show", "first"], ["first by lead lena of north-hospital: finished", FILE]),
    ],
)
def test_commands_show_what_a_server_of_version_0_1_0_answers(
    command: list[str], said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(federation, "connected", lambda kit: nullcontext((client(2), None)))
    shown = CliRunner().invoke(app, ["job", *command, "--kit", "kits/lena"], env={"COLUMNS": "140"})
    assert shown.exit_code == 0, shown.output
    assert all(text in shown.stdout for text in said), shown.stdout
