"""The loop of `train`: XGBoost's own, with an exchange after each round."""

from __future__ import annotations

from typing import Protocol

import xgboost

from fl_adapters.participant.policy_gate import LeaveReason
from fl_adapters.participant.restart import FunctionSnapshot, seed_python
from fl_adapters.participant.session import Session
from fl_adapters.participant.state_file import State
from fl_runtime.aggregation.trees.document import TreeModel
from fl_runtime.types import Arrays, Metrics

from .call import Mode, TrainCall
from .model import SEEDING, learning_rate, released, trees_after
from .rounds import TreeRounds
from .scores import Evaluation, Log, Stopping, record, stopping_of


class Grower(Protocol):
    """Grows the trees of a round.

    Attributes:
        empty: Further arrays that travel beside a model, without elements.
        extras: This site's part in the initial model.
        repeatable: Whether the trees depend only on the model, this site's data and the number of the round.
    """

    empty: Arrays
    extras: Arrays
    repeatable: bool

    def grow(self, booster: xgboost.Booster, rounds: TreeRounds) -> TreeModel:
        """Return the new trees of the current round.

        Args:
            booster: Holds the global model; may be changed.
            rounds: Where the training stands.
        """
        ...

    def metrics(self) -> Metrics:
        """Return metrics of the last round that was grown, for the history."""
        ...

    def close(self, *, gently: bool) -> None:
        """Release what the grower holds. May be called again.

        Args:
            gently: Whether the last round is done, so that all sites end together.
        """
        ...


class OwnTrees:
    """Grows trees from this site's own rows, for the modes bagging and cyclic."""

    def __init__(self, call: TrainCall) -> None:
        self.empty: Arrays = {}
        self.extras: Arrays = {}
        self.repeatable = call.params.get("booster") != "dart"  # dart has a random state of its own
        self._call = call

    def grow(self, booster: xgboost.Booster, rounds: TreeRounds) -> TreeModel:
        if not rounds.grows_here:
            return rounds.no_trees
        for iteration in range(rounds.start, rounds.end):
            booster.update(self._call.dtrain, iteration, fobj=self._call.obj)
            rounds.grown += 1
        return trees_after(booster, rounds.loaded.rounds, mask=self._call.mask_statistics)

    def metrics(self) -> Metrics:
        return {}

    def close(self, *, gently: bool) -> None:
        pass


def train(session: Session, call: TrainCall, mode: Mode, grower: Grower, log: Log) -> xgboost.Booster:
    """Train with the other sites.

    Args:
        session: This process's session.
        call: The arguments of `train`.
        mode: How the sites grow trees.
        grower: Grows this site's trees.
        log: Receives the metrics over all sites, a number per round.

    Returns:
        The final global model.
    """
    booster = call.booster(SEEDING)
    evaluation = Evaluation.of(call)
    scored = session.settings.evaluate_global is not False
    names = list(evaluation.values(booster, 0)) if call.evals and scored else []
    stopping, callbacks = stopping_of(call, names)
    rounds = TreeRounds(session, call, mode)
    terms = (stopping or Stopping("loss", False)).terms(rounds.strategy, rounds.boosts)
    snapshot = _snapshot(booster, log) if grower.repeatable else None
    rounds.begin(booster, terms, evaluates=bool(names), empty=grower.empty, extras=grower.extras, snapshot=snapshot)
    for callback in callbacks:
        booster = callback.before_training(booster)

    def after_exchange(last: int) -> bool:
        """Score the model after iteration `last` and call the callbacks; whether one of them stops the training."""
        if names:
            _score(session, evaluation, booster, last, rounds, log, names)
        return True in [callback.after_iteration(booster, last, log) for callback in callbacks]

    stopped = False
    if session.attempt > 1 and rounds.task is not None and rounds.task.version > 0:
        # The process before may have died before it did this: the other sites wait for the score, and callbacks set
        # values for the next round, such as a learning rate.
        stopped = after_exchange(rounds.end_of(rounds.task.version) - 1)
    while not rounds.over and not stopped:
        if session.round_seed is not None:
            seed_python(session.round_seed)  # for objectives and callbacks of the user's own
        first, last = rounds.start, max(rounds.end - 1, rounds.start)
        if True in [c.before_iteration(booster, first, log) for c in callbacks]:  # a list, so that all are called
            break
        new_trees = grower.grow(booster, rounds)
        if rounds.exchange(booster, new_trees, grower.empty, grower.metrics()):
            stopped = after_exchange(last)  # else the round failed and is opened again
    grower.close(gently=rounds.over)
    if rounds.over:
        if stopping is not None and stopping.rounds:
            _mark_best(booster, rounds, stopping)
        rounds.finish(booster, scored=bool(names))
    else:
        session.leave(LeaveReason.own(f"a callback stopped training in round {rounds.round} of {rounds.rounds}"))
    for callback in callbacks:
        booster = callback.after_training(booster)
    if rounds.over:
        rounds.put_back(booster)
    if rounds.over and stopping is not None and stopping.save_best:
        attributes = booster.attributes()
        booster = booster[: booster.best_iteration + 1]
        booster.set_attr(**attributes)  # a slice has none
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
    """Score the model that has arrived, and learn the score over all sites, which may end the run."""
    global_metrics, stops = session.report_together(evaluation.summaries(booster, iteration), evaluation.examples)
    record(log, global_metrics, names)
    if stops and not rounds.over:
        rounds.next_task(booster)


def _snapshot(booster: xgboost.Booster, log: Log) -> FunctionSnapshot:
    """What to save of a booster beside the global model, for exact restarts."""

    def save() -> State:
        return {"learning_rate": learning_rate(booster), "attributes": booster.attributes(), "log": log}

    def load(state: State) -> None:
        booster.set_param({"learning_rate": state["learning_rate"]})
        booster.set_attr(**state["attributes"])
        log.update(state["log"])

    return FunctionSnapshot(save, load)


def _mark_best(booster: xgboost.Booster, rounds: TreeRounds, stopping: Stopping) -> None:
    """Set `best_iteration` and `best_score`, as XGBoost's own early stopping does, if there is a best round."""
    best = rounds.session.results.best()
    if best is None:
        return
    iteration = rounds.first + min(best.version * rounds.boosts, booster.num_boosted_rounds() - rounds.first) - 1
    score = best.config.get("metrics", {}).get(stopping.metric)
    booster.set_attr(best_iteration=str(iteration), best_score=None if score is None else str(score))
