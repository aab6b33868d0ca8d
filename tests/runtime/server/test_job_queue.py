"""A job on a federation's server, as an admin and the sites see it."""

from __future__ import annotations

import queue
import threading
from typing import Any, cast

import numpy as np
import pytest
from federation_bench import Site, at_once, started
from study import Study, until

from fl_adapters.cli.federation.server import read_job
from fl_adapters.environments.remote import RemoteJob
from fl_adapters.job import Job
from fl_runtime.errors import AbortedError, ConfigError, ConnectionLostError, StoreError
from fl_runtime.server.federation.federation import FederationServer
from fl_runtime.store.stores import Storage, Store
from fl_runtime.transport.tunnel import Stream
from fl_runtime.trust.kits import read_kit
from fl_runtime.types import Event, Task

W = {"w": np.zeros(3, np.float32)}


def finish(sites: list[Site], tasks: dict[str, Task]) -> None:
    def work(site: Site) -> None:
        task = tasks[site.name]
        while task.kind == "train":
            site.submit(task, W)
            task = site.client.next_task()
        site.client.leave("done", early=False)

    at_once(sites, work)


def test_who_watches_hears_every_event_and_the_end_also_across_a_restart_of_the_server(study: Study) -> None:
    events: list[Event] = []
    address = study.address
    job = RemoteJob(study.admin("lena"), Job(app="x", name="job", rounds=2), events.append, 30)
    sites = [study.site(name) for name in study.sites]
    tasks = started(sites, W)
    until(lambda: any(event.kind == "round_started" for event in events), "the first round to be seen")

    study.server.close()
    study.start(address)
    finish(sites, tasks)

    assert job.wait(30)
    result = job.result()
    assert result.error is None
    assert len(result.rounds) == 2
    assert any(event.kind == "joined" and event.site == "north" for event in events)
    study.server.close()
    study.start(address)
    (again,) = list(study.admin("mina").follow("job"))
    assert again["ended"]["rounds"][1]["round"] == 2
    with pytest.raises(ConfigError, match="there is no job"):
        list(study.admin("mina").follow("../job"))


def test_who_aborts_is_said_to_everybody(study: Study) -> None:
    job = RemoteJob(study.admin("lena"), Job(app="x", name="job", rounds=2), lambda event: None, 30)
    sites = [study.site(name) for name in study.sites]
    tasks = started(sites, W)
    sites[0].submit(tasks["north"], W)
    waiting = threading.Thread(target=job.wait, args=(30,))
    waiting.start()
    job.abort("enough")
    waiting.join(30)
    error = job.result().error
    assert isinstance(error, AbortedError)
    assert "lead lena of north-hospital has aborted the job" in error.what
    with pytest.raises(AbortedError, match="lena"):
        sites[0].client.next_task()


def test_sites_wait_for_their_job_and_each_gets_it_once(study: Study) -> None:
    answers: dict[str, Any] = {}

    def ask(name: str) -> None:
        answers[name] = study.admin(name).ask("Assignment", patience_s=30)

    threads = [threading.Thread(target=ask, args=(name,)) for name in study.sites]
    for thread in threads:
        thread.start()
    study.job(sites=["south"], app="tumour", strategy="fedavg")
    threads[1].join(30)
    assert {"rounds", "min_sites", "filters"} <= answers["south"].pop("settings").keys()
    assert answers["south"].pop("log")  # what the server has seen of this site's audit log
    assert answers == {
        "south": {
            "job": "job",
            "app": "tumour",
            "strategy": "fedavg",
            "submitted_by": "fl-adapters://study/admin/lena?organisation=north-hospital&role=lead",
            "index": 0,
            "count": 1,
        }
    }
    south = study.site("south")
    finish([south], started([south], W))
    assert study.server.wait_for_job("job", 30)
    study.job("next", sites=["north"])
    threads[0].join(30)
    assert answers["north"]["job"] == "next"


def test_two_sites_of_a_job_exchange_streams_through_the_server(study: Study) -> None:
    study.job()
    sites = [study.site(name) for name in study.sites]
    tasks = started(sites, W)
    arrived: queue.Queue[Stream] = queue.Queue()
    tunnels = [site.client.tunnel(arrived.put, lambda: None) for site in sites]

    def reaches_the_other() -> bool:  # whose own call must have come first
        stream = tunnels[0].open("south", "greeting")
        try:
            stream.send(b"hello")
        except ConnectionLostError:
            return False
        return stream.receive() == b"hello to you"

    def answer() -> None:
        stream = arrived.get(timeout=30)
        assert (stream.peer, stream.name, stream.receive()) == ("north", "greeting", b"hello")
        stream.send(b"hello to you")

    other = threading.Thread(target=answer)
    other.start()
    until(reaches_the_other, "a stream to south")
    other.join()
    for tunnel in tunnels:
        tunnel.close()
    finish(sites, tasks)


class AwayStore:
    """A store that is out of reach, as a shared database is while it restarts."""

    def __getattr__(self, name: str) -> Any:
        def fail(*args: object, **options: object) -> None:
            error = StoreError("the database cannot be read or written: it is shutting down")
            error.away = True
            raise error

        return fail


def test_a_job_whose_store_is_away_at_the_start_is_neither_failed_nor_left(study: Study) -> None:
    address = study.address
    study.job("job")
    sites = [study.site(name) for name in study.sites]
    tasks = started(sites, W)
    study.server.close()

    kit = read_kit(study.kits / "server", kind="server")
    storage = Storage(cast(Store, AwayStore()))
    away = FederationServer(kit, study.runs, read_job, listen=address, storage=storage)
    try:
        with pytest.raises(StoreError, match="shutting down"):
            away.start()  # it listens already, until it is closed
        assert away.queue.record("job").state == "running"
        again = study.site("north", patience_s=1.0)
        with pytest.raises(ConnectionLostError, match="stands still"):
            again.join("job")
    finally:
        away.close()

    study.start(address)
    finish(sites, tasks)
    assert study.server.wait_for_job("job", 30)
    assert study.server.outcome("job")["error"] is None
