"""FedBuff, whose sites never wait, through the real server and against a few lines of NumPy."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation_bench import Bench, Site, at_once, ended, serving
from numpy_rounds import EXAMPLES
from server_process import server_process

from fl_runtime.aggregation import make_strategy
from fl_runtime.errors import ConfigError, QuorumError, UpdateRefusedError
from fl_runtime.server.records.history import History
from fl_runtime.types import Array, Arrays, Task

ORDER = (0, 0, 1, 0, 2, 1, 0, 2, 1, 1, 2, 2)
"""The order of the updates: three sites, four updates each, the last of them late."""


def start() -> dict[str, Array]:
    rng = np.random.default_rng(0)
    return {"w": rng.normal(size=(5, 3)), "b": rng.normal(size=4).astype(np.float32)}


def worked(x: Array, index: int, number: int) -> Array:
    return np.asarray(x + 0.3 * (np.random.default_rng([index, number, x.size]).normal(size=x.shape) - x))


def joined(sites: list[Site], initial: Arrays) -> dict[str, Task]:
    for site in sites:
        site.join()
    at_once(sites, lambda site: site.register(initial))
    return {site.name: site.start(initial) for site in sites}


def reference(k: int, lr: float, a: float, n: Array) -> list[dict[str, Array]]:
    models = [{name: x.astype(float) for name, x in start().items()}]
    began, done, buffer = [0, 0, 0], [0, 0, 0], []
    for index in ORDER:
        done[index] += 1
        base = models[began[index]]
        buffer.append((index, began[index], {m: worked(x, index, done[index]) - x for m, x in base.items()}))
        if len(buffer) == k or sum(done) == len(ORDER):
            weights = np.array([n[i] for i, _, _ in buffer])
            fresh = np.array([(1 + len(models) - 1 - b) ** -a for _, b, _ in buffer])
            models.append(
                {
                    name: x
                    + lr
                    * sum(w * s * d[name] for w, s, (_, _, d) in zip(weights, fresh, buffer, strict=True))
                    / weights.sum()
                    for name, x in models[-1].items()
                }
            )
            buffer = []
        began[index] = len(models) - 1
    return models


@pytest.mark.parametrize(
    ("spec", "arguments"),
    [
        ("fedbuff:k=2", (2, 1.0, 0.5, np.ones(3))),
        ("fedbuff:k=5,lr=0.5,staleness=1,weights=examples", (5, 0.5, 1.0, np.array(EXAMPLES[:3], float))),
        ("fedbuff:k=1,staleness=0", (1, 1.0, 0.0, np.ones(3))),
    ],
)
def test_every_model_is_that_of_plain_numpy(tmp_path: Path, spec: str, arguments: Any) -> None:
    expected = reference(*arguments)
    k = arguments[0]
    with serving(tmp_path, 3, sockets=False, rounds=4, strategy=spec) as bench:
        sites = [bench.site(name) for name in bench.names]
        tasks = joined(sites, start())
        for count, index in enumerate(ORDER, 1):
            site, task = sites[index], tasks[f"site-{index + 1}"]
            assert task.kind == "train"
            arrays = {name: worked(x, index, task.round).astype(x.dtype) for name, x in task.arrays.items()}
            assert site.submit(task, arrays, EXAMPLES[index]) == "used"
            if count % k == 0 and count < len(ORDER):
                bench.watch.wait("round_finished", count=count // k)
            if task.round < 4:  # nobody waits, whatever the others do
                tasks[site.name] = site.client.next_task()
                assert (tasks[site.name].round, tasks[site.name].version) == (task.round + 1, count // k)
                for name, array in tasks[site.name].arrays.items():
                    np.testing.assert_allclose(array, expected[count // k][name], rtol=1e-6, atol=1e-6)
        finals = [site.client.next_task() for site in sites]
        for task in finals:
            assert (task.kind, task.version) == ("final", len(expected) - 1)
            for name, array in task.arrays.items():
                np.testing.assert_allclose(array, expected[-1][name], rtol=1e-6, atol=1e-6)
        for site in sites:
            site.client.leave("done", early=False)
        ended(bench.server)
        held = {path.stem for path in (tmp_path / "server" / "blobs").glob("model-*")}
        last = len(expected) - 1
        assert held <= {f"model-{last}", f"model-{last - 1}"}  # the newest, and the best before it


def test_a_slow_site_holds_nobody_up(tmp_path: Path) -> None:
    """It sends its second update after the others' last: synchronous rounds would wait for ever."""
    rounds = 5
    with serving(tmp_path, 3, sockets=False, rounds=rounds, strategy="fedbuff:k=2") as bench:

        def change(name: str, task: Task) -> Arrays:
            if name == "site-3":
                for other in ("site-1", "site-2"):
                    bench.watch.wait("update", other, count=min(3 * task.round, rounds))
            return {"w": task.arrays["w"] + 1}

        finals = bench.run(lambda name: bench.site(name).take_part({"w": np.zeros(2)}, lambda task: change(name, task)))
        ended(bench.server)
        updates = [(event.site, event.round) for event in bench.watch.all("update")]
        assert sorted(updates) == sorted((name, number) for name in bench.names for number in range(1, rounds + 1))
        assert len(bench.server.result().rounds) == 8  # 15 updates, two each, and one that is left
        assert len({arrays["w"].tobytes() for arrays in finals.values()}) == 1
        history = History(tmp_path / "history")
        for event in bench.watch.events:
            history(event)
        history.close()
    with open(tmp_path / "history" / "history.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["round"] != "0"]
    of_sites = [(row["site"], int(row["round"])) for row in rows if row["site"] != "global"]
    assert sorted(of_sites) == sorted(updates)
    assert {row["status"] for row in rows if row["site"] != "global"} == {"buffered"}
    assert sum(int(row["num_examples"]) for row in rows if row["site"] == "global") == 15


def two(bench: Bench) -> tuple[list[Site], dict[str, Task]]:
    sites = [bench.site(name) for name in bench.names]
    return sites, joined(sites, {"w": np.zeros(2)})


def test_a_site_that_leaves_is_done_without_as_far_as_the_quorum_allows(tmp_path: Path) -> None:
    with serving(tmp_path / "one", 2, sockets=False, rounds=1, min_sites=1, strategy="fedbuff:k=2") as bench:
        sites, tasks = two(bench)
        sites[0].submit(tasks["site-1"], {"w": np.ones(2)})
        sites[1].client.leave("enough", early=True)
        final = sites[0].client.next_task()
        assert (final.kind, final.arrays["w"].tolist()) == ("final", [1, 1])
    with serving(tmp_path / "two", 2, sockets=False, rounds=1, min_sites=2, strategy="fedbuff:k=2") as bench:
        sites, tasks = two(bench)
        sites[0].submit(tasks["site-1"], {"w": np.ones(2)})
        sites[1].client.leave("enough", early=True)
        with pytest.raises(QuorumError):
            sites[0].client.next_task()


def test_sending_again_counts_once_and_extras_are_refused(tmp_path: Path) -> None:
    with serving(tmp_path, 2, sockets=False, rounds=2, strategy="fedbuff:k=4") as bench:
        sites, tasks = two(bench)
        with pytest.raises(UpdateRefusedError, match="beside the weights"):
            sites[0].submit(tasks["site-1"], {"w": np.ones(2)}, extras={"m": np.ones(2)})
        assert sites[0].submit(tasks["site-1"], {"w": np.ones(2)}) == "used"
        assert sites[0].submit(tasks["site-1"], {"w": np.ones(2)}) == "duplicate"


def test_an_initial_model_that_is_sent_again_is_a_duplicate_at_once(tmp_path: Path) -> None:
    """As when the connection breaks before its acknowledgement; the site would else not train until the run ends."""
    weights = {"w": np.zeros(2)}
    with serving(tmp_path, 2, sockets=False, rounds=1, strategy="fedbuff:k=2") as bench:
        sites = [bench.site(name) for name in bench.names]
        for site in sites:
            site.join()
        at_once(sites, lambda site: site.register(weights))
        initial = sites[0].client.next_task()
        assert initial.kind == "initial"
        assert sites[0].submit(initial, weights) == "used"
        assert sites[1].client.next_task().kind == "train"
        assert sites[0].submit(initial, weights) == "duplicate"


def test_a_killed_server_goes_on_with_its_buffer(tmp_path: Path) -> None:
    with server_process(tmp_path, 2, rounds=2, strategy="fedbuff:k=3,staleness=0") as server:
        sites = [server.site(name) for name in ("site-1", "site-2")]
        tasks = joined(sites, {"w": np.zeros(2)})
        one, two = sites
        one.submit(tasks["site-1"], {"w": np.full(2, 3.0)})
        task = one.client.next_task()
        one.submit(task, {"w": np.full(2, 6.0)})
        server.kill()
        server.start()
        assert one.submit(task, {"w": np.full(2, 6.0)}) == "duplicate"
        assert two.submit(tasks["site-2"], {"w": np.full(2, 9.0)}) == "used"  # the third: 0 + (3 + 6 + 9) / 3
        task = two.client.next_task()
        while task.version == 0:  # it may have been asked for before the model was made
            task = two.client.next_task()
        assert (task.round, task.version, task.arrays["w"].tolist()) == (2, 1, [6, 6])
        server.kill()
        server.start()
        assert two.submit(task, {"w": np.full(2, 8.0)}) == "used"
        finals = [site.client.next_task() for site in sites]
        assert [(final.kind, final.arrays["w"].tolist()) for final in finals] == [("final", [8, 8])] * 2
        for site in sites:
            site.client.leave("done", early=False)
            site.vanish()
        np.testing.assert_array_equal(server.finished()["w"], [8, 8])


def test_a_variance_stays_above_zero(tmp_path: Path) -> None:
    """Stale differences of running statistics could add up to more than there is."""
    with serving(tmp_path, 3, sockets=False, rounds=1, strategy="fedbuff:k=1,staleness=0") as bench:
        sites = [bench.site(name) for name in bench.names]
        tasks = joined(sites, {"bn.running_var": np.ones(2), "n": np.array(3)})
        for index, site in enumerate(sites):
            site.submit(tasks[site.name], {"bn.running_var": np.full(2, 0.25), "n": np.array(9 - index)})
            bench.watch.wait("round_finished", count=index + 1)
        final = sites[0].client.next_task()
        assert final.arrays["bn.running_var"].tolist() == [0.25, 0.25]
        assert final.arrays["n"] == 7


@pytest.mark.parametrize("spec", ["fedbuff:k=0", "fedbuff:staleness=-1", "fedbuff:lr=0", "fedbuff:k=1.5"])
def test_bad_arguments(spec: str) -> None:
    with pytest.raises(ConfigError, match="fedbuff"):
        make_strategy(spec)
