"""The arguments of one call of `train`, their checks, and what must be the same at all sites."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import xgboost

from fl_adapters.participant.options import Options
from fl_runtime.aggregation.trees.document import TreeModel
from fl_runtime.errors import ConfigError
from fl_runtime.wire.names import Names, names_of

Mode = Literal["bagging", "cyclic", "histogram", "levelwise"]
MODES = ("bagging", "cyclic", "histogram", "levelwise")
_ALIASES = {"eta": "learning_rate", "gamma": "min_split_loss", "lambda": "reg_lambda", "alpha": "reg_alpha"}
_DEFAULTS: dict[str, Any] = {
    "booster": "gbtree",
    "objective": "reg:squarederror",
    "num_class": 0,
    "num_parallel_tree": 1,
    "max_bin": 256,
    "multi_strategy": "one_output_per_tree",
    "base_score": "agreed before round 1",
}


@dataclass(frozen=True)
class TrainCall:
    """The arguments of `xgboost.train` that matter in every mode.

    Attributes:
        params: Booster parameters.
        dtrain: This site's training data.
        num_boost_round: Number of boosting rounds of the script.
        evals: Validation data with their names.
        obj: Custom objective, or None.
        custom_metric: Custom metric, or None.
        xgb_model: Model to continue from, or None.
        maximize: Whether early stopping looks for the maximum; None for the metric's own direction.
        early_stopping_rounds: Rounds without improvement after which to stop, or None.
        callbacks: The script's callbacks of XGBoost.
        mask_statistics: Whether updates leave out the statistics of each node.
        options: The arguments that every adapter shares.
        checked_trees: Digests of the server's trees that have been checked.
    """

    params: Mapping[str, Any]
    dtrain: xgboost.DMatrix
    num_boost_round: int
    evals: Sequence[tuple[xgboost.DMatrix, str]] = ()
    obj: Callable[..., Any] | None = None
    custom_metric: Callable[..., Any] | None = None
    xgb_model: Any = None
    maximize: bool | None = None
    early_stopping_rounds: int | None = None
    callbacks: Sequence[xgboost.callback.TrainingCallback] = ()
    mask_statistics: bool = False
    options: Options = field(default_factory=Options)
    checked_trees: set[bytes] = field(default_factory=set)

    def booster(self, changes: Mapping[str, Any], model_file: Any = None) -> xgboost.Booster:
        """A new booster with these parameters, changed by `changes`, that knows the call's data."""
        data = [self.dtrain, *(data for data, _ in self.evals)]
        return xgboost.Booster({**self.params, **changes}, data, model_file=model_file)


def checked_params(params: Any) -> dict[str, Any]:
    """The parameters as a dict. Raises ConfigError for those that cannot be federated."""
    checked = dict(params or {})
    if not isinstance(params, Mapping):  # pairs, among which XGBoost reads every eval_metric
        metrics = [value for name, value in params or () if name == "eval_metric"]
        checked |= {"eval_metric": metrics} if len(metrics) > 1 else {}
    for name, value, why in (
        ("booster", "gblinear", "its model has no trees"),
        ("process_type", "update", "it changes existing trees"),
        ("multi_strategy", "multi_output_tree", "the server does not support trees with a vector per leaf"),
    ):
        if checked.get(name) == value:
            raise ConfigError(f"{name}={value!r} cannot be federated: {why}", where="params", fix=f"leave {name} out")
    return checked


def check_mode(params: Mapping[str, Any], mode: Mode) -> None:
    """Raise ConfigError for parameters that a mode cannot honour."""
    if mode != "histogram" and str(params.get("lambdarank_unbiased", "")).lower() in ("1", "true"):
        raise ConfigError(
            "lambdarank_unbiased learns the bias of positions over the rounds, and XGBoost cannot go on from it when "
            "the model is replaced, as it is in each round of this mode",
            where=f'params, mode="{mode}"',
            fix='use mode="histogram", or leave lambdarank_unbiased out',
        )


def check_options(options: Options) -> None:
    """Raise ConfigError for shared arguments that make no sense for trees."""
    for name, value, allowed in (
        ("exchange", options.exchange, (None, "auto", "all")),
        ("keep_local", tuple(options.keep_local), ((),)),
        ("optimizer_state", options.optimizer_state, (None, "keep")),
    ):
        if value not in allowed:
            raise ConfigError(f"{name}={value!r} has no meaning for trees", where=name, fix=f"leave {name} out")


def agreement(call: TrainCall, start: TreeModel) -> dict[str, str | Names]:
    """Collect what must be equal at all sites.

    Args:
        call: The arguments of `train`.
        start: The model that this site would start from.

    Returns:
        Name -> text or list of names, for the handshake.
    """
    head = start.head
    facts: dict[str, str | Names] = {name: str(call.params.get(name, default)) for name, default in _DEFAULTS.items()}
    if call.obj is not None:
        facts["objective"] = f"custom: {getattr(call.obj, '__name__', type(call.obj).__name__)}"
    facts["xgboost"] = ".".join(map(str, installed_version()))
    facts["num_target"] = str(head["learner"]["learner_model_param"]["num_target"])
    facts["number of features"] = str(call.dtrain.num_col())
    facts |= {"features": _features(call.dtrain), **_categories(call.dtrain, head)}
    facts["feature weights"] = names_of(call.dtrain.get_float_info("feature_weights").tolist() or ["equal"])
    if call.xgb_model is not None:
        facts["xgb_model"] = _digest(json.dumps(head, default=str), *start.trees)
    for name in ("monotone_constraints", "interaction_constraints", "quantile_alpha"):
        if name in call.params:
            facts[name] = str(np.asarray(call.params[name]).tolist() if name == "quantile_alpha" else call.params[name])
    return facts


def tree_parameters(booster: xgboost.Booster) -> dict[str, str]:
    """All parameters of the trees and of the objective, with XGBoost's own names and defaults."""
    learner = json.loads(booster.save_config())["learner"]
    part = learner["gradient_booster"]
    sections = [part.get("gbtree", part)["tree_train_param"]]
    sections += [section for name, section in learner["objective"].items() if name.endswith("_param")]
    return {f"parameter {name}": str(value) for section in sections for name, value in section.items()}


def warn_of_unnamed_columns(dtrain: xgboost.DMatrix) -> None:
    """Say on stderr that columns without names cannot be compared between sites."""
    if not dtrain.feature_names and dtrain.num_col() > 1:
        print(
            f"fl-adapters: the {dtrain.num_col()} columns of the data have no names to compare, so their order must be "
            "the same at all sites; pass a DataFrame or feature_names= to have it checked",
            file=sys.stderr,
            flush=True,
        )


def installed_version() -> tuple[int, int]:
    """(major, minor) of XGBoost. Models of different versions differ in base score, categories and tree weights."""
    major, minor = xgboost.__version__.split(".")[:2]
    return int(major), int(minor)


def _features(dtrain: xgboost.DMatrix) -> Names:
    """Names and types of the features, in their order."""
    names = _feature_names(dtrain)
    types = dtrain.feature_types or [""] * len(names)
    return names_of(f"{name} ({kind})" if kind else name for name, kind in zip(names, types, strict=True))


def _categories(dtrain: xgboost.DMatrix, head: Mapping[str, Any]) -> dict[str, str | Names]:
    """The category behind each code, over all features.

    XGBoost keeps them in the model since 3.1; before, it knows their codes only.
    """
    booster = head["learner"]["gradient_booster"]
    model = booster["gbtree"]["model"] if "gbtree" in booster else booster["model"]
    encodings = model.get("cats", {}).get("enc", [])
    lines = [
        f"{name} {code} = {value}"
        for name, encoding in zip(_feature_names(dtrain), encodings, strict=False)
        for code, value in enumerate(_category_values(encoding))
    ]
    categorical = lines or "c" in (dtrain.feature_types or ())
    return {"categories": names_of(lines)} if categorical and encodings else {}


def _feature_names(dtrain: xgboost.DMatrix) -> list[str]:
    return list(map(str, dtrain.feature_names or (f"f{i}" for i in range(dtrain.num_col()))))


def _category_values(encoded: Mapping[str, Any]) -> list[str]:
    values = encoded.get("values")
    if values is None or len(values) == 0:
        return []
    if "offsets" not in encoded:
        return [str(value) for value in values]
    text = bytes(int(code) & 0xFF for code in values)
    cuts = [int(at) for at in encoded["offsets"]]
    return [text[a:b].decode(errors="replace") for a, b in pairwise(cuts)]


def _digest(text: str, *more: bytes | memoryview) -> str:
    digest = hashlib.sha256(text.encode())
    for data in more:
        digest.update(data)
    return digest.hexdigest()[:12]
