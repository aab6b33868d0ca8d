"""A participant that loops a costly call is refused and named, its audit lines are summed up, and others go on."""

from __future__ import annotations

import errno
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation_bench import Site, serving, started
from study import Study, until

from fl_runtime.capabilities import CROSS_EVALUATION
from fl_runtime.errors import ConnectionLostError, FederationError, PermissionDeniedError, ProtocolError, StoreError
from fl_runtime.server.federation import audit_summary, quota
from fl_runtime.server.federation.quota import CALLS, REFUSED, USED, Allowance, CallAccount, Quotas
from fl_runtime.trust.audit import Anchor, verify
from fl_runtime.trust.identity import Identity
from fl_runtime.types import Report, Task
from fl_runtime.wire import frames
from fl_runtime.wire.fl.v1 import federation_pb2 as pb
from fl_runtime.wire.manifest import Manifest

W = {"w": np.zeros(4, np.float32)}


class Siege:
    """A run of three sites in round 1; evil is one of them."""

    def __init__(self, study: Study) -> None:
        self.study = study
        study.job(rounds=3, min_sites=2)
        self.north, self.south, self.evil = sites = [study.site(name) for name in study.sites]
        self.tasks = started(sites, W, evaluates=True)
        self.calls: list[tuple[Any, threading.Event]] = []
        self.session = pb.Session(job="job", attempt=self.evil.welcome.attempt)

    def send(self, method: str, request: Any, by: str = "evil") -> FederationError | None:
        """Make a call; return the error with which it was refused."""
        message = request if isinstance(request, bytes) else request.SerializeToString()
        transport = self.evil.transport if by == "evil" else self.study.transport(by)
        try:
            list(transport.call(method, message))
        except FederationError as error:
            return error
        return None

    def until_over_quota(self, call: Callable[[int], FederationError | None], most: int) -> PermissionDeniedError:
        """Repeat a call until it is over the quota, and return that error."""
        for number in range(most):
            error = call(number)
            if isinstance(error, PermissionDeniedError) and "over its quota" in error.what:
                assert "evil" in error.what or "mina" in error.what
                assert error.where.startswith("rule quota: ") and error.fix
                return error
        raise AssertionError(f"{most} calls were answered")

    def finish(self, *, revoke: bool = True) -> None:
        """Let the honest sites finish their rounds, which wait for evil until it is over its quota or revoked."""
        if revoke:
            _, crl = self.study.authority.revoke("evil")
            self.study.admin().ask("Revoke", crl=crl.decode())

        def work(site: Site) -> None:
            task: Task = self.tasks[site.name]
            while task.kind == "train":
                site.submit(task, {"w": task.arrays["w"] + np.float32(1)})
                task = site.client.next_task()
                site.client.report(Report("job", task.version, site.name, {"loss": 0.5}, 1))
            np.testing.assert_array_equal(task.arrays["w"], np.full(4, 3, np.float32))
            site.client.leave("done", early=False)

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(work, [self.north, self.south]))
        assert self.study.server.wait_for_job("job", 30)
        assert self.study.server.outcome("job")["error"] is None

    def audit_bytes(self) -> int:
        return (self.study.kits / "server" / "audit.jsonl").stat().st_size


@pytest.fixture
def siege(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Siege]:
    monkeypatch.setattr(quota, "HOLD_S", 0.01)  # the tests make hundreds of calls over the quota
    with Study(tmp_path, ("north", "south", "evil")) as study:
        siege = Siege(study)
        yield siege
        for call, hold in siege.calls:
            hold.set()
            call.cancel()


def test_a_member_that_asks_for_the_status_in_a_loop_is_refused_and_summed_up(siege: Siege) -> None:
    request = json.dumps({"x": "y" * 1_000}).encode()
    siege.until_over_quota(lambda _: siege.send("Status", request, by="mina"), 400)
    before = siege.audit_bytes()
    errors = [siege.send("Status", request, by="mina") for _ in range(200)]
    assert sum(error is not None for error in errors) > 120, "5 calls a second come back, and no more"
    assert siege.audit_bytes() - before < 30_000, "the log does not grow with the calls"
    siege.finish()
    siege.study.server.close()
    full = [entry for entry in siege.study.refusals() if "quota" in entry["rule"] and "summary" not in entry]
    assert 1 <= len(full) <= 3, "once, and again after a sum"
    sums = [entry for entry in siege.study.log() if "more like it" in entry.get("summary", "")]
    refused = [entry for entry in sums if entry["outcome"] == "refused"]
    assert refused and all("mina" in entry["who"] and "quota" in entry["rule"] for entry in refused)
    assert sum(entry["count"] for entry in refused) > 100
    done = [entry for entry in sums if entry["outcome"] == "done"]
    assert {entry["action"] for entry in done} <= {"called Status"}
    kit = siege.study.kits / "server"
    assert verify(kit, Anchor(kit=kit))[1] == []


def test_one_action_of_a_participant_cannot_be_hidden_behind_many_others(siege: Siege) -> None:
    for _ in range(150):
        siege.send("Status", json.dumps({"x": "y" * 1_500}).encode(), by="ada")
    siege.send("AbortJob", json.dumps({"job": "another"}).encode(), by="ada")
    assert [entry["request"] for entry in siege.study.log() if entry["action"] == "called AbortJob"]


def test_refused_calls_are_counted_with_their_bytes(siege: Siege) -> None:
    junk = b"\xff" * 7_000_000
    siege.until_over_quota(lambda _: siege.send("Score", junk), 60)
    request = pb.ScoreRequest(session=siege.session, version=0, num_examples=1)
    error = siege.send("Score", request)
    assert error is not None and "refused calls" in error.what
    siege.finish(revoke=False)  # nobody waits for a site that is over its quota
    (left,) = [entry for entry in siege.study.log() if entry["action"] == "left" and "evil" in entry["site"]]
    assert "over its quota" in left["facts"]["reason"]


def test_manifests_are_counted_before_they_are_read_and_when_they_are_refused(
    siege: Siege, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = pb.Manifest(tensors=[pb.Tensor(name="t", dtype="float32", shape=[1])]).SerializeToString()
    huge = pb.RegisterRequest(session=siege.session, manifest=pb.Manifest.FromString(one * 200_000))
    read: list[int] = []
    original = Manifest.from_proto
    monkeypatch.setattr(
        Manifest, "from_proto", lambda message: (read.append(len(message.tensors)), original(message))[1]
    )
    with ThreadPoolExecutor(4) as pool:
        errors = list(pool.map(lambda _: siege.send("Register", huge), range(4)))
    assert all(isinstance(error, (ProtocolError, PermissionDeniedError)) for error in errors)
    says = "describes tensors in 3400000 bytes; the model that the sites agreed on has 1 tensors, and the limit is"
    assert any(says in str(e) for e in errors)
    header = pb.UpdateHeader(session=siege.session, round=1, content="weights", num_examples=1)
    header.payload.manifest.CopyFrom(huge.manifest)
    assert says in str(siege.send("Submit", pb.UpdatePart(update=header)))
    header.payload.manifest.CopyFrom(pb.Manifest.FromString(one * 9_000))
    assert "describes 9000 tensors; the model" in str(siege.send("Submit", pb.UpdatePart(update=header)))
    assert not read, "no manifest of that length is looked through"
    small = pb.RegisterRequest(session=siege.session, manifest=pb.Manifest.FromString(one * 1_000))
    monkeypatch.setitem(USED, "tensors", Allowance(5_000, 0))  # type: ignore[index]
    error = siege.until_over_quota(lambda _: siege.send("Register", small), 10)
    assert "tensors" in error.what
    siege.finish()


def test_joining_in_a_loop_with_long_texts_is_refused(siege: Siege) -> None:
    manifest = Manifest.of(W).to_proto()

    def register(number: int) -> FederationError | None:
        replies = siege.evil.transport.call("Join", pb.JoinRequest(protocol_min=1, protocol_max=1).SerializeToString())
        session = pb.Session(job="job", attempt=pb.JoinReply.FromString(next(iter(replies))).attempt)
        info = {f"{number}-{n}": "x" * 4_000 for n in range(250)}
        error = siege.send("Register", pb.RegisterRequest(session=session, manifest=manifest, info=info))
        siege.send("Leave", pb.LeaveRequest(session=session, early=True))
        return error

    error = siege.until_over_quota(register, 10)
    assert "registered bytes" in error.what
    siege.finish()
    written = sum(path.stat().st_size for path in siege.study.runs.rglob("*") if path.is_file())
    assert written < 60 * 2**20


def test_ever_new_names_of_metrics_are_refused_and_neither_history_nor_others_suffer(siege: Siege) -> None:
    errors = []
    for number in range(40):
        metrics = json.dumps({f"m{number}_{n}": 1.0 for n in range(100)})
        request = pb.ScoreRequest(session=siege.session, version=0, num_examples=1, metrics_json=metrics)
        errors.append(siege.send("Score", request))
    named = [error for error in errors if error is not None]
    assert len(named) >= 20 and all(
        "evil has given its metrics more than 2000 different names" in str(e) for e in named
    )
    siege.finish()


def test_reporting_on_one_model_in_a_loop_is_refused(siege: Siege) -> None:
    request = pb.ScoreRequest(session=siege.session, version=0, num_examples=1, metrics_json='{"loss": 1.0}')
    error = siege.until_over_quota(lambda _: siege.send("Score", request), 400)
    assert "calls Score: 200 at once" in error.what
    siege.finish()


def test_reports_on_models_of_no_site_are_refused(tmp_path: Path) -> None:
    with serving(tmp_path, 2, rounds=1, cross_site=True) as bench:
        sites = [bench.site(name) for name in bench.names]
        tasks = started(sites, W, evaluates=True, capabilities=frozenset({CROSS_EVALUATION}))
        for version in (2, 9, 2**31):
            with pytest.raises(ProtocolError, match=f"a score of model {version}, which is the model of no site"):
                sites[0].client.report(Report("job", version, sites[0].name, {"loss": 0.5}, 1))
        for site in sites:
            site.submit(tasks[site.name], W)
        assert [site.client.next_task().kind for site in sites] == ["final", "final"]


def test_downloading_the_same_model_in_a_loop_counts_as_nothing_new(siege: Siege) -> None:
    request = pb.NextRequest(session=pb.Session(job="job", attempt=siege.north.welcome.attempt))
    before = len([e for e in siege.study.log() if e["action"] == "task_sent" and "north" in e["who"]])
    for _ in range(200):
        list(siege.north.transport.call("Next", request.SerializeToString()))
    lines = [e for e in siege.study.log() if e["action"] == "task_sent" and "north" in e["who"]]
    assert len(lines) - before < 150, "the log does not grow with the calls"
    siege.finish()


def announced(siege: Siege, extra: int, name: str = "moments") -> bytes:
    """The header of an update that announces so many numbers beside the weights."""
    manifest = Manifest.of(W, {name: np.empty(extra, np.float32)})
    payload = frames.describe(manifest, bytes(8 * len(manifest.tensors)), known=False)
    header = pb.UpdateHeader(session=siege.session, round=1, content="weights", num_examples=1, payload=payload)
    return pb.UpdatePart(update=header).SerializeToString()


def blobs_mib(siege: Siege) -> float:
    files = (siege.study.runs / "job" / "server" / "blobs").glob("*")
    return sum(path.stat().st_size for path in files if path.exists()) / 2**20


def test_of_all_uploads_that_a_site_announces_and_does_not_send_one_takes_disk(siege: Siege) -> None:
    for number in range(6):  # each in a call that stays open
        header, hold = announced(siege, 2**24 + number), threading.Event()

        def messages(header: bytes = header, hold: threading.Event = hold) -> Iterator[bytes]:
            yield header
            hold.wait(60)

        call = siege.evil.transport.call("Submit", messages())
        assert pb.SubmitReply.FromString(next(call)).send_from == 0
        siege.calls.append((call, hold))
        assert blobs_mib(siege) < 2 * 64 + 10
    siege.finish()


def test_an_upload_that_does_not_fit_the_disk_is_refused_and_the_run_goes_on(
    siege: Siege, monkeypatch: pytest.MonkeyPatch
) -> None:
    """300 MB are free: an announcement of 128 MiB fits, the files of the server and of others do afterwards."""
    free = 300e6
    usage = shutil.disk_usage(siege.study.folder)
    monkeypatch.setattr(
        "fl_runtime.server.calls.spool.shutil.disk_usage",
        lambda folder: usage._replace(free=int(free - blobs_mib(siege) * 2**20)),
    )
    monkeypatch.setattr("fl_runtime.server.calls.spool._HEADROOM_BYTES", int(200e6))
    error = siege.send("Submit", announced(siege, 2**25))
    assert isinstance(error, StoreError)
    assert "no room for an upload of 134217744 bytes by evil" in error.what
    (line,) = [entry for entry in siege.study.refusals() if "disk" in entry["rule"]]
    assert "evil" in line["who"] and "evil" in line["error"]
    monkeypatch.undo()
    siege.finish()


def test_a_disk_that_is_full_when_an_upload_begins_refuses_that_upload(
    siege: Siege, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("fl_runtime.store.blobs._preallocate", full)
    error = siege.send("Submit", announced(siege, 2**20))
    assert isinstance(error, StoreError) and "No space left on device" in error.what
    monkeypatch.undo()
    siege.finish()


# -- the allowances ------------------------------------------------------------------------------------------------

WHO = Identity("study", "site", "north", "north-hospital")


def rounds_of(account: Callable[[str], CallAccount], rounds: int) -> None:
    """The calls of a site whose rounds take no time at all."""
    for _ in range(rounds):
        for method in ("Next", "Submit", "Score", "Score"):
            call = account(method)
            call.begin()
            if method in ("Submit", "Score"):
                call.spend("metric bytes", 1_000)
            if method == "Submit":
                call.earn()


def test_rounds_that_count_pay_for_their_calls_however_short_they_are() -> None:
    quotas = Quotas()
    rounds_of(lambda method: quotas.account(WHO, method), 20_000)


def test_a_site_may_score_thousands_of_models_of_others_at_once() -> None:
    quotas = Quotas()
    for _ in range(5_000):
        call = quotas.account(WHO, "Score")
        call.begin()
        call.earn()


def test_what_is_used_up_comes_back_and_debts_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("fl_runtime.server.federation.quota.time.monotonic", lambda: now[0])
    quotas = Quotas()
    for _ in range(int(CALLS["Join"].at_once)):
        quotas.account(WHO, "Join").begin()
    with pytest.raises(PermissionDeniedError, match="calls Join: 200 at once and 2 a second"):
        quotas.account(WHO, "Join").begin()
    now[0] = 5.0
    for _ in range(10):
        quotas.account(WHO, "Join").begin()
    call = quotas.account(WHO, "Submit")
    list(call.counted(iter([bytes(2**20)] * 1_000)))
    call.refuse(ProtocolError("a gigabyte of nothing"))
    with pytest.raises(PermissionDeniedError, match="refused calls"):
        quotas.account(WHO, "Attend").begin()
    now[0] += 10.1  # whatever it cost
    quotas.account(WHO, "Attend").begin()
    assert REFUSED.per_s > 0


def waits_for_work(study: Study, site: str, running: list[str]) -> Any:
    """Begin a call that the server answers once there is another job for the site."""
    call = study.transport(site).call("Assignment", json.dumps({"running": running}).encode())
    until(lambda: open_calls(study, site) > 0, "the call to arrive")
    return call


def open_calls(study: Study, site: str) -> int:
    guard = study.server._guard
    with guard._lock:
        return sum(call.certificate.identity.name == site and not call.left for call in guard._open)


def test_calls_that_their_caller_has_ended_leave_no_thread_waiting(tmp_path: Path) -> None:
    with Study(tmp_path) as study:
        for _ in range(40):
            waits_for_work(study, "north", []).cancel()
            until(lambda: not open_calls(study, "north"), "the server to notice")
        until(lambda: not study.server._guard._open, "the threads to be free again, long before a sign of life is due")
        assert study.refusals() == []


def test_a_site_with_too_many_open_calls_calls_again_and_stays_in_its_job(tmp_path: Path) -> None:
    """As after an outage of which the server has not heard: earlier connections seem to be open still."""
    with Study(tmp_path) as study:
        study.job("job", sites=["north"])
        calls = [waits_for_work(study, "north", ["job"]) for _ in range(8)]
        until(lambda: open_calls(study, "north") == 8, "all calls to be open")
        site = study.site("north")
        joining = threading.Thread(target=site.join, args=("job",))
        joining.start()
        until(study.refusals, "a refusal")
        assert study.refusals()[0]["rule"] == "calls: at most 8 at a time for each job"
        for call in calls:
            call.cancel()
        joining.join(30)
        assert site.welcome.attempt == 1
        assert study.server.queue.running()[0].server.state()["sites"]["north"] != "gone"


def test_a_site_may_have_as_many_calls_for_each_of_its_jobs(tmp_path: Path) -> None:
    with Study(tmp_path) as study:
        for name in ("first", "second"):
            study.job(name, sites=["north"])
        study.admin("north").ask("Assignment", resources={"slots": 2})
        until(lambda: len(study.server.queue.running()) == 2, "two jobs at a time")
        running = [job.name for job in study.server.queue.running()]
        request = json.dumps({"running": running}).encode()
        calls = [study.transport("north").call("Assignment", request) for _ in range(16)]
        until(lambda: open_calls(study, "north") == 16, "16 calls for two jobs")
        with pytest.raises(ConnectionLostError, match="16 calls open already"):
            study.admin("north").ask("Assignment", running=running)
        for call in calls:
            call.cancel()


def test_a_revoked_certificate_does_not_use_up_the_quota_of_its_successor() -> None:
    quotas = Quotas()
    for _ in range(int(CALLS["Join"].at_once)):
        quotas.account(WHO, "Join", void="ab12").begin()
    with pytest.raises(PermissionDeniedError):
        quotas.account(WHO, "Join", void="ab12").begin()
    quotas.account(WHO, "Join").begin()


def test_sums_are_written_while_the_attack_goes_on(siege: Siege, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_summary, "SUM_S", 0.1)
    for _ in range(200):
        siege.send("Revoke", b"{}")
    line = until(lambda: [e for e in siege.study.refusals() if "more like it" in e.get("summary", "")], "a sum")[0]
    assert line["action"] == "Revoke" and "evil" in line["who"] and line["error"].endswith("more like it")
