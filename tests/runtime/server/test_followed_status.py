"""Calls that follow: what there is, and the audit log, told again whenever they have changed."""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from federation_bench import at_once
from promptness import PROMPT_S
from study import Study, until

from fl_runtime.client.control import ControlClient
from fl_runtime.errors import FederationError, PermissionDeniedError, ProtocolError
from fl_runtime.trust.audit import entries, lines_after, lines_before
from fl_runtime.types import Arrays, Task

W = {"w": np.zeros(3, np.float32)}


class Followed:
    """The answers of a call that follows, in a thread of its own."""

    def __init__(self, control: ControlClient, method: str, **fields: Any) -> None:
        self.answers: list[dict[str, Any]] = []
        self.at: list[float] = []
        self.error: FederationError | None = None
        self._new: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._call = lambda: control.answers(method, follow=True, **fields)
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        try:
            for answer in self._call():
                self.at.append(time.monotonic())
                self.answers.append(answer)
        except FederationError as error:
            self.error = error

    def until(self, holds: Callable[[dict[str, Any]], Any], what: str) -> tuple[dict[str, Any], float]:
        """Wait for an answer; return it and when it came, in monotonic seconds."""

        def found() -> tuple[dict[str, Any], float] | None:
            both = zip(list(self.answers), list(self.at), strict=False)
            return next(((answer, at) for answer, at in both if holds(answer)), None)

        return until(found, what)  # type: ignore[no-any-return]

    def ended(self) -> FederationError | None:
        self._thread.join(30)
        assert not self._thread.is_alive()
        return self.error


def states(answer: dict[str, Any]) -> dict[str, str]:
    return {job["job"]: job["state"] for job in answer.get("jobs", ())}


def test_a_status_that_is_followed_tells_each_change_within_a_second_and_makes_one_line_of_the_audit_log(
    study: Study,
) -> None:
    followed = Followed(study.admin("mina"), "Status")
    followed.until(lambda answer: answer["jobs"] == [], "the first answer")
    at = time.monotonic()
    study.job("job", rounds=1)
    first, came = followed.until(lambda answer: states(answer) == {"job": "running"}, "the job to be told")
    assert came - at < PROMPT_S
    assert first["jobs"][0]["submitter"].endswith("/admin/lena?organisation=north-hospital&role=lead")
    at_once([study.site(name) for name in study.sites], lambda site: site.take_part(W, lambda task: W))
    followed.until(lambda answer: states(answer) == {"job": "finished"}, "the job's end to be told")
    spaces = [after - before for before, after in zip(followed.at[1:], followed.at[2:], strict=False)]
    assert all(space > 0.2 for space in spaces), "it is told a few times a second at most"
    asked = [line for line in study.log() if line["action"] == "called Status"]
    assert len(asked) == 1
    assert study.admin("mina").ask("Status")["ended"]["job"]["rounds"], "who does not follow gets outcomes as before"
    assert all(answer.get("ended") == {} for answer in followed.answers)
    study.server.close()
    assert followed.ended() is not None


def test_the_newest_metrics_of_a_job_are_told_to_admins_and_to_its_own_sites(study: Study) -> None:
    study.job("job", rounds=2, sites=["north"])
    seen: dict[str, Any] = {}

    def change(task: Task) -> Arrays:
        if task.round == 2:
            for name in ("mina", "north", "south"):
                (job,) = study.admin(name).ask("Status")["jobs"]
                seen[name] = job.get("newest", "not told")
        return W

    study.site("north").take_part(W, change)
    told = {"round": 1, "metrics": {}}
    assert seen == {"mina": told, "north": told, "south": "not told"}


def test_jobs_that_ended_long_ago_are_told_in_pages(study: Study) -> None:
    admin, names = study.admin("lena"), [f"job-{number}" for number in range(1, 46)]
    for name in names:
        study.job(name)
        admin.ask("AbortJob", job=name)
    study.job("runs")
    newest = admin.ask("Status")
    assert [job["job"] for job in newest["jobs"]] == [*names[-20:], "runs"]
    pages = [newest]
    while pages[-1]["older"] is not None:
        pages.append(study.admin("lena").ask("Status", before=pages[-1]["older"], follow=True))
    assert [[job["job"] for job in page["jobs"]] for page in pages[1:]] == [names[5:25], names[:5]]
    assert pages[1]["jobs"][0]["state"] == "aborted" and pages[1]["ended"] == {}
    assert study.admin("lena").ask("Status", before=-1)["jobs"] == []
    for wrong in ("5", 1.5, True, [1]):
        with pytest.raises(ProtocolError, match="by the number of a job"):
            admin.ask("Status", before=wrong)


def test_rooms_of_sites_are_told_to_admins_alone(study: Study) -> None:
    room = {"slots": 2, "gpus": 4, "memory_bytes": 2**34}
    north = study.admin("north")
    asking = threading.Thread(target=lambda: list(north.answers("Assignment", resources=room)))
    asking.start()
    admin = study.admin("mina")
    until(lambda: admin.ask("Status")["site_rooms"] == {"north": room}, "the room to be told")
    assert "site_rooms" not in study.admin("south").ask("Status")
    study.job(sites=["north"])
    asking.join(30)


def test_the_audit_log_is_read_from_its_end_in_pages_and_followed(study: Study) -> None:
    admin = study.admin("ada")
    for _ in range(5):
        admin.ask("Revocations")
        study.admin("lena").ask("Status")
    pages: list[dict[str, Any]] = [admin.ask("ReadAudit", count=3)]
    while pages[-1]["begin"]:
        pages.append(admin.ask("ReadAudit", count=3, before=pages[-1]["begin"]))
    told = [line for page in reversed(pages) for line in page["lines"]]
    whole = study.log()
    assert [line["number"] for line in told] == list(range(1, len(told) + 1))
    assert [line["action"] for line in told] == [line["action"] for line in whole[: len(told)]]
    assert not any({"seal", "digest", "before"} & line.keys() for line in told)

    followed = Followed(study.admin("ada"), "ReadAudit", count=1)
    followed.until(lambda answer: True, "the first answer")
    at = time.monotonic()
    study.job("seen")
    _, came = followed.until(
        lambda answer: any(line["action"] == "job queued" for line in answer.get("lines", ())), "the new line"
    )
    assert came - at < PROMPT_S


def test_the_audit_log_is_for_admins_of_the_project_and_bounded(study: Study) -> None:
    for name in ("lena", "mina", "olga", "north"):
        with pytest.raises(PermissionDeniedError, match="may not read the server's audit log"):
            study.admin(name).ask("ReadAudit")
    requests: list[dict[str, Any]] = [{"count": 0}, {"count": 501}, {"count": "all"}, {"count": True}, {"before": "x"}]
    for fields in requests:
        with pytest.raises(ProtocolError, match="asked for by a count of 1 to 500"):
            study.admin("ada").ask("ReadAudit", **fields)


def test_lines_of_a_log_that_somebody_has_damaged_are_told_as_such(study: Study) -> None:
    kit = study.kits / "server"
    path = kit / "audit.jsonl"
    count = len(entries(kit))
    end = lines_before(kit, 1).end
    with path.open("ab") as file:
        file.write(b"\xff\xfe nonsense\n" + b"[" * 50_000 + b"\n" + b"[1]\n" + b'{"half')
    lines = lines_after(kit, end)
    assert [line["outcome"] for line in lines.entries] == ["damaged"] * 3
    assert lines_before(kit, 500).end == lines.end, "a line that is being written is not read"
    assert len(lines_before(kit, 500).entries) == count + 3
    assert lines_before(kit, 2, -5).entries == ()
    assert lines_after(kit, 10**12).entries == ()


def test_a_long_log_is_read_in_bounded_pieces(tmp_path: Any) -> None:
    text = [json.dumps({"number": number, "action": "x" * 1000}) for number in range(2000)]
    (tmp_path / "audit.jsonl").write_text("".join(line + "\n" for line in text))
    seen: list[int] = []
    end: int | None = None
    for _ in _pages():
        lines = lines_before(tmp_path, 500, end)
        seen = [line["number"] for line in lines.entries] + seen
        end = lines.begin
        if not end:
            break
    assert seen == list(range(2000))


def _pages() -> Iterator[int]:
    yield from range(50)
    raise AssertionError("the pages do not end")
