"""Mode "histogram": all sites grow the same trees together, from gradient histograms summed over the sites."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import xgboost

from fl_adapters.participant.session import Session
from fl_runtime.aggregation.metrics.quantiles import CUTS, check_cuts
from fl_runtime.aggregation.trees.document import TreeModel
from fl_runtime.aggregation.trees.strategies import FAILED
from fl_runtime.errors import ConfigError
from fl_runtime.types import Arrays, Metrics

from .call import TrainCall
from .data import rows_of, summary
from .engine import BrokenError, Engine
from .model import learning_rate
from .rounds import TreeRounds

log = logging.getLogger(__name__)
_BROKEN = "its worker or one of its connections broke; the log of this site says how"
_CUTS: Arrays = {"cuts": np.empty(0, np.float32), "cut_ends": np.empty(0, np.int64), "levels": np.empty(0, np.int64)}


class JointTrees:
    """Grows trees from all sites' rows, in XGBoost's own collective."""

    def __init__(
        self,
        session: Session,
        call: TrainCall,
        *,
        collective_timeout_s: int,
        quantile_rows: int,
        quantile_noise: float,
    ) -> None:
        """Summarise this site's data for the bins of all sites.

        Args:
            session: This process's session.
            call: The arguments of `train`.
            collective_timeout_s: Seconds for which XGBoost waits for a silent worker.
            quantile_rows: Fewest rows that a point of the summary may stand for.
            quantile_noise: Random shift of the points, as a share of the distance to their neighbours.

        Raises:
            ConfigError: For what XGBoost's collective, or common bins, cannot do.
        """
        check(call)
        self.empty = _CUTS
        self._session, self._call = session, call
        max_bin = int(call.params.get("max_bin", 256))
        quantiles = summary(rows_of(call.dtrain), call.dtrain.feature_types, max_bin, quantile_rows, quantile_noise)
        self.extras: Arrays = quantiles.to_arrays()
        self.repeatable = False  # a new generation of workers sums in another order
        self._engine = Engine(session, call, collective_timeout_s)
        self._fresh = session.attempt > 1  # then the round may have begun without this process
        self._cuts: Arrays = {}
        self._reported_bytes = 0

    def grow(self, booster: xgboost.Booster, rounds: TreeRounds) -> TreeModel:
        """Grow trees in the running generation of workers, or in a new one.

        If it breaks, return a model that says so; the server opens the round again.
        """
        task, call = rounds.task, self._call
        assert task is not None
        members = [str(name) for name in task.config.get("members", ())]
        if not self._cuts:
            check_cuts(task.arrays, len(self.extras["levels"]))
            self._cuts = {name: np.copy(task.arrays[name]) for name in CUTS}
        fresh, self._fresh = self._fresh, False
        try:
            if fresh or self._session.name not in members:
                self._engine.end(gently=False)
                return failed(rounds.no_trees, "this site has come back in the middle of the round")
            if task.stage or not self._engine.fits(members):
                name = f"{task.round}.{task.stage or 1}"
                self._engine.begin(name, members, rounds.loaded, self._cuts)
            gradients = None if call.obj is None else self._gradients
            iterations = range(rounds.start, rounds.end)
            return self._engine.boost(iterations, learning_rate(booster), gradients, rounds.count)
        except BrokenError as error:
            self._engine.end(gently=False)
            log.warning("the round broke at this site: %s", error)
            return failed(rounds.no_trees, _BROKEN)  # the text of an error may quote data, and stays here

    def metrics(self) -> Metrics:
        """Return "tunnel_bytes": bytes that this site's streams sent in the round."""
        earlier, self._reported_bytes = self._reported_bytes, self._engine.bytes_up
        return {"tunnel_bytes": float(self._reported_bytes - earlier)}

    def close(self, *, gently: bool) -> None:
        if gently:
            self._engine.end(gently=True)
        self._engine.close()

    def _gradients(self, margins: Any, data: Any) -> Any:
        assert self._call.obj is not None
        return self._call.obj(margins, self._call.dtrain)


def failed(no_trees: TreeModel, why: str) -> TreeModel:
    """An update that reports a broken round in place of new trees."""
    learner = no_trees.head["learner"]
    head = {**no_trees.head, "learner": {**learner, "attributes": {**learner["attributes"], FAILED: why[:500]}}}
    return TreeModel(head)


def check(call: TrainCall) -> None:
    """Raise ConfigError for what XGBoost's collective, or common bins, cannot do."""
    method = call.params.get("tree_method", "hist")
    if method not in ("hist", "auto"):
        raise ConfigError(
            f"tree_method={method!r} does not use fixed bins",
            where='train(mode="histogram")',
            fix='use tree_method="hist"',
        )
    if str(call.params.get("device", "cpu")).split(":")[0] != "cpu":
        raise ConfigError(
            "GPUs communicate with each other directly, which sites cannot do",
            where='train(mode="histogram"): device',
            fix='use device="cpu", or mode="bagging"',
        )
    if call.mask_statistics:
        raise ConfigError(
            "mask_statistics would hide nothing: every site sees the statistics when histograms are summed",
            where='train(mode="histogram")',
            fix="leave it out",
        )
