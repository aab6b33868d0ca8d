"""Conversion between boosters and the arrays that travel."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import xgboost

from fl_runtime.aggregation.trees import ubjson
from fl_runtime.aggregation.trees.checks import check_global_model
from fl_runtime.aggregation.trees.document import TreeModel, base_score, masked, pooled_base_score
from fl_runtime.aggregation.trees.strategies import BASE_SUMS, ROW_WEIGHT, WEIGHT
from fl_runtime.errors import ConfigError, ProtocolError
from fl_runtime.types import Array, Arrays

from .call import TrainCall, installed_version
from .trainer import exchange_contents
from .worker import drops_trees

EMPTY: Arrays = {
    "head": np.empty(0, np.uint8),
    "trees": np.empty(0, np.uint8),
    "ends": np.empty(0, np.int64),
    "sizes": np.zeros(3, np.int64),
}
"""Names and dtypes of the arrays that travel, for the handshake."""

SEEDING = {"seed_per_iteration": True}
"""Makes row and column sampling depend on the iteration alone, so that it repeats after a restart."""

_SAME_SCORE = 1e-4  # XGBoost sums in float32


def initial_model(call: TrainCall) -> TreeModel:
    """The model that this site would start from: `xgb_model`, else no trees and the base score of its own data."""
    if call.xgb_model is not None:
        _check_not_newer(call.xgb_model)
        booster = xgboost.Booster(call.params, model_file=call.xgb_model)
        return TreeModel.from_document(booster.save_raw("ubj"))
    # growing a stump makes XGBoost estimate the base score
    booster = call.booster({"max_depth": 1, "max_leaves": 0, "grow_policy": "depthwise"})
    try:
        booster.update(call.dtrain, 0, fobj=call.obj)
    except xgboost.core.XGBoostError as error:
        if "base_score" not in str(error):
            raise
        raise ConfigError(
            f"XGBoost {xgboost.__version__} cannot estimate a base score from the rows of this site",
            where="xgboost.train, before round 1",
            fix="pass the same base_score in params at every site, such as 0.5, or use XGBoost 3.2 or later",
        ) from None
    model = TreeModel.from_document(booster.save_raw("ubj")).iterations(1)
    return model if model.weight_drop is None else model.with_head(weight_drop=[])


def _check_not_newer(model: Any) -> None:
    """Raise ConfigError for a model of a later XGBoost: this one would ignore what it does not know, and mispredict."""
    if isinstance(model, xgboost.Booster):
        return
    data = model if isinstance(model, bytes | bytearray) else Path(model).read_bytes()
    version = tuple(int(part) for part in TreeModel.from_document(data).head["version"][:2])
    if version > installed_version():
        newer, installed = (".".join(map(str, numbers)) for numbers in (version, installed_version()))
        raise ConfigError(
            f"XGBoost {installed} cannot continue from a model of XGBoost {newer}",
            where="xgb_model",
            fix=f"install XGBoost {newer} or later at every site",
        )


def rows_weight(data: xgboost.DMatrix) -> float:
    """Sum of the weights of the rows, or of the groups for ranking. Without weights, the number of rows."""
    weights = data.get_weight()
    return float(np.sum(weights, dtype=np.float64)) if len(weights) else float(data.num_row())


def trees_after(booster: xgboost.Booster, rounds: int, *, mask: bool) -> TreeModel:
    """Take the boosting rounds after the first `rounds` out of a booster.

    Args:
        booster: The booster.
        rounds: Number of boosting rounds to leave out.
        mask: Whether to remove what trees say about the data beside their splits.
    """
    if booster.num_boosted_rounds() == rounds or drops_trees(booster):  # the weights of all trees travel then
        grown = TreeModel.from_document(booster.save_raw("ubj")).iterations(rounds)
    else:
        grown = TreeModel.from_document(booster[rounds:].save_raw("ubj"))
    if mask:
        trees = tuple(ubjson.dumps(masked(ubjson.loads(tree))) for tree in grown.trees)
        grown = TreeModel(grown.head, trees)
    return grown


def load(booster: xgboost.Booster, model: TreeModel, call: TrainCall) -> None:
    """Replace the model in a booster object; parameters, learning rate and attributes stay.

    `Booster.load_model` is not enough: XGBoost caches predictions of the former trees for the training data, and the
    next tree would correct those. So the object takes over the contents of a new booster.
    """
    try:
        fresh = call.booster(SEEDING, model_file=bytearray(model.document()))
    except xgboost.core.XGBoostError as error:
        raise ProtocolError(
            f"XGBoost cannot read the global model: {str(error).splitlines()[0][:300]}",
            fix="run the same version of XGBoost at every site, or ask the server's operator",
        ) from None
    fresh.set_param({"learning_rate": learning_rate(booster)})
    fresh.set_attr(**booster.attributes())
    exchange_contents(booster, fresh)


def is_same(booster: xgboost.Booster, model: TreeModel) -> bool:
    """Whether a booster has the trees of a model, and their weights."""
    held = TreeModel.from_document(booster.save_raw("ubj"))
    return (list(map(bytes, held.trees)), held.weight_drop) == (list(map(bytes, model.trees)), model.weight_drop)


def received(arrays: Arrays, call: TrainCall) -> TreeModel:
    """The model in arrays from the server, with this site's own names of features.

    They differ from those in the arrays only if a site has left them out of the comparison (`agree=False`).

    Raises:
        ProtocolError: The arrays hold no model, or one that XGBoost could not use safely.
    """
    model = TreeModel.from_arrays(arrays)
    check_global_model(model, call.checked_trees)
    names, learner = call.dtrain.feature_names, model.head["learner"]
    if not names or list(learner.get("feature_names", ())) == names:
        return model
    types = call.dtrain.feature_types or []
    return TreeModel(
        {**model.head, "learner": {**learner, "feature_names": names, "feature_types": types}}, model.trees
    )


def without_categories(model: TreeModel) -> TreeModel:
    """The model without category values: training on bare category codes, XGBoost would compare the values."""
    if "cats" not in model.model:
        return model
    empty = np.empty(0, np.int32)
    return model.with_head({**model.model, "cats": {"enc": [], "feature_segments": empty, "sorted_idx": empty}})


def export(booster: xgboost.Booster, folder: str) -> None:
    """Write `folder/model.ubj`, which `Booster(model_file=...)` opens."""
    os.makedirs(folder, exist_ok=True)
    booster.save_model(os.path.join(folder, "model.ubj"))


def released(booster: xgboost.Booster) -> xgboost.Booster:
    """The booster without its references to the training data, as `xgboost.train` returns it."""
    return booster.reset()


def weight_extra(call: TrainCall, start: TreeModel) -> dict[str, Array]:
    """This site's part in the base score of all sites, as extras of its first update.

    Args:
        call: The arguments of `train`.
        start: What `initial_model` returned.
    """
    return {WEIGHT: np.array([rows_weight(call.dtrain)], np.float64), BASE_SUMS: _base_sums(call, start)}


def warn_of_mean_base_score(call: TrainCall, extras: Arrays) -> None:
    """Say on stderr if the base score will not be that of all rows together.

    Args:
        call: The arguments of `train`.
        extras: What `weight_extra` returned.
    """
    objective = str(call.params.get("objective", ""))
    given = call.xgb_model is not None or call.params.get("base_score") is not None
    if not given and not len(extras[BASE_SUMS]) and not objective.startswith("rank:"):
        print(
            f"fl-adapters: the base score of {objective or 'this objective'} over all sites is the mean of their own, "
            "not that of all rows together; pass base_score= to choose it",
            file=sys.stderr,
            flush=True,
        )


def round_extra(call: TrainCall) -> dict[str, Array]:
    """The mean weight of this site's rows, as an extra of the updates in mode "bagging"; none without row weights."""
    if call.options.num_examples or not len(call.dtrain.get_weight()):
        return {}
    return {ROW_WEIGHT: np.array([rows_weight(call.dtrain) / max(call.dtrain.num_row(), 1)], np.float64)}


def _base_sums(call: TrainCall, start: TreeModel) -> Array:
    """Sums from which the base score over all sites is computed exactly: of the labels, or of the rows of each class.

    Empty if XGBoost computes the base score of this site's rows in another way, such as a median.
    """
    empty = np.empty(0)
    if call.xgb_model is not None or call.params.get("base_score") is not None:
        return empty
    labels, scores = call.dtrain.get_label().astype(np.float64), np.array(base_score(start.head))
    weights = call.dtrain.get_weight().astype(np.float64)
    rows = call.dtrain.num_row()
    weights = weights if len(weights) == rows else np.ones(rows)
    if not rows or len(labels) % rows or not weights.sum():
        return empty
    if str(call.params.get("objective", "")).startswith("multi:"):
        sums = np.bincount(labels.astype(np.int64), weights, len(scores))
    else:
        sums = weights @ labels.reshape(rows, -1)
    if len(sums) != len(scores) or len(call.dtrain.get_uint_info("group_ptr")):
        return empty
    own = pooled_base_score(start.head, sums, float(weights.sum()))
    return sums if np.allclose(own, scores, rtol=_SAME_SCORE, atol=_SAME_SCORE) else empty


def learning_rate(booster: xgboost.Booster) -> str:
    """The booster's current learning rate, which a scheduler may have changed."""
    part = json.loads(booster.save_config())["learner"]["gradient_booster"]
    return str(part.get("gbtree", part)["tree_train_param"]["eta"])
