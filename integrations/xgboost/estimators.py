"""Estimators for scikit-learn users: `fit` trains with the sites of a federation, all else is XGBoost's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import xgboost

from fl_runtime.errors import ConfigError, HandshakeError

from .trainer import set_booster
from .training import train

_FEDERATED = (
    *("mode", "mask_statistics", "quantile_rows", "quantile_noise", "collective_timeout_s"),
    *("kit", "every", "evaluate_global", "num_examples", "required", "agree"),
)
_EXAMPLES = 1000  # labels that are looked at for an error's examples


def _own(params: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in params.items() if name not in ("federated", "classes")}


class _Federated:
    """Shared code of the three estimators. It comes second among their bases: XGBoost looks at the first."""

    federated: dict[str, Any] | None

    def _boost(self, data: xgboost.DMatrix, evals: list[tuple[xgboost.DMatrix, str]], **fit: Any) -> None:
        this: Any = self
        params = {**this.get_xgb_params(), **fit.pop("params", {})}
        objective, metric = this.objective, this.eval_metric
        custom: Any = None
        if callable(objective):
            params["objective"] = "reg:squarederror"
            custom = _row_objective(objective)
        if callable(metric):
            raise ConfigError(
                "a metric function of scikit-learn cannot be computed over all sites",
                where="eval_metric",
                fix="name one of XGBoost's metrics",
            )
        unknown = [name for name in this.federated or {} if name not in _FEDERATED]
        if unknown:
            raise ConfigError(
                f"federated has no argument {unknown[0]!r}",
                where="federated",
                fix=f"use some of {', '.join(_FEDERATED)}",
            )
        params = {name: value for name, value in params.items() if value is not None}
        log: dict[str, Any] = {}
        booster = train(
            params,
            data,
            this.get_num_boosting_rounds(),
            evals=evals,
            obj=custom,
            early_stopping_rounds=this.early_stopping_rounds,
            evals_result=log,
            callbacks=this.callbacks,
            **{"verbose_eval": False, **fit},
            **(this.federated or {}),
        )
        set_booster(this, booster)
        if log:
            this.evals_result_ = {name: dict(metrics) for name, metrics in log.items()}

    def _matrix(self, x: Any, y: Any, **columns: Any) -> xgboost.DMatrix:
        this: Any = self
        given = {name: value for name, value in columns.items() if value is not None}
        return xgboost.DMatrix(
            x,
            label=y,
            missing=this.missing,
            nthread=this.n_jobs,
            enable_categorical=this.enable_categorical,
            feature_types=this.feature_types,
            **given,
        )

    def _fit(
        self, x: Any, y: Any, eval_set: Any, weights: Any, verbose: Any, columns: dict[str, Any], params: dict[str, Any]
    ) -> None:
        """Fit on this site's rows. eval_set: tuples (X, y) or (X, y, dict of further columns)."""
        this: Any = self
        data = self._matrix(x, y, weight=weights, feature_weights=this.feature_weights, **columns)
        evals = [
            (self._matrix(item[0], item[1], **(item[2] if len(item) > 2 else {})), f"validation_{number}")
            for number, item in enumerate(eval_set or ())
        ]
        self._boost(data, evals, params=params, verbose_eval=verbose, xgb_model=columns_model(this, params))


def columns_model(estimator: Any, params: dict[str, Any]) -> Any:
    """Take the model to continue from out of `params`."""
    model = params.pop("xgb_model", None)
    return model.get_booster() if isinstance(model, xgboost.XGBModel) else model


def _row_objective(objective: Any) -> Any:
    """Turn scikit-learn's f(y_true, y_pred[, weight]) into XGBoost's f(margins, data)."""

    def decorated(margins: Any, data: xgboost.DMatrix) -> Any:
        weights = data.get_weight()
        if len(weights):
            return objective(data.get_label(), margins, sample_weight=weights)
        return objective(data.get_label(), margins)

    decorated.__name__ = getattr(objective, "__name__", type(objective).__name__)
    return decorated


def _labels(y: Any, classes: int | None) -> tuple[Any, int]:
    """The labels as an array of numbers, and the number of classes, at least 2."""
    labels = np.asarray(y)
    if labels.dtype.kind not in "iuf":  # booleans, objects, text
        try:
            labels = labels.astype(float)
        except (TypeError, ValueError):
            names = sorted({str(label) for label in labels.reshape(-1)[:_EXAMPLES]})[:3]
            raise ConfigError(
                f"the labels are not numbers but {', '.join(map(repr, names))}, ...",
                where="fit",
                fix="number the classes from 0 on, in the same way at every site: "
                f"{{{', '.join(f'{name!r}: {number}' for number, name in enumerate(names))}, ...}}",
            ) from None
    local_count = int(labels.max()) + 1 if len(labels) and np.isfinite(labels).all() else 0
    count = max(classes or local_count, 2)
    whole = np.isfinite(labels).all() and np.array_equal(labels, np.floor(labels))
    if local_count > count or not whole or labels.min(initial=0) < 0:
        raise ConfigError(
            f"the labels run from {labels.min()} to {labels.max()}, which does not fit {count} classes",
            where="fit",
            fix="label the classes 0, 1, ... in the same way at every site, and pass their number: classes=",
        )
    return labels, count


def _weighted(eval_set: Any, weights: Any) -> list[Any]:
    """(X, y, columns) for each validation set."""
    given = weights or [None] * len(eval_set or ())
    return [(x, y, {"weight": weight}) for (x, y), weight in zip(eval_set or (), given, strict=True)]


class FederatedXGBRegressor(xgboost.XGBRegressor, _Federated):
    """`xgboost.XGBRegressor` whose `fit` trains with the sites of a federation.

    Outside a federation, that is without a startup kit, it trains alone.

    Args:
        federated: Arguments of `fl_adapters.xgboost.train` that XGBoost does not have, such as
            `{"mode": "histogram"}`.
        **kwargs: Parameters of `xgboost.XGBRegressor`.

    Example:
        ```python
        model = FederatedXGBRegressor(n_estimators=50, federated={"mode": "histogram"}).fit(X, y)
        ```
    """

    def __init__(self, *, federated: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.federated = federated
        super().__init__(**kwargs)

    def get_xgb_params(self) -> dict[str, Any]:
        """Return the parameters of XGBoost itself, without those of the federation."""
        return _own(super().get_xgb_params())

    def fit(
        self,
        X: Any,  # noqa: N803 (scikit-learn's name)
        y: Any,
        sample_weight: Any = None,
        base_margin: Any = None,
        eval_set: Any = None,
        verbose: bool | int | None = False,
        xgb_model: Any = None,
        sample_weight_eval_set: Any = None,
    ) -> FederatedXGBRegressor:
        """Train with the other sites; afterwards the model is the global one.

        Args:
            X: Features of this site's rows, as for `xgboost.XGBRegressor.fit`.
            y: Targets, one for each row.
            sample_weight: Weight of each row.
            base_margin: Margin of each row to start from.
            eval_set: This site's validation data, a list of (X, y).
            verbose: Whether to print metrics, or after how many rounds.
            xgb_model: Model to continue from, the same at all sites.
            sample_weight_eval_set: Weights of the rows, for each entry of `eval_set`.

        Returns:
            This estimator.

        Raises:
            ConfigError: For arguments that cannot be federated.
            HandshakeError: If the sites do not agree, before round 1.
        """
        sets = _weighted(eval_set, sample_weight_eval_set)
        self._fit(X, y, sets, sample_weight, verbose, {"base_margin": base_margin}, {"xgb_model": xgb_model})
        return self


class FederatedXGBClassifier(xgboost.XGBClassifier, _Federated):
    """`xgboost.XGBClassifier` whose `fit` trains with the sites of a federation.

    Outside a federation, that is without a startup kit, it trains alone.

    Args:
        classes: Number of classes at all sites together, labelled from 0. Default: as in this site's labels.
        federated: Arguments of `fl_adapters.xgboost.train` that XGBoost does not have, such as
            `{"mode": "histogram"}`.
        **kwargs: Parameters of `xgboost.XGBClassifier`.

    Example:
        ```python
        model = FederatedXGBClassifier(classes=3, n_estimators=50).fit(X, y)
        ```
    """

    def __init__(self, *, classes: int | None = None, federated: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.classes, self.federated = classes, federated
        super().__init__(**kwargs)

    def get_xgb_params(self) -> dict[str, Any]:
        """Return the parameters of XGBoost itself, without those of the federation."""
        return _own(super().get_xgb_params())

    def fit(
        self,
        X: Any,  # noqa: N803 (scikit-learn's name)
        y: Any,
        sample_weight: Any = None,
        base_margin: Any = None,
        eval_set: Any = None,
        verbose: bool | int | None = False,
        xgb_model: Any = None,
        sample_weight_eval_set: Any = None,
    ) -> FederatedXGBClassifier:
        """Train with the other sites; afterwards the model is the global one.

        Args:
            X: Features of this site's rows, as for `xgboost.XGBClassifier.fit`.
            y: Labels, whole numbers from 0 with the same meaning at all sites.
            sample_weight: Weight of each row.
            base_margin: Margin of each row to start from.
            eval_set: This site's validation data, a list of (X, y).
            verbose: Whether to print metrics, or after how many rounds.
            xgb_model: Model to continue from, the same at all sites.
            sample_weight_eval_set: Weights of the rows, for each entry of `eval_set`.

        Returns:
            This estimator.

        Raises:
            ConfigError: For labels that do not fit `classes`, and arguments that cannot be federated.
            HandshakeError: If the sites do not agree, before round 1.
        """
        labels, count = _labels(y, self.classes)
        params: dict[str, Any] = {"xgb_model": xgb_model}
        if count > 2:
            params |= {"num_class": count}
            if not callable(self.objective) and not str(self.objective).startswith("multi:"):
                params |= {"objective": "multi:softprob"}
        self.n_classes_ = count
        sets = _weighted(eval_set, sample_weight_eval_set)
        try:
            self._fit(X, labels, sets, sample_weight, verbose, {"base_margin": base_margin}, params)
        except HandshakeError as error:
            if self.classes is None and "num_class: " in error.what:
                fix = (
                    f"if a site has no rows of some class, pass classes= at every site, such as classes={max(count, 3)}"
                )
                raise type(error)(error.what, where=error.where, fix=f"{fix}; else {error.fix}") from None
            raise
        return self


class FederatedXGBRanker(xgboost.XGBRanker, _Federated):
    """`xgboost.XGBRanker` whose `fit` trains with the sites of a federation. Every group belongs to one site.

    Outside a federation, that is without a startup kit, it trains alone.

    Args:
        federated: Arguments of `fl_adapters.xgboost.train` that XGBoost does not have, such as `{"mode": "cyclic"}`.
        **kwargs: Parameters of `xgboost.XGBRanker`. `objective` is "rank:ndcg" by default.

    Example:
        ```python
        model = FederatedXGBRanker(n_estimators=50).fit(X, y, qid=queries)
        ```
    """

    def __init__(self, *, federated: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.federated = federated
        super().__init__(**{"objective": "rank:ndcg", **kwargs})

    def get_xgb_params(self) -> dict[str, Any]:
        """Return the parameters of XGBoost itself, without those of the federation."""
        return _own(super().get_xgb_params())

    def fit(
        self,
        X: Any,  # noqa: N803 (scikit-learn's name)
        y: Any,
        group: Any = None,
        qid: Any = None,
        sample_weight: Any = None,
        base_margin: Any = None,
        eval_set: Any = None,
        eval_group: Any = None,
        eval_qid: Any = None,
        verbose: bool | int | None = False,
        xgb_model: Any = None,
        sample_weight_eval_set: Any = None,
    ) -> FederatedXGBRanker:
        """Train with the other sites; afterwards the model is the global one.

        Args:
            X: Features of this site's rows, as for `xgboost.XGBRanker.fit`.
            y: Relevance of each row.
            group: Sizes of the groups, in the order of the rows. Either this or `qid` is needed.
            qid: Number of each row's group, in ascending order.
            sample_weight: Weight of each group.
            base_margin: Margin of each row to start from.
            eval_set: This site's validation data, a list of (X, y).
            eval_group: Sizes of the groups, for each entry of `eval_set`.
            eval_qid: Numbers of the rows' groups, for each entry of `eval_set`.
            verbose: Whether to print metrics, or after how many rounds.
            xgb_model: Model to continue from, the same at all sites.
            sample_weight_eval_set: Weights of the groups, for each entry of `eval_set`.

        Returns:
            This estimator.

        Raises:
            ConfigError: Without groups, and for arguments that cannot be federated.
            HandshakeError: If the sites do not agree, before round 1.
        """
        if (group is None) == (qid is None):
            raise ConfigError("ranking needs the rows' groups", where="fit", fix="pass either group= or qid=")
        count = len(eval_set or ())
        none = [None] * count
        sets = [
            (item[0], item[1], {"weight": w, "group": g, "qid": q})
            for item, w, g, q in zip(
                eval_set or (), sample_weight_eval_set or none, eval_group or none, eval_qid or none, strict=True
            )
        ]
        columns = {"base_margin": base_margin, "group": group, "qid": qid}
        self._fit(X, y, sets, sample_weight, verbose, columns, {"xgb_model": xgb_model})
        return self
