"""Checks of tree models that another participant may have made, before anything reads them without checks of its own.

XGBoost's native code trusts a model document: an index beyond its array would read foreign memory, and a circle of
nodes would never end.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import xxhash

from fl_runtime.aggregation.trees import ubjson
from fl_runtime.aggregation.trees.document import TreeModel, base_score, booster_model
from fl_runtime.errors import ProtocolError, UpdateRefusedError

WRONG_TYPES = (LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)
"""What reading a document raises whose fields have other types, shapes or sizes than expected."""

_ROOT_PARENT = 2147483647
_GROUPS = ("num_class", "num_target")
"""Parameters whose value is the number of trees per boosting round."""


def check_model(model: TreeModel, checked: set[bytes] | None = None) -> None:
    """Check that a model can be used for prediction safely: its head, its trees, and what the head says about them.

    Args:
        model: The model, which may come from a hostile peer.
        checked: Digests of trees that need no further check, for the same number of features. Those of this model are
            added.

    Raises:
        ProtocolError: The head does not fit the trees, or is no head.
        UpdateRefusedError: A tree could crash or hang XGBoost, or has values that are not finite.
    """
    checked = set() if checked is None else checked
    try:
        check_head(model.head)
        parameters = model.head["learner"]["learner_model_param"]
        features = int(parameters["num_feature"])
        groups = max(*(int(parameters[name]) for name in _GROUPS), 1)
        info, starts = list(model.model["tree_info"]), [int(at) for at in model.model["iteration_indptr"]]
        if len(info) != len(model.trees) or not all(0 <= group < groups for group in info):
            raise ProtocolError("the model does not give each of its trees a class")
        if starts[0] != 0 or starts != sorted(starts) or starts[-1] != len(info):
            raise ProtocolError("the boosting rounds of the model do not match its trees")
        if not np.isfinite(model.weight_drop or []).all():
            raise ProtocolError("the model does not give each of its trees a finite weight")
        for tree in model.trees:
            digest = xxhash.xxh3_128_digest(tree)
            if digest not in checked:
                check_tree(ubjson.loads(tree), features)
                checked.add(digest)
    except WRONG_TYPES:
        raise ProtocolError("this is not a tree model of XGBoost") from None


def check_global_model(model: TreeModel, checked: set[bytes]) -> None:
    """Check the global model that a server sends to a site, before XGBoost reads it.

    Args:
        model: The model.
        checked: As in `check_model`.

    Raises:
        ProtocolError: It could crash or hang XGBoost, or has values that are not finite.
    """
    fix = "ask the server's operator, and run the same version of XGBoost at every site"
    try:
        check_model(model, checked)
        finite = np.isfinite(np.asarray(base_score(model.head), np.float32)).all()
        weights = model.weight_drop
    except (ProtocolError, UpdateRefusedError, ValueError, TypeError) as error:
        what = error.what if isinstance(error, (ProtocolError, UpdateRefusedError)) else "its base score is no number"
        raise ProtocolError(f"the server sends trees that XGBoost could not use safely: {what}", fix=fix) from None
    if not finite:
        raise ProtocolError("the server sends trees with a base score that is not finite", fix=fix)
    if weights and len(weights) != len(model.trees):  # XGBoost would read beyond the list
        raise ProtocolError(f"the server sends {len(model.trees)} trees with {len(weights)} weights of trees", fix=fix)


def check_head(head: dict[str, Any]) -> None:
    """Check that the parts of a head that aggregation reads are there, with the right types.

    Args:
        head: The head, which may come from a hostile peer.

    Raises:
        ProtocolError: A part is missing, or of another type.
    """
    model, learner = booster_model(head), head["learner"]
    attributes, params = learner["attributes"], learner["learner_model_param"]
    texts = [learner["gradient_booster"]["name"], learner["objective"]["name"], *attributes, *attributes.values()]
    texts += [params[name] for name in ("base_score", "num_class", "num_feature", "num_target")]
    integers = [*model["tree_info"], *model["iteration_indptr"]]
    valid = (
        all(isinstance(text, str) for text in texts)
        and all(isinstance(number, (int, np.integer)) for number in integers)
        and isinstance(model["gbtree_model_param"], dict)
        and len(model["iteration_indptr"]) > 0
    )
    if not valid:
        raise ProtocolError("the head of a tree model has fields of the wrong types")


def check_tree(tree: dict[str, Any], features: int) -> None:
    """Check that a tree can be used for prediction safely.

    Args:
        tree: The parsed tree, which may come from a hostile peer.
        features: Number of features of the model.

    Raises:
        UpdateRefusedError: If it could crash or hang XGBoost, or has values that are not finite.
    """
    try:
        nodes = int(tree["tree_param"]["num_nodes"])
        left, right, parents = (np.asarray(tree[k]) for k in ("left_children", "right_children", "parents"))
        conditions, indices = np.asarray(tree["split_conditions"], np.float32), np.asarray(tree["split_indices"])
        per_node = [left, right, parents, conditions, indices, *(np.asarray(tree[k]) for k in _PER_NODE)]
        children = np.concatenate([left[left != -1], right[right != -1]])
        valid = (
            nodes >= 1
            and int(tree["tree_param"]["size_leaf_vector"]) <= 1
            and all(len(values) == nodes for values in per_node)
            and np.array_equal(left == -1, right == -1)
            and bool(np.all((children > 0) & (children < nodes)))
            and len(np.unique(children)) == len(children)
            and parents[0] == _ROOT_PARENT
            and all(np.array_equal(parents[side[side != -1]], np.flatnonzero(side != -1)) for side in (left, right))
            and bool(np.all((indices >= 0) & (indices < max(features, 1))))
            and bool(np.all(np.isfinite(conditions[left == -1])))
            and not np.any(np.isnan(conditions[np.asarray(tree["split_type"]) == 0]))  # unused for categories
        )
        valid = valid and _categories_fit(tree, nodes)
    except WRONG_TYPES:
        valid = False
    if not valid:
        raise UpdateRefusedError("a tree of the model is malformed", fix="check the site's version of XGBoost")


_PER_NODE = ("base_weights", "default_left", "loss_changes", "split_type", "sum_hessian")


def _categories_fit(tree: dict[str, Any], nodes: int) -> bool:
    categories, starts = np.asarray(tree["categories"]), np.asarray(tree["categories_segments"])
    sizes, owners = np.asarray(tree["categories_sizes"]), np.asarray(tree["categories_nodes"])
    if not len(starts) == len(sizes) == len(owners):
        return False
    within = np.all((starts >= 0) & (sizes >= 0) & (starts + sizes <= len(categories)))
    owned = np.all((owners >= 0) & (owners < nodes)) and np.all((categories >= 0) & (categories < 2**24))
    categorical = np.flatnonzero(np.asarray(tree["split_type"]) == 1)
    return bool(within and owned) and set(categorical.tolist()) <= set(owners.tolist())
