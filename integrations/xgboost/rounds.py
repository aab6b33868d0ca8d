"""The rounds of one booster in every mode: the handshake, the exchanges, and the end."""

from __future__ import annotations

import sys

import xgboost

from fl_adapters.adapter import Snapshot
from fl_adapters.participant.local_result import LocalResult
from fl_adapters.participant.session import Session
from fl_runtime.aggregation.trees.document import TreeModel
from fl_runtime.aggregation.trees.strategies import ENCODING
from fl_runtime.client.local_training import StepCount
from fl_runtime.errors import ConfigError
from fl_runtime.types import Arrays, Metrics, Task, Terms

from . import model
from .call import Mode, TrainCall, agreement, check_mode, tree_parameters, warn_of_unnamed_columns

FRAMEWORK = "xgboost"


class TreeRounds:
    """Where one training stands in its run. Iterations are counted from 0 over all rounds that this run adds.

    Attributes:
        session: This process's session.
        call: The arguments of `train`.
        mode: How the sites grow trees.
        boosts: Boosting rounds between two exchanges.
        rounds: Number of rounds of the run.
        round: The current round, counted from 1.
        over: Whether the final model has arrived.
        first: Number of boosting rounds in `xgb_model`, which the run continues.
        grown: Boosting rounds made in the current round, where they are counted.
        loaded: The global model that arrived last. Valid until the next exchange.
        task: The task that arrived last. Valid until the next exchange.
    """

    def __init__(self, session: Session, call: TrainCall, mode: Mode) -> None:
        check_mode(call.params, mode)
        self.session, self.call, self.mode = session, call, mode
        every = session.settings.every
        self.boosts = every.epochs or every.steps or 1
        self.rounds, self.round, self.over = 0, 0, False
        self.first = self.grown = 0
        self.loaded = TreeModel({})
        self.task: Task | None = None

    @property
    def strategy(self) -> str:
        """Name of the server's strategy for this mode."""
        return f"tree-{self.mode}"

    @property
    def start(self) -> int:
        """First iteration of the current round."""
        return (self.round - 1) * self.boosts

    @property
    def end(self) -> int:
        """Iteration before which the current round ends."""
        return self.end_of(self.round)

    def end_of(self, round: int) -> int:
        """Iteration before which a round ends. The script's own length may cut the last round short."""
        end = round * self.boosts
        return end if self.session.settings.rounds else min(end, self.call.num_boost_round)

    @property
    def grows_here(self) -> bool:
        """Whether this site adds trees in the current round. In mode "cyclic" one site at a time does."""
        assert self.task is not None
        return bool(self.task.config.get("turn", self.session.name) == self.session.name)

    @property
    def no_trees(self) -> TreeModel:
        """An update without new trees."""
        return self.loaded.iterations(self.loaded.rounds)

    def begin(
        self,
        booster: xgboost.Booster,
        terms: Terms,
        *,
        evaluates: bool,
        empty: Arrays | None = None,
        extras: Arrays | None = None,
        snapshot: Snapshot | None = None,
    ) -> None:
        """Make the handshake, and load the first global model into the booster.

        Args:
            booster: The booster that is trained; its contents are replaced.
            terms: Settings of the script for what the job leaves open.
            evaluates: Whether this site scores each global model.
            empty: Further arrays that travel beside the model, without elements.
            extras: This site's part in the initial model, beside its weight.
            snapshot: What to save for exact restarts; None if this training cannot be restarted exactly.
        """
        call, session = self.call, self.session
        start = model.initial_model(call)
        self.first = start.rounds
        if session.attempt == 1:
            warn_of_unnamed_columns(call.dtrain)
        facts = agreement(call, start) | {"every": f"{self.boosts} boosting rounds"}
        if self.mode == "histogram":  # all sites grow the same trees
            facts |= tree_parameters(booster)
        self.rounds = session.register(
            {**model.EMPTY, **(empty or {})},
            agreement=facts,
            rounds=-(-call.num_boost_round // self.boosts),
            evaluates=evaluates,
            restarts=snapshot is not None,
            capabilities=frozenset([self.strategy]),
            terms=terms,
            encoding=ENCODING,
        )
        own = {**model.weight_extra(call, start), **(extras or {})}
        if session.attempt == 1:
            model.warn_of_mean_base_score(call, own)
        initial = {**start.to_arrays(), **(empty or {})}
        self._load_task(booster, session.start(lambda: initial, own, snapshot, self._steps))

    def exchange(
        self,
        booster: xgboost.Booster,
        grown: TreeModel,
        empty: Arrays | None = None,
        metrics: Metrics | None = None,
    ) -> bool:
        """End a round: send this site's new trees, and load the next global model into the booster.

        Args:
            booster: The booster that is trained; its contents are replaced.
            grown: The trees that this site adds.
            empty: Further arrays that travel beside the model, without elements.
            metrics: Metrics of the round, for the history.

        Returns:
            False if the round failed and is opened again: the global model is the same as before.
        """
        call, before = self.call, self.task
        assert before is not None
        examples = call.options.num_examples or call.dtrain.num_row()
        result = LocalResult(examples, grown.rounds, metrics or {})
        extras = model.round_extra(call) if self.mode == "bagging" else None
        task = self.session.exchange({**grown.to_arrays(), **(empty or {})}, result, extras=extras)
        self._load_task(booster, task)
        return task.version != before.version

    def count(self, grown: int) -> None:
        """Note how many boosting rounds of the current round are done, for whoever watches the run.

        Args:
            grown: Their number.
        """
        self.grown = grown

    def next_task(self, booster: xgboost.Booster) -> None:
        """Take the next task without sending an update, when the run is known to end."""
        self._load_task(booster, self.session.next_task())

    def finish(self, booster: xgboost.Booster, *, scored: bool) -> None:
        """Put the final model into the booster, leave the run and write its results.

        Args:
            booster: The booster with the final model.
            scored: Whether global models have been scored, so that there is a best one.
        """
        final = TreeModel(self.loaded.head, tuple(map(bytes, self.loaded.trees)))
        self.loaded = final  # the arrays of the last task end with the session
        self.put_back(booster)
        self.session.finish(
            export=lambda folder: model.export(booster, folder),
            load=(lambda arrays: model.load(booster, model.received(arrays, self.call), self.call)) if scored else None,
        )

    def put_back(self, booster: xgboost.Booster) -> None:
        """Put the global model into the booster again if a callback has changed it, and say so."""
        if model.is_same(booster, self.loaded):
            return
        model.load(booster, self.loaded, self.call)
        print(
            "fl-adapters: a callback changed the model after the last exchange; it is the global one again",
            file=sys.stderr,
            flush=True,
        )

    def _steps(self) -> StepCount | None:
        """How far the round is; None before its first boosting round has been counted."""
        return StepCount(self.grown, self.end - self.start) if self.grown else None

    def _load_task(self, booster: xgboost.Booster, task: Task) -> None:
        self.task, self.loaded = task, model.received(task.arrays, self.call)
        model.load(booster, self.loaded, self.call)
        self.round, self.over, self.grown = task.round, task.kind == "final", 0


def check_budget(rounds: TreeRounds) -> None:
    """Raise ConfigError if a plain `xgboost.train` would stop before the last round."""
    available, needed = rounds.call.num_boost_round, rounds.session.settings.rounds
    if needed and available < needed * rounds.boosts:
        raise ConfigError(
            f"num_boost_round={available} ends before the job's {needed} rounds of {rounds.boosts} boosting rounds",
            where="xgboost.train",
            fix=f"pass num_boost_round={needed * rounds.boosts}: training stops after the last round",
        )
