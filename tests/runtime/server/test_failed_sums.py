"""Updates that are accepted one by one and make no model together: whose fault it is, and how the others go on."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation_bench import Bench, Site, at_once, registered, serving
from study import until

from fl_runtime.errors import QuorumError, RoundFailedError, SiteExcludedError
from fl_runtime.server.courses.sums.failures import sites_to_blame
from fl_runtime.types import Arrays, Task

W = {"w": np.zeros(4, np.float32)}
SITES = ("ada", "bob", "eve", "joe", "mal")

Change = Callable[[str, Task], Arrays]


def honest(name: str, task: Task) -> Arrays:
    return {"w": task.arrays["w"] + np.float32(1 + len(name) + ord(name[0]) % 7)}


def changing(values: Mapping[str, float], rounds: Collection[int] = range(99)) -> Change:
    """Sites send a constant in some rounds; all else is honest."""

    def change(name: str, task: Task) -> Arrays:
        if name in values and task.round in rounds:
            return {"w": np.full(4, values[name], np.float32)}
        return honest(name, task)

    return change


def whole_run(bench: Bench, change: Change, num_examples: int = 1) -> dict[str, Arrays | BaseException]:
    """Let every site take part to the end. Return its final model, or the error with which it ended."""
    sites = [bench.site(name) for name in bench.names]
    registered(sites, W)

    def take_part(site: Site) -> Arrays | BaseException:
        try:
            task = site.start(W)
            while task.kind == "train":
                site.submit(task, change(site.name, task), num_examples, local_steps=1)
                task = site.client.next_task()
            final = {name: np.copy(array) for name, array in task.arrays.items()}
            site.client.leave("done", early=False)
            return final
        except Exception as error:
            site.client.leave("it ended with an error", early=True)
            return error

    return dict(zip(bench.names, at_once(sites, take_part), strict=True))


# -- who is to blame ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(30))
def test_whoever_is_blamed_has_made_the_sum_fail(seed: int) -> None:
    """Any minority of sites makes sums fail by itself. Excluding who is blamed ends with them, and nobody else."""
    draw = np.random.default_rng(seed)
    count = int(draw.integers(3, 40))
    norms = {f"site-{number}": float(norm) for number, norm in enumerate(draw.lognormal(size=count))}
    bad = {str(site) for site in draw.choice(list(norms), int(draw.integers(1, max((count - 1) // 2, 1) + 1)), False)}
    norms |= {site: norms[site] * 1e30 for site in bad}
    left = dict(norms)
    while bad & left.keys():
        blamed = sites_to_blame(left, lambda out, left=left: not bad & (left.keys() - set(out)), infinite=True)  # type: ignore[misc]
        assert blamed and set(blamed) <= bad
        left = {site: norm for site, norm in left.items() if site not in blamed}
    assert left.keys() == norms.keys() - bad


def test_both_of_two_sites_are_to_blame_that_make_a_sum_fail_together() -> None:
    def works_without(sites: Collection[str]) -> bool:
        return not {"eve", "mal"} <= set(SITES) - set(sites)

    assert sites_to_blame(dict.fromkeys(SITES, 1.0), works_without, infinite=True) == ["eve", "mal"]


def test_nobody_is_blamed_by_a_minority_or_for_what_all_do() -> None:
    norms = dict.fromkeys(SITES, 1.0)
    assert sites_to_blame(norms, lambda out: False, infinite=True) == []
    assert sites_to_blame(norms, lambda out: len(out) > 2, infinite=True) == []
    pair = {"ada": 1.0, "eve": 2.0}
    assert sites_to_blame(pair, lambda out: "eve" in out, infinite=False) == []  # which of them is right?
    assert sites_to_blame(pair, lambda out: "eve" in out, infinite=True) == ["eve"]
    assert sites_to_blame({"eve": 1.0}, lambda out: True, infinite=True) == []


# -- rounds ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "values"),
    [
        ("fedavgm:lr=4", {"eve": 3e38}),
        ("fedadam:lr=0.1", {"eve": 1e25}),
        ("fedyogi:lr=0.1", {"eve": -1e25, "mal": 1e30}),
        ("fedadagrad:lr=0.1", {"eve": 1e25}),
        ("fedavg", {"eve": 3e38, "mal": -3e38}),
        ("fednova", {"eve": 3e38, "mal": -3e38}),
        ("fedavg:weights=equal", {"ada": -3e38, "mal": 3e38}),
    ],
    ids=str,
)
@pytest.mark.parametrize("first", [1, 2])
def test_the_others_end_with_the_model_of_a_run_without_the_attacker(
    tmp_path: Path, strategy: str, values: dict[str, float], first: int
) -> None:
    """From round 1 on, or while it has behaved before: then the run without it ends with its part of round 1."""
    rounds = range(first, 4)
    with serving(tmp_path / "a", SITES, sockets=False, strategy=strategy, rounds=3, min_sites=2) as bench:
        found = whole_run(bench, changing(values, rounds))
    tries = {site: sum(event.round == first for event in bench.watch.all("warning", site)) for site in SITES}
    dropped = [event.round for event in bench.watch.all("round_dropped")]
    excluded = [site for site, end in found.items() if isinstance(end, SiteExcludedError)]
    assert excluded == sorted(values)
    assert tries == {site: int(site in values) for site in SITES}  # each is told once, and nobody else is
    assert set(dropped) == {first} and len(dropped) <= 2 * len(values)

    others = [site for site in SITES if site not in values]
    with serving(tmp_path / "b", SITES, sockets=False, strategy=strategy, rounds=3, min_sites=2) as bench:
        expected = whole_run(bench, gone_from(first, values))
    for site in others:
        np.testing.assert_array_equal(found[site]["w"], expected[site]["w"])  # type: ignore[index,call-overload]


def gone_from(first: int, values: Mapping[str, float]) -> Change:
    """The same sites leave before they send anything in a round."""

    def change(name: str, task: Task) -> Arrays:
        if name in values and task.round == first:
            raise LeavesError
        return honest(name, task)

    return change


class LeavesError(Exception):
    pass


def test_of_the_rounds_tries_those_do_not_count_for_which_sites_are_to_blame(tmp_path: Path) -> None:
    """Four attackers, one found after the other, take eight tries; a round may fail four times without a reason."""
    names = [f"site-{number}" for number in range(9)]
    values = {f"site-{number}": 10.0 ** (25 + number) for number in range(4)}
    with serving(tmp_path, names, sockets=False, strategy="fedadam:lr=0.1", rounds=1, min_sites=2) as bench:
        found = whole_run(bench, changing(values))
    assert len(bench.watch.all("round_dropped")) == 8
    assert [site for site, end in found.items() if isinstance(end, SiteExcludedError)] == list(values)
    assert np.isfinite(found["site-8"]["w"]).all()  # type: ignore[index,call-overload]


def test_what_all_sites_do_ends_the_run_after_four_tries(tmp_path: Path) -> None:
    with serving(tmp_path, SITES, sockets=False, strategy="fedadam:lr=0.1", rounds=2, min_sites=2) as bench:
        found = whole_run(bench, changing(dict.fromkeys(SITES, 1e25)))
    assert not bench.watch.all("warning")
    for end in found.values():
        assert isinstance(end, RoundFailedError)
        assert "round 1 failed 4 times: the new global model is not finite" in end.what


def test_without_a_quorum_the_run_ends_and_says_who_was_excluded_and_why(tmp_path: Path) -> None:
    with serving(tmp_path, SITES, sockets=False, strategy="fedavgm:lr=4", rounds=2) as bench:
        found = whole_run(bench, changing({"eve": 3e38}))
    excluded, end = found["eve"], found["ada"]
    assert isinstance(excluded, (SiteExcludedError, QuorumError))  # whichever reaches its waiting call first
    assert "eve is excluded from this run" in str(excluded)
    assert isinstance(end, QuorumError)
    assert "eve: eve is excluded from this run: round 1 failed with its updates" in end.where


def test_an_exclusion_outlives_processes_and_servers(tmp_path: Path) -> None:
    """The first failure is on record when the server is killed, and after the exclusion no new process helps."""
    fields: dict[str, Any] = {"sockets": False, "strategy": "fedavgm:lr=4", "rounds": 1, "min_sites": 2}
    with serving(tmp_path / "a", SITES, **fields) as first:
        sites, tasks = first.started(W)
        for name, site in sites.items():
            site.submit(tasks[name], changing({"eve": 3e38})(name, tasks[name]))
        first.watch.wait("round_started", count=2)
        shutil.copytree(tmp_path / "a", tmp_path / "b")  # as a kill would leave it
    with serving(tmp_path / "b", SITES, **fields) as second:
        sites = {name: second.site(name) for name in SITES}
        registered(sites.values(), W)
        for name, site in sites.items():
            task = site.client.next_task()
            assert (task.round, task.stage) == (1, "2")
            site.submit(task, changing({"eve": 3e38})(name, task))
        assert "eve is excluded" in second.watch.wait("left", "eve").data["reason"]
        second.watch.wait("round_started", count=2)
        shutil.copytree(tmp_path / "b", tmp_path / "c")
        with pytest.raises(SiteExcludedError, match="eve is excluded from this run: round 1 failed"):
            second.site("eve").join()
    with serving(tmp_path / "c", SITES, **fields) as third:
        others = [third.site(name) for name in SITES if name != "eve"]
        with pytest.raises(SiteExcludedError, match="eve is excluded from this run: round 1 failed"):
            third.site("eve").join()
        registered(others, W)
        for site in others:
            task = site.client.next_task()
            assert task.stage == "3"
            site.submit(task, honest(site.name, task))
        final = others[0].client.next_task()
        mean = np.mean([honest(site.name, Task("test", 1, "", "train", 0, W))["w"] for site in others], axis=0)
        np.testing.assert_allclose(final.arrays["w"], 4 * mean, rtol=1e-6)


# -- buffered runs --------------------------------------------------------------------------------------------


class Turns:
    """A buffered run whose sites send in turns, so that the order of the updates is known."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.sites = {name: bench.site(name) for name in bench.names}
        registered(self.sites.values(), W)
        self.tasks = {name: site.start(W) for name, site in self.sites.items()}

    def send(self, name: str, value: float) -> None:
        """Send the newest model plus a number."""
        task = self.tasks.pop(name, None) or self.sites[name].client.next_task()
        self.sites[name].submit(task, {"w": task.arrays["w"] + np.float32(value)})

    def model(self, name: str, version: int) -> Any:
        """Return a version of the model, once it is there."""
        until(lambda: version in [event.round for event in self.bench.watch.all("round_finished")], f"model {version}")
        self.tasks[name] = self.sites[name].client.next_task()
        assert self.tasks[name].version == version
        return self.tasks[name].arrays["w"]


def test_a_buffer_goes_on_without_the_updates_that_are_to_blame(tmp_path: Path) -> None:
    """The updates of others stay in the buffer, also when the server is killed after the failure."""
    fields: dict[str, Any] = {"sockets": False, "strategy": "fedbuff:k=2,lr=4,staleness=0", "rounds": 9, "min_sites": 2}
    with serving(tmp_path / "a", SITES, **fields) as bench:
        turns = Turns(bench)
        turns.send("ada", 1)
        turns.send("eve", 3e38)
        bench.watch.wait("warning", "eve")
        turns.send("bob", 3)  # with that of ada
        np.testing.assert_array_equal(turns.model("joe", 1), np.full(4, 4 * (1 + 3) / 2, np.float32))
        turns.send("ada", 1)
        shutil.copytree(tmp_path / "a", tmp_path / "b")
    with serving(tmp_path / "b", SITES, **fields) as bench:
        turns = Turns(bench)
        turns.send("eve", 3e38)
        assert "eve is excluded from this run: rounds 1 and 2" in bench.watch.wait("left", "eve").data["reason"]
        turns.send("mal", 5)  # with that of ada, which was sent before the kill
        np.testing.assert_array_equal(turns.model("joe", 2), np.full(4, 8 + 4 * (1 + 5) / 2, np.float32))
        shutil.copytree(tmp_path / "b", tmp_path / "c")
    with serving(tmp_path / "c", SITES, **fields) as bench:
        with pytest.raises(SiteExcludedError, match="rounds 1 and 2"):
            bench.site("eve").join()


def test_a_buffer_of_one_update_does_not_end_a_run(tmp_path: Path) -> None:
    with serving(tmp_path, SITES, sockets=False, strategy="fedbuff:k=1,lr=4", rounds=9, min_sites=2) as bench:
        turns = Turns(bench)
        turns.send("eve", 3e38)
        bench.watch.wait("warning", "eve")
        turns.send("ada", 1)
        np.testing.assert_array_equal(turns.model("joe", 1), np.full(4, 4, np.float32))
        turns.send("eve", 3e38)
        bench.watch.wait("left", "eve")
        turns.send("joe", 1)
        np.testing.assert_array_equal(turns.model("bob", 2), np.full(4, 8, np.float32))


# -- tensors beside the weights -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "extras", [{"other": np.ones(2, np.float32)}, {"momentum": np.ones(1, np.float32)}, {}], ids=str
)
def test_the_first_to_send_other_tensors_beside_the_weights_is_excluded(tmp_path: Path, extras: Arrays) -> None:
    """Those who come later are not refused because of it: what most sites send is right."""
    with serving(tmp_path, SITES, sockets=False, rounds=1, min_sites=2) as bench:
        sites, tasks = bench.started(W)
        for failures in (1, 2):
            sites["eve"].submit(tasks["eve"], W, extras=extras)
            for name in (name for name in SITES if name != "eve"):
                sites[name].submit(tasks[name], honest(name, tasks[name]), extras={"momentum": np.ones(2, np.float32)})
            bench.watch.wait("round_dropped", count=failures)
            if failures == 1:
                tasks = {name: site.client.next_task() for name, site in sites.items()}
        bench.watch.wait("left", "eve")
        others = {name: site for name, site in sites.items() if name != "eve"}
        for name, site in others.items():
            task = site.client.next_task()
            site.submit(task, honest(name, task), extras={"momentum": np.ones(2, np.float32)})
            with_task = task
        with pytest.raises(SiteExcludedError, match="extra tensors differ"):
            sites["eve"].client.next_task()
        final = others["ada"].client.next_task().arrays["w"]
        np.testing.assert_allclose(final, np.mean([honest(name, with_task)["w"] for name in others], axis=0), rtol=1e-6)
