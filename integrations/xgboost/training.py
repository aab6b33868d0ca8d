"""`train`: `xgboost.train` as a participant in a federation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import xgboost

from fl_adapters.participant.options import Options
from fl_adapters.participant.registry import open_session
from fl_runtime.errors import ConfigError

from . import boosting
from .call import MODES, TrainCall, check_options, checked_params
from .rounds import FRAMEWORK, leaving_on_error
from .scores import Log


def train(
    params: Mapping[str, Any],
    dtrain: xgboost.DMatrix,
    num_boost_round: int = 10,
    *,
    evals: Sequence[tuple[xgboost.DMatrix, str]] | None = None,
    obj: Callable[..., Any] | None = None,
    maximize: bool | None = None,
    early_stopping_rounds: int | None = None,
    evals_result: dict[str, Any] | None = None,
    verbose_eval: bool | int | None = True,
    xgb_model: Any = None,
    callbacks: Sequence[xgboost.callback.TrainingCallback] | None = None,
    custom_metric: Callable[..., Any] | None = None,
    mode: Literal["bagging", "cyclic", "histogram"] = "bagging",
    mask_statistics: bool = False,
    quantile_rows: int = 10,
    quantile_noise: float = 0.0,
    collective_timeout_s: int = 300,
    kit: str | None = None,
    every: str | int | None = None,
    exchange: str | Sequence[str] | None = None,
    keep_local: Sequence[str] = (),
    optimizer_state: str | None = None,
    evaluate_global: bool | None = None,
    num_examples: int | None = None,
    required: bool = False,
) -> xgboost.Booster:
    """Train like `xgboost.train`, together with the sites of a federation.

    `evals` are scored on the global model and pooled over all sites, and early stopping decides for all of them.
    Without a startup kit this is `xgboost.train`.

    Args:
        params: Parameters of XGBoost, as for `xgboost.train`.
        dtrain: This site's training data; in histogram mode a plain `DMatrix`.
        num_boost_round: Boosting rounds over all rounds of the federation. They decide how many rounds there are if the
            job does not.
        evals: Validation data of this site, with names that all sites share.
        obj: Custom objective, the same at every site.
        maximize: Whether a larger score is better, in early stopping and for the best round. Default: by the metric.
        early_stopping_rounds: Boosting rounds without improvement, on all sites' data, after which the run stops.
        evals_result: Dict that receives the pooled scores of every boosting round.
        verbose_eval: Whether, or every how many boosting rounds, the pooled scores are printed.
        xgb_model: Model to continue from. It must not be of a later XGBoost than this one.
        callbacks: Further callbacks of XGBoost. They see the pooled scores.
        custom_metric: Custom metric, pooled by the weights of the rows.
        mode: "bagging" (each round appends all sites' new trees, scaled by the site's share of the examples), "cyclic"
            (one site boosts, in turn), or "histogram" (the trees of training on all rows in one place).
        mask_statistics: Whether trees are sent without `sum_hessian` and gains (bagging and cyclic).
        quantile_rows: Least number of rows that a point of this site's summary for the bins stands for (histogram).
        quantile_noise: Share of the way to its neighbours by which such a point is moved at random (histogram).
        collective_timeout_s: Seconds after which a site that is silent within a tree is given up (histogram).
        kit: Folder of this site's startup kit. Default: `$FL_ADAPTERS_KIT`, which `fl-adapters run` and
            `fl-adapters simulate` set.
        every: Boosting rounds between two exchanges; "epoch" is one. Default: the job's, else one.
        exchange: "auto" or "all", which mean the same: a model of trees travels as a whole.
        keep_local: Must be empty, for the same reason.
        optimizer_state: Only "keep" is possible: boosting has no optimizer.
        evaluate_global: Whether each global model is evaluated on `evals`, so that the server can pick the best round.
            Default: yes if there are `evals`.
        num_examples: Weight of this site in the ensemble. Default: the number of its rows.
        required: Raise ConfigError instead of training alone if there is no startup kit.

    Returns:
        An ordinary Booster, the same at every site.

    Raises:
        ConfigError: For an argument that cannot work, before round 1.
        HandshakeError: If the sites do not agree, before round 1.
    """
    options = Options(
        kit=kit,
        every=every,
        exchange=exchange,
        keep_local=keep_local,
        optimizer_state=optimizer_state,
        evaluate_global=evaluate_global,
        num_examples=num_examples,
        required=required,
    )
    if mode not in MODES:
        raise ConfigError(f"mode={mode!r} is not known", where="train", fix=f"give one of {', '.join(MODES)}")
    check_options(options)
    given = checked_params(params)
    session = open_session(options, framework=FRAMEWORK, fresh=True)
    if session is None:
        return xgboost.train(
            given,
            dtrain,
            num_boost_round,
            evals=evals,
            obj=obj,
            maximize=maximize,
            early_stopping_rounds=early_stopping_rounds,
            evals_result=evals_result,
            verbose_eval=verbose_eval,
            xgb_model=xgb_model,
            callbacks=callbacks,
            custom_metric=custom_metric,
        )
    shown = list(callbacks or ())
    if verbose_eval and evals:
        shown.append(xgboost.callback.EvaluationMonitor(period=int(verbose_eval)))
    call = TrainCall(
        params=given,
        dtrain=dtrain,
        num_boost_round=num_boost_round,
        evals=list(evals or ()),
        obj=obj,
        custom_metric=custom_metric,
        xgb_model=xgb_model,
        maximize=maximize,
        early_stopping_rounds=early_stopping_rounds,
        callbacks=shown,
        mask_statistics=mask_statistics,
        options=options,
    )
    log: Log = {}
    with leaving_on_error(session):
        grower: boosting.Grower = boosting.OwnTrees(call)
        if mode == "histogram":
            from . import histogram

            grower = histogram.TreesOfAll(
                session,
                call,
                collective_timeout_s=collective_timeout_s,
                quantile_rows=quantile_rows,
                quantile_noise=quantile_noise,
            )
        try:
            booster = boosting.train(session, call, mode, grower, log)
        finally:
            grower.close(gently=False)
    if evals_result is not None:
        evals_result.update(log)
    return booster
