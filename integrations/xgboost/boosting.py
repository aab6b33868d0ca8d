"""Training in the modes bagging and cyclic: XGBoost's own loop, with an exchange after every round's boosting."""

from __future__ import annotations

import xgboost

from fl_adapters.session import Session

from .call import Mode, TrainCall
from .model import SEEDING, released
from .rounds import TreeRounds
from .scores import Evaluation, Log, Stopping, record, stopping_of


def train(session: Session, call: TrainCall, mode: Mode, log: Log) -> xgboost.Booster:
    """The final global model. log: gets the metrics of all sites together, a number per round."""
    booster = call.booster(SEEDING)
    evaluation = Evaluation.of(call)
    wanted = session.settings.evaluate_global is not False
    names = list(evaluation.values(booster, 0)) if call.evals and wanted else []
    stopping, callbacks = stopping_of(call, names)
    rounds = TreeRounds(session, call, mode)
    terms = (stopping or Stopping("loss", False)).terms(rounds.strategy, rounds.boosts)
    rounds.begin(booster, terms, evaluates=bool(names))
    for callback in callbacks:
        booster = callback.before_training(booster)
    while not rounds.over:
        iteration = max(rounds.ends - 1, rounds.begun)
        if True in [c.before_iteration(booster, rounds.begun, log) for c in callbacks]:  # all of them are called
            break
        if rounds.grows:
            for number in range(rounds.begun, rounds.ends):
                booster.update(call.dtrain, number, fobj=call.obj)
        rounds.exchange(booster)
        if names:
            together, stops = session.report_together(evaluation.summaries(booster, iteration), evaluation.examples)
            record(log, together, names)
            if stops and not rounds.over:
                rounds.next_task(booster)
        if True in [c.after_iteration(booster, iteration, log) for c in callbacks] and not rounds.over:
            break
    if not rounds.over:
        session.leave(f"a callback stopped training in round {rounds.round} of {rounds.rounds}")
    else:
        if stopping is not None and stopping.rounds:
            _mark_best(booster, rounds, stopping)
        rounds.finish(booster, scored=bool(names))
    for callback in callbacks:
        booster = callback.after_training(booster)
    if rounds.over and stopping is not None and stopping.save_best:
        booster = booster[: booster.best_iteration + 1]
    return released(booster)


def _mark_best(booster: xgboost.Booster, rounds: TreeRounds, stopping: Stopping) -> None:
    """`best_iteration` and `best_score`, as XGBoost's own early stopping leaves them."""
    best = rounds.session.best()
    iteration = rounds.first + min(best.version * rounds.boosts, booster.num_boosted_rounds() - rounds.first) - 1
    score = best.config.get("metrics", {}).get(stopping.metric)
    booster.set_attr(best_iteration=str(iteration), best_score=None if score is None else str(score))
