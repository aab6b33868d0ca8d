"""A server that sends trees which would crash, hang or mislead XGBoost's native code, over mutual TLS."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xgboost
import xgboost_data as d
from hostile_server import Hostile, changed_task
from study import Study, readdressed

from fl_adapters import ProtocolError
from fl_adapters.participant.kit import read_kit
from fl_adapters.participant.registry import close_sessions
from fl_adapters.xgboost import model, train
from fl_adapters.xgboost.call import TrainCall
from fl_adapters.xgboost.ring import read_ports
from fl_runtime.aggregation.metrics.quantiles import check_cuts
from fl_runtime.aggregation.trees import ubjson
from fl_runtime.aggregation.trees.document import TreeModel
from fl_runtime.wire import frames
from fl_runtime.wire.fl.v1 import federation_pb2 as pb
from fl_runtime.wire.manifest import Manifest

Change = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def grown() -> TreeModel:
    """A model of two trees that XGBoost has grown from the same data."""
    booster = xgboost.train({**d.BASE, "objective": "binary:logistic"}, d.matrix(0), 2)
    return TreeModel.from_document(booster.save_raw("ubj"))


def of_tree(name: str, value: Any, at: int | None = None) -> Change:
    """Change a field of each tree, or its element `at`."""

    def change(tree: dict[str, Any]) -> None:
        if at is None:
            tree[name] = value
        else:
            tree[name] = np.copy(tree[name])
            tree[name][at] = value

    return change


def of_head(*path: str, value: Any) -> Change:
    def change(head: dict[str, Any]) -> None:
        for name in path[:-1]:
            head = head[name]
        head[path[-1]] = value

    return change


TREES: dict[str, Change] = {
    "a child beyond the tree": of_tree("left_children", 10**6, 0),
    "a child before the tree": of_tree("left_children", -7, 0),
    "a circle": of_tree("left_children", 0, 0),
    "a parent beyond the tree": of_tree("parents", 10**6, 1),
    "a root with a parent": of_tree("parents", 1, 0),
    "a feature that nobody has": of_tree("split_indices", 10**6, 0),
    "a leaf that is no number": of_tree("split_conditions", np.nan, -1),
    "an infinite leaf": of_tree("split_conditions", np.inf, -1),
    "children as text": of_tree("left_children", "abc"),
    "no children": of_tree("left_children", np.empty(0, np.int32)),
    "more nodes than there are": of_tree("tree_param", {"num_nodes": "1000000", "size_leaf_vector": "1"}),
    "nodes without a number": of_tree("tree_param", {"num_nodes": "many", "size_leaf_vector": "1"}),
    "categories beyond the list": of_tree("categories_segments", np.array([10**9], np.int64)),
}
MODEL = ("learner", "gradient_booster", "model")
HEADS: dict[str, Change] = {
    "a class that is none": of_head(*MODEL, "tree_info", value=[7, 7]),
    "rounds that end before the trees": of_head(*MODEL, "iteration_indptr", value=[0, 1]),
    "rounds beyond the trees": of_head(*MODEL, "iteration_indptr", value=[0, 10**6]),
    "no rounds": of_head(*MODEL, "iteration_indptr", value=[]),
    "another number of trees": of_head(*MODEL, "gbtree_model_param", "num_trees", value="1000000"),
    "too few weights of trees": of_head(*MODEL, "weight_drop", value=[np.float32(1)]),
    "a base score that is no number": of_head("learner", "learner_model_param", "base_score", value="[nan]"),
    "a base score of text": of_head("learner", "learner_model_param", "base_score", value="high"),
    "features as a list": of_head("learner", "learner_model_param", "num_feature", value=[]),
    "no booster": of_head("learner", "gradient_booster", value="gblinear"),
    "no learner": of_head("learner", value=7),
}


def call(**fields: Any) -> TrainCall:
    return TrainCall({**d.BASE, "objective": "binary:logistic"}, d.matrix(0), 2, **fields)


def holding(arrays: dict[str, Any]) -> Callable[[pb.TaskHeader], None]:
    """Put other arrays into a task."""

    def change(task: pb.TaskHeader) -> None:
        manifest = Manifest.of(arrays)
        task.payload.CopyFrom(frames.describe(manifest, manifest.digests(arrays, {}), known=False))
        names = [manifest.tensors[index].name for index in manifest.payload_order]
        task.payload.inline = b"".join(arrays[name].tobytes() for name in names)

    return change


def with_trees(grown: TreeModel, change: Change) -> TreeModel:
    trees = [ubjson.loads(tree) for tree in grown.trees]
    for tree in trees:
        change(tree)
    return TreeModel(grown.head, tuple(ubjson.dumps(tree) for tree in trees))


def test_an_honest_model_is_read_and_predicts_as_before(grown: TreeModel) -> None:
    own = call()
    booster = own.booster(model.SEEDING)
    model.load(booster, model.received(grown.to_arrays(), own), own)
    same = xgboost.Booster(model_file=bytearray(grown.document()))
    np.testing.assert_array_equal(booster.predict(d.matrix(0)), same.predict(d.matrix(0)))
    assert len(own.checked_trees) == len(set(map(bytes, grown.trees)))


@pytest.mark.parametrize("what", TREES)
def test_a_tree_that_xgboost_could_not_use_safely_is_refused(grown: TreeModel, what: str) -> None:
    with pytest.raises(ProtocolError, match="trees that XGBoost could not use safely"):
        model.received(with_trees(grown, TREES[what]).to_arrays(), call())


@pytest.mark.parametrize("what", HEADS)
def test_a_head_that_does_not_fit_its_trees_is_refused(grown: TreeModel, what: str) -> None:
    head = ubjson.loads(ubjson.dumps(grown.head))
    HEADS[what](head)
    own = call()
    arrays = {**grown.to_arrays(), **_head(head, grown)}
    with pytest.raises(ProtocolError):
        model.load(own.booster(model.SEEDING), model.received(arrays, own), own)


def _head(head: dict[str, Any], grown: TreeModel) -> dict[str, Any]:
    data = np.frombuffer(ubjson.dumps(head), np.uint8)
    return {"head": data, "sizes": np.array([len(data), *grown.to_arrays()["sizes"][1:]], np.int64)}


def test_a_script_that_meets_such_a_server_ends_with_an_error_of_ours(tmp_path: Path, grown: TreeModel) -> None:
    with Study(tmp_path, ("north",)) as study:
        study.job()
        kit = readdressed(study, "north")
        Hostile(study, changed_task(holding(with_trees(grown, TREES["a child beyond the tree"]).to_arrays())))
        own = call()
        try:
            with pytest.raises(ProtocolError, match="a tree of the model is malformed"):
                train(own.params, own.dtrain, 2, kit=str(kit))
        finally:
            close_sessions("its script ended before the last round", read_kit(kit), failed=True)


CUT_POINTS = {"cuts": np.array([0, 1, 5], np.float32), "cut_ends": np.array([2, 3]), "levels": np.array([0, 0])}


@pytest.mark.parametrize(
    "changes",
    [
        {"cut_ends": np.array([2, 9])},
        {"cut_ends": np.array([3, 2])},
        {"cut_ends": np.array([3])},
        {"levels": np.array([0, 2**40])},
        {"levels": np.array([0, -1])},
        {"cuts": np.array([0, np.nan, 5], np.float32)},
        {"cuts": np.array([1, 0, 5], np.float32)},
        {"cuts": np.empty(0, np.float32)},
    ],
    ids=str,
)
def test_cut_points_that_make_no_bins_are_refused(changes: dict[str, Any]) -> None:
    check_cuts(CUT_POINTS, 2)
    with pytest.raises(ProtocolError, match="no cut points for the bins of 2 features"):
        check_cuts({**CUT_POINTS, **changes}, 2)
    with pytest.raises(ProtocolError):
        check_cuts({}, 2)


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"7",
        b"[" * 900 + b"]" * 900,
        b'{"port": 1, "error_port": 2}',
        b'{"port": 0, "error_port": 2, "network": "n"}',
        b'{"port": 65536, "error_port": 2, "network": "n"}',
        b'{"port": "1", "error_port": 2, "network": "n"}',
        b'{"port": 1, "error_port": true, "network": "n"}',
        b'{"port": 1, "error_port": 2, "network": 7}',
        b'{"port": 1, "error_port": 2, "network": "' + b"n" * 10_000 + b'"}',
    ],
    ids=lambda message: repr(message)[:40],
)
def test_ports_of_a_member_that_are_none_are_refused(message: bytes) -> None:
    assert read_ports(b'{"port": 1, "error_port": 2, "network": "n"}', "south") == ({"port": 1, "error_port": 2}, "n")
    with pytest.raises(ProtocolError, match="south names the ports of its XGBoost worker"):
        read_ports(message, "south")
