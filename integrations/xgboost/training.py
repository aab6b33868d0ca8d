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
    """`xgboost.train` with the sites of a federation; returns an ordinary Booster, the same at every site.

    mode: "bagging" (all sites' new trees, each with its share of the examples), "cyclic" (the model goes round the
    sites), or "histogram" (the trees of training on all rows together).
    mask_statistics: bagging and cyclic send no `sum_hessian` and no gains.
    quantile_rows, quantile_noise: of the summary that a site gives for the bins of all sites, see docs/xgboost.md.
    collective_timeout_s: how long a silent site is waited for in the middle of a tree (histogram).
    every: boosting rounds between two exchanges ("epoch" is one).

    Evaluation is of the global model on all sites' `evals` together, and so is early stopping. Without a startup kit
    this is `xgboost.train`. The other arguments are those of `xgboost.train` and of every adapter.

    Raises ConfigError for what cannot work, HandshakeError where the sites do not agree, before round 1.
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
