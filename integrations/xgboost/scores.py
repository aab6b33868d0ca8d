"""Evaluation with XGBoost's own metrics, in a form that pools to the metric over all sites' data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import xgboost

from fl_runtime.aggregation.metrics.score_histogram import score_histogram
from fl_runtime.errors import ConfigError
from fl_runtime.types import Metrics, Summary, Terms

from .call import TrainCall
from .model import rows_weight
from .trainer import min_delta_of

_MAXIMISED = ("auc", "aucpr", "pre", "map", "ndcg")
_PER_GROUP = ("ndcg", "map", "pre")
_ROOTS = ("rmse", "rmsle")
Log = dict[str, dict[str, list[float]]]


@dataclass(frozen=True)
class Evaluation:
    """Scores a booster on this site's `evals`.

    Attributes:
        evals: Validation data with their names.
        custom_metric: The script's own metric, or None.
        output_margin: Whether the custom metric gets margins instead of predictions.
        binary: Whether labels may be those of two classes, so that areas under curves can be pooled.
    """

    evals: Sequence[tuple[xgboost.DMatrix, str]]
    custom_metric: Callable[..., Any] | None
    output_margin: bool
    binary: bool

    @classmethod
    def of(cls, call: TrainCall) -> Evaluation:
        objective = str(call.params.get("objective", ""))
        return cls(
            call.evals, call.custom_metric, callable(call.obj), objective.startswith("binary:") or callable(call.obj)
        )

    @property
    def examples(self) -> int:
        """Number of rows in the last evaluation set, at least 1."""
        return max(int(self.evals[-1][0].num_row()), 1)

    def values(self, booster: xgboost.Booster, iteration: int) -> dict[str, float]:
        """XGBoost's own numbers as "data-metric" -> value, in its order."""
        text = booster.eval_set(self.evals, iteration, self.custom_metric, self.output_margin)
        pairs = [item.rpartition(":") for item in text.split("\t")[1:]]
        return {name: float(value) for name, _, value in pairs}

    def summaries(self, booster: xgboost.Booster, iteration: int) -> dict[str, float | Summary]:
        """The same numbers, each with what is needed to pool it over the sites."""
        values, data = self.values(booster, iteration), {name: dmatrix for dmatrix, name in self.evals}
        margins: dict[str, Any] = {}
        summaries: dict[str, float | Summary] = {}
        for name, value in values.items():
            source, metric = split(name)
            kind = metric.split("@")[0].rstrip("-")
            if kind in ("auc", "aucpr") and self._has_two_classes(data[source]):
                if source not in margins:
                    margins[source] = margins_histogram(booster, data[source])
                value = value if margins[source] else float("nan")
                summaries[name] = Summary(kind, value, rows_weight(data[source]), margins[source])  # type: ignore[arg-type]
            else:
                weight = groups(data[source]) if kind in _PER_GROUP else rows_weight(data[source])
                summaries[name] = Summary("root_mean" if kind in _ROOTS else "mean", value, weight)
        return summaries

    def _has_two_classes(self, data: xgboost.DMatrix) -> bool:
        labels = data.get_label()
        return self.binary and len(data.get_uint_info("group_ptr")) == 0 and bool(np.isin(labels, (0, 1)).all())


def split(name: str) -> tuple[str, str]:
    """ "valid-auc" -> ("valid", "auc"), as XGBoost itself splits it."""
    source, _, metric = name.partition("-")
    return source, metric


def margins_histogram(booster: xgboost.Booster, data: xgboost.DMatrix) -> dict[int, tuple[float, float]]:
    """Histogram of the margins of both classes; empty if the model has diverged, so that a margin is NaN."""
    margins = booster.predict(data, output_margin=True)
    if np.isnan(margins).any():
        return {}
    labels, weights = data.get_label(), data.get_weight()
    return score_histogram(margins, labels > 0.5, weights if len(weights) else np.ones(len(labels)))


def groups(data: xgboost.DMatrix) -> float:
    """Weight of a ranking metric: the sum of the groups' weights, or the number of groups."""
    weights, ends = data.get_weight(), data.get_uint_info("group_ptr")
    count = max(len(ends) - 1, 1)
    return float(np.sum(weights, dtype=np.float64)) if len(weights) == count else float(count)


@dataclass(frozen=True)
class Stopping:
    """Which round is best, and early stopping for all sites together.

    Attributes:
        metric: The metric to watch, as "data-metric".
        maximize: Whether more is better.
        rounds: Boosting rounds without improvement after which to stop; None to never stop early.
        min_delta: The smallest change that counts as an improvement.
        save_best: Whether the result ends with the best iteration.
    """

    metric: str
    maximize: bool
    rounds: int | None = None
    min_delta: float = 0.0
    save_best: bool = False

    def terms(self, strategy: str, boosts_per_round: int) -> Terms:
        """The same as terms of the handshake, in rounds of the federation."""
        mode: Literal["min", "max"] = "max" if self.maximize else "min"
        patience = -(-self.rounds // boosts_per_round) if self.rounds else None
        return Terms("encoded", strategy, self.metric, mode, patience, self.min_delta)


def stopping_of(call: TrainCall, names: Sequence[str]) -> tuple[Stopping | None, list[Any]]:
    """Take early stopping out of a call of `train`, since it means all sites together.

    Args:
        call: The arguments of `train`.
        names: The metrics that are evaluated, as "data-metric".

    Returns:
        What decides which round is best and when to stop (None without metrics), and the callbacks left to call.

    Raises:
        ConfigError: If early stopping is asked for twice, without `evals`, or for a metric that is not evaluated.
    """
    stoppers = [c for c in call.callbacks if isinstance(c, xgboost.callback.EarlyStopping)]
    others = [c for c in call.callbacks if c not in stoppers]
    if call.early_stopping_rounds:
        stoppers.append(xgboost.callback.EarlyStopping(rounds=call.early_stopping_rounds, maximize=call.maximize))
    if len(stoppers) > 1:
        raise ConfigError(
            "early stopping is requested twice",
            where="callbacks",
            fix="pass either early_stopping_rounds= or one EarlyStopping callback",
        )
    if not names:
        if stoppers:
            raise ConfigError("early stopping needs evals", where="early_stopping_rounds", fix="pass evals=[...]")
        return None, others
    if not stoppers:
        return Stopping(names[-1], _is_maximised(names[-1], call)), others
    stopper = stoppers[0]
    source = stopper.data or split(names[-1])[0]
    metric = stopper.metric_name or [split(n)[1] for n in names if split(n)[0] == source][-1:] or ""
    name = f"{source}-{metric if isinstance(metric, str) else metric[0]}"
    if name not in names:
        raise ConfigError(
            f"early stopping watches {name!r}, which is not evaluated",
            where="EarlyStopping",
            fix=f"watch one of {', '.join(names)}",
        )
    maximize = stopper.maximize if stopper.maximize is not None else _is_maximised(name, call)
    return Stopping(name, maximize, stopper.rounds, min_delta_of(stopper), bool(stopper.save_best)), others


def record(log: Log, metrics: Metrics, names: Sequence[str]) -> None:
    """Append one round's metrics to the log that callbacks see."""
    for name in names:
        source, metric = split(name)
        log.setdefault(source, {}).setdefault(metric, []).append(metrics.get(name, float("nan")))


def _is_maximised(name: str, call: TrainCall) -> bool:
    metric = split(name)[1]
    if call.maximize is not None:
        return call.maximize
    return metric != "mape" and metric.startswith(_MAXIMISED)
