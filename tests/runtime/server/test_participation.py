"""Sampled sites, weights of sites, and early stopping of the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation_bench import Bench, ended, serving
from numpy_rounds import EXAMPLES, assert_same, reference, rounds_of, weights

from fl_runtime.errors import ConfigError
from fl_runtime.server.courses.sampling import sample_sites
from fl_runtime.types import Array, Report, RunSettings, Task, Terms
from fl_runtime.wire.manifest import Manifest

SITES = 8


def draw(number: int, seed: int = 3, size: int = 4) -> list[int]:
    return sorted(np.random.default_rng([seed, number]).permutation(SITES)[:size])


def mean(x: Array, parts: list[Array], n: Array) -> Array:
    return np.asarray(np.tensordot(n / n.sum(), np.array(parts), 1))


@pytest.mark.parametrize("strategy", ["fedavg", "median"])
def test_a_fraction_of_the_sites_makes_a_round(tmp_path: Path, strategy: str) -> None:
    def plain(x: Array, parts: list[Array], number: int, memory: Any) -> Array:
        if strategy == "median":
            return np.asarray(np.median(parts, axis=0))
        return mean(x, parts, np.array(EXAMPLES, float)[draw(number)])

    fields = {"fraction": 0.5, "seed": 3, "min_sites": 4}
    actual = rounds_of(tmp_path, strategy, weights(), sites=SITES, rounds=6, **fields)
    assert_same(actual, reference(weights(), plain, sites=draw, rounds=6))


def test_every_round_draws_anew_and_the_seed_decides() -> None:
    names = tuple(f"site-{i}" for i in range(1, SITES + 1))

    def of(seed: int | None, number: int, present: tuple[str, ...] = names) -> list[str]:
        return sample_sites(RunSettings("job", names, 1, seed=seed, fraction=0.4), number, present)

    assert of(1, 5) == of(1, 5)
    assert of(None, 5) == of(0, 5)
    assert len({tuple(of(1, number)) for number in range(20)}) > 10
    assert any(of(1, number) != of(2, number) for number in range(5))
    assert all(len(of(1, number)) == 4 for number in range(20))  # 3.2, rounded up
    counts = [sum(name in of(1, number) for number in range(500)) for name in names]
    assert min(counts) > 200  # of 250 expected
    first = of(1, 5)
    others = tuple(name for name in names if name != first[0])
    assert set(first[1:]) < set(of(1, 5, others))  # somebody takes the place of who is away


def joined(bench: Bench) -> dict[str, Any]:
    """Register all sites, each of which scores every model."""
    sites = {name: bench.site(name) for name in bench.names}
    for site in sites.values():
        site.join()
    bench.run(lambda name: sites[name].register({"w": np.zeros(2)}, evaluates=True))
    return sites


def first_task(bench: Bench, sites: dict[str, Any]) -> tuple[list[str], dict[str, Task]]:
    """Give the initial model; return who takes part in round 1, and their tasks."""
    initial = sites["site-1"].client.next_task()
    sites["site-1"].submit(initial, {"w": np.zeros(2)})
    names = bench.watch.wait("round_started").data["sites"]
    return names, {name: sites[name].client.next_task() for name in names}


def test_who_is_not_drawn_waits_and_is_not_waited_for(tmp_path: Path) -> None:
    with serving(tmp_path, 4, sockets=False, rounds=1, fraction=0.5, min_sites=2) as bench:
        sites = joined(bench)
        names, tasks = first_task(bench, sites)
        idle = [name for name in bench.names if name not in names]
        assert (len(names), len(idle)) == (2, 2)
        # nobody asked this site
        assert sites[idle[0]].submit(tasks[names[0]], {"w": np.full(2, 9.0)}) == "late"
        for name in names:  # the score of the model that they got: it is complete without the others
            sites[name].client.report(Report("test", 0, name, {"loss": 2.0}, 1))
        assert bench.watch.wait("scored").round == 0
        for name in names:
            assert sites[name].submit(tasks[name], {"w": np.ones(2)}) == "used"
        finals = {name: site.client.next_task() for name, site in sites.items()}
        assert {task.kind for task in finals.values()} == {"final"}
        assert all(task.arrays["w"].tolist() == [1, 1] for task in finals.values())
        for name in bench.names:  # all have the last model, so all score it
            assert len(bench.watch.all("scored")) == 1
            sites[name].client.report(Report("test", 1, name, {"loss": 1.0}, 1))
        bench.watch.wait("scored", count=2)


def test_a_site_that_is_drawn_and_comes_back_is_in_its_round_still(tmp_path: Path) -> None:
    with serving(tmp_path, 4, sockets=False, rounds=2, fraction=0.5, min_sites=1) as bench:
        sites = joined(bench)
        names, tasks = first_task(bench, sites)
        idle = next(name for name in bench.names if name not in names)
        for name in (names[0], idle):
            sites[name].client.leave("away for a moment", early=True)
            sites[name] = bench.site(name)
            sites[name].join()
            sites[name].register({"w": np.zeros(2)}, evaluates=True)
        assert sites[names[0]].client.next_task().round == 1
        for name in names:
            assert sites[name].submit(tasks[name], {"w": np.ones(2)}) == "used"
        assert bench.watch.wait("round_finished").data["sites"] == tuple(sorted(names))


def test_trees_take_all_sites(tmp_path: Path) -> None:
    with serving(tmp_path, 2, sockets=False, fraction=0.5, min_sites=1) as bench:
        sites = [bench.site(name) for name in bench.names]
        for site in sites:
            site.join()
        with pytest.raises(ConfigError, match="tree-bagging needs all sites"):
            bench.run(
                lambda name: sites[bench.names.index(name)].client.register(
                    Manifest.of({"w": np.zeros(1)}),
                    agreement={},
                    info={},
                    capabilities=frozenset({"tree-bagging"}),
                    rounds=1,
                    evaluates=False,
                    terms=Terms("encoded", "tree-bagging"),
                )
            )


@pytest.mark.parametrize("spec", ["fedavg", "fedavg:weights=equal", "norm-bounding:bound=1e9,weights=examples"])
def test_weights_of_sites(tmp_path: Path, spec: str) -> None:
    n = np.ones(3) if "equal" in spec else np.array(EXAMPLES[:3], float)

    def plain(x: Array, parts: list[Array], number: int, memory: Any) -> Array:
        return mean(x, parts, n * [0.5, 1, 3])

    site_weights = {"site-1": 0.5, "site-3": 3.0}
    assert_same(rounds_of(tmp_path, spec, weights(), site_weights=site_weights), reference(weights(), plain))


def test_weights_of_sites_with_different_numbers_of_steps(tmp_path: Path) -> None:
    """With one site only, FedNova is that site, whatever its weight."""
    actual = rounds_of(tmp_path / "one", "fednova", weights(), sites=1, site_weights={"site-1": 0.1})
    assert_same(actual, rounds_of(tmp_path / "other", "fedavg", weights(), sites=1))


def losses_until_the_end(folder: Path, losses: list[float], **fields: Any) -> list[int]:
    """Return the rounds that were run when the model of round r scores losses[r]."""
    with serving(folder, 1, sockets=False, rounds=len(losses) - 1, **fields) as bench:
        sites = joined(bench)
        _, tasks = first_task(bench, sites)
        client, task, done = sites["site-1"].client, tasks["site-1"], []
        while True:
            client.report(Report("test", task.version, "site-1", {"loss": losses[task.version]}, 1))
            if task.kind == "final":
                break
            sites["site-1"].submit(task, {"w": np.ones(2)})
            task = client.next_task()
            done.append(task.version)
        client.leave("done", early=False)
        ended(bench.server)
        assert [result.round for result in bench.server.result().rounds] == sorted(set(done))
        return sorted(set(done))


def test_the_job_says_when_patience_ends(tmp_path: Path) -> None:
    losses = [9.0, 5.0, 4.0, 4.5, 4.2, 3.0, 2.0]
    assert losses_until_the_end(tmp_path / "none", losses) == [1, 2, 3, 4, 5, 6]
    assert losses_until_the_end(tmp_path / "two", losses, patience=2) == [1, 2, 3, 4]
    assert losses_until_the_end(tmp_path / "three", losses, patience=3) == [1, 2, 3, 4, 5, 6]
    assert losses_until_the_end(tmp_path / "delta", losses, patience=3, min_delta=1.5) == [1, 2, 3, 4]
    assert losses_until_the_end(tmp_path / "max", losses, patience=1, best_mode="max") == [1, 2]


def test_scores_that_are_complete_only_after_the_next_commit_end_the_run_one_round_later(tmp_path: Path) -> None:
    """Site 2 never reports, so the scores of a round are final when the next one is committed."""
    losses = [9.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    with serving(tmp_path, 2, sockets=False, rounds=5, patience=1) as bench:
        sites = joined(bench)
        tasks = {"site-1": sites["site-1"].start({"w": np.zeros(2)}), "site-2": sites["site-2"].client.next_task()}
        while tasks["site-1"].kind == "train":
            version = tasks["site-1"].version
            sites["site-1"].client.report(Report("test", version, "site-1", {"loss": losses[version]}, 1))
            for name, site in sites.items():
                site.submit(tasks[name], {"w": np.ones(2)})
            tasks = {name: site.client.next_task() for name, site in sites.items()}
        for site in sites.values():
            site.client.leave("done", early=False)
        ended(bench.server)
        assert [result.round for result in bench.server.result().rounds] == [1, 2, 3]
