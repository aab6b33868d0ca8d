"""`train`: `xgboost.train` as a participant in a federation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import xgboost

from fl_adapters.participant.kit import current_kit
from fl_adapters.participant.options import Options
from fl_adapters.participant.registry import leaving_on_error, open_session
from fl_adapters.participant.session import Session
from fl_runtime.errors import ConfigError

from . import boosting
from .call import MODES, TrainCall, check_options, checked_params
from .rounds import FRAMEWORK
from .scores import Log


def train(
    params: Mapping[str, Any],
    dtrain: xgboost.DMatrix,
    num_boost_round: int = 10,
    evals: Sequence[tuple[xgboost.DMatrix, str]] | None = None,
    obj: Callable[..., Any] | None = None,
    maximize: bool | None = None,
    early_stopping_rounds: int | None = None,
    evals_result: dict[str, Any] | None = None,
    verbose_eval: bool | int | None = True,
    xgb_model: Any = None,
    callbacks: Sequence[xgboost.callback.TrainingCallback] | None = None,
    custom_metric: Callable[..., Any] | None = None,
    *,
    mode: Literal["bagging", "cyclic", "histogram", "levelwise"] = "bagging",
    kit: str | None = None,
    every: str | int | None = None,
    evaluate_global: bool | None = None,
    num_examples: int | None = None,
    required: bool = False,
    agree: bool | Mapping[str, Sequence[Any]] = True,
    mask_statistics: bool = False,
    quantile_rows: int = 10,
    quantile_noise: float = 0.0,
    collective_timeout_s: int = 300,
    exchange: str | Sequence[str] | None = None,
    keep_local: Sequence[str] = (),
    optimizer_state: str | None = None,
) -> xgboost.Booster:
    """Train with the sites of a federation, in place of `xgboost.train`.

    Evaluation is of the global model on all sites' `evals` together, and so is early stopping. Without a startup kit
    this is `xgboost.train`.

    Args:
        params: Booster parameters. They must be the same at all sites where they shape the model.
        dtrain: This site's training data.
        num_boost_round: Number of boosting rounds. The job's `rounds` decide where they are set.
        evals: Validation data of this site with their names, as in `xgboost.train`.
        obj: Custom objective.
        maximize: Whether early stopping looks for the maximum of its metric.
        early_stopping_rounds: Stop if the metric over all sites has not improved for so many boosting rounds.
        evals_result: Dict that receives the metrics over all sites, a number per round.
        verbose_eval: Whether to print metrics, or after how many rounds.
        xgb_model: Model to continue from, the same at all sites.
        callbacks: Callbacks of XGBoost. `EarlyStopping` stops all sites together.
        custom_metric: Custom metric.
        mode: "bagging" (the new trees of all sites, each weighted by the site's share of the examples), "cyclic" (the
            model goes round the sites), "histogram" (the trees that training on all rows together would grow, summed in
            a ring of the sites), or "levelwise" (the same from sums over the sites, one for each level of a tree).
        kit: Folder of this site's startup kit. Default: `$FL_ADAPTERS_KIT`, which `fl-adapters run` and
            `fl-adapters simulate` set.
        every: Boosting rounds between two exchanges; "epoch" is one. Default: the job's, else "epoch".
        evaluate_global: Whether each global model is scored on `evals`, so that the server can pick the best round.
            Default: yes if there are `evals`.
        num_examples: Weight of this site in the average, above 0. Default: the rows of `dtrain`.
        required: Raise ConfigError instead of training alone if there is no startup kit.
        agree: Whether lists of names that the adapter sees (features, categories) must be equal at all sites. A dict
            adds lists that it cannot see, such as `{"labels": ["cat", "dog"]}`. Default: yes.
        mask_statistics: Whether updates leave out the statistics of each node, `sum_hessian` and gains (bagging and
            cyclic).
        quantile_rows: Fewest rows that a point of this site's quantile summary may stand for (histogram), or that a
            cell of values must hold at all sites to be divided (levelwise); see docs/xgboost.md.
        quantile_noise: Random shift of these points, as a share of the distance to their neighbours (histogram).
        collective_timeout_s: Seconds for which a silent site is waited for in the middle of a tree (histogram).
        exchange: Only None, "auto" or "all": a model of trees always travels whole.
        keep_local: Only an empty sequence: a model of trees always travels whole.
        optimizer_state: Only None or "keep": boosting has no optimizer.

    Returns:
        An ordinary Booster, the same at every site.

    Raises:
        ConfigError: For arguments that cannot work.
        HandshakeError: If the sites do not agree, before round 1.

    Example:
        ```python
        booster = train(params, dtrain, 50, evals=[(valid, "valid")], early_stopping_rounds=5)
        ```
    """
    options = Options(
        kit=kit,
        every=every,
        evaluate_global=evaluate_global,
        num_examples=num_examples,
        required=required,
        agree=agree,
        exchange=exchange,
        keep_local=keep_local,
        optimizer_state=optimizer_state,
    )
    if mode not in MODES:
        raise ConfigError(f"mode={mode!r} is not known", where="train", fix=f"give one of {', '.join(MODES)}")
    check_options(options)
    booster_params = checked_params(params)
    all_callbacks = list(callbacks or ())
    if verbose_eval and evals:
        all_callbacks.append(xgboost.callback.EvaluationMonitor(period=int(verbose_eval)))
    call = TrainCall(
        params=booster_params,
        dtrain=dtrain,
        num_boost_round=num_boost_round,
        evals=list(evals or ()),
        obj=obj,
        custom_metric=custom_metric,
        xgb_model=xgb_model,
        maximize=maximize,
        early_stopping_rounds=early_stopping_rounds,
        callbacks=all_callbacks,
        mask_statistics=mask_statistics,
        options=options,
    )
    log: Log = {}
    if mode == "levelwise" and current_kit(kit) is not None:
        booster = _levelwise(call, log, quantile_rows, quantile_noise, collective_timeout_s)
        if evals_result is not None:
            evals_result.update(log)
        return booster
    session = open_session(options, framework=FRAMEWORK, fresh=True)
    if session is None:
        return xgboost.train(
            booster_params,
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
    with leaving_on_error(session.leave):
        grower: boosting.Grower = boosting.OwnTrees(call)
        if mode == "histogram":
            grower = _joint_trees(session, call, collective_timeout_s, quantile_rows, quantile_noise)
        try:
            booster = boosting.train(session, call, mode, grower, log)
        finally:
            grower.close(gently=False)
    if evals_result is not None:
        evals_result.update(log)
    return booster


def _levelwise(
    call: TrainCall, log: Log, quantile_rows: int, quantile_noise: float, collective_timeout_s: int
) -> xgboost.Booster:
    from .levelwise import checks, training

    checks.check_unused(quantile_noise=(quantile_noise, 0.0), collective_timeout_s=(collective_timeout_s, 300))
    return training.train(call, log, quantile_rows)


def _joint_trees(
    session: Session, call: TrainCall, collective_timeout_s: int, quantile_rows: int, quantile_noise: float
) -> boosting.Grower:
    from . import histogram  # here, so that the other modes do not need what it imports

    return histogram.JointTrees(
        session,
        call,
        collective_timeout_s=collective_timeout_s,
        quantile_rows=quantile_rows,
        quantile_noise=quantile_noise,
    )
