"""Sites that are cut off for hours, by a clock that the tests move on: a run waits for its quorum, and goes on."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation_bench import WAIT_S, Bench, Site, at_once, ended, errors_together, registered, serving, started
from moved_clock import MovedClock
from study import Study, until
from tcp_proxy import TcpProxy

from fl_adapters.environments.remote import RemoteJob
from fl_adapters.job import Job
from fl_runtime.aggregation.swarm import RECEIPT
from fl_runtime.capabilities import CROSS_EVALUATION, SWARM
from fl_runtime.client import SiteClient
from fl_runtime.errors import ConnectionLostError, QuorumError
from fl_runtime.server import Server
from fl_runtime.server.registration import Member
from fl_runtime.transport.grpc import GrpcTransport
from fl_runtime.types import Arrays, Report, Task
from fl_runtime.wire.manifest import Manifest

HOUR_S, DAY_S = 3600.0, 86_400.0
OUTAGES_S = [float(os.environ.get("FL_ADAPTERS_OUTAGE_S", "5"))]
W: Arrays = {"w": np.zeros(3)}


def value(number: float) -> Arrays:
    return {"w": np.full(3, float(number))}


def wait_for(server: Server, site: str, *, away: bool) -> Member:
    """Wait until the server has noticed that a site is away, or connected."""
    run = server.trainings.newest.run
    member = run.membership.members[site]
    with run.state.lock:
        assert run.state.changed.wait_for(lambda: (member.absent_since is not None) is away, WAIT_S)
    return member


class Away:
    """Cuts the sites behind a proxy off, and lets them back."""

    def __init__(self, bench: Bench, proxy: TcpProxy, clock: MovedClock, *names: str) -> None:
        self._bench, self._proxy, self._clock, self._names = bench, proxy, clock, names

    def leave(self) -> None:
        self._proxy.refuses = True
        self._proxy.cut()
        for name in self._names:
            wait_for(self._bench.server, name, away=True)

    def come_back(self) -> None:
        self._proxy.refuses = False
        for name in self._names:
            wait_for(self._bench.server, name, away=False)

    def be_cut_off_for(self, hours: float) -> None:
        self.leave()
        passed(self._bench, self._clock, hours)
        self.come_back()


def passed(bench: Bench, clock: MovedClock, hours: float) -> None:
    """Let hours pass, and wait until the server has said once more that it waits."""
    said, quorum = len(bench.watch.all("waiting")), bench.server.trainings.newest.run.membership.outages
    until(lambda: quorum.waiting, "the server to notice that it has no quorum")
    clock.pass_by(hours * HOUR_S)
    bench.watch.wait("waiting", count=said + 1)


@contextmanager
def federation(folder: Path, sites: int, behind: int, **fields: Any) -> Iterator[tuple[Bench, Away, MovedClock]]:
    """A run with patience of a day, of whose sites the last `behind` reach the server through a proxy."""
    clock = MovedClock()
    fields = {"patience_s": DAY_S, **fields}
    with serving(folder, sites, clock=clock, **fields) as bench, TcpProxy(bench.address) as proxy:
        names = bench.names[sites - behind :]
        for name in bench.names:
            bench.site(name, address=proxy.address if name in names else "", clock=clock)
        yield bench, Away(bench, proxy, clock, *names), clock


def trained(site: Site, task: Task) -> Arrays:
    """A round of training, whose result depends on the site, the round and the global model."""
    return {"w": task.arrays["w"] * 0.75 + int(site.name[-1]) + 1 / task.round}


def quiet_result(sites: int, rounds: int) -> list[float]:
    """The mean of all sites' updates, round by round, as a plain loop."""
    w = np.zeros(3)
    for number in range(1, rounds + 1):
        w = sum((w * 0.75 + site + 1 / number for site in range(1, sites + 1)), np.zeros(3)) / sites
    return w.tolist()  # type: ignore[no-any-return]


def test_two_hours_in_the_middle_of_a_round_cost_nothing_but_time(tmp_path: Path) -> None:
    """The deadline of a round is shorter than the outage, in which the sites' updates are under way."""
    with federation(tmp_path, 3, 2, rounds=3, deadline_s=600.0) as (bench, away, clock):
        tasks = started(bench.made, W)
        for number in (1, 2, 3):
            submits = list(bench.made)
            if number == 2:
                one, *cut_off = submits
                one.submit(tasks[one.name], trained(one, tasks[one.name]))
                away.leave()
                sending = [
                    threading.Thread(target=s.submit, args=(tasks[s.name], trained(s, tasks[s.name]))) for s in cut_off
                ]
                for thread in sending:
                    thread.start()
                for _ in range(2):
                    passed(bench, clock, 1)
                away.come_back()
                for thread in sending:
                    thread.join(WAIT_S)
            else:
                at_once(submits, lambda s, given=tasks: s.submit(given[s.name], trained(s, given[s.name])))
            tasks = {site.name: site.client.next_task() for site in submits}
        assert [task.kind for task in tasks.values()] == ["final"] * 3
        for task in tasks.values():
            np.testing.assert_allclose(task.arrays["w"], quiet_result(3, 3), rtol=1e-12)
        waiting = bench.watch.all("waiting")
        assert not bench.watch.all("left")
        assert len({tuple(task.arrays["w"].tolist()) for task in tasks.values()}) == 1
    assert [event.data["sites"] for event in waiting] == [["site-2", "site-3"]] * 2
    assert [event.data["waited_s"] for event in waiting] == [3600.0, 7200.0]
    assert (waiting[0].data["here"], waiting[0].data["needed"]) == (1, 3)
    assert bench.watch.wait("quorum").data["waited_s"] == 7200.0
    updates = sorted((event.round, event.site) for event in bench.watch.all("update"))
    assert updates == [(number, name) for number in (1, 2, 3) for name in bench.names]


def test_the_bits_are_those_of_a_run_without_an_outage(tmp_path: Path) -> None:
    def run(folder: Path, hours: float) -> bytes:
        with federation(folder, 3, 3, rounds=2) as (bench, away, _):
            tasks = started(bench.made, {"w": np.random.default_rng(0).normal(size=9)})
            for number in (1, 2):
                bench.made[0].submit(tasks["site-1"], trained(bench.made[0], tasks["site-1"]), 3)
                if hours and number == 2:
                    away.be_cut_off_for(hours)
                for site in bench.made[1:]:
                    site.submit(tasks[site.name], trained(site, tasks[site.name]), 5)
                tasks = {site.name: site.client.next_task() for site in bench.made}
            return bytes(tasks["site-2"].arrays["w"].tobytes())

    assert run(tmp_path / "quiet", 0) == run(tmp_path / "outage", 2)


def test_only_when_patience_is_spent_the_run_ends_and_names_who_was_waited_for(tmp_path: Path) -> None:
    with federation(tmp_path, 2, 1) as (bench, away, clock):
        tasks = started(bench.made, W)
        one = bench.made[0]
        one.submit(tasks["site-1"], value(1))
        away.leave()
        passed(bench, clock, 23.9)

        def later() -> None:
            clock.pass_by(HOUR_S)

        error, _ = errors_together(one.client.next_task, later)
    assert isinstance(error, QuorumError)
    assert "site-2: its connection was lost 24 h ago" in error.where


def test_without_patience_a_run_ends_after_rejoin_s(tmp_path: Path) -> None:
    """As a simulation does, which knows when a process is dead."""
    with federation(tmp_path, 2, 1, patience_s=None) as (bench, away, clock):
        tasks = started(bench.made, W)
        bench.made[0].submit(tasks["site-1"], value(1))
        away.leave()
        error, _ = errors_together(bench.made[0].client.next_task, lambda: clock.pass_by(61))
    assert isinstance(error, QuorumError)
    assert not bench.watch.all("waiting")


def test_a_site_that_has_left_for_good_is_not_waited_for(tmp_path: Path) -> None:
    with federation(tmp_path, 2, 0) as (bench, _, _):
        tasks = started(bench.made, W)
        one = bench.made[0]
        one.submit(tasks["site-1"], value(1))
        error, _ = errors_together(one.client.next_task, lambda: bench.server.site_left("site-2", "it is dead"))
    assert isinstance(error, QuorumError)


# -- with a quorum --------------------------------------------------------------------------------------------------


def test_while_the_others_make_a_quorum_a_lost_site_is_waited_for_once(tmp_path: Path) -> None:
    """Also over a restart of the server; and once it is back, it takes part again."""
    clock = MovedClock()
    fields: dict[str, Any] = {"min_sites": 2, "rounds": 4, "patience_s": DAY_S, "clock": clock}
    with serving(tmp_path, 3, **fields) as bench:
        sites, tasks = bench.started(W)
        sites["site-3"].vanish()
        wait_for(bench.server, "site-3", away=True)
        two = [sites["site-1"], sites["site-2"]]
        for site in two:
            site.submit(tasks[site.name], value(1))
        assert not bench.watch.all("round_finished")
        clock.pass_by(61)
        for number in (1, 2):  # the clock stands still from here on
            assert bench.watch.wait("round_finished", count=number).data["missing"] == (
                ("site-3",) if number == 1 else ()
            )
            tasks = {site.name: site.client.next_task() for site in two}
            for site in two if number == 1 else ():
                site.submit(tasks[site.name], value(2))
        bench.server.close()
        again = Server(bench.server.trainings.newest.run.state.settings, tmp_path, {}, clock=clock)
        assert again.state()["sites"]["site-3"].startswith("gone")
        again.close()


def test_a_quorum_may_come_from_a_site_that_was_lost_earlier(tmp_path: Path) -> None:
    with federation(tmp_path, 3, 1, min_sites=2, rounds=2) as (bench, away, clock):
        tasks = started(bench.made, W)
        one, _, three = bench.made
        away.leave()
        clock.pass_by(61)
        bench.watch.wait("left", "site-3")
        one.submit(tasks["site-1"], value(1))
        bench.server.site_left("site-2", "it is dead")  # the run needs site-3 now
        passed(bench, clock, 1)
        away.come_back()
        three.submit(tasks["site-3"], value(3))
        for site in (one, three):
            site.submit(site.client.next_task(), value(int(site.name[-1])))
        assert one.client.next_task().arrays["w"].tolist() == [2.0] * 3
    assert [r.sites for r in bench.server.result().rounds] == [("site-1", "site-3")] * 2


def test_when_the_quorum_is_back_the_others_still_get_their_time_to_rejoin(tmp_path: Path) -> None:
    with federation(tmp_path, 3, 3, min_sites=2, rounds=1) as (bench, away, clock):
        tasks = started(bench.made, W)
        one, two, three = bench.made
        three.vanish()
        away.leave()
        passed(bench, clock, 2)
        away._names = ("site-1", "site-2")
        away.come_back()
        for site in (one, two):
            site.submit(tasks[site.name], value(1))
        clock.pass_by(50)
        back = bench.site("site-3")
        back.join()
        back.register(W)
        assert back.submit(back.start(W), value(4)) == "used"
        assert one.client.next_task().arrays["w"].tolist() == [2.0] * 3


# -- before and after the rounds ------------------------------------------------------------------------------------


def test_an_outage_before_round_1_is_waited_for(tmp_path: Path) -> None:
    with federation(tmp_path, 2, 1, deadline_s=600.0, rounds=1) as (bench, away, clock):
        one, two = bench.made
        one.join(), two.join()
        joining = threading.Thread(target=one.register, args=(W,))
        joining.start()
        away.leave()
        passed(bench, clock, 2)
        away.come_back()
        two.register(W)
        joining.join(WAIT_S)
        tasks = {site.name: site.start(W) for site in (one, two)}
        at_once((one, two), lambda s: s.submit(tasks[s.name], value(1)))
        assert one.client.next_task().kind == "final"


def test_an_outage_while_the_initial_model_is_awaited(tmp_path: Path) -> None:
    with federation(tmp_path, 2, 2, deadline_s=600.0, rounds=1) as (bench, away, _):
        registered(bench.made, W)
        task = bench.made[0].client.next_task()
        away.be_cut_off_for(2)
        bench.made[0].submit(task, value(7))
        assert bench.made[1].client.next_task().arrays["w"].tolist() == [7.0] * 3


def test_an_outage_after_the_last_round_keeps_the_final_model_for_every_site(tmp_path: Path) -> None:
    with federation(tmp_path, 2, 1, deadline_s=600.0, rounds=1) as (bench, away, _):
        tasks = started(bench.made, W)
        one, two = bench.made
        two.submit(tasks["site-2"], value(3))
        away.leave()
        one.submit(tasks["site-1"], value(1))
        assert one.client.next_task().kind == "final"
        one.client.leave("done", early=False)
        passed(bench, away._clock, 2)
        away.come_back()
        final = two.client.next_task()
        assert (final.kind, final.arrays["w"].tolist()) == ("final", [2.0] * 3)
        two.client.leave("done", early=False)
        ended(bench.server)


def test_at_the_end_a_lost_site_does_not_hold_up_a_quorum_that_has_the_final_model(tmp_path: Path) -> None:
    with federation(tmp_path, 2, 1, min_sites=1, rounds=1) as (bench, away, clock):
        tasks = started(bench.made, W)
        one, two = bench.made
        two.submit(tasks["site-2"], value(3))
        away.leave()
        one.submit(tasks["site-1"], value(1))
        one.client.next_task()
        one.client.leave("done", early=False)
        clock.pass_by(61)
        ended(bench.server)


# -- other courses --------------------------------------------------------------------------------------------------


def test_a_buffered_run_stands_still_without_a_quorum(tmp_path: Path) -> None:
    with federation(tmp_path, 2, 1, strategy="fedbuff:k=1", deadline_s=600.0, rounds=3) as (bench, away, clock):
        tasks = started(bench.made, W)
        one = bench.made[0]
        away.leave()
        clock.pass_by(61)
        passed(bench, clock, 2)
        one.submit(tasks["site-1"], value(1))
        asking = threading.Thread(target=lambda: tasks.update({"site-1": one.client.next_task()}))
        asking.start()
        assert not bench.watch.all("round_finished")
        away.come_back()
        asking.join(WAIT_S)
        assert tasks["site-1"].round == 2
        bench.watch.wait("round_finished")


@pytest.mark.parametrize("late_s", [60.0, 0.0])
def test_a_job_begins_with_its_quorum_after_join_s_and_takes_who_comes_later(tmp_path: Path, late_s: float) -> None:
    clock = MovedClock()
    with serving(tmp_path, 3, min_sites=2, join_s=late_s, rounds=1, clock=clock) as bench:
        sites = [bench.site(name) for name in bench.names]
        for site in sites[:2]:
            site.join()
        waiting = [threading.Thread(target=site.register, args=(W,)) for site in sites[:2]]
        for thread in waiting:
            thread.start()
        bench.watch.wait("registered", count=2)
        if late_s:
            assert all(thread.is_alive() for thread in waiting)
            until(lambda: clock.pass_by(late_s + 1) or bench.watch.all("warning"), "the start with a quorum")
            assert clock.now() < MovedClock().now() + HOUR_S  # long before deadline_s
        for thread in waiting:
            thread.join(WAIT_S)
        assert bench.watch.wait("warning").data["text"] == "the run begins without site-3, which may still join it"
        tasks = {site.name: site.start(W) for site in sites[:2]}
        late = sites[2]
        assert late.join().started
        late.register(W)
        late.submit(late.start(W), value(6))
        for site in sites[:2]:
            site.submit(tasks[site.name], value(0))
        assert late.client.next_task().arrays["w"].tolist() == [2.0] * 3


def test_an_outage_during_a_cross_site_evaluation_leaves_no_gap_in_the_matrix(tmp_path: Path) -> None:
    with federation(tmp_path, 2, 1, cross_site=True, rounds=1, deadline_s=600.0) as (bench, away, clock):
        tasks = started(bench.made, W, capabilities=frozenset({CROSS_EVALUATION}))
        at_once(bench.made, lambda site: site.submit(tasks[site.name], value(1)))
        one, two = bench.made

        def evaluate(site: Site) -> None:
            assert site.client.next_task().kind == "final"
            while (task := site.client.next_task(evaluate=True)).kind == "evaluate":
                site.client.report(Report(task.job, task.version, site.name, {"loss": 1.0}, 1))
            site.client.leave("done", early=False)

        two.client.next_task()
        away.leave()
        evaluate(one)
        passed(bench, clock, 2)
        away.come_back()
        evaluate(two)
        matrix = bench.watch.wait("cross_site").data["matrix"]
    assert {model: sorted(scores) for model, scores in matrix.items()} == {
        "global": ["site-1", "site-2"],
        "site-1": ["site-1", "site-2"],
        "site-2": ["site-1", "site-2"],
    }


def test_a_swarm_round_that_an_outage_interrupts_is_aggregated_by_no_other_set_of_sites(tmp_path: Path) -> None:
    """The server has all receipts, and a site is cut off before an aggregator is asked; min_sites is all."""
    capabilities = frozenset({SWARM})
    with federation(tmp_path, 2, 1, strategy="swarm", rounds=1, deadline_s=600.0) as (bench, away, clock):
        tasks = started(bench.made, W, capabilities=capabilities)
        one, two = bench.made
        two.submit(tasks["site-2"], {}, content="encoded", encoding=RECEIPT)
        away.leave()
        one.submit(tasks["site-1"], {}, content="encoded", encoding=RECEIPT)
        passed(bench, clock, 2)
        assert not bench.watch.all("aggregator")
        away.come_back()
        order = bench.watch.wait("aggregator")
        assert order.data["sites"] == ["site-1", "site-2"]
        aggregator = one if order.site == "site-1" else two
        task = aggregator.client.next_task()
        assert task.kind == "aggregate"
        aggregator.submit(task, value(5))
        assert aggregator.client.next_task().arrays["w"].tolist() == [5.0] * 3


# -- who decides ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"), [({}, (DAY_S, 600.0)), ({"patience_s": 5.0, "join_s": 0.0}, (5.0, 0.0))]
)
def test_in_production_the_project_decides_where_the_job_does_not(
    study: Study, given: dict[str, float], expected: tuple[float, float]
) -> None:
    RemoteJob(study.admin("lena"), Job(app="x", name="job", rounds=1, **given), lambda event: None, 30)
    settings = study.site("north").join().settings
    assert (settings["patience_s"], settings["join_s"]) == expected


@pytest.mark.parametrize("own", [False, True])
def test_a_site_keeps_to_its_own_patience_whatever_the_job_says(tmp_path: Path, own: bool) -> None:
    clock = MovedClock()
    with serving(tmp_path, 1, patience_s=HOUR_S) as bench, TcpProxy(bench.address) as proxy:
        client = SiteClient(GrpcTransport(proxy.address, "secret of site-1"), 60.0, own_patience=own, clock=clock)
        client.join()
        client.register(Manifest.of(W), agreement={}, info={}, capabilities=frozenset(), rounds=0, evaluates=False)
        proxy.refuses = True
        proxy.cut()
        error: list[ConnectionLostError] = []

        def ask() -> None:
            try:
                client.next_task()
            except ConnectionLostError as lost:
                error.append(lost)

        asking = threading.Thread(target=ask)
        asking.start()
        until(lambda: clock.pass_by(20) or error, "the end of the site's patience")
        asking.join(WAIT_S)
        client.close()
    assert error[0].what.endswith(f"gave up after {'60 s' if own else '1 h'}")


# -- by real clocks -------------------------------------------------------------------------------------------------


def final_bits(folder: Path, outage_s: float) -> bytes:
    """The result of three sites, two of which are cut off in the middle of their updates of round 2."""
    first = {"w": np.random.default_rng(0).normal(size=200_000)}
    fields: dict[str, Any] = {"rounds": 3, "rejoin_s": 0.5, "deadline_s": 600.0, "patience_s": 900.0}
    with serving(folder, 3, **fields) as bench, TcpProxy(bench.address) as proxy:
        sites = [bench.site(name, address=proxy.address if name != "site-1" else "") for name in bench.names]
        tasks = started(sites, first)

        def outage() -> None:
            assert proxy.wait_fired(1, WAIT_S)
            proxy.refuses = True
            proxy.cut()
            proxy.go_on()
            threading.Timer(outage_s, setattr, (proxy, "refuses", False)).start()

        for number in (1, 2, 3):
            if outage_s and number == 2:
                proxy.stop_after("up", 500_000)
                threading.Thread(target=outage).start()

            def work(site: Site, given: dict[str, Task] = tasks) -> Task:
                site.submit(given[site.name], trained(site, given[site.name]), int(site.name[-1]))
                return site.client.next_task()

            with ThreadPoolExecutor() as pool:
                tasks = dict(zip(bench.names, pool.map(work, sites), strict=True))
        assert {task.kind for task in tasks.values()} == {"final"}
        updates = sorted((event.round, event.site) for event in bench.watch.all("update"))
        assert updates == [(number, name) for number in (1, 2, 3) for name in bench.names]
        assert not bench.watch.all("left")
        assert not outage_s or bench.server.result().rounds[1].seconds >= outage_s
        return bytes(tasks["site-2"].arrays["w"].tobytes())


@pytest.mark.parametrize("outage_s", OUTAGES_S)
def test_a_real_outage_in_the_middle_of_updates_changes_no_bit(tmp_path: Path, outage_s: float) -> None:
    """$FL_ADAPTERS_OUTAGE_S gives another length, such as 180."""
    assert final_bits(tmp_path / "quiet", 0) == final_bits(tmp_path / "outage", outage_s)
