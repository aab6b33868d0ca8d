"""`FederatedCallback`: a plain `xgboost.train` takes part, with bagging or cyclic."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Literal

import xgboost

from fl_adapters.participant.options import Options
from fl_adapters.participant.registry import open_session
from fl_runtime.errors import ConfigError

from .call import TrainCall, check_options, checked_params
from .model import SEEDING, grown_since
from .rounds import FRAMEWORK, TreeRounds, check_budget, leaving_on_error
from .scores import Evaluation, Stopping, stopping_of


class FederatedCallback(xgboost.callback.TrainingCallback):
    """Makes `xgboost.train` a site of a federation; afterwards the booster holds the final global model.

    XGBoost evaluates before it calls callbacks: what it prints, logs and gives to other callbacks describes this
    site's own trees. The global model is scored once more, for the server; early stopping for all sites together
    needs `fl_adapters.xgboost.train`. XGBoost can be stopped early and not lengthened: `num_boost_round` must be
    enough for the job's rounds. Without a startup kit it stays out of the way.

    mode: "bagging" or "cyclic". The other arguments are those of `fl_adapters.xgboost.train`.
    Holds no connection: the session belongs to the process. Raises ConfigError, before the first tree, for what
    cannot work.
    """

    def __init__(
        self,
        *,
        mode: Literal["bagging", "cyclic"] = "bagging",
        mask_statistics: bool = False,
        kit: str | None = None,
        every: str | int | None = None,
        exchange: str | Sequence[str] | None = None,
        keep_local: Sequence[str] = (),
        optimizer_state: str | None = None,
        evaluate_global: bool | None = None,
        num_examples: int | None = None,
        required: bool = False,
    ) -> None:
        super().__init__()
        self.options = Options(
            kit=kit,
            every=every,
            exchange=exchange,
            keep_local=keep_local,
            optimizer_state=optimizer_state,
            evaluate_global=evaluate_global,
            num_examples=num_examples,
            required=required,
        )
        if mode not in ("bagging", "cyclic"):
            raise ConfigError(
                f"mode={mode!r} is not possible in a callback",
                where="FederatedCallback",
                fix='give "bagging" or "cyclic", or use fl_adapters.xgboost.train',
            )
        check_options(self.options)
        self._mode, self._mask = mode, mask_statistics
        self._rounds: TreeRounds | None = None
        self._evaluation: Evaluation | None = None
        self._made = 0  # iterations of the round under way

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rounds": None, "_evaluation": None}

    def before_training(self, model: xgboost.Booster) -> xgboost.Booster:
        session = open_session(self.options, framework=FRAMEWORK, fresh=True)
        if session is None:
            return model
        self._made = 0
        with leaving_on_error(session):
            call = _calling_train(self.options, mask=self._mask)
            checked_params(call.params)
            self._rounds = rounds = TreeRounds(session, call, self._mode)
            check_budget(rounds)
            evaluation = Evaluation.of(call)
            wanted = self.options.evaluate_global is not False
            names = list(evaluation.values(model, 0)) if call.evals and wanted else []
            self._evaluation = evaluation if names else None
            stopping, _ = stopping_of(call, names)
            if stopping is not None and stopping.rounds:
                raise ConfigError(
                    "early stopping would be decided by each site for itself",
                    where="xgboost.train",
                    fix="use fl_adapters.xgboost.train, whose early stopping is that of all sites",
                )
            terms = (stopping or Stopping("loss", False)).terms(rounds.strategy, rounds.boosts)
            rounds.begin(model, terms, evaluates=bool(names))
            model.set_param(SEEDING)
        return model

    def before_iteration(self, model: xgboost.Booster, epoch: int, evals_log: Any) -> bool:
        return self._rounds is not None and self._rounds.over  # a run that was over already

    def after_iteration(self, model: xgboost.Booster, epoch: int, evals_log: Any) -> bool:
        rounds = self._rounds
        self._made += 1
        if rounds is None or rounds.over or self._made < rounds.ends - rounds.begun:
            return False
        self._made = 0
        with leaving_on_error(rounds.session):
            grown = grown_since(model, rounds.loaded.rounds, mask=self._mask) if rounds.mine else rounds.nothing
            if rounds.exchange(model, grown) and self._evaluation is not None:
                rounds.session.report(self._evaluation.summaries(model, epoch), self._evaluation.examples)
        return rounds.over and epoch + 1 < rounds.call.num_boost_round

    def after_training(self, model: xgboost.Booster) -> xgboost.Booster:
        rounds, self._rounds = self._rounds, None
        if rounds is not None:
            with leaving_on_error(rounds.session):
                if rounds.over:
                    rounds.finish(model, scored=self._evaluation is not None)
                else:
                    rounds.session.leave(f"training stopped in round {rounds.round} of {rounds.rounds}")
        return model


def _calling_train(options: Options, *, mask: bool) -> TrainCall:
    """The arguments of the `xgboost.train` that calls the callback."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "train" and frame.f_globals.get("__name__") == "xgboost.training":
            found = frame.f_locals
            return TrainCall(
                params=dict(found["params"]),
                dtrain=found["dtrain"],
                num_boost_round=found["num_boost_round"],
                evals=list(found.get("evals") or ()),
                obj=found.get("obj"),
                custom_metric=found.get("custom_metric"),
                xgb_model=found.get("xgb_model"),
                maximize=found.get("maximize"),
                callbacks=[c for c in found.get("callbacks") or () if not isinstance(c, FederatedCallback)],
                mask_statistics=mask,
                options=options,
            )
        frame = frame.f_back
    raise ConfigError(
        "FederatedCallback works within xgboost.train only",
        where="before_training",
        fix="call xgboost.train(..., callbacks=[FederatedCallback()]) or fl_adapters.xgboost.train",
    )
