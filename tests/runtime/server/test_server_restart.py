"""A server that is killed and started again on the same folder continues the run and ends with the same bits."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation_bench import WAIT_S, Site, at_once, registered, serving, started, together
from server_process import server_process
from tcp_proxy import TcpProxy

from fl_runtime.types import Arrays, Report, Task
from fl_runtime.wire.manifest import Manifest


def trained(task: Task, site: str) -> Arrays:
    """Return an update that differs for every site and round; sums of the updates are not associative."""
    index = int(site[-1])
    rng = np.random.default_rng([index, task.round])
    return {
        name: (0.5 * array + rng.normal(size=array.shape) * 10.0**index).astype(array.dtype)
        for name, array in task.arrays.items()
    }


def start_weights(size: int = 1000) -> Arrays:
    return {"w": np.zeros(size, np.float32), "v": np.ones((3, 2))}


def uninterrupted(folder: Path, sites: int, rounds: int, size: int = 1000, **fields: Any) -> dict[str, bytes]:
    def site(name: str) -> Arrays:
        return bench.site(name).take_part(start_weights(size), lambda task: trained(task, name))

    with serving(folder, sites, sockets=False, rounds=rounds, **fields) as bench:
        return bits(bench.run(site)["site-1"])


def bits(arrays: Arrays) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in arrays.items()}


def test_killed_between_two_updates_of_a_round(tmp_path: Path) -> None:
    expected = uninterrupted(tmp_path / "oracle", 3, 2)
    with server_process(tmp_path / "run", 3, rounds=2) as server:
        sites = {f"site-{i}": server.site(f"site-{i}") for i in (1, 2, 3)}
        tasks = started(sites.values(), start_weights())
        sites["site-3"].submit(tasks["site-3"], trained(tasks["site-3"], "site-3"))
        server.kill()
        server.start()
        # acknowledged: it counts, and is not counted again
        assert sites["site-3"].submit(tasks["site-3"], trained(tasks["site-3"], "site-3")) == "duplicate"
        for name in ("site-1", "site-2"):
            assert sites[name].submit(tasks[name], trained(tasks[name], name)) == "used"
        tasks = {n: s.client.next_task() for n, s in sites.items()}
        assert {task.round for task in tasks.values()} == {2}
        for name, site in sites.items():
            site.submit(tasks[name], trained(tasks[name], name))
        finals = [bits(site.client.next_task().arrays) for site in sites.values()]
        for site in sites.values():
            site.client.leave("done", early=False)
            site.vanish()
        assert finals == [expected] * 3
        assert bits(server.finished()) == expected


@pytest.mark.parametrize("late", ["drop", "carry"])
def test_killed_after_a_round_whose_acknowledgement_was_lost(tmp_path: Path, late: str) -> None:
    with server_process(tmp_path / "run", 1, rounds=3, late=late) as server:
        site = server.site("site-1")
        site.join()
        site.register(start_weights())
        task = site.start(start_weights())
        update = trained(task, "site-1")
        site.submit(task, update)
        server.kill()
        server.start()
        assert site.submit(task, update) == "duplicate"
        assert site.client.next_task().round == 2
        site.vanish()


@pytest.mark.parametrize(
    ("rounds", "fields"),
    [
        (6, {}),
        (6, {"strategy": "fedadam:lr=0.1"}),  # has moments, which only the server knows
        (12, {"fraction": 0.5, "seed": 1, "min_sites": 2}),  # draws who takes part
    ],
)
def test_killed_again_and_again_while_three_sites_train(tmp_path: Path, rounds: int, fields: dict[str, Any]) -> None:
    expected = uninterrupted(tmp_path / "oracle", 3, rounds, **fields)
    acknowledged = threading.Semaphore(0)

    def site(name: str) -> dict[str, bytes]:
        site = server.site(name)

        def change(task: Task) -> Arrays:
            if task.round > 1:
                acknowledged.release()
            return trained(task, name)

        return bits(site.take_part(start_weights(), change))

    def murder() -> None:
        for _ in range(4):
            for _ in range(3):
                assert acknowledged.acquire(timeout=WAIT_S)
            server.kill()
            server.start()

    with server_process(tmp_path / "run", 3, rounds=rounds, **fields) as server:
        finals = together(murder, lambda: site("site-1"), lambda: site("site-2"), lambda: site("site-3"))
        assert finals[1:] == [expected] * 3
        assert bits(server.finished()) == expected


def test_killed_in_the_middle_of_an_upload(tmp_path: Path) -> None:
    size = 2**22  # 16 MiB of float32
    expected = uninterrupted(tmp_path / "oracle", 2, 1, size)
    with server_process(tmp_path / "run", 2, rounds=1) as server, TcpProxy(server.address) as proxy:

        def murder() -> None:
            # site-1 uploads the initial model, then its update; the kill comes in the middle of the latter
            proxy.wait_for("up", size * 4 + 2**22)
            server.kill()
            server.start()

        def site(name: str, address: str) -> dict[str, bytes]:
            return bits(server.site(name, address).take_part(start_weights(size), lambda task: trained(task, name)))

        finals = together(murder, lambda: site("site-1", proxy.address), lambda: site("site-2", ""))
        assert finals[1:] == [expected] * 2
        assert bits(server.finished()) == expected


@pytest.mark.parametrize("moment", ["one site has registered", "the initial model is awaited", "the end is near"])
def test_killed_at_the_edges_of_a_run(tmp_path: Path, moment: str) -> None:
    with server_process(tmp_path / "run", 2, rounds=1) as server:
        one, two = server.site("site-1"), server.site("site-2")
        one.join()
        two.join()
        if moment == "one site has registered":
            registered = threading.Thread(target=lambda: one.register(start_weights()), daemon=True)
            registered.start()
            server.kill()
            server.start()
            two.register(start_weights())
            registered.join(WAIT_S)
        else:
            at_once([one, two], lambda site: site.register(start_weights()))
        if moment == "the initial model is awaited":
            server.kill()
            server.start()
        tasks = {s.name: s.start(start_weights()) for s in (one, two)}
        for site in (one, two):
            site.submit(tasks[site.name], trained(tasks[site.name], site.name))
        final = one.client.next_task()
        assert final.kind == "final"
        kept = bits(final.arrays)
        if moment == "the end is near":
            server.kill()
            server.start()
        other = two.client.next_task()
        assert (other.kind, bits(other.arrays)) == ("final", kept)
        for site in (one, two):
            site.client.leave("done", early=False)
            site.vanish()
        assert bits(server.finished()) == kept


def test_killed_after_the_update_of_a_site_that_had_come_back_to_the_round(tmp_path: Path) -> None:
    with server_process(tmp_path / "run", 2, rounds=2, min_sites=1) as server:
        one, two = server.site("site-1"), server.site("site-2")
        tasks = started([one, two], {"w": np.zeros(1)})
        one.client.leave("away for a moment", early=True)
        two.submit(tasks["site-2"], {"w": np.zeros(1)})
        task = two.client.next_task()  # round 2 was opened without site-1
        back = server.site("site-1")
        back.join()
        back.register({"w": np.zeros(1)})
        assert back.submit(back.start({"w": np.zeros(1)}), {"w": np.full(1, 8.0)}) == "used"
        server.kill()
        server.start()
        two.submit(task, {"w": np.zeros(1)})
        assert back.client.next_task().arrays["w"].tolist() == [4.0]
        for site in (one, two, back):
            site.vanish()


def test_a_site_that_dies_while_the_server_is_down_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    with server_process(tmp_path / "run", 2, rounds=1, min_sites=1, rejoin_s=3.0) as server:
        one, two = server.site("site-1"), server.site("site-2")
        registered([one, two], start_weights())
        task = one.start(start_weights())
        server.kill()
        two.vanish()
        server.start()
        one.submit(task, trained(task, "site-1"))
        assert one.client.next_task().kind == "final"
        one.client.leave("done", early=False)
        one.vanish()
        server.finished()


def test_a_site_that_had_left_is_not_waited_for_again(tmp_path: Path) -> None:
    with server_process(tmp_path / "run", 2, rounds=1, rejoin_s=600.0) as server:
        one, two = server.site("site-1"), server.site("site-2")
        tasks = started([one, two], start_weights())
        for site in (one, two):
            site.submit(tasks[site.name], trained(tasks[site.name], site.name))
        assert [site.client.next_task().kind for site in (one, two)] == ["final", "final"]
        one.client.leave("done", early=False)
        one.vanish()
        server.kill()
        server.start()
        two.client.leave("done", early=False)
        two.vanish()
        server.finished()


def test_killed_while_the_sites_score_each_others_models(tmp_path: Path) -> None:
    with server_process(tmp_path / "run", 2, rounds=1, cross_site=True) as server:
        sites = [server.site(name) for name in ("site-1", "site-2")]
        for site in sites:
            site.join()
        able = frozenset({"cross-evaluation"})
        manifest = Manifest.of({"w": np.zeros(2)})
        at_once(
            sites,
            lambda site: site.client.register(
                manifest, agreement={}, info={}, capabilities=able, rounds=0, evaluates=False
            ),
        )
        for index, site in enumerate(sites):
            site.submit(site.start({"w": np.zeros(2)}), {"w": np.full(2, float(index))})
        assert [site.client.next_task().kind for site in sites] == ["final", "final"]

        def score(site: Site) -> tuple[str, float]:
            task = site.client.next_task(evaluate=True)
            if task.kind == "evaluate":
                site.client.report(Report(task.job, task.version, site.name, {"loss": 1.0}, 1))
            return str(task.config.get("model", task.kind)), float(task.arrays["w"][0]) if task.arrays else 0.0

        assert score(sites[0]) == ("global", 0.5)
        assert score(sites[0]) == ("site-1", 0.0)
        server.kill()
        server.start()
        assert [score(sites[0]) for _ in range(2)] == [("site-2", 1.0), ("evaluated", 0.0)]
        assert [score(sites[1])[0] for _ in range(4)] == ["global", "site-1", "site-2", "evaluated"]
        for site in sites:
            site.client.leave("done", early=False)
            site.vanish()
        server.finished()
