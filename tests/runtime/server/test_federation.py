"""A federation over real sockets, from the sites' first call to the final model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from federation_bench import Bench, at_once, ended, registered, serving

from fl_runtime.errors import ConfigError
from fl_runtime.store.tensorfile import read_tensors, write_tensors
from fl_runtime.types import Array, Arrays, Report, Task, is_floating
from fl_runtime.wire.dtypes import DTYPES

MIB = 2**20


def plus(amount: float) -> Callable[[Task], Arrays]:
    return lambda task: {name: np.add(array, array.dtype.type(amount)) for name, array in task.arrays.items()}


def run_all(bench: Bench, initial: Callable[[int], Arrays], examples: tuple[int, ...]) -> dict[str, Arrays]:
    """Run sites that each add their number; return the final weights by site."""

    def site(name: str) -> Arrays:
        index = bench.names.index(name)
        return bench.site(name).take_part(initial(index), plus(index + 1), examples[index])

    return bench.run(site)


@pytest.mark.parametrize("sockets", [True, False])
def test_a_run_averages_by_examples_and_all_sites_end_with_the_same_weights(tmp_path: Path, sockets: bool) -> None:
    with serving(tmp_path, 3, sockets=sockets, rounds=4) as bench:
        finals = run_all(bench, lambda i: {"w": np.full((2, 3), 10.0 * i)}, (1, 2, 5))
        ended(bench.server)
        result = bench.server.result()
        bench.server.export(tmp_path / "model")
    # the first site's zeros are the start; each round adds (1 * 1 + 2 * 2 + 3 * 5) / 8
    for final in finals.values():
        np.testing.assert_allclose(final["w"], np.full((2, 3), 4 * 2.5), rtol=1e-12)
    assert [r.round for r in result.rounds] == [1, 2, 3, 4]
    assert all(r.sites == bench.names and r.missing == () for r in result.rounds)
    assert read_tensors(tmp_path / "model" / "model.safetensors")["w"].tobytes() == finals["site-2"]["w"].tobytes()


def test_a_single_site_is_a_federation_too(tmp_path: Path) -> None:
    with serving(tmp_path, 1, rounds=3) as bench:
        (final,) = run_all(bench, lambda _: {"w": np.zeros(2)}, (7,)).values()
    assert final["w"].tolist() == [3, 3]


def test_64_mib_of_several_tensors_survive_the_round_trip(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    initial = {f"w{i}": rng.normal(size=(5 * MIB // 4 + i,)).astype(np.float32) for i in range(12)}
    initial["tail"] = rng.normal(size=MIB).astype(np.float32)
    digest = np.concatenate([a.view(np.uint8) for a in initial.values()]).tobytes()

    def echo(task: Task) -> Arrays:
        assert np.concatenate([a.view(np.uint8) for a in task.arrays.values()]).tobytes() == digest
        return task.arrays

    with serving(tmp_path, 2, rounds=2) as bench:
        finals = bench.run(lambda name: bench.site(name).take_part(initial, echo))
    for final in finals.values():
        assert all(final[name].tobytes() == array.tobytes() for name, array in initial.items())


def test_every_dtype_travels_end_to_end(tmp_path: Path) -> None:
    """Identical updates must come back bit for bit, scalars and empty tensors included."""
    rng = np.random.default_rng(0)
    initial: dict[str, Array] = {}
    for name, dtype in DTYPES.items():
        for shape in ((), (3, 2), (0, 2)):
            initial[f"{name}{shape}"] = rng.integers(0, 2, shape).astype(dtype)

    def changed(task: Task) -> Arrays:
        return {n: ((a.astype(np.float64) + 1) / 2).astype(a.dtype) if is_floating(a.dtype) and a.dtype.kind != "c"
                else np.array(1).astype(a.dtype) | a if a.dtype.kind in "iub" else a
                for n, a in task.arrays.items()}  # fmt: skip

    with serving(tmp_path, 2, rounds=2) as bench:
        finals = bench.run(lambda name: bench.site(name).take_part(initial, changed))
    expected: Arrays = initial
    for _ in range(2):
        expected = changed(Task("", 1, "", "train", 0, expected))
    for final in finals.values():
        assert {n: (a.dtype, a.shape, a.tobytes()) for n, a in final.items()} == {
            n: (a.dtype, a.shape, a.tobytes()) for n, a in expected.items()
        }


def test_orders_of_arrival_over_sockets_give_the_same_bits(tmp_path: Path) -> None:
    values = {f"site-{i}": (np.float32(10.0**i) * np.random.default_rng(i).normal(size=5000)) for i in (1, 2, 3)}

    def result(order: tuple[str, ...]) -> bytes:
        with serving(tmp_path / "-".join(order), 3, rounds=1) as bench:
            sites, tasks = bench.started({"w": np.zeros(5000, np.float32)})
            for name in order:
                sites[name].submit(tasks[name], {"w": values[name].astype(np.float32)}, num_examples=int(name[-1]))
            return sites["site-1"].client.next_task().arrays["w"].tobytes()

    assert len({result(order) for order in itertools.permutations(values)}) == 1


def test_extras_travel_beside_the_weights_and_come_back_averaged(tmp_path: Path) -> None:
    with serving(tmp_path, 2, rounds=2) as bench:
        sites, tasks = bench.started({"w": np.zeros(2)})
        assert tasks["site-1"].extras == {}
        for index, name in enumerate(bench.names):
            sites[name].submit(tasks[name], {"w": np.zeros(2)}, extras={"m": np.full(3, 2.0 * index)})
        for site in sites.values():
            task = site.client.next_task()
            assert task.extras["m"].tolist() == [1.0] * 3
            assert list(task.arrays) == ["w"]


def test_the_first_weights_are_the_first_sites(tmp_path: Path) -> None:
    with serving(tmp_path, ["b", "a"], rounds=1) as bench:
        finals = bench.run(
            lambda name: bench.site(name).take_part({"w": np.full(2, 5.0 + (name == "a"))}, lambda task: task.arrays)
        )
    assert finals["a"]["w"].tolist() == [5, 5]  # those of "b", the first in the job's order


def test_the_first_weights_come_from_a_file_where_the_job_gives_one(tmp_path: Path) -> None:
    write_tensors(tmp_path / "start.safetensors", {"v": np.array([7, 8]), "w": np.array([1.5])})
    weights = {"w": np.zeros(1), "v": np.zeros(2, np.int64)}
    with serving(tmp_path, 2, rounds=1, initial=str(tmp_path / "start.safetensors")) as bench:
        _, tasks = bench.started(weights)
    for task in tasks.values():
        assert {n: a.tolist() for n, a in task.arrays.items()} == {"w": [1.5], "v": [7, 8]}


def test_the_rounds_are_the_jobs_else_what_the_trainers_say(tmp_path: Path) -> None:
    with serving(tmp_path / "job", 2, rounds=3) as bench:
        sites = [bench.site(name) for name in bench.names]
        assert registered(sites, {"w": np.zeros(1)}) == [3, 3]
        assert all(site.welcome.settings["rounds"] == 3 for site in sites)
    with serving(tmp_path / "trainers", 2, rounds=None) as bench:
        sites = [bench.site(n) for n in bench.names]
        for site in sites:
            site.join()
        budgets = {"site-1": 0, "site-2": 7}  # a site without a budget of its own follows the others
        assert at_once(sites, lambda s: s.register({"w": np.zeros(1)}, rounds=budgets[s.name])) == [7, 7]


def test_nobody_says_how_many_rounds(tmp_path: Path) -> None:
    with serving(tmp_path, 1, rounds=None) as bench:
        site = bench.site("site-1")
        site.join()
        with pytest.raises(ConfigError, match="number of rounds is not specified"):
            site.register({"w": np.zeros(1)})


def test_the_welcome_says_who_and_where_a_site_is(tmp_path: Path) -> None:
    with serving(tmp_path, ["x", "y"], keep_local=("head.*",)) as bench:
        welcome = bench.site("y").join()
    assert (welcome.site, welcome.index, welcome.count, welcome.attempt, welcome.started) == ("y", 1, 2, 1, False)
    assert welcome.settings["keep_local"] == ["head.*"]


def test_the_best_round_is_the_one_with_the_best_report_weighted_by_examples(tmp_path: Path) -> None:
    # what site-1 and site-2 say of versions 0 to 3; the means, by 1 and 3 examples, are 8, 3, 2, 4
    scores = {"site-1": [8.0, 0.0, 5.0, 1.0], "site-2": [8.0, 4.0, 1.0, 5.0]}

    def site(name: str) -> tuple[int, list[float]]:
        site = bench.site(name)
        site.join()
        site.register({"w": np.zeros(1)}, evaluates=True)
        task = site.start({"w": np.zeros(1)})
        while True:
            version = task.version
            examples = 1 if name == "site-1" else 3
            site.client.report(Report("test", version, name, {"loss": scores[name][version]}, examples))
            if task.kind == "final":
                break
            site.submit(task, {"w": task.arrays["w"] + 1})
            task = site.client.next_task()
        best = site.client.next_task(best=True)
        site.client.leave("done", early=False)
        return best.version, best.arrays["w"].tolist()

    with serving(tmp_path, 2, rounds=3) as bench:
        best_models = bench.run(site)
        ended(bench.server)
        result = bench.server.result()
        bench.server.export(tmp_path / "best", "best")
    assert best_models == {"site-1": (2, [2.0]), "site-2": (2, [2.0])}
    assert result.best_round == 2
    assert [r.metrics["loss"] for r in result.rounds] == [3.0, 2.0, 4.0]
    assert read_tensors(tmp_path / "best" / "model.safetensors")["w"].tolist() == [2.0]


def test_a_report_that_is_larger_than_another_wins_with_mode_max(tmp_path: Path) -> None:
    with serving(tmp_path, 1, rounds=3, best_metric="accuracy", best_mode="max") as bench:
        sites, tasks = bench.started({"w": np.zeros(1)})
        site, task = sites["site-1"], tasks["site-1"]
        for accuracy in (0.5, 0.9, 0.7):
            site.submit(task, {"w": task.arrays["w"] + 1}, metrics={"accuracy": accuracy})
            task = site.client.next_task()
        assert site.client.next_task(best=True).version == 2


def test_one_site_alone_is_told_to_write_the_results(tmp_path: Path) -> None:
    """However fast the others leave: two processes writing one folder would tear it."""
    with serving(tmp_path, 3, rounds=1) as bench:
        sites, tasks = bench.started({"w": np.zeros(1)})
        for name, site in sites.items():
            site.submit(tasks[name], {"w": np.zeros(1)})
        exports = []
        for site in sites.values():
            exports.append(site.client.next_task().config["export"])
            site.client.leave("done", early=False)
    assert exports == [True, False, False]


def test_metrics_of_updates_are_averaged_over_the_sites_that_sent_them(tmp_path: Path) -> None:
    with serving(tmp_path, 2, rounds=1) as bench:
        sites, tasks = bench.started({"w": np.zeros(1)})
        sites["site-1"].submit(tasks["site-1"], {"w": np.zeros(1)}, 1, metrics={"train_loss": 1.0, "extra": 5.0})
        sites["site-2"].submit(
            tasks["site-2"], {"w": np.zeros(1)}, 3, metrics={"train_loss": np.float32(2.0), "extra": float("nan")}
        )
        bench.watch.wait("round_finished")
        (result,) = bench.server.result().rounds
    assert result.metrics["train_loss"] == 1.75 and math.isnan(result.metrics["extra"])


def test_many_sites_join_train_and_leave_at_once(tmp_path: Path) -> None:
    with serving(tmp_path, 24, rounds=3) as bench:
        finals = run_all(bench, lambda _: {"w": np.zeros(100)}, (1,) * 24)
        ended(bench.server)
    assert {final["w"].tobytes() for final in finals.values()} == {np.full(100, 37.5).tobytes()}


def test_the_disk_holds_no_more_than_a_round_whatever_their_number(tmp_path: Path) -> None:
    with serving(tmp_path, 2, rounds=12) as bench:
        run_all(bench, lambda _: {"w": np.zeros(1000)}, (1, 1))
        ended(bench.server)
    blobs = list((tmp_path / "server" / "blobs").iterdir())
    assert len(blobs) <= 2 + 3  # a round's updates; the model, the next one, the best one
