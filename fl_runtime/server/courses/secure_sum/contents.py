"""What is summed under masks: the weights of models, or the values of a call of `fl_adapters.sums`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from fl_runtime.aggregation.sums.call import Call, common_metrics
from fl_runtime.aggregation.sums.strategy import CALL, ENCODING, VALUES, check_same_call
from fl_runtime.secure_sum.ring import Ring
from fl_runtime.secure_sum.totals import ring_of_totals
from fl_runtime.secure_sum.vectors import Mean, Rings, mean_of, metric_of
from fl_runtime.server.courses.scoring import Scoring
from fl_runtime.server.models import Model
from fl_runtime.server.state import OpenRound, Pooled, RunState
from fl_runtime.types import Arrays, Metrics, Report, Update


class MaskedContent(Protocol):
    """What the masked updates of a round hold, and what their totals give."""

    def ring_of(self, name: str, update: Update) -> Ring | None:
        """Return the ring of an update's vector of this name; None if it is not masked."""
        ...

    def check(self, updates: Sequence[Update]) -> None:
        """Refuse updates that do not fit each other, before the masks of their sum are removed.

        Args:
            updates: The masked updates of the round.

        Raises:
            StateMismatchError: They do not.
        """
        ...

    def plain(self, updates: Sequence[Update], totals: Arrays) -> list[Update]:
        """Return updates without masks that have the same sum, for the strategy.

        Args:
            updates: The masked updates of the round.
            totals: Sums of the vectors that all of them have, without masks.

        Raises:
            RoundFailedError: The totals make no sense.
        """
        ...


class MaskedModels:
    """Weights, numbers of examples and metrics: their weighted mean stands for all updates. A `MaskedContent`.

    Args:
        state: The run's state.
        scoring: Takes the scores of global models.
        current: The round; it gets the means of the metrics.
        base: The global model of the round.
        told: Names of the metrics of which the run has been warned that they cannot be summed; added to.
    """

    def __init__(
        self, state: RunState, scoring: Scoring, current: OpenRound, base: Model | None, told: set[str]
    ) -> None:
        self._state, self._scoring, self._current, self._base, self._told = state, scoring, current, base, told
        self._rings = Rings.for_sites(len(state.settings.sites))

    def ring_of(self, name: str, update: Update) -> Ring | None:
        return self._rings.of(name)

    def check(self, updates: Sequence[Update]) -> None:
        """Do nothing: every update has been compared with the agreed tensors."""

    def plain(self, updates: Sequence[Update], totals: Arrays) -> list[Update]:
        assert self._base is not None
        self._tell_left_out(updates, totals)
        mean = mean_of(totals, self._base.blob.views()[0], self._rings, len(updates))
        if mean.scores:
            self._take_scores(mean, self._base.version)
        self._current.pooled = Pooled(mean.metrics, mean.num_examples, mean.local_steps)
        update = replace(
            updates[0],
            arrays=mean.arrays,
            extras={},
            content="weights",
            encoding="",
            num_examples=mean.num_examples,
            local_steps=mean.local_steps,
            metrics=mean.metrics,
        )
        return [update]

    def _take_scores(self, mean: Mean, version: int) -> None:
        """Keep the scores of the round's base model, which its evaluators have masked with their updates."""
        with self._state.lock:
            self._scoring.record(Report(self._state.settings.name, version, "", mean.scores, mean.scored), "report")
            self._scoring.settle(version)

    def _tell_left_out(self, updates: Sequence[Update], totals: Arrays) -> None:
        """Say once which metrics and scores are in no result, since not every site has sent them."""
        names = sorted({metric_of(name) for update in updates for name in update.arrays if name not in totals} - {""})
        if new := [name for name in names if name not in self._told]:
            self._told |= set(new)
            text = f"{', '.join(new[:8])} is in no result: only metrics that every site has can be summed under masks"
            self._state.events.emit("warning", self._current.round, text=text)


class MaskedValues:
    """The values of a call of `fl_adapters.sums`; what they are called is not masked. A `MaskedContent`.

    Args:
        sites: Number of sites of the job.
        current: The round; it gets the number of sites.
    """

    def __init__(self, sites: int, current: OpenRound) -> None:
        self._sites, self._current = sites, current
        self._metrics: Metrics = {}

    def ring_of(self, name: str, update: Update) -> Ring | None:
        return self._ring(update) if name == VALUES else None

    def check(self, updates: Sequence[Update]) -> None:
        check_same_call(updates)
        self._metrics = common_metrics({update.site: Call.from_array(update.arrays[CALL]) for update in updates})

    def plain(self, updates: Sequence[Update], totals: Arrays) -> list[Update]:
        """Return updates of which the first has the total as its values, and the others have zeros."""
        self._current.pooled = Pooled(self._metrics, len(updates), 0)
        total = self._ring(updates[0]).decode(totals[VALUES])
        call = replace(Call.from_array(updates[0].arrays[CALL]), metrics=()).to_array()
        zeros = np.broadcast_to(0.0, total.shape)
        return [
            replace(
                update,
                arrays={VALUES: zeros if number else total, CALL: call},
                content="encoded",
                encoding=ENCODING,
            )
            for number, update in enumerate(updates)
        ]

    def _ring(self, update: Update) -> Ring:
        return ring_of_totals(self._sites, integers=Call.from_array(update.arrays[CALL]).integers)
