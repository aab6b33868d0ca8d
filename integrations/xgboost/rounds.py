"""The rounds of one booster, whatever the mode: what goes out, what comes in, when it is over."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import xgboost

from fl_adapters.adapter import Snapshot
from fl_adapters.participant.local_result import LocalResult
from fl_adapters.participant.session import Session
from fl_runtime.aggregation.trees.document import TreeModel
from fl_runtime.aggregation.trees.strategies import ENCODING
from fl_runtime.errors import ConfigError
from fl_runtime.types import Arrays, Metrics, Task, Terms

from . import model
from .call import Mode, TrainCall, agreement

FRAMEWORK = "xgboost"


class TreeRounds:
    """Where one training stands in its run.

    boosts: boosting rounds between two exchanges. rounds: of the run. round: the one under way. over: the final model
    has arrived. task, loaded: what came last, valid until the next exchange. Iterations are counted over all rounds,
    from 0, in those that this run adds.
    """

    def __init__(self, session: Session, call: TrainCall, mode: Mode) -> None:
        self.session, self.call, self.mode = session, call, mode
        every = session.settings.every
        self.boosts = every.epochs or every.steps or 1
        self.rounds, self.round, self.over = 0, 0, False
        self.first = 0  # boosting rounds of `xgb_model`
        self.loaded = TreeModel({})
        self.task: Task | None = None

    @property
    def strategy(self) -> str:
        return f"tree-{self.mode}"

    @property
    def begun(self) -> int:
        """The first iteration of the round under way."""
        return (self.round - 1) * self.boosts

    @property
    def ends(self) -> int:
        """The iteration that the round under way ends before."""
        return self.end_of(self.round)

    def end_of(self, round: int) -> int:
        """The same of any round; a script's own budget may cut the last one short."""
        end = round * self.boosts
        return end if self.session.settings.rounds else min(end, self.call.num_boost_round)

    @property
    def mine(self) -> bool:
        """Whether this site adds trees in the round under way: in cyclic mode, when it is its turn."""
        assert self.task is not None
        return bool(self.task.config.get("turn", self.session.name) == self.session.name)

    @property
    def nothing(self) -> TreeModel:
        """No new trees."""
        return self.loaded.iterations(self.loaded.rounds)

    def begin(
        self,
        booster: xgboost.Booster,
        terms: Terms,
        *,
        evaluates: bool,
        more: Arrays | None = None,
        extras: Arrays | None = None,
        snapshot: Snapshot | None = None,
    ) -> None:
        """The handshake, and the first global model into the booster.

        more: what travels beside the model, empty; extras: this site's part in the initial model, beside its weight.
        snapshot: of a training that can restart exactly.
        """
        call, session = self.call, self.session
        start = model.initial_model(call)
        self.first = start.rounds
        self.rounds = session.register(
            {**model.EMPTY, **(more or {})},
            agreement=agreement(call, start) | {"every": f"{self.boosts} boosting rounds"},
            rounds=-(-call.num_boost_round // self.boosts),
            evaluates=evaluates,
            restarts=snapshot is not None,
            capabilities=frozenset([self.strategy]),
            terms=terms,
            encoding=ENCODING,
        )
        own = {**model.weight_extra(call.dtrain), **(extras or {})}
        self._take(booster, session.start(lambda: {**start.to_arrays(), **(more or {})}, own, snapshot))

    def exchange(
        self,
        booster: xgboost.Booster,
        grown: TreeModel,
        more: Arrays | None = None,
        metrics: Metrics | None = None,
    ) -> bool:
        """The end of a round: this site's new trees out, the global model into the booster.

        False where the round has come to nothing, and the model is the same as before.
        """
        call, before = self.call, self.task
        assert before is not None
        examples = call.options.num_examples or call.dtrain.num_row()
        result = LocalResult(examples, grown.rounds, metrics or {})
        task = self.session.exchange({**grown.to_arrays(), **(more or {})}, result)
        self._take(booster, task)
        return task.version != before.version

    def next_task(self, booster: xgboost.Booster) -> None:
        """Without an update: the run is known to end here."""
        self._take(booster, self.session.next_task())

    def finish(self, booster: xgboost.Booster, *, scored: bool) -> None:
        """Leave the run, writing the results where this site does so. The booster holds the final model again."""
        self.session.finish(
            export=lambda folder: model.export(booster, folder),
            load=(lambda arrays: model.load(booster, TreeModel.from_arrays(arrays), self.call)) if scored else None,
        )

    def _take(self, booster: xgboost.Booster, task: Task) -> None:
        self.task, self.loaded = task, TreeModel.from_arrays(task.arrays)
        model.load(booster, self.loaded, self.call)
        self.round, self.over = task.round, task.kind == "final"


@contextmanager
def leaving_on_error(session: Session) -> Iterator[None]:
    """An error ends this site's part in the run at once, not only when the process ends."""
    try:
        yield
    except BaseException as error:
        session.leave(f"{type(error).__name__}: {error}")
        raise


def check_budget(rounds: TreeRounds) -> None:
    """ConfigError where a plain `xgboost.train` would stop before the last round."""
    given, wanted = rounds.call.num_boost_round, rounds.session.settings.rounds
    if wanted and given < wanted * rounds.boosts:
        raise ConfigError(
            f"num_boost_round={given} ends before the job's {wanted} rounds of {rounds.boosts} boosting rounds",
            where="xgboost.train",
            fix=f"pass num_boost_round={wanted * rounds.boosts}: training stops after the last round",
        )
