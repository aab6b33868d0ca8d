"""What the dashboard knows of a federation, and lets its admin do, against a real server in this process."""

from __future__ import annotations

import io
import json
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation_bench import at_once
from promptness import PROMPT_S
from study import ADMINS, Study, until

from fl_adapters.dashboard.federation.audit import AuditTail
from fl_adapters.dashboard.federation.connection import FederationConnection
from fl_adapters.dashboard.federation.events import JobEvents
from fl_adapters.dashboard.federation.results import archive_of, pieces_of
from fl_adapters.dashboard.federation.rights import ACTS, Rights
from fl_adapters.dashboard.federation.view import Job, ResultFile, read_details, read_job, read_status
from fl_adapters.environments.report.record import read_run
from fl_runtime.errors import PermissionDeniedError, TransferDamagedError
from fl_runtime.trust.identity import Identity
from fl_runtime.trust.permissions import TABLE

W = {"w": np.zeros(3, np.float32)}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Study]:
    with Study(tmp_path_factory.mktemp("study")) as study:
        yield study


def identity(name: str) -> Identity:
    organisation, role = ADMINS[name]
    return Identity("study", "admin", name, organisation, role)  # type: ignore[arg-type]


def connected(study: Study, name: str) -> FederationConnection:
    return FederationConnection(study.transport(name), Rights(identity(name)))


def known_job(connection: FederationConnection, name: str) -> Job | None:
    federation = connection.seen.federation
    return federation.job(name) if federation else None


def trained(study: Study, name: str, rounds: int = 2) -> None:
    study.job(name, rounds=rounds)
    at_once([study.site(site) for site in study.sites], lambda site: site.take_part(W, lambda task: W, job=name))
    assert study.server.wait_for_job(name, 30)


def allowed_by_the_table(name: str, call: str, submitter: str) -> bool:
    """What the table says, read anew: who holds the role, and whose jobs it concerns."""
    organisation, role = ADMINS[name]
    scope = TABLE[call].allowed.get(role)
    own, same = name == submitter, organisation == ADMINS[submitter][0]
    return {"any": True, "organisation": same, "own": own, None: False}[scope]


@pytest.mark.parametrize("name", ADMINS)
def test_what_is_offered_is_what_the_table_allows_and_the_server_refuses_the_rest(study: Study, name: str) -> None:
    rights, admin = Rights(identity(name)), study.admin(name)
    for submitter in ("lena", "lars"):
        job = f"of-{submitter}-for-{name}"
        study.job(job, by=submitter)
        told = read_details(admin.ask("ShowJob", job=job)).job
        assert told.submitter == identity(submitter)
        for act in ACTS:
            for state in act.states:
                offered = act in rights.acts_on(Job(job, state, submitter=told.submitter))
                assert offered == allowed_by_the_table(name, act.call, submitter)
            if not offered:
                with pytest.raises(PermissionDeniedError, match="may not"):
                    admin.ask(act.call, job=job)
        study.admin("ada").ask("AbortJob", job=job)
    assert {act.call for act in rights.acts_on(Job("x", "queued", submitter=identity("ada")))} <= {"AbortJob"}
    for call in ("SubmitJob", "ReadAudit", "Download", "Watch"):
        assert rights.may(call) == (ADMINS[name][1] in TABLE[call].allowed)


def test_a_change_is_known_within_a_second_and_a_server_that_was_away_comes_back_by_itself(tmp_path: Path) -> None:
    with Study(tmp_path) as study:
        address, connection = study.address, connected(study, "mina")
        until(lambda: connection.seen.federation, "the first answer")
        number, at = connection.seen.number, time.monotonic()
        study.job("job")
        while not (job := known_job(connection, "job")):
            number = connection.wait(number, 5).number
            assert time.monotonic() - at < 20, "the job is not known"
        assert time.monotonic() - at < PROMPT_S
        assert (job.state, job.sites, job.submitted_by) == ("running", study.sites, "lead lena of north-hospital")
        study.server.close()
        until(lambda: connection.seen.fault, "the fault to be known")
        assert known_job(connection, "job") == job, "what was known stays"
        study.start(address)
        until(lambda: connection.seen.fault is None, "the server to be back")
        study.admin("lena").ask("AbortJob", job="job")
        until(lambda: (known_job(connection, "job") or job).state == "aborted", "the end to be known")
        connection.close()


def test_a_jobs_events_are_copied_while_it_runs_and_are_those_of_the_server_at_its_end(
    study: Study, tmp_path: Path
) -> None:
    study.job("live", rounds=2)
    sites = [study.site(name) for name in study.sites]
    for site in sites:
        site.join("live")
    at_once(sites, lambda site: site.register(W))
    events = JobEvents(study.transport("mina"), "live", tmp_path / "live")
    tasks = dict(zip((site.name for site in sites), at_once(sites, lambda site: site.start(W)), strict=True))
    for site in sites:
        site.submit(tasks[site.name], W, metrics={"train_loss": 0.25})
    at = time.monotonic()
    until((tmp_path / "live" / "events.jsonl").exists, "the first event")
    until(lambda: read_run(tmp_path / "live").curve("train_loss"), "the first round's metrics")
    assert time.monotonic() - at < 1.5 * PROMPT_S
    late = JobEvents(study.transport("mina"), "live", tmp_path / "late")
    study.admin("ada").ask("AbortJob", job="live")
    original = (study.runs / "live" / "events.jsonl").read_text().splitlines()
    for folder in (tmp_path / "live", tmp_path / "late"):
        copy = folder / "events.jsonl"
        until(lambda copy=copy: copy.exists() and len(copy.read_text().splitlines()) >= len(original), "all events")
        assert [json.loads(line) for line in copy.read_text().splitlines()] == [json.loads(line) for line in original]
        assert read_run(folder).job["rounds"] == 2
    late.close()
    events.touch(ended=True)
    events.close()


def test_results_arrive_as_files_and_as_one_archive_and_a_damaged_one_is_not_whole(study: Study) -> None:
    trained(study, "done")
    transport = study.transport("mina")
    files = read_details(study.admin("mina").ask("ShowJob", job="done")).files
    assert {"events.jsonl", "model/model.safetensors"} <= {file.path for file in files}
    archive = zipfile.ZipFile(io.BytesIO(b"".join(archive_of(transport, "done", files))))
    assert archive.testzip() is None
    for file in files:
        original = (study.runs / "done" / file.path).read_bytes()
        assert b"".join(pieces_of(transport, "done", file)) == original
        assert archive.read(f"done/{file.path}") == original
    wrong = ResultFile(files[0].path, files[0].size_bytes, "0" * 64)
    arrived: list[bytes] = []
    with pytest.raises(TransferDamagedError, match="did not arrive as the server has it"):
        arrived.extend(pieces_of(transport, "done", wrong))
    assert sum(map(len, arrived)) < files[0].size_bytes


def test_the_audit_log_is_shown_newest_first_and_followed(study: Study) -> None:
    tail = AuditTail(study.transport("ada"))
    page, _ = tail.newest()
    assert page.lines[0].number > page.lines[-1].number
    study.job("audited")
    line = until(
        lambda: next((n for n in tail.newest()[0].lines if n.action == "job queued" and "audited" in n.facts), None),
        "the new line",
    )
    assert (line.who, line.outcome) == ("lead lena of north-hospital", "done")
    numbers = [line.number for line in tail.newest()[0].lines]
    assert len(numbers) == len(set(numbers))
    tail.close()
    study.admin("ada").ask("AbortJob", job="audited")


HOSTILE = "<script>alert(1)</script>\x1b[2J\u202e"


def test_values_of_a_hostile_server_are_bounded_and_printable() -> None:
    job: dict[str, Any] = {
        "job": HOSTILE * 100,
        "state": [HOSTILE],
        "sites": [HOSTILE, 3, None, {"a": 1}],
        "site_states": {HOSTILE: HOSTILE * 1000, "b": 5},
        "error": {"what": HOSTILE, "where": [], "fix": 3},
        "round": 10**400,
        "rounds": "many",
        "submitted_at": float("inf"),
        "submitter": "javascript:alert(1)",
        "priority": True,
    }
    told = {"federation": 5, "sites": [HOSTILE, None], "site_rooms": {HOSTILE: {"slots": -1}}, "jobs": [job, 7, None]}
    seen = read_status(told)
    read = seen.jobs[0] if seen.jobs[0].name else read_job(job)
    texts = [read.name, *read.sites, *read.site_states, *read.site_states.values(), seen.sites[0].name, read.says]
    assert all(text.isprintable() and len(text) < 2100 for text in texts)
    assert (read.round, read.rounds, read.submitted_at, read.submitter, read.priority) == (0, 0, 0.0, None, 0)
    assert read_status({}).jobs == ()
    files = [{"path": path, "size_bytes": 1, "sha256": ""} for path in ("../a", "/etc/passwd", "a\nb", "ok/a.txt")]
    assert [file.path for file in read_details({"job": "x", "files": files}).files] == ["ok/a.txt"]


def test_jobs_are_listed_as_they_run_as_they_will_start_and_as_they_ended() -> None:
    def told(name: str, state: str, at: float, priority: int = 0) -> dict[str, Any]:
        return {"job": name, "state": state, "submitted_at": at, "started_at": at, "ended_at": at, "priority": priority}

    jobs = [
        told("old", "finished", 1),
        told("late", "queued", 5),
        told("first", "queued", 4),
        told("urgent", "queued", 6, 9),
        told("new", "failed", 3),
        told("now", "running", 2),
    ]
    assert [job.name for job in read_status({"jobs": jobs}).jobs] == ["now", "urgent", "first", "late", "new", "old"]
