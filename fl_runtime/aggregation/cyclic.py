"""Weight transfer from site to site, a workflow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from fl_runtime.aggregation.base import WeightsStrategy
from fl_runtime.aggregation.fedavg import WeightedMean
from fl_runtime.aggregation.spec import choice
from fl_runtime.types import Aggregator, Allocate, Arrays, RoundPlan, ServerState, Settings


@dataclass(frozen=True)
class Cyclic(WeightsStrategy):
    """Weight transfer from site to site: x_{r+1} = what the site of round r makes of x_r. No weights are averaged.

    Chang et al. 2018, "Distributed deep learning networks among institutions for medical imaging" (cyclical weight
    transfer). A round is one site's turn, so a job of `rounds` gives each of n sites rounds / n turns. A site that is
    away is passed over. order: "fixed" is that of the job; "shuffled" draws one for each lap, from its number.
    """

    name: ClassVar[str] = "cyclic"
    weighted: ClassVar[bool] = False
    order: Literal["fixed", "shuffled"] = choice("fixed", "shuffled")

    def plan_round(self, round: int, present: Sequence[str]) -> RoundPlan:
        """The turn of one site."""
        if self.order == "fixed":
            return self.relay(present, round)
        lap = np.random.default_rng((round - 1) // len(present)).permutation(len(present))
        return self.relay([present[index] for index in lap], round)

    def aggregator(self, base: Arrays, allocate: Allocate, config: Settings, state: ServerState) -> Aggregator:
        """The mean of one update is that update, bit for bit."""
        return WeightedMean(allocate)
