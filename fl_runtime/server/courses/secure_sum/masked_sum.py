"""The sum of a round's masked updates: add them, have the sites remove the masks, and make the next global model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fl_runtime.errors import RoundFailedError
from fl_runtime.secure_sum.context import context_of
from fl_runtime.secure_sum.vectors import Mean, Rings, in_all, mean_of, metric_of
from fl_runtime.server.courses.scoring import Scoring
from fl_runtime.server.courses.secure_sum.ahead import SharesAhead
from fl_runtime.server.courses.secure_sum.steps import Steps
from fl_runtime.server.courses.sums.failures import SumFailedError
from fl_runtime.server.courses.sums.summing import Summing
from fl_runtime.server.membership import Membership
from fl_runtime.server.models import Model
from fl_runtime.server.state import Accepted, OpenRound, Pooled, RunState
from fl_runtime.store.blobs import Blob
from fl_runtime.types import Array, Arrays, Report


class MaskedSum:
    """Closes a round with a secure sum. A `RoundSum`.

    Attributes:
        current: The round.
        steps: What its sites are asked for.
        base: The global model of the round.
        strategy_state: Tensors that the strategy keeps at the server beside the next model, or None.
    """

    strategy_state: Blob | None = None

    def __init__(
        self,
        state: RunState,
        membership: Membership,
        scoring: Scoring,
        current: OpenRound,
        told: set[str],
        ahead: SharesAhead | None = None,
    ) -> None:
        """Begin the sum of a round.

        Args:
            state: The run's state.
            membership: Its sites.
            scoring: Takes the scores of global models.
            current: The round.
            told: Names of the metrics of which the run has been warned that they cannot be summed; added to.
            ahead: Shares for this round that came with the updates of the round before, or None.
        """
        self.current = current
        self.steps = Steps(state, membership, current, context_of(state.settings.name, state.settings.filters), ahead)
        self.base: Model | None = state.models.newest
        self._state, self._membership, self._scoring, self._told = state, membership, scoring, told
        self._rings = Rings.for_sites(len(state.settings.sites))
        self._closing = Summing(state, membership.quorum, current)
        self._added = set[str]()
        self._totals: dict[str, Array] = {}  # of all names that any vector has

    def next_in_order(self) -> Accepted | None:
        """Go on with the steps before the sites train, and return a masked update that is not in the sum yet, if any.

        The order does not matter, since sums of whole numbers are exact.
        """
        self.steps.advance()
        return next((item for name, item in self.current.accepted.items() if name not in self._added), None)

    def add(self, accepted: Accepted) -> None:
        """Add a masked update to the totals."""
        self._added.add(accepted.update.site)
        for name, vector in accepted.update.arrays.items():
            if name in self._totals:
                self._rings.of(name).add_into(self._totals[name], vector)
            else:
                self._totals[name] = np.array(vector)

    def to_blame(self, failure: SumFailedError) -> Sequence[str]:
        """Return nobody: single updates are not known."""
        return ()

    def give_up(self) -> None:
        self._closing.give_up()

    def finish(self) -> Blob:
        """Have the survivors reveal what removes the masks, and make the next global model of the mean.

        Raises:
            RoundFailedError: Too few sites are left to remove the masks, or the totals make no sense.
        """
        order = [name for name in self._state.settings.sites if name in self.current.accepted]
        assert set(order) == self._added
        with self._state.lock:
            self.steps.ask_survivors(order)
            if self.steps.step == "agree":
                self._wait()
            self.steps.ask_shares()
            self._wait()
            if not self.steps.enough:
                raise RoundFailedError(
                    f"the masks of round {self.current.round} cannot be removed: too few sites have answered",
                    where=self._membership.reasons(),
                    fix="look at the logs of the sites that left",
                )
        mean = self._mean(order)
        self._take_scores(mean)
        self.current.pooled = Pooled(mean.metrics, mean.num_examples, mean.local_steps)
        first = self.current.accepted[order[0]].update
        update = replace(
            first,
            arrays=mean.arrays,
            extras={},
            content="weights",
            encoding="",
            num_examples=mean.num_examples,
            local_steps=mean.local_steps,
            metrics=mean.metrics,
        )
        blob = self._closing.finish_with(update)
        self.strategy_state = self._closing.strategy_state
        return blob

    def _take_scores(self, mean: Mean) -> None:
        """Keep the scores of the round's base model, which its evaluators have masked with their updates."""
        if self.base is None or not mean.scores:
            return
        with self._state.lock:
            report = Report(self._state.settings.name, self.base.version, "", mean.scores, mean.scored)
            self._scoring.record(report, "report")
            self._scoring.settle(self.base.version)

    def _wait(self) -> None:
        """Wait until every survivor has answered, and for those that do not answer for `rejoin_s`."""
        settings = self._state.settings
        self._membership.wait_until(
            lambda: self.steps.all_answered() or (self.steps.step == "reveal" and self.steps.enough), settings.rejoin_s
        )

    def _tell_left_out(self, vectors: Sequence[Arrays], common: Sequence[str]) -> None:
        """Say once which metrics and scores are in no result, since not every site has sent them."""
        names = sorted({metric_of(name) for each in vectors for name in each if name not in common} - {""})
        if new := [name for name in names if name not in self._told]:
            self._told |= set(new)
            text = f"{', '.join(new[:8])} is in no result: only metrics that every site has can be summed under masks"
            self._state.events.emit("warning", self.current.round, text=text)

    def _mean(self, order: Sequence[str]) -> Mean:
        """Remove the masks from the totals, and divide by the weight."""
        assert self.base is not None
        vectors = [self.current.accepted[name].update.arrays for name in order]
        common = in_all(vectors)
        self._tell_left_out(vectors, common)
        totals = {name: self._totals[name] for name in common}
        for part, ring in zip(self._rings.split(totals), (self._rings.tensors, self._rings.numbers), strict=True):
            self.steps.sums.unmask(part, ring)
        return mean_of(totals, self.base.blob.views()[0], self._rings, len(order))
