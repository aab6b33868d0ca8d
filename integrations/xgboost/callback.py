"""`FederatedCallback` for a plain `xgboost.train`, in the modes bagging and cyclic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import xgboost

from fl_adapters.participant.options import Options, SharedArguments
from fl_adapters.participant.policy_gate import LeaveReason
from fl_adapters.participant.registry import leaving_on_error, open_session
from fl_runtime.errors import ConfigError

from .call import TrainCall, check_options, checked_params
from .model import SEEDING, trees_after
from .rounds import FRAMEWORK, TreeRounds, check_budget
from .scores import Evaluation, Stopping, stopping_of
from .trainer import call_last, running_train


class FederatedCallback(SharedArguments, xgboost.callback.TrainingCallback):
    """Makes a plain `xgboost.train` a site of a federation. Afterwards the booster holds the final global model.

    XGBoost evaluates before it calls callbacks: what it prints, logs and passes to other callbacks describes this
    site's own trees. The global model is scored once more, for the server. Early stopping for all sites together needs
    `fl_adapters.xgboost.train`. XGBoost can be stopped early but not lengthened, so `num_boost_round` must suffice for
    the job's rounds. Outside a federation, that is without a startup kit, the callback prints one line and stays out
    of the way. It holds no connection: the session belongs to the process.

    Args:
        mode: "bagging" (the new trees of all sites, each weighted by the site's share of the examples) or "cyclic"
            (the model goes round the sites).
        kit: Folder of this site's startup kit. Default: `$FL_ADAPTERS_KIT`, which `fl-adapters run` and
            `fl-adapters simulate` set.
        every: Boosting rounds between two exchanges; "epoch" is one. Default: the job's, else "epoch".
        evaluate_global: Whether each global model is scored on `evals`, so that the server can pick the best round.
            Default: yes if there are `evals`.
        num_examples: Weight of this site in the average, above 0. Default: the rows of the training data.
        required: Raise ConfigError instead of training alone if there is no startup kit.
        agree: Whether lists of names that the adapter sees (features, categories) must be equal at all sites. A dict
            adds lists that it cannot see, such as `{"labels": ["cat", "dog"]}`. Default: yes.
        mask_statistics: Whether updates leave out the statistics of each node: `sum_hessian` and gains.
        exchange: Only None, "auto" or "all": a model of trees always travels whole.
        keep_local: Only an empty sequence: a model of trees always travels whole.
        optimizer_state: Only None or "keep": boosting has no optimizer.

    Raises:
        ConfigError: For an argument that cannot work. `xgboost.train` raises it too, before the first tree, for
            arguments that cannot be federated.

    Example:
        ```python
        booster = xgboost.train(params, dtrain, 50, evals=[(valid, "valid")], callbacks=[FederatedCallback()])
        ```
    """

    def __init__(
        self,
        *,
        mode: Literal["bagging", "cyclic"] = "bagging",
        kit: str | None = None,
        every: str | int | None = None,
        evaluate_global: bool | None = None,
        num_examples: int | None = None,
        required: bool = False,
        agree: bool | Mapping[str, Sequence[Any]] = True,
        mask_statistics: bool = False,
        exchange: str | Sequence[str] | None = None,
        keep_local: Sequence[str] = (),
        optimizer_state: str | None = None,
    ) -> None:
        super().__init__(
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
        self._iterations = 0  # iterations of the current round
        self._keeper = _ResultKeeper()

    def __getstate__(self) -> dict[str, Any]:
        """Leave everything of a running training behind: a copy does not take part in it."""
        return {**self.__dict__, "_rounds": None, "_evaluation": None, "_keeper": _ResultKeeper()}

    def before_training(self, model: xgboost.Booster) -> xgboost.Booster:
        """Join the federation and take the first global model."""
        session = open_session(self.options, framework=FRAMEWORK, fresh=True)
        if session is None:
            return model
        self._iterations, self._keeper = 0, _ResultKeeper()
        with leaving_on_error(session.leave):
            call = _calling_train(self.options, self._keeper, mask=self._mask)
            checked_params(call.params)
            self._rounds = rounds = TreeRounds(session, call, self._mode)
            check_budget(rounds)
            evaluation = Evaluation.of(call)
            scored = self.options.evaluate_global is not False
            names = list(evaluation.values(model, 0)) if call.evals and scored else []
            self._evaluation = evaluation if names else None
            stopping, _ = stopping_of(call, names)
            if stopping is not None and stopping.rounds:
                raise ConfigError(
                    "each site would decide on early stopping by itself",
                    where="xgboost.train",
                    fix="use fl_adapters.xgboost.train, whose early stopping is that of all sites",
                )
            terms = (stopping or Stopping("loss", False)).terms(rounds.strategy, rounds.boosts)
            rounds.begin(model, terms, evaluates=bool(names))
            model.set_param(SEEDING)
        return model

    def before_iteration(self, model: xgboost.Booster, epoch: int, evals_log: Any) -> bool:
        """Stop at once if the run had ended before this site joined."""
        return self._rounds is not None and self._rounds.over

    def after_iteration(self, model: xgboost.Booster, epoch: int, evals_log: Any) -> bool:
        """Exchange trees at the end of a round, score the global model, and stop after the last round."""
        rounds = self._rounds
        self._iterations += 1
        if rounds is not None:
            rounds.grown = self._iterations
        if rounds is None or rounds.over or self._iterations < rounds.end - rounds.start:
            return False
        self._iterations = 0
        with leaving_on_error(rounds.session.leave):
            new_trees = (
                trees_after(model, rounds.loaded.rounds, mask=self._mask) if rounds.grows_here else rounds.no_trees
            )
            if rounds.exchange(model, new_trees) and self._evaluation is not None:
                rounds.session.report(self._evaluation.summaries(model, epoch), self._evaluation.examples)
        return rounds.over and epoch + 1 < rounds.call.num_boost_round

    def after_training(self, model: xgboost.Booster) -> xgboost.Booster:
        """Finish the run, or leave it if training stopped before the last round."""
        rounds, self._rounds = self._rounds, None
        if rounds is not None:
            with leaving_on_error(rounds.session.leave):
                if rounds.over:
                    rounds.finish(model, scored=self._evaluation is not None)
                    self._keeper.rounds = rounds
                else:
                    stopped = f"training stopped in round {rounds.round} of {rounds.rounds}"
                    rounds.session.leave(LeaveReason.own(stopped))
        return model


class _ResultKeeper(xgboost.callback.TrainingCallback):
    """Puts the final model back after all other callbacks, once it is given the rounds that have ended."""

    rounds: TreeRounds | None = None

    def after_training(self, model: xgboost.Booster) -> xgboost.Booster:
        if self.rounds is not None:
            self.rounds.put_back(model)
        return model


def _calling_train(options: Options, keeper: _ResultKeeper, *, mask: bool) -> TrainCall:
    """The arguments of the running `xgboost.train`, which calls `keeper` after all other callbacks."""
    arguments = running_train()
    if arguments is None:
        raise ConfigError(
            "FederatedCallback works within xgboost.train only",
            where="before_training",
            fix="call xgboost.train(..., callbacks=[FederatedCallback()]) or fl_adapters.xgboost.train",
        )
    call_last(keeper, arguments)
    return TrainCall(
        params=dict(arguments["params"]),
        dtrain=arguments["dtrain"],
        num_boost_round=arguments["num_boost_round"],
        evals=list(arguments.get("evals") or ()),
        obj=arguments.get("obj"),
        custom_metric=arguments.get("custom_metric"),
        xgb_model=arguments.get("xgb_model"),
        maximize=arguments.get("maximize"),
        callbacks=[c for c in arguments.get("callbacks") or () if not isinstance(c, FederatedCallback)],
        mask_statistics=mask,
        options=options,
    )
