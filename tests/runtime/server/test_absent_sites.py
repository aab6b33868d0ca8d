"""Sites that are late, absent, or come back: no round hangs, and no update is lost or counted twice."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from federation_bench import (
    WAIT_S,
    Site,
    Watch,
    ended,
    errors_at_once,
    errors_together,
    registered,
    serving,
    settings,
    started,
    together,
)
from tcp_proxy import TcpProxy

from fl_runtime.aggregation import FedAvg
from fl_runtime.errors import AbortedError, FederationError, QuorumError, StateMismatchError
from fl_runtime.server.calls.service import FederationService
from fl_runtime.server.records.events import Events
from fl_runtime.server.run import Run
from fl_runtime.store.stores import FolderStore
from fl_runtime.transport.base import Peer, Service
from fl_runtime.transport.memory import MemoryTransport
from fl_runtime.types import Aggregator, Allocate, Arrays, ServerState, Settings, Update

W: Arrays = {"w": np.zeros(3)}


def value(number: float) -> Arrays:
    return {"w": np.full(3, float(number))}


@pytest.mark.parametrize("late", ["drop", "carry"])
def test_a_deadline_with_a_quorum_closes_the_round(tmp_path: Path, late: str) -> None:
    with serving(tmp_path, 2, min_sites=1, deadline_s=3.0, late=late, rounds=2) as bench:
        sites, tasks = bench.started(W)
        one, two = sites.values()
        assert one.submit(tasks["site-1"], value(4)) == "used"
        bench.watch.wait("round_finished")
        assert two.submit(tasks["site-2"], value(8)) == ("late" if late == "drop" else "carried")
        task = one.client.next_task()
        assert (task.round, task.arrays["w"].tolist()) == (2, [4.0] * 3)
        one.submit(task, value(2))
        if late == "drop":
            again = two.client.next_task()
            assert again.round == 2
            two.submit(again, value(6))
        final = one.client.next_task()
        first, second = bench.server.result().rounds
    assert final.kind == "final"
    assert final.arrays["w"].tolist() == ([4.0] * 3 if late == "drop" else [5.0] * 3)
    assert (first.sites, first.missing) == (("site-1",), ("site-2",))
    assert (second.sites, second.missing) == (("site-1", "site-2"), ())


def test_a_deadline_without_a_quorum_ends_the_run_and_names_who_did_not_answer(tmp_path: Path) -> None:
    with serving(tmp_path, 2, deadline_s=2.0) as bench:
        sites, tasks = bench.started(W)
        sites["site-1"].submit(tasks["site-1"], value(1))
        with pytest.raises(QuorumError, match="site-2") as caught:
            sites["site-1"].client.next_task()
        assert "deadline_s" in caught.value.fix


def test_a_needed_site_that_leaves_ends_the_run_for_all(tmp_path: Path) -> None:
    with serving(tmp_path, 3) as bench:
        sites, tasks = bench.started(W)
        for name in ("site-1", "site-2"):
            sites[name].submit(tasks[name], value(1))
        *waiting, _ = errors_together(
            sites["site-1"].client.next_task,
            sites["site-2"].client.next_task,
            lambda: sites["site-3"].client.leave("early stop", early=True),
        )
    for error in waiting:
        assert isinstance(error, QuorumError)
        assert "site-3: early stop" in str(error)


@pytest.mark.parametrize("how", ["vanish", "known dead"])
def test_a_needed_site_that_dies_ends_the_run(tmp_path: Path, how: str) -> None:
    with serving(tmp_path, 2, rejoin_s=0.6) as bench:
        sites, tasks = bench.started(W)
        sites["site-1"].submit(tasks["site-1"], value(1))
        if how == "vanish":
            sites["site-2"].vanish()
        else:
            bench.server.site_left("site-2", "its process ended with signal 9")
        with pytest.raises(QuorumError, match="only 1 site is left .*; the job needs at least 2") as caught:
            sites["site-1"].client.next_task()
        assert ("signal 9" if how == "known dead" else "connection") in str(caught.value)


@pytest.mark.parametrize("when", ["joined", "registered", "in a round"])
def test_a_run_whose_sites_are_all_gone_ends(tmp_path: Path, when: str) -> None:
    with serving(tmp_path, 2, min_sites=1, rejoin_s=0.6) as bench:
        if when == "in a round":
            made = list(bench.started(W)[0].values())
        else:
            made = [bench.site(name) for name in bench.names]
            for site in made:
                site.join()
        if when == "registered":
            threading.Thread(target=lambda: errors_at_once([W], made[0].register), daemon=True).start()
            bench.watch.wait("registered")
        for site in made:
            site.vanish()
        with pytest.raises(QuorumError, match="no site is left") as caught:
            ended(bench.server)
        assert "min_sites" not in caught.value.fix  # would not help


def test_a_site_that_dies_is_done_without_where_the_job_allows_it(tmp_path: Path) -> None:
    with serving(tmp_path, 3, min_sites=2, rejoin_s=0.6, rounds=2) as bench:
        sites, tasks = bench.started(W)
        sites["site-1"].vanish()  # the first in order: the sum must not wait for it for ever
        for number in (1, 2):
            for name in ("site-2", "site-3"):
                sites[name].submit(tasks[name], value(number))
            for name in ("site-2", "site-3"):
                tasks[name] = sites[name].client.next_task()
        assert tasks["site-2"].kind == "final"
        assert tasks["site-2"].arrays["w"].tolist() == [2.0] * 3
        first, second = bench.server.result().rounds
    assert (first.sites, first.missing) == (("site-2", "site-3"), ("site-1",))
    assert (second.sites, second.missing) == (("site-2", "site-3"), ())


# -- coming back ---------------------------------------------------------------------------------------------------


def test_a_new_attempt_takes_the_place_of_the_old_one_at_once(tmp_path: Path) -> None:
    with serving(tmp_path, 2) as bench:
        sites, tasks = bench.started(W)
        old = sites["site-2"]
        sites["site-1"].submit(tasks["site-1"], value(1))
        old.submit(tasks["site-2"], value(1))
        tasks = {n: s.client.next_task() for n, s in sites.items()}
        sites["site-1"].submit(tasks["site-1"], value(1))

        new = bench.site("site-2")
        welcome = new.join()
        assert (welcome.attempt, welcome.started) == (2, True)
        for call in (lambda: old.submit(tasks["site-2"], value(99)), lambda: old.client.next_task()):
            with pytest.raises(AbortedError, match="attempt 1 of site-2; attempt 2 has taken over"):
                call()
        new.register(W)
        task = new.start(W)
        assert (task.kind, task.round, task.arrays["w"].tolist()) == ("train", 2, [1.0] * 3)
        new.submit(task, value(3))
        final = new.client.next_task()
        assert (final.kind, final.arrays["w"].tolist()) == ("final", [2.0] * 3)


def test_a_site_that_is_started_again_while_the_initial_model_is_awaited_does_not_end_the_run(tmp_path: Path) -> None:
    with serving(tmp_path, 2, rounds=1) as bench:
        one, two = bench.site("site-1"), bench.site("site-2")
        registered([one, two], W)
        two.vanish()
        again = bench.site("site-2")
        again.join()  # and has not registered yet
        task = one.client.next_task()
        assert task.kind == "initial"
        one.submit(task, W)
        again.register(W)
        tasks = [site.client.next_task() for site in (one, again)]
        assert [task.round for task in tasks] == [1, 1]


def test_an_old_attempt_that_waits_is_woken_by_the_new_one(tmp_path: Path) -> None:
    with serving(tmp_path, 2) as bench:
        sites, tasks = bench.started(W)
        old = sites["site-2"]
        old.submit(tasks["site-2"], value(1))

        def taken_over() -> object:
            bench.watch.wait("update", "site-2")
            return bench.site("site-2").join()

        waiting, new = errors_together(old.client.next_task, taken_over)
        assert isinstance(waiting, AbortedError)
        assert new is None


def test_an_update_of_a_dead_attempt_counts_and_its_successor_waits_for_the_next_round(tmp_path: Path) -> None:
    with serving(tmp_path, 2, rounds=2) as bench:
        sites, tasks = bench.started(W)
        assert sites["site-2"].submit(tasks["site-2"], value(6)) == "used"
        sites["site-2"].vanish()
        new = bench.site("site-2")
        new.join()
        new.register(W)
        sites["site-1"].submit(tasks["site-1"], value(2))
        task = new.client.next_task()
        assert (task.round, task.arrays["w"].tolist()) == (2, [4.0] * 3)


def test_a_site_that_comes_back_within_a_round_is_counted_wherever_it_stands_in_the_order(tmp_path: Path) -> None:
    """site-1 is absent when the round opens, and the others' updates are already summed when it returns."""
    with serving(tmp_path, 4, min_sites=2, rejoin_s=0.6, rounds=2) as bench:
        sites, tasks = bench.started(W)
        sites["site-1"].client.leave("away for a moment", early=True)
        for name in ("site-2", "site-3", "site-4"):
            sites[name].submit(tasks[name], value(0))
        tasks = {n: sites[n].client.next_task() for n in ("site-2", "site-3", "site-4")}
        assert bench.watch.wait("round_started", count=2).data["sites"] == ["site-2", "site-3", "site-4"]
        for name in ("site-2", "site-3"):
            sites[name].submit(tasks[name], value(0))
        back = bench.site("site-1")
        back.join()
        back.register(W)
        assert back.submit(back.start(W), value(8)) == "used"
        sites["site-4"].submit(tasks["site-4"], value(0))
        final = back.client.next_task()
        second = bench.server.result().rounds[1]
    assert second.sites == ("site-1", "site-2", "site-3", "site-4")
    assert final.arrays["w"].tolist() == [2.0] * 3


def test_an_outlived_process_does_not_keep_its_site_present(tmp_path: Path) -> None:
    with serving(tmp_path, 2, rejoin_s=0.6) as bench:
        sites, tasks = bench.started(W)
        new = bench.site("site-2")  # the old process hangs, its connection stays open
        new.join()
        new.register(W)
        new.vanish()
        sites["site-1"].submit(tasks["site-1"], value(1))
        with pytest.raises(QuorumError, match="site-2: its connection was lost"):
            sites["site-1"].client.next_task()


def test_a_site_that_was_given_up_is_taken_back_when_its_connection_returns(tmp_path: Path) -> None:
    with serving(tmp_path, 2, min_sites=1, rejoin_s=0.6, rounds=2) as bench, TcpProxy(bench.address) as proxy:
        one, two = bench.site("site-1"), bench.site("site-2", address=proxy.address)
        tasks = started([one, two], W)
        proxy.refuses = True
        proxy.cut()
        bench.watch.wait("left", "site-2")
        one.submit(tasks["site-1"], value(1))
        task = one.client.next_task()
        proxy.refuses = False
        assert two.submit(tasks["site-2"], value(9)) == "late"
        again = two.client.next_task()
        assert (again.round, again.arrays["w"].tolist()) == (2, [1.0] * 3)
        one.submit(task, value(2))
        two.submit(again, value(4))
        assert two.client.next_task().arrays["w"].tolist() == [3.0] * 3


def test_a_site_that_comes_after_the_start_takes_part(tmp_path: Path) -> None:
    with serving(tmp_path, 2, min_sites=1, deadline_s=2.0, rounds=2) as bench:
        one, two = bench.site("site-1"), bench.site("site-2")
        one.join()
        one.register(W)  # returns when the deadline of the handshake has passed
        task = one.start(W)
        assert two.join().started
        assert two.register(W) == 2
        bad = bench.site("site-2")
        bad.join()
        with pytest.raises(StateMismatchError, match="w: float64"):
            bad.register({"w": np.zeros(4)})
        good = bench.site("site-2")
        good.join()
        good.register(W)
        late = good.start(W)
        assert late.round == 1
        one.submit(task, value(1))
        good.submit(late, value(3))
        assert good.client.next_task().arrays["w"].tolist() == [2.0] * 3


# -- never twice, never silently ------------------------------------------------------------------------------------


@pytest.mark.parametrize("late", ["drop", "carry"])
def test_an_update_that_is_sent_again_counts_once(tmp_path: Path, late: str) -> None:
    with serving(tmp_path, 2, late=late, rounds=3) as bench:
        sites, tasks = bench.started(W)
        one, two = sites.values()
        first = dict(tasks)
        assert one.submit(first["site-1"], value(1)) == "used"
        assert one.submit(first["site-1"], value(1)) == "duplicate"
        assert one.submit(first["site-1"], value(50)) == "duplicate"  # the first one counts
        assert two.submit(first["site-2"], value(3)) == "used"
        bench.watch.wait("round_started", count=2)
        # the acknowledgement was lost, and the round has been closed meanwhile
        assert one.submit(first["site-1"], value(1)) == "duplicate"
        for expected in ([2.0] * 3, [5.0] * 3):
            tasks = {name: site.client.next_task() for name, site in sites.items()}
            assert tasks["site-1"].arrays["w"].tolist() == expected
            for name, site in sites.items():
                site.submit(tasks[name], value(5))
        assert all(r.sites == bench.names for r in bench.server.result().rounds)
    assert [e.data["status"] for e in bench.watch.all("update", "site-1")] == ["used"] * 3


def test_a_carried_update_that_is_sent_again_counts_once(tmp_path: Path) -> None:
    with serving(tmp_path, 2, min_sites=1, deadline_s=2.5, late="carry", rounds=3) as bench:
        sites, tasks = bench.started(W)
        one, two = sites.values()
        one.submit(tasks["site-1"], value(0))
        bench.watch.wait("round_started", count=2)
        assert two.submit(tasks["site-2"], value(8)) == "carried"
        one.submit(one.client.next_task(), value(0))
        bench.watch.wait("round_started", count=3)
        assert two.submit(tasks["site-2"], value(8)) == "duplicate"
        one.submit(one.client.next_task(), value(1))
        two.submit(two.client.next_task(), value(1))
        assert two.client.next_task().arrays["w"].tolist() == [1.0] * 3


class HeldMean(FedAvg):
    """FedAvg whose last step waits for the test."""

    def __init__(self) -> None:
        self.summing, self.go_on = threading.Event(), threading.Event()

    def aggregator(self, base: Arrays, allocate: Allocate, config: Settings, state: ServerState) -> Aggregator:
        inner, outer = super().aggregator(base, allocate, config, state), self

        class Held:
            def add(self, update: Update) -> None:
                inner.add(update)

            def result(self) -> tuple[Arrays, Arrays]:
                outer.summing.set()
                outer.go_on.wait(WAIT_S)
                return inner.result()

        return Held()


class Noticing:
    """A service that tells the test when the header of a site's update has arrived."""

    def __init__(self, service: Service, site: str) -> None:
        self._service, self._site = service, site
        self.submitting = threading.Event()

    def handle(self, method: str, peer: Peer, requests: Iterator[bytes]) -> Iterator[bytes]:
        if method != "Submit" or peer.name != self._site:
            return self._service.handle(method, peer, requests)
        return self._service.handle(method, peer, self._noticed(requests))

    def _noticed(self, requests: Iterator[bytes]) -> Iterator[bytes]:
        for message in requests:
            self.submitting.set()
            yield message


@pytest.mark.parametrize("late", ["drop", "carry"])
def test_an_update_that_comes_while_a_round_is_being_summed_is_not_counted_in_it(tmp_path: Path, late: str) -> None:
    strategy, watch = HeldMean(), Watch()
    events = Events([watch])
    run = Run(settings(2, min_sites=1, deadline_s=2.5, late=late, rounds=2), tmp_path, events, FolderStore(), strategy)
    loop = threading.Thread(target=run.drive, daemon=True)
    loop.start()
    service = Noticing(FederationService(run), "site-2")
    one, two = (Site(name, MemoryTransport(service, name)) for name in ("site-1", "site-2"))
    tasks = started([one, two], W)
    one.submit(tasks["site-1"], value(4))
    assert strategy.summing.wait(WAIT_S)  # the deadline has passed

    def finished() -> None:
        assert service.submitting.wait(WAIT_S)
        strategy.go_on.set()

    status, _ = together(lambda: two.submit(tasks["site-2"], value(8)), finished)
    first = watch.wait("round_finished")
    run.state.fail(FederationError("the test is over"))
    loop.join(WAIT_S)
    events.close()
    assert first.data["sites"] == ("site-1",)
    assert status == ("late" if late == "drop" else "carried")
    assert run.state.models.newest is not None
    assert run.state.models.newest.blob.views()[0]["w"].tolist() == [4.0] * 3


def test_an_aborted_run_reaches_every_waiting_site(tmp_path: Path) -> None:
    with serving(tmp_path, 2) as bench:
        sites, tasks = bench.started(W)
        for name in bench.names:
            sites[name].submit(tasks[name], value(1))
        tasks = {n: s.client.next_task() for n, s in sites.items()}
        sites["site-1"].submit(tasks["site-1"], value(1))
        waiting, _ = errors_together(
            sites["site-1"].client.next_task, lambda: bench.server.abort("somebody pressed a key")
        )
        assert isinstance(waiting, AbortedError)
        assert "somebody pressed a key" in str(waiting)
        with pytest.raises(AbortedError):
            bench.site("site-2").join()
