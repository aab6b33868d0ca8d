"""Workflows, which choose the sites of each round: cyclic weight transfer, and those made of the verbs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from federation_bench import Bench, Site, ended, serving
from numpy_rounds import assert_same, pulled, reference, rounds_of, weights

from fl_runtime.aggregation import Cyclic, FedAvg
from fl_runtime.server.run import Run
from fl_runtime.store.stores import FolderStore
from fl_runtime.types import Array, RoundPlan, Task


def one(x: Array, parts: list[Array], number: int, memory: Any) -> Array:
    assert len(parts) == 1
    return parts[0]


def test_cyclic_goes_from_site_to_site(tmp_path: Path) -> None:
    actual = rounds_of(tmp_path, "cyclic", weights(), rounds=7)
    assert_same(actual, reference(weights(), one, sites=lambda number: [(number - 1) % 3], rounds=7))


def test_cyclic_shuffles_every_lap(tmp_path: Path) -> None:
    laps = [np.random.default_rng(lap).permutation(3) for lap in range(3)]
    actual = rounds_of(tmp_path, "cyclic:order=shuffled", weights(), rounds=7)
    expected = reference(weights(), one, sites=lambda number: [laps[(number - 1) // 3][(number - 1) % 3]], rounds=7)
    assert_same(actual, expected)
    assert len({tuple(lap) for lap in laps}) > 1


def test_every_site_has_its_turn_in_a_lap() -> None:
    names = ["north", "south", "east", "west"]
    for order in ("fixed", "shuffled"):
        turns = [Cyclic(order=order).plan_round(number, names).sites for number in range(1, 9)]  # type: ignore[arg-type]
        assert sorted(turns[:4]) == sorted(turns[4:]) == sorted((name,) for name in names)  # type: ignore[type-var]


def test_the_turn_of_a_site_that_is_gone_passes_to_another(tmp_path: Path) -> None:
    with serving(tmp_path, 3, sockets=False, rounds=2, min_sites=2, strategy="cyclic") as bench:
        sites = registered(bench)
        assert sites["site-1"].client.next_task().round == 1
        sites["site-1"].client.leave("enough", early=True)  # in the middle of its turn
        task = sites["site-2"].client.next_task()
        assert (task.round, task.stage, bench.watch.wait("round_dropped").round) == (1, "2", 1)
        sites["site-2"].submit(task, {"w": np.full(2, 5.0)})
        task = sites["site-3"].client.next_task()
        assert (task.round, task.arrays["w"].tolist()) == (2, [5.0, 5.0])
        sites["site-3"].submit(task, {"w": np.full(2, 6.0)})
        assert [sites[name].client.next_task().arrays["w"][0] for name in ("site-2", "site-3")] == [6, 6]


@dataclass(frozen=True)
class Own(FedAvg):
    """A workflow of one site, then two, then the first one present, then all."""

    name: ClassVar[str] = "own"

    def plan_round(self, round: int, present: Sequence[str]) -> RoundPlan:
        return [
            self.send(present[-1]),
            self.broadcast(present[:2]),
            self.broadcast(answers=1),
            self.broadcast(),
        ][round - 1]


def registered(bench: Bench) -> dict[str, Site]:
    sites = {name: bench.site(name) for name in bench.names}
    for site in sites.values():
        site.join()
    bench.run(lambda name: sites[name].register({"w": np.zeros(2)}))
    initial = sites["site-1"].client.next_task()
    assert initial.kind == "initial"
    sites["site-1"].submit(initial, {"w": np.zeros(2)})
    return sites


@pytest.mark.parametrize("late", ["drop", "carry"])
def test_a_workflow_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: str) -> None:
    monkeypatch.setattr("fl_runtime.server.state.make_strategy", lambda spec: Own())
    with serving(tmp_path, 3, sockets=False, rounds=4, late=late) as bench:
        sites = registered(bench)

        def answered(name: str, value: float, task: Task | None = None) -> Task:
            task = task or sites[name].client.next_task()
            sites[name].submit(task, {"w": np.full(2, value)})
            return task

        assert answered("site-3", 3.0).round == 1
        first = answered("site-1", 1.0)
        assert (first.round, first.arrays["w"][0]) == (2, 3.0)
        answered("site-2", 2.0)
        slow = sites["site-1"].client.next_task()  # of round 3, and takes its time
        assert (slow.round, slow.arrays["w"][0]) == (3, 1.5)
        assert answered("site-3", 7.0).round == 3
        bench.watch.wait("round_finished", count=3)
        second = sites["site-2"].client.next_task()  # nobody waits for the others
        assert (second.round, second.arrays["w"][0]) == (4, 7.0)
        late_status = sites["site-1"].submit(slow, {"w": np.full(2, 100.0)})
        assert late_status == {"drop": "late", "carry": "carried"}[late]
        if late == "drop":
            answered("site-1", 1.0)
        answered("site-2", 2.0, second)
        answered("site-3", 3.0)
        value = {"drop": 2.0, "carry": 35.0}[late]
        for name, site in sites.items():
            final = site.client.next_task()
            assert (final.kind, final.arrays["w"].tolist()) == ("final", [value, value]), name
            site.client.leave("done", early=False)
        ended(bench.server)


def test_a_restarted_server_gives_the_turn_to_the_same_site(tmp_path: Path) -> None:
    """What a restarted server reads from its journal; runtime/server/test_server_restart.py kills the server."""
    from fl_runtime.server.records.events import Events

    with serving(tmp_path, 3, sockets=False, rounds=5, strategy="cyclic") as bench:
        sites = registered(bench)
        task = sites["site-1"].client.next_task()
        sites["site-1"].submit(task, {"w": np.ones(2)})
        assert sites["site-2"].client.next_task().round == 2
        settings = bench.server.trainings.newest.run.state.settings
        run = Run(settings, tmp_path / "server", Events([]), FolderStore())
        run.recover()
        current = run.state.open_round
        assert current is not None
        assert (current.round, current.participants, current.drawn) == (2, ["site-2"], True)


def test_pulled_depends_on_the_site() -> None:
    """Otherwise the tests above would show nothing."""
    assert not np.allclose(pulled(0, 1, np.zeros(3)), pulled(1, 1, np.zeros(3)))
