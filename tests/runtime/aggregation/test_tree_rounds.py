"""The server's side of tree models: who proposes the strategy, round 0, reopened rounds, stopping.

The documents of trees are made by hand, so XGBoost is not needed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation_bench import Bench, Site, at_once, serving

from fl_runtime.aggregation.metrics.pooling import (
    area_under_curve,
    area_under_precision_recall,
    from_json,
    pooled,
    to_json,
)
from fl_runtime.aggregation.metrics.quantiles import QuantileSummary
from fl_runtime.aggregation.trees.document import TreeModel
from fl_runtime.aggregation.trees.strategies import ENCODING, FAILED, ubjson
from fl_runtime.errors import ConfigError, HandshakeError, RoundFailedError, UpdateRefusedError
from fl_runtime.types import Arrays, Report, Summary, Terms
from fl_runtime.wire.manifest import Manifest

EMPTY = {
    "head": np.empty(0, np.uint8),
    "trees": np.empty(0, np.uint8),
    "ends": np.empty(0, np.int64),
    "sizes": np.zeros(3, np.int64),
}


def head(base: str = "5E-1", trees: int = 0) -> dict[str, Any]:
    model = {
        "gbtree_model_param": {"num_parallel_tree": "1", "num_trees": str(trees)},
        "iteration_indptr": [0, trees] if trees else [0],
        "tree_info": [0] * trees,
        "trees": [],
    }
    param = {"base_score": base, "boost_from_average": "1", "num_class": "0", "num_feature": "2", "num_target": "1"}
    learner = {
        "attributes": {},
        "gradient_booster": {"model": model, "name": "gbtree"},
        "learner_model_param": param,
        "objective": {"name": "reg:squarederror"},
    }
    return {"learner": learner, "version": [3, 0, 0]}


def stump(low: float, high: float, **changes: Any) -> dict[str, Any]:
    """Return a tree with one split: `low` for x0 < 0.5, else `high`."""
    values = np.array([0.5, low, high], np.float32)
    none, longs = np.empty(0, np.int32), np.empty(0, np.int64)
    tree = {
        "base_weights": values,
        "categories": none,
        "categories_nodes": none,
        "categories_segments": longs,
        "categories_sizes": longs,
        "default_left": np.zeros(3, np.uint8),
        "id": 0,
        "left_children": np.array([1, -1, -1], np.int32),
        "loss_changes": np.ones(3, np.float32),
        "parents": np.array([2147483647, 0, 0], np.int32),
        "right_children": np.array([2, -1, -1], np.int32),
        "split_conditions": values,
        "split_indices": np.zeros(3, np.int32),
        "split_type": np.zeros(3, np.uint8),
        "sum_hessian": np.ones(3, np.float32),
        "tree_param": {"num_deleted": "0", "num_feature": "2", "num_nodes": "3", "size_leaf_vector": "1"},
    }
    return {**tree, **changes}


def grown(*trees: dict[str, Any]) -> Arrays:
    return TreeModel(head(trees=len(trees)), tuple(ubjson.dumps(tree) for tree in trees)).to_arrays()


def leaves(arrays: Arrays) -> list[list[float]]:
    model = TreeModel.from_arrays(arrays)
    document = ubjson.loads(model.document())["learner"]["gradient_booster"]["model"]
    assert [tree["id"] for tree in document["trees"]] == list(range(len(model.trees)))
    assert int(document["gbtree_model_param"]["num_trees"]) == len(document["trees"]) == len(document["tree_info"])
    return [tree["split_conditions"][1:].tolist() for tree in document["trees"]]


def register(site: Site, mode: str = "tree-bagging", **fields: Any) -> int:
    site.join()
    arguments: dict[str, Any] = {"agreement": {}, "info": {}, "rounds": 2, "evaluates": False, **fields}
    arguments.setdefault("capabilities", frozenset({mode}))
    arguments.setdefault("terms", Terms("encoded", mode))
    arrays = EMPTY | CUTS if mode == "tree-histogram" else EMPTY
    return site.client.register(Manifest.of(arrays), **arguments)


def submit(site: Site, task: Any, arrays: Arrays, examples: int = 1, **extras: Any) -> str:
    return site.submit(task, arrays, examples, content="encoded", encoding=ENCODING, extras=extras)


def begun(bench: Bench, mode: str = "tree-bagging", weights: tuple[float, ...] = (1.0, 1.0), **fields: Any) -> Any:
    """Return sites past round 0, whose base scores are 0.2 and 0.6, and their first tasks."""
    sites = [bench.site(name) for name in bench.names]
    at_once(sites, lambda site: register(site, mode, **fields))
    for number, site in enumerate(sites):
        task = site.client.next_task()
        assert (task.kind, task.round) == ("initial", 0)
        start = TreeModel(head(str(0.2 + 0.4 * number))).to_arrays()
        extras = {"weight": np.array([weights[number]])}
        if mode == "tree-histogram":
            extras |= QUANTILES.to_arrays()
        submit(site, task, start | (CUTS if mode == "tree-histogram" else {}), **extras)
    return sites, [site.client.next_task() for site in sites]


def test_sites_propose_the_strategy_and_the_first_model_is_made_of_all(tmp_path: Path) -> None:
    with serving(tmp_path, 2, rounds=1) as bench:
        sites, tasks = begun(bench, weights=(3.0, 1.0))
        model = TreeModel.from_arrays(tasks[0].arrays)
        assert float(model.head["learner"]["learner_model_param"]["base_score"]) == pytest.approx(0.3)
        assert model.head["learner"]["learner_model_param"]["boost_from_average"] == "0"
        submit(sites[0], tasks[0], grown(stump(1, 2)), 1)
        submit(sites[1], tasks[1], grown(stump(4, 8)), 3)
        final = sites[0].client.next_task()
        assert final.kind == "final" and leaves(final.arrays) == [[0.25, 0.5], [3, 6]]
        path = bench.server.export(tmp_path / "model")
        assert path is not None and path.name == "model.ubj"
        assert ubjson.loads(path.read_bytes())["learner"]["gradient_booster"]["name"] == "gbtree"


def test_of_all_trees_no_site_has_a_larger_share(tmp_path: Path) -> None:
    with serving(tmp_path, 2, sockets=False, rounds=1, max_share=0.5) as bench:
        sites, tasks = begun(bench, weights=(1e9, 1.0))
        param = TreeModel.from_arrays(tasks[0].arrays).head["learner"]["learner_model_param"]
        assert float(param["base_score"]) == pytest.approx(0.4)  # of 0.2 and 0.6
        submit(sites[0], tasks[0], grown(stump(1, 2)), 1)
        submit(sites[1], tasks[1], grown(stump(4, 8)), 10**9)
        finals = at_once(sites, lambda site: site.client.next_task())
        assert leaves(finals[0].arrays) == [[0.5, 1.0], [2.0, 4.0]]


@pytest.mark.parametrize("place", ["beside the model", "in the model"])  # XGBoost until 3.3, and since then
@pytest.mark.parametrize("sends", ["all weights", "those of its trees"])
def test_weights_of_dart_are_the_mean_of_what_the_sites_make_of_them(tmp_path: Path, place: str, sends: str) -> None:
    """Two sites append a stump each. In round 2 one or both send new weights for the trees before."""

    def weighted(arrays: Arrays, weights: list[float]) -> Arrays:
        model = TreeModel.from_arrays(arrays)
        booster = model.head["learner"]["gradient_booster"]
        (booster if place == "beside the model" else booster["model"])["weight_drop"] = weights
        return model.to_arrays()

    with serving(tmp_path, 2, rounds=2) as bench:
        sites = [bench.site(name) for name in bench.names]
        at_once(sites, register)
        for site in sites:
            task = site.client.next_task()
            submit(site, task, weighted(TreeModel(head()).to_arrays(), []), weight=np.ones(1))
        tasks = [site.client.next_task() for site in sites]
        for site, task in zip(sites, tasks, strict=True):
            submit(site, task, weighted(grown(stump(4, 8)), [1.0]))
        tasks = [site.client.next_task() for site in sites]
        assert TreeModel.from_arrays(tasks[0].arrays).weight_drop == [1.0, 1.0]
        submit(sites[0], tasks[0], weighted(grown(stump(4, 8)), [0.5, 0.25, 0.75]), 3)
        own = [0.75] if sends == "those of its trees" else [1.0, 1.0, 0.75]
        with pytest.raises(UpdateRefusedError, match="each of its trees a finite weight"):
            submit(sites[1], tasks[1], weighted(grown(stump(4, 8)), [float("nan")]))
        submit(sites[1], tasks[1], weighted(grown(stump(4, 8)), own), 1)
        final = TreeModel.from_arrays(sites[0].client.next_task().arrays)
        assert final.weight_drop == [0.625, 0.4375, 0.75, 0.75]
        assert leaves(final.to_arrays()) == [[2, 4], [2, 4], [3, 6], [1, 2]]
        where = final.head["learner"]["gradient_booster"]
        assert ("weight_drop" in where) is (place == "beside the model")


@pytest.mark.parametrize(("strategy", "expected"), [("fedavg", "weights"), ("tree-cyclic", "tree-cyclic")])
def test_a_job_whose_strategy_the_adapter_cannot_do_is_refused(tmp_path: Path, strategy: str, expected: str) -> None:
    with serving(tmp_path, 2, strategy=strategy) as bench:
        sites = [bench.site(name) for name in bench.names]
        with pytest.raises(HandshakeError, match=f"{strategy} needs the capability {expected}"):
            at_once(sites, register)


@pytest.mark.parametrize("at", ["site_out", "server_out"])
def test_filters_of_weights_are_refused_once_the_sites_have_proposed_trees(tmp_path: Path, at: str) -> None:
    with serving(tmp_path, 2, filters=({"name": "Quantize", "at": at},)) as bench:
        sites = [bench.site(name) for name in bench.names]
        with pytest.raises(ConfigError, match="Quantize works on weights, which TreeBagging does not take"):
            at_once(sites, register)


def test_sites_that_propose_different_strategies_are_refused(tmp_path: Path) -> None:
    with serving(tmp_path, 2) as bench:
        sites = {
            bench.site(name): mode for name, mode in zip(bench.names, ("tree-bagging", "tree-cyclic"), strict=True)
        }
        with pytest.raises(HandshakeError, match="strategy: tree-bagging != tree-cyclic"):
            at_once(sites, lambda site: register(site, sites[site]))


@pytest.mark.parametrize(
    "tree",
    [
        stump(1, 2, left_children=np.array([0, -1, -1], np.int32)),  # its own child: predicting would not end
        stump(1, 2, right_children=np.array([9, -1, -1], np.int32)),
        stump(1, 2, split_indices=np.array([7, 0, 0], np.int32)),
        stump(1, float("inf")),
        stump(1, 2, base_weights=np.zeros(1, np.float32)),
        {"id": 0},
    ],
)
def test_a_tree_that_is_not_sound_is_refused(tmp_path: Path, tree: dict[str, Any]) -> None:
    with serving(tmp_path, 2) as bench:
        sites, tasks = begun(bench)
        with pytest.raises(UpdateRefusedError, match=r"malformed|does not hold a tree model"):
            submit(sites[0], tasks[0], grown(tree))
        assert submit(sites[0], tasks[0], grown(stump(1, 2))) == "used"


def test_weights_are_refused_where_trees_are_wanted(tmp_path: Path) -> None:
    with serving(tmp_path, 2) as bench:
        sites, tasks = begun(bench)
        with pytest.raises(UpdateRefusedError, match="weights"):
            sites[0].submit(tasks[0], grown(stump(1, 2)))


@pytest.mark.parametrize("killed_at", ["round 0", "round 1"])
def test_a_run_of_trees_survives_its_server(tmp_path: Path, killed_at: str) -> None:
    """An update accepted before a restart is in the result, in round 0 and later."""
    undisturbed = tmp_path / "a"
    with serving(undisturbed, 2, rounds=1) as bench:
        sites, tasks = begun(bench)
        for site, task in zip(sites, tasks, strict=True):
            submit(site, task, grown(stump(1, 2)), 2)
        expected = bytes(sites[0].client.next_task().arrays["trees"])
    with serving(tmp_path / "b", 2, rounds=1) as first:
        sites = [first.site(name) for name in first.names]
        at_once(sites, register)
        task = sites[0].client.next_task()
        submit(sites[0], task, TreeModel(head("0.2")).to_arrays(), weight=np.ones(1))
        if killed_at == "round 1":
            submit(sites[1], sites[1].client.next_task(), TreeModel(head("0.6")).to_arrays(), weight=np.ones(1))
            submit(sites[0], sites[0].client.next_task(), grown(stump(1, 2)), 2)
        journal = tmp_path / "c"
        import shutil

        shutil.copytree(tmp_path / "b", journal)
    with serving(journal, 2, rounds=1) as second:
        sites = [second.site(name) for name in second.names]
        at_once(sites, register)
        if killed_at == "round 0":
            submit(sites[1], sites[1].client.next_task(), TreeModel(head("0.6")).to_arrays(), weight=np.ones(1))
            submit(sites[0], sites[0].client.next_task(), grown(stump(1, 2)), 2)
        submit(sites[1], sites[1].client.next_task(), grown(stump(1, 2)), 2)
        assert bytes(sites[0].client.next_task().arrays["trees"]) == expected


def test_a_round_that_comes_to_nothing_is_opened_again_and_ends_the_run_at_last(tmp_path: Path) -> None:
    with serving(tmp_path, 2, rounds=1) as bench:
        sites, tasks = begun(bench, "tree-histogram", **{})
        stages = []
        for _ in range(4):
            stages.append(tasks[0].stage)
            for site, task in zip(sites, tasks, strict=True):
                broken = head()
                broken["learner"]["attributes"] = {FAILED: "its worker was killed"}
                submit(site, task, TreeModel(broken).to_arrays() | CUTS)
            if len(stages) < 4:
                tasks = [site.client.next_task() for site in sites]
        with pytest.raises(RoundFailedError, match="failed 4 times"):
            sites[0].client.next_task()
        assert stages == ["", "2", "3", "4"]


QUANTILES = QuantileSummary(
    (np.empty(0, np.float32),) * 2, (np.empty(0),) * 2, np.zeros(2, np.int64), 16, np.zeros((2, 2), np.int64), 1
)
CUTS = {"cuts": np.empty(0, np.float32), "cut_ends": np.empty(0, np.int64), "levels": np.empty(0, np.int64)}


def test_the_run_stops_when_the_score_of_all_sites_no_longer_improves(tmp_path: Path) -> None:
    terms = Terms("encoded", "tree-bagging", "loss", "min", patience=2)
    with serving(tmp_path, 2, rounds=9) as bench:
        sites, tasks = begun(bench, terms=terms, evaluates=True)
        stopped = []
        for score in (3.0, 1.0, 2.0, 2.0):
            for site, task in zip(sites, tasks, strict=True):
                submit(site, task, grown(stump(1, 2)))
            tasks = [site.client.next_task() for site in sites]
            reports = [Report("test", tasks[0].version, site.name, {"loss": score}, 1) for site in sites]
            replies = at_once(
                list(zip(sites, reports, strict=True)), lambda one: one[0].client.report(one[1], wait=True)
            )
            assert replies[0] == replies[1] == ({"loss": score}, replies[0][1])
            stopped.append(replies[0][1])
        assert stopped == [False, False, False, True]
        finals = [site.client.next_task() for site in sites]
        assert [(task.kind, task.version) for task in finals] == [("final", 4)] * 2
        bench.watch.wait("finished")
        assert bench.server.result().best_round == 2 and len(bench.server.result().rounds) == 4


def test_pooled_metrics_are_those_of_all_rows() -> None:
    draw = np.random.default_rng(0)
    scores, labels = draw.normal(size=300).round(1), draw.integers(0, 2, 300)

    def histogram(chosen: Any) -> dict[int, tuple[float, float]]:
        bins = np.rint(scores[chosen] * 10).astype(int)
        return {
            int(b): (
                float(((bins == b) & (labels[chosen] == 0)).sum()),
                float(((bins == b) & (labels[chosen] == 1)).sum()),
            )
            for b in np.unique(bins)
        }

    parts = [np.arange(300) < 200, np.arange(300) >= 200]
    reports = [
        ({"auc": Summary("auc", 0.5, 1.0, histogram(p)), "rmse": Summary("root_mean", float(n), float(n))}, 1)
        for n, p in enumerate(parts, start=1)
    ]
    wired = [(from_json(to_json(metrics)), n) for metrics, n in reports]
    actual = pooled(wired)
    pairs = scores[labels == 1][:, None] - scores[labels == 0][None, :]
    assert actual["auc"] == pytest.approx(((pairs > 0) + 0.5 * (pairs == 0)).mean())
    assert actual["rmse"] == pytest.approx(np.sqrt((1 * 1 + 4 * 2) / 3))
    assert area_under_curve({0: (3.0, 0.0), 1: (0.0, 2.0)}) == 1.0
    assert area_under_precision_recall({0: (3.0, 0.0), 1: (0.0, 2.0)}) == 1.0


def test_a_site_whose_trees_do_not_go_with_those_of_the_others_is_excluded(tmp_path: Path) -> None:
    """With three sites, the base score of another objective is that of one alone. It used to end the run at once."""
    with serving(tmp_path, 3, sockets=False, rounds=1, min_sites=2) as bench:
        sites = [bench.site(name) for name in bench.names]
        at_once(sites, register)
        for failures in (1, 2):
            for number, site in enumerate(sites):
                base = "[2E-1,3E-1]" if number == 1 else str(0.2 + 0.2 * number)
                submit(site, site.client.next_task(), TreeModel(head(base)).to_arrays(), weight=np.ones(1))
            bench.watch.wait("round_dropped", count=failures)
        assert "site-2 is excluded from this run: round 0 failed" in bench.watch.wait("left", "site-2").data["reason"]
        for number in (0, 2):
            start = TreeModel(head(str(0.2 + 0.2 * number))).to_arrays()
            submit(sites[number], sites[number].client.next_task(), start, weight=np.ones(1))
        model = TreeModel.from_arrays(sites[0].client.next_task().arrays)
        assert float(model.head["learner"]["learner_model_param"]["base_score"]) == pytest.approx(0.4)  # 0.2 and 0.6
