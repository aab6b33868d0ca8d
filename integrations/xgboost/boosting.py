"""The loop of `train`: XGBoost's own, with trees from this site or from all, and an exchange after each round."""

from __future__ import annotations

from typing import Protocol

import xgboost

from fl_adapters.participant.restart import FunctionSnapshot, seed_python
from fl_adapters.participant.session import Session
from fl_adapters.participant.state_file import State
from fl_runtime.aggregation.trees.document import TreeModel
from fl_runtime.types import Arrays, Metrics

from .call import Mode, TrainCall
from .model import SEEDING, grown_since, learning_rate, released
from .rounds import TreeRounds
from .scores import Evaluation, Log, Stopping, record, stopping_of


class Grower(Protocol):
    """Where the trees of a round come from.

    more: empty arrays that travel beside a model. extras: this site's part in the initial model.
    exact: the trees depend on the model, this site's data and the number of the round alone.
    """

    more: Arrays
    extras: Arrays
    exact: bool

    def grow(self, booster: xgboost.Booster, rounds: TreeRounds) -> TreeModel:
        """The new trees of the round under way. The booster holds the global model, and may be changed."""
        ...

    def metrics(self) -> Metrics:
        """Of the round that has been grown last, for the history."""
        ...

    def close(self, *, gently: bool) -> None:
        """gently: the last round is done."""
        ...


class OwnTrees:
    """Bagging and cyclic: trees of this site's rows."""

    def __init__(self, call: TrainCall) -> None:
        self.more: Arrays = {}
        self.extras: Arrays = {}
        self.exact = call.params.get("booster") != "dart"  # which drops trees by states of its own
        self._call = call

    def grow(self, booster: xgboost.Booster, rounds: TreeRounds) -> TreeModel:
        if not rounds.mine:
            return rounds.nothing
        for iteration in range(rounds.begun, rounds.ends):
            booster.update(self._call.dtrain, iteration, fobj=self._call.obj)
        return grown_since(booster, rounds.loaded.rounds, mask=self._call.mask_statistics)

    def metrics(self) -> Metrics:
        return {}

    def close(self, *, gently: bool) -> None:
        pass


def train(session: Session, call: TrainCall, mode: Mode, grower: Grower, log: Log) -> xgboost.Booster:
    """The final global model. log: gets the metrics of all sites together, a number per round."""
    booster = call.booster(SEEDING)
    evaluation = Evaluation.of(call)
    wanted = session.settings.evaluate_global is not False
    names = list(evaluation.values(booster, 0)) if call.evals and wanted else []
    stopping, callbacks = stopping_of(call, names)
    rounds = TreeRounds(session, call, mode)
    terms = (stopping or Stopping("loss", False)).terms(rounds.strategy, rounds.boosts)
    snapshot = _snapshot(booster, log) if grower.exact else None
    rounds.begin(booster, terms, evaluates=bool(names), more=grower.more, extras=grower.extras, snapshot=snapshot)
    for callback in callbacks:
        booster = callback.before_training(booster)

    def done(last: int) -> bool:
        """What follows an exchange, after iteration `last`: the score, and the callbacks, of which one may stop."""
        if names:
            _score(session, evaluation, booster, last, rounds, log, names)
        return True in [callback.after_iteration(booster, last, log) for callback in callbacks]

    stopped = False
    if session.attempt > 1 and rounds.task is not None and rounds.task.version > 0:
        # the process before may have died before it came to that: the others wait for the score, and what callbacks
        # have set for the next round, such as a learning rate, is that of a training in which nothing happened
        stopped = done(rounds.end_of(rounds.task.version) - 1)
    while not rounds.over and not stopped:
        if session.round_seed is not None:
            seed_python(session.round_seed)  # for objectives and callbacks of the user's own
        first, last = rounds.begun, max(rounds.ends - 1, rounds.begun)
        if True in [c.before_iteration(booster, first, log) for c in callbacks]:  # all of them are called
            break
        grown = grower.grow(booster, rounds)
        if rounds.exchange(booster, grown, grower.more, grower.metrics()):
            stopped = done(last)  # else the round has come to nothing, and is opened again
    grower.close(gently=rounds.over)
    if rounds.over:
        if stopping is not None and stopping.rounds:
            _mark_best(booster, rounds, stopping)
        rounds.finish(booster, scored=bool(names))
    else:
        session.leave(f"a callback stopped training in round {rounds.round} of {rounds.rounds}")
    for callback in callbacks:
        booster = callback.after_training(booster)
    if rounds.over and stopping is not None and stopping.save_best:
        booster = booster[: booster.best_iteration + 1]
    return released(booster)


def _score(
    session: Session,
    evaluation: Evaluation,
    booster: xgboost.Booster,
    iteration: int,
    rounds: TreeRounds,
    log: Log,
    names: list[str],
) -> None:
    """The model that has arrived, on this site's data; and what all sites make of it, which may end the run."""
    together, stops = session.report_together(evaluation.summaries(booster, iteration), evaluation.examples)
    record(log, together, names)
    if stops and not rounds.over:
        rounds.next_task(booster)


def _snapshot(booster: xgboost.Booster, log: Log) -> FunctionSnapshot:
    """What a booster has beside the global model, for exact restarts."""

    def save() -> State:
        return {"learning_rate": learning_rate(booster), "attributes": booster.attributes(), "log": log}

    def load(state: State) -> None:
        booster.set_param({"learning_rate": state["learning_rate"]})
        booster.set_attr(**state["attributes"])
        log.update(state["log"])

    return FunctionSnapshot(save, load)


def _mark_best(booster: xgboost.Booster, rounds: TreeRounds, stopping: Stopping) -> None:
    """`best_iteration` and `best_score`, as XGBoost's own early stopping leaves them."""
    best = rounds.session.results.best()
    iteration = rounds.first + min(best.version * rounds.boosts, booster.num_boosted_rounds() - rounds.first) - 1
    score = best.config.get("metrics", {}).get(stopping.metric)
    booster.set_attr(best_iteration=str(iteration), best_score=None if score is None else str(score))
