"""The strategy `ditto`: a global model, and a personal model for each site."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fl_runtime.aggregation.corrections.local_terms import LocalTerms
from fl_runtime.aggregation.fedavg import FedAvg
from fl_runtime.aggregation.spec import number
from fl_runtime.capabilities import PERSONAL_MODEL, WEIGHTS
from fl_runtime.types import Settings


@dataclass(frozen=True)
class Ditto(FedAvg):
    """FedAvg for the global model w, and a personal model v_i for each site, which never leaves it.

    In every round a site trains w as usual, then v_i for the same number of steps with the gradient g + lam (v_i - w),
    where w is the global model that the round began with. v_i is initially the first global model. Sites need the
    capability "personal-model".

    Source: Li et al. 2021, "Ditto: Fair and Robust Federated Learning Through Personalization", algorithm 1.

    Attributes:
        lam: Strength of the pull towards the global model, at least 0; 0 is purely local training. The paper tries 0.05
            to 2.
        weights: The mean is weighted by numbers of "examples", or all sites count the same ("equal").

    Raises:
        ConfigError: If an argument is out of range.
    """

    name: ClassVar[str] = "ditto"
    requires: ClassVar[frozenset[str]] = frozenset({WEIGHTS, PERSONAL_MODEL})
    lam: float = number(0.1, least=0)

    def configure(self, round: int, sites: Sequence[str]) -> Settings:
        """Return the setting that makes sites train a personal model."""
        return LocalTerms(personal_mu=self.lam).to_config()
