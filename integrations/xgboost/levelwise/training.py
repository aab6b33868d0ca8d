"""The loop of `train` in mode "levelwise": a block of sums, in which all sites grow the same trees."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import xgboost

from fl_adapters.loop.federation import Federation, of_same_sites
from fl_adapters.loop.sums import sums
from fl_adapters.participant.options import SiteSettings
from fl_runtime.aggregation.trees import ubjson
from fl_runtime.aggregation.trees.document import TreeModel, base_score, pooled_base_score, with_base_score
from fl_runtime.aggregation.trees.strategies import BASE_SUMS, WEIGHT
from fl_runtime.errors import ConfigError, StateMismatchError
from fl_runtime.types import Array, Metrics
from fl_runtime.wire.names import names_of

from ..call import TrainCall, agreement, tree_parameters, warn_of_unnamed_columns
from ..data import rows_of
from ..model import SEEDING, export, initial_model, learning_rate, load, released, warn_of_mean_base_score, weight_extra
from ..scores import Evaluation, Log, record
from .bins import agree_on_bins, columns_of
from .checks import check, regularisation
from .grower import Grower, Tree
from .large_sums import summed
from .objectives import Objective, Units, objective_of, power_above
from .scoring import pooled

_MOST_NUMBERS = 1 << 21
"""Most numbers in one sum; the histograms of a larger level take several."""
_EXPONENTS = 256


def train(call: TrainCall, log: Log, quantile_rows: int) -> xgboost.Booster:
    """Train with the other sites.

    Args:
        call: The arguments of `train`.
        log: Receives the metrics over all sites, a number per round.
        quantile_rows: Fewest rows of all sites that a cell of the bins' counts must hold to be divided.

    Returns:
        The final model, the same at every site.

    Raises:
        ConfigError: For arguments that this mode cannot honour.
        HandshakeError: If the sites do not agree, before the first sum.
    """
    check(call)
    if call.options.every is not None:
        raise ConfigError(
            f"every={call.options.every!r} has no meaning where all sites grow one tree together",
            where='train(mode="levelwise")',
            fix="leave it out",
        )
    own_start = initial_model(call)
    booster = call.booster(SEEDING, model_file=bytearray(own_start.document()))
    parameters = tree_parameters(booster)
    regularisation(parameters)  # refuses before the other sites are called
    evaluation = Evaluation.of(call)
    scored = bool(call.evals) and call.options.evaluate_global is not False
    names = list(evaluation.values(booster, 0)) if scored else []
    facts = agreement(call, own_start) | parameters
    facts |= {"num_boost_round": str(call.num_boost_round), "quantile_rows": str(quantile_rows)}
    facts |= {"early_stopping_rounds": str(call.early_stopping_rounds), "metrics of evals": names_of(names or ["none"])}
    facts = dict(SiteSettings.resolve(call.options, {}).declared(facts))
    warn_of_unnamed_columns(call.dtrain)
    examples = call.options.num_examples or max(int(call.dtrain.num_row()), 1)
    with sums(kit=call.options.kit, agree=facts, num_examples=examples) as block:
        final = _boost(
            of_same_sites(block),
            call,
            booster,
            own_start,
            evaluation if names else None,
            log,
            quantile_rows,
            block.report,
        )
        block.leave_model(lambda folder: export(final, folder))
    return released(final)


def _boost(
    federation: Federation,
    call: TrainCall,
    booster: xgboost.Booster,
    own_start: TreeModel,
    evaluation: Evaluation | None,
    log: Log,
    quantile_rows: int,
    report: Callable[[Metrics], None],
) -> xgboost.Booster:
    """Agree on start, bins and units, and grow the trees. Returns the booster that the callbacks leave."""
    model = _common_start(federation, call, own_start)
    load(booster, model, call)
    penalty, max_depth, max_bin = regularisation(tree_parameters(booster))
    rows = rows_of(call.dtrain)
    count, features = rows["shape"].tolist()
    columns = columns_of(rows["data"], rows["indices"], rows["indptr"], features)
    bins = agree_on_bins(federation, [values for _, values in columns], max_bin, quantile_rows)
    placed = bins.place(columns, count)
    margins = _margins(booster, call.dtrain)
    objective = objective_of(_name(call), rows, count, len(margins))
    units = _units(federation, objective, margins)
    callbacks = _callbacks(call)
    for callback in callbacks:
        booster = callback.before_training(booster)
    for iteration in range(call.num_boost_round):
        if True in [callback.before_iteration(booster, iteration, log) for callback in callbacks]:
            break
        penalty = penalty.with_eta(float(learning_rate(booster)))  # a callback may have set another one
        quantised = units.quantised(objective.gradients(margins))
        grower = Grower(bins, placed, penalty, max_depth)
        trees, values = grower.grow(
            quantised, units.scales, lambda own: summed(federation, "histogram", own, _MOST_NUMBERS)
        )
        margins += values
        units.move(max(max(map(abs, tree.leaves())) for tree in trees))
        model = _extended(model, trees, features)
        if evaluation or callbacks:
            load(booster, model, call)
        if evaluation:
            metrics = pooled(federation, evaluation.summaries(booster, iteration))
            record(log, metrics, list(metrics))
            report({"boosting_round": iteration + 1, **metrics})
        if True in [callback.after_iteration(booster, iteration, log) for callback in callbacks]:
            break
    load(booster, model, call)
    _check_same(federation, model)
    for callback in callbacks:
        booster = callback.after_training(booster)
    return booster


def _callbacks(call: TrainCall) -> list[Any]:
    """The script's callbacks. Metrics are the same at all sites, so early stopping is too."""
    callbacks = list(call.callbacks)
    if call.early_stopping_rounds:
        callbacks.append(xgboost.callback.EarlyStopping(rounds=call.early_stopping_rounds, maximize=call.maximize))
    if any(isinstance(c, xgboost.callback.EarlyStopping) for c in callbacks) and not call.evals:
        raise ConfigError("early stopping needs evals", where="early_stopping_rounds", fix="pass evals=[...]")
    return callbacks


def _name(call: TrainCall) -> str:
    return str(call.params.get("objective", "reg:squarederror"))


def _margins(booster: xgboost.Booster, data: xgboost.DMatrix) -> Array:
    """Predictions of the model so far, float32 [outputs, rows]."""
    margins = np.asarray(booster.predict(data, output_margin=True), np.float32)
    return np.ascontiguousarray(margins.reshape(int(data.num_row()), -1).T)


def _common_start(federation: Federation, call: TrainCall, start: TreeModel) -> TreeModel:
    """Return the start with the base score of all rows together."""
    own = weight_extra(call, start)
    scores = np.asarray(base_score(start.head), np.float64)
    weight, known = float(own[WEIGHT][0]), len(own[BASE_SUMS]) > 0
    warn_of_mean_base_score(call, own)
    totals = federation.sum(
        {
            "weight": np.array([weight]),
            "base score": weight * scores,
            "base sums": own[BASE_SUMS] if known else np.zeros(len(scores)),
            "without base sums": np.array([float(not known)]),
        }
    )
    if call.xgb_model is not None or call.params.get("base_score") is not None:
        return start
    total = float(totals["weight"][0])
    if totals["without base sums"][0]:
        common = [float(score) for score in totals["base score"] / total]
    else:
        common = pooled_base_score(start.head, totals["base sums"], total)
    return TreeModel(with_base_score(start.head, common), start.trees)


def _units(federation: Federation, objective: Objective, margins: Array) -> Units:
    """Agree on bounds of gradients and weights: powers of 2, of which each site names its own in a column of zeros."""
    named = np.zeros((2, _EXPONENTS))
    for row, largest in zip(named, objective.largest(margins), strict=True):
        row[power_above(largest) + _EXPONENTS // 2] = 1
    found = federation.sum({"exponents": named})["exponents"]
    gradient, weight = (2.0 ** (int(np.flatnonzero(row)[-1]) - _EXPONENTS // 2) for row in found)
    return Units(gradient, weight, grows=objective.name == "reg:squarederror")


def _extended(model: TreeModel, trees: Sequence[Tree], features: int) -> TreeModel:
    """Return the model with one more boosting round: a tree for each output."""
    before = len(model.trees)
    documents = [ubjson.dumps(tree.document(before + number, features)) for number, tree in enumerate(trees)]
    part: Mapping[str, Any] = model.model
    extended = {
        **part,
        "tree_info": [*map(int, part["tree_info"]), *range(len(trees))],
        "iteration_indptr": [*map(int, part["iteration_indptr"]), before + len(trees)],
        "gbtree_model_param": part["gbtree_model_param"] | {"num_trees": str(before + len(trees))},
    }
    weights = model.weight_drop
    longer = None if weights is None else [*weights, *[1.0] * len(trees)]
    return TreeModel(model.with_head(extended, longer).head, (*model.trees, *documents))


def _check_same(federation: Federation, model: TreeModel) -> None:
    """Raise StateMismatchError if the sites end with different trees."""
    digest = hashlib.sha256(b"".join(map(bytes, model.trees))).hexdigest()
    if len(federation.union([digest])) > 1:
        raise StateMismatchError(
            "the sites have grown different trees",
            where='train(mode="levelwise")',
            fix="use the same callbacks, such as schedules of the learning rate, at every site",
        )
