"""The queue of a federation's server, over real sockets: order, room at the sites, restarts, resumed jobs, results."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation_bench import Site, at_once
from study import Study, until

from fl_adapters.environments.download import download
from fl_runtime.errors import (
    AbortedError,
    ConfigError,
    FederationError,
    PermissionDeniedError,
    QuorumError,
)
from fl_runtime.server.federation.archive import JobArchive, JobRecord
from fl_runtime.server.federation.schedule import Room, next_to_start, shortage
from fl_runtime.store.stores import Unshared
from fl_runtime.store.tensorfile import read_tensors
from fl_runtime.trust.identity import Identity
from fl_runtime.types import Arrays, RunSettings, Task

W = {"w": np.zeros(3, np.float32)}
SITES = ("north", "south", "west")
LENA = Identity("study", "admin", "lena", "north-hospital", "lead")


@pytest.fixture
def study(tmp_path: Path) -> Iterator[Study]:
    with Study(tmp_path, SITES) as running:
        yield running


def plus(amount: float) -> Any:
    return lambda task: {"w": task.arrays["w"] + np.float32(amount)}


def state(study: Study, name: str) -> str:
    return study.server.queue.record(name).state


def whole(study: Study, job: str, sites: tuple[str, ...], amount: float = 1.0) -> dict[str, Arrays]:
    """Take part in a job with all of its sites, each in a thread."""
    with ThreadPoolExecutor(len(sites)) as pool:
        futures = {
            name: pool.submit(study.site(name).take_part, W, plus(amount * (index + 1)), job=job)
            for index, name in enumerate(sites)
        }
        return {name: future.result(60) for name, future in futures.items()}


def record(number: int, sites: str, priority: int = 0, **resources: float) -> JobRecord:
    settings = RunSettings(f"job-{number}", tuple(sites), 1, resources=resources)
    return JobRecord(settings, LENA, "study", number, priority)


@pytest.mark.parametrize(
    ("queued", "busy", "slots", "first"),
    [
        ([record(2, "ab"), record(1, "ab")], [], {}, 1),
        ([record(1, "ab"), record(2, "ab", priority=5)], [], {}, 2),
        ([record(1, "ab", priority=-1), record(2, "ab")], [], {}, 2),
        ([record(1, "ab"), record(2, "c")], ["a"], {}, 2),  # one that fits passes
        ([record(1, "ab"), record(2, "b")], ["ab"], {}, None),
        ([record(1, "ab")], ["ab"], {"a": 2}, None),  # b has no room
        ([record(1, "ab")], ["ab"], {"a": 2, "b": 2}, 1),
        ([record(1, "ab")], ["ab", "a"], {"a": 2, "b": 3}, None),
        ([], [], {}, None),
    ],
)
def test_the_oldest_of_the_highest_priority_that_fits_starts(
    queued: list[JobRecord], busy: list[str], slots: dict[str, int], first: int | None
) -> None:
    works = [(record(0, sites).settings, tuple(sites)) for sites in busy]
    chosen = next_to_start(queued, works, {site: Room(number) for site, number in slots.items()})
    assert (chosen.number if chosen else None) == first


@pytest.mark.parametrize(
    ("needs", "others", "lacks"),
    [
        ({"gpus": 2}, [], ""),
        ({"gpus": 5}, [], "a: 5 GPUs are needed, 4 of 4 are free"),
        ({"gpus": 2}, [{"gpus": 3}], "a: 2 GPUs are needed, 1 of 4 are free"),
        ({"gpus": 3}, [{}], "a: 3 GPUs are needed, 2 of 4 are free"),  # a job that says nothing has its share
        ({"gpus": 2}, [{}], ""),
        ({}, [{"gpus": 4}], "a: other jobs have all GPUs for themselves"),
        ({}, [{"gpus": 3}], ""),
        ({"gpus": 0}, [{"gpus": 4}], ""),
        ({"memory_gb": 6}, [{"memory_gb": 6}], "a: 6 GiB of memory are needed, 4.0 are free"),
        ({"memory_gb": 4}, [{"memory_gb": 6}], ""),
        ({}, [{"gpus": 0}, {"gpus": 0}], "a: all places for jobs are taken (2)"),
    ],
)
def test_a_job_waits_until_its_sites_have_the_gpus_and_the_memory_that_it_needs(
    needs: dict[str, float], others: list[dict[str, float]], lacks: str
) -> None:
    works = [(record(0, "a", **other).settings, ("a",)) for other in others]
    assert shortage(record(1, "a", **needs).settings, works, {"a": Room(2, 4, 10 * 2**30)}) == lacks


def test_what_a_site_tells_of_its_room_is_checked() -> None:
    assert Room.told({"slots": 99, "gpus": 4, "memory_bytes": -1}, 32) == Room(32, 4, None)
    assert Room.told({"slots": 1, "gpus": "many"}, 32) == Room(1)
    for nothing in (None, [], {}, {"slots": 0}, {"slots": True}):
        assert Room.told(nothing, 32) is None


def test_a_job_that_needs_more_than_its_site_has_says_what_it_waits_for(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fl_runtime.server.federation.calls.BEAT_S", 0.05)  # a site tells by a call that then waits

    def tell(gpus: int) -> None:
        control, others = study.admin("north"), ["small", "large"]
        resources = {"slots": 2, "gpus": gpus, "memory_bytes": 2**30}
        next(iter(control.answers("Assignment", running=others, resources=resources)))

    study.job("small", sites=["north"], resources={"gpus": 1})
    tell(2)
    study.job("large", sites=["north"], resources={"gpus": 2})
    shown = study.admin("lena").ask("ShowJob", job="large")
    assert (shown["state"], shown["waits_for"]) == ("queued", "north: 2 GPUs are needed, 1 of 2 are free")
    assert shown["settings"]["resources"] == {"gpus": 2}
    tell(3)
    assert state(study, "large") == "running"
    with pytest.raises(ConfigError, match="resources names a whole number of gpus"):
        study.job("half", resources={"gpus": 0.5})


def test_jobs_wait_for_their_sites_in_order_and_others_pass(study: Study) -> None:
    study.job("first", sites=["north", "south"])
    study.job("second", sites=["south"])
    study.job("other", sites=["west"])
    study.admin("lena").ask(
        "SubmitJob", job={"app": "x", "name": "urgent", "rounds": 2, "sites": ["south"]}, priority=9
    )
    states = {job["job"]: job["state"] for job in study.admin("mina").ask("Status")["jobs"]}
    assert states == {"first": "running", "second": "queued", "other": "running", "urgent": "queued"}

    finals = whole(study, "first", ("north", "south"))
    assert finals["north"]["w"].tolist() == [3, 3, 3]  # two rounds of (1 + 2) / 2
    assert study.server.wait_for_job("first", 30)
    assert (state(study, "urgent"), state(study, "second")) == ("running", "queued")
    whole(study, "urgent", ("south",))
    assert study.server.wait_for_job("urgent", 30)
    whole(study, "second", ("south",))
    whole(study, "other", ("west",))
    assert study.server.wait_for_job("second", 30)
    assert study.server.wait_for_job("other", 30)


def test_two_jobs_at_once_at_sites_with_room_keep_apart(study: Study) -> None:
    def offered(name: str, running: list[str]) -> str:
        asked = {"running": running, "resources": {"slots": 2}}
        return str(study.admin(name).ask("Assignment", patience_s=30, **asked)["job"])

    study.job("one")
    study.job("two")
    assert state(study, "two") == "queued"
    for name in SITES:
        assert offered(name, []) == "one"
    until(lambda: state(study, "two") == "running", "the second job to start")
    assert [offered(name, ["one"]) for name in SITES] == ["two"] * 3
    results: dict[str, dict[str, Arrays]] = {}
    threads = [
        threading.Thread(target=lambda job=job, by=by: results.update({job: whole(study, job, SITES, by)}))
        for job, by in (("one", 1.0), ("two", 10.0))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results["one"]["west"]["w"].tolist() == [4, 4, 4]
    assert results["two"]["west"]["w"].tolist() == [40, 40, 40]
    assert study.server.wait_for_job("one", 30)
    assert study.server.wait_for_job("two", 30)


@contextmanager
def daemon(study: Study, site: str) -> Iterator[None]:
    """Let a site's daemon wait for a job during the block."""
    request = json.dumps({"running": [], "resources": {"slots": 1}}).encode()
    call = study.transport(site).call("Assignment", request)
    until(lambda: site in study.server.queue.attendance.waiting, f"the daemon of {site} to wait")
    yield
    call.cancel()
    until(lambda: site not in study.server.queue.attendance.waiting, f"the daemon of {site} to be gone")


def shown(study: Study, name: str) -> tuple[str, str]:
    job = study.admin("mina").ask("ShowJob", job=name)
    return job["state"], job.get("waits_for", "")


def test_a_job_waits_for_its_sites_without_holding_others_up_also_after_a_restart(study: Study) -> None:
    with daemon(study, "north"):
        pass
    study.job("all")
    assert shown(study, "all") == ("queued", "sites: north")
    study.job("south", sites=["south"])
    assert state(study, "south") == "running", "nobody has its place"
    whole(study, "south", ("south",))
    assert study.server.wait_for_job("south", 30)
    address = study.address
    study.server.close()
    study.start(address)
    assert shown(study, "all") == ("queued", "sites: north")
    assert study.admin("north").ask("Assignment", patience_s=30, running=[], resources={"slots": 1})["job"] == "all"
    assert whole(study, "all", SITES)["north"]["w"].tolist() == [4, 4, 4]
    assert study.server.wait_for_job("all", 30)


def test_a_site_is_there_that_was_given_a_job_just_now_or_is_connected_to_one(study: Study) -> None:
    study.job("one", sites=["north"])
    assert study.admin("north").ask("Assignment", patience_s=30, running=[], resources={"slots": 3})["job"] == "one"
    study.job("two", sites=["north"])
    assert state(study, "two") == "running", "its daemon has had no time to ask again"
    study.server.queue.attendance._answered_at.clear()  # as if half a minute had passed
    study.job("three", sites=["north"])
    assert shown(study, "three") == ("queued", "sites: north")
    site = study.site("north")
    site.join("one")
    study.job("other", sites=["south"])  # a reason to look again
    assert state(study, "three") == "running"


def test_a_script_that_joins_by_itself_is_taken_for_a_site_without_a_daemon(study: Study) -> None:
    with daemon(study, "north"):
        pass
    study.job("job", sites=["north"])
    assert shown(study, "job") == ("queued", "sites: north")
    study.site("north").join()
    assert state(study, "job") == "running"
    study.server.close()
    study.start()
    study.job("next", sites=["north"])
    assert shown(study, "next") == ("queued", "north: all places for jobs are taken (1)")


@pytest.mark.parametrize(
    ("min_sites", "away", "waits"),
    [
        (3, "", ""),
        (3, "b", "sites: b"),
        (2, "b", ""),
        (2, "ab", "sites: a, b"),
        (1, "abc", "sites: a, b, c"),
        (3, "x", ""),
    ],
)
def test_as_many_sites_as_the_quorum_must_be_there(min_sites: int, away: str, waits: str) -> None:
    settings = RunSettings("job", tuple("abc"), min_sites)
    assert shortage(settings, [], {}, away) == waits
    queued = [JobRecord(settings, LENA, "study", 1, 0)]
    assert (next_to_start(queued, [], {}, away) is None) == bool(waits)


def test_what_waits_and_what_runs_goes_on_after_a_restart(study: Study) -> None:
    for name in ("first", "second", "third"):
        study.job(name)
    sites = [study.site(name) for name in SITES]
    at_once(sites, lambda site: (site.join("first"), site.register(W)))
    address = study.address
    study.server.close()
    study.start(address)
    assert [state(study, name) for name in ("first", "second", "third")] == ["running", "queued", "queued"]
    for name in ("first", "second", "third"):
        until(lambda name=name: state(study, name) == "running", f"{name} to start")
        assert whole(study, name, SITES)["north"]["w"].tolist() == [4, 4, 4]
        assert study.server.wait_for_job(name, 30)


def test_a_job_that_cannot_start_is_in_nobodys_way(study: Study) -> None:
    study.job("first")
    study.job("broken")
    study.job("third")
    (study.runs / "broken" / "server").mkdir()
    (study.runs / "broken" / "server" / "journal.sqlite").write_bytes(b"not a database" * 1000)
    study.admin("lena").ask("AbortJob", job="first")
    until(lambda: state(study, "third") == "running", "the third job to start")
    assert state(study, "broken") == "failed"
    assert study.server.outcome("broken")["error"]["what"]
    assert whole(study, "third", SITES)["north"]["w"].tolist() == [4, 4, 4]


def until_round(study: Study, job: str, number: int) -> list[tuple[Site, Task]]:
    """Take part in a job until a round; return its sites and their tasks."""

    def take_part(site: Site) -> Task:
        site.join(job)
        site.register(W)
        task = site.start(W)
        while task.round < number:
            site.submit(task, plus(SITES.index(site.name) + 1)(task))
            task = site.client.next_task()
        return task

    sites = [study.site(name) for name in SITES]
    return list(zip(sites, at_once(sites, take_part), strict=True))


@pytest.mark.parametrize("how", ["aborted", "left", "killed and aborted"])
def test_a_job_that_ended_early_is_resumed_where_it_stood(study: Study, how: str) -> None:
    study.job("study-1", rounds=4)
    taking_part = until_round(study, "study-1", 3)
    if how == "left":
        taking_part[2][0].client.leave("its disk is full", early=True)
    else:
        if how == "killed and aborted":
            address = study.address
            study.server.close()
            study.start(address)
        study.admin("lena").ask("AbortJob", job="study-1")
    assert study.server.wait_for_job("study-1", 30)
    error = FederationError.from_wire(study.server.outcome("study-1")["error"])
    assert isinstance(error, QuorumError if how == "left" else AbortedError)
    for site, _ in taking_part:
        site.client.close()
    assert not (study.runs / "study-1" / ".current.json").exists()

    study.admin("lena").ask("ResumeJob", job="study-1")
    assert whole(study, "study-1", SITES)["north"]["w"].tolist() == [8, 8, 8]  # four rounds of (1 + 2 + 3) / 3
    assert study.server.wait_for_job("study-1", 30)
    assert study.server.outcome("study-1")["error"] is None
    assert [item["round"] for item in study.server.outcome("study-1")["rounds"]] == [1, 2, 3, 4]
    assert read_tensors(study.runs / "study-1" / "model" / "model.safetensors")["w"].tolist() == [8, 8, 8]
    with pytest.raises(ConfigError, match="has finished"):
        study.admin("lena").ask("ResumeJob", job="study-1")


def test_a_job_that_waits_can_be_aborted_resumed_and_deleted(study: Study) -> None:
    study.job("first")
    study.job("second")
    lena = study.admin("lena")
    lena.ask("AbortJob", job="second")
    assert state(study, "second") == "aborted"
    with pytest.raises(ConfigError, match="has ended already"):
        lena.ask("AbortJob", job="second")
    lena.ask("ResumeJob", job="second")
    assert state(study, "second") == "queued"
    with pytest.raises(ConfigError, match="has not ended"):
        lena.ask("DeleteJob", job="second")
    lena.ask("AbortJob", job="second")
    with pytest.raises(PermissionDeniedError):
        study.admin("lars").ask("DeleteJob", job="second")
    lena.ask("DeleteJob", job="second")
    assert not (study.runs / "second").exists()
    study.job("second")  # its name is free again


def test_a_site_that_refuses_a_job_is_not_waited_for(study: Study) -> None:
    study.job("job", min_sites=2)
    asked = study.admin("west").ask("Assignment", patience_s=30, running=[])
    assert asked["settings"]["min_sites"] == 2
    study.admin("west").ask("RefuseJob", job="job", reason="no app tumour\x1b[2J here")
    assert whole(study, "job", ("north", "south"))["north"]["w"].tolist() == [3, 3, 3]
    assert study.server.wait_for_job("job", 30)
    refusals = [entry for entry in study.log() if entry["action"] == "left" and entry["site"] == "west"]
    assert refusals[0]["facts"]["reason"] == "it refuses the job: no app tumour\\x1b[2J here"
    with pytest.raises(ConfigError, match="does not run with"):
        study.admin("west").ask("RefuseJob", job="job", reason="late")


def test_results_are_downloaded_by_admins_and_sites_of_the_job_alone(study: Study, tmp_path: Path) -> None:
    study.job("job", sites=["north", "south"])
    with pytest.raises(ConfigError, match="has not ended"):
        download(study.admin("mina"), "job", tmp_path / "early")
    whole(study, "job", ("north", "south"))
    assert study.server.wait_for_job("job", 30)
    out = tmp_path / "out"
    (out / "model").mkdir(parents=True)
    model = (study.runs / "job" / "model" / "model.safetensors").read_bytes()
    (out / "model" / "model.safetensors.part").write_bytes(model[:10])  # an earlier download was interrupted
    for who in ("mina", "north"):
        files = download(study.admin(who), "job", out)
        names = {path.relative_to(out).as_posix() for path in files}
        assert {"model/model.safetensors", "history.csv", "events.jsonl", "outcome.json", "report.html"} <= names
        assert not any(name.startswith("server/") or name == "job.json" for name in names)
        for name in names - {"report.html", "job.yml"}:  # are made here, from events and settings
            assert (out / name).read_bytes() == (study.runs / "job" / name).read_bytes()
    assert not list(out.rglob("*.part"))
    with pytest.raises(PermissionDeniedError, match="west is not a site of the job"):
        download(study.admin("west"), "job", tmp_path / "west")


@pytest.mark.parametrize(
    "file", ["server/journal.sqlite", "job.json", "../other", "/etc/hostname", "link", "nothing", ""]
)
def test_nothing_but_results_can_be_downloaded(study: Study, file: str) -> None:
    study.job("job")
    study.admin("lena").ask("AbortJob", job="job")
    assert study.server.wait_for_job("job", 30)
    (study.runs / "other").write_text("secret")
    (study.runs / "job" / "link").symlink_to(study.runs / "other")
    with pytest.raises(ConfigError, match="the job has no file"):
        list(study.admin("mina").stream("Download", job="job", file=file))


def test_a_folder_of_another_federation_is_refused(study: Study) -> None:
    study.job("job")
    study.server.close()
    with pytest.raises(ConfigError, match="holds the job job of the federation study, not of other"):
        JobArchive(study.runs, "other", Unshared())


def test_a_folder_of_a_version_without_a_queue_is_read(study: Study) -> None:
    study.job("old")
    study.server.close()
    file = study.runs / "old" / "job.json"
    fields = json.loads(file.read_text())
    file.write_text(json.dumps({key: fields[key] for key in ("settings", "submitter")}))
    (study.runs / ".current.json").write_text(json.dumps({"job": "old"}))
    (study.runs / "older").mkdir()  # it ended, but how was not written
    older = {**fields["settings"], "name": "older"}
    (study.runs / "older" / "job.json").write_text(json.dumps({"settings": older, "submitter": fields["submitter"]}))
    study.start()
    assert state(study, "old") == "running"
    (shown,) = (job for job in study.admin().ask("Status")["jobs"] if job["job"] == "older")
    assert (shown["state"], shown["error"]["what"]) == ("failed", "the job 'older' has no outcome")
    assert study.admin().ask("ShowJob", job="older")["outcome"]["error"] == shown["error"]
    assert not (study.runs / ".current.json").exists()
    assert whole(study, "old", SITES)["north"]["w"].tolist() == [4, 4, 4]
