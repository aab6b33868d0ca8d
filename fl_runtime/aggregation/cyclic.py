"""The strategy `cyclic`: the model goes from site to site."""

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
    """Cyclical weight transfer: one site trains in each round, and its weights are the next global model.

    Each of n sites has rounds / n turns. A site that is away is skipped. No weights are averaged, so numbers of
    examples have no effect. Sites need no special capability.

    Source: Chang et al. 2018, "Distributed deep learning networks among institutions for medical imaging".

    Attributes:
        order: "fixed" is the job's order of sites; "shuffled" draws a new order for each lap, seeded by its number.

    Raises:
        ConfigError: If `order` is neither.
    """

    name: ClassVar[str] = "cyclic"
    partial: ClassVar[bool] = True
    weighted: ClassVar[bool] = False
    order: Literal["fixed", "shuffled"] = choice("fixed", "shuffled")

    def cohort(self, updates: int) -> int:
        """Return 1: a model is made of one site's update."""
        return min(1, updates)

    def plan_round(self, round: int, present: Sequence[str]) -> RoundPlan:
        """Send the model to the site whose turn it is."""
        if self.order == "fixed":
            return self.relay(present, round)
        lap = np.random.default_rng((round - 1) // len(present)).permutation(len(present))
        return self.relay([present[index] for index in lap], round)

    def aggregator(self, base: Arrays, allocate: Allocate, config: Settings, state: ServerState) -> Aggregator:
        """Return a weighted mean, which for one update is that update, bit for bit."""
        return WeightedMean(allocate)
