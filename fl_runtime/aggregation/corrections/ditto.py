"""Ditto (Li et al. 2021, "Ditto: Fair and Robust Federated Learning Through Personalization", Algorithm 1)."""

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
    """FedAvg for the global model w, and beside it a personal model v_i for each site, which never leaves it.

    In every round a site trains w as always, and then v_i for as many steps again, each with the gradient
    g + lam (v_i - w), where w is the global model that the round began with. v_i begins as the first global model.
    lam: at least 0; 0 is purely local training. The paper tries 0.05 to 2.
    """

    name: ClassVar[str] = "ditto"
    requires: ClassVar[frozenset[str]] = frozenset({WEIGHTS, PERSONAL_MODEL})
    lam: float = number(0.1, least=0)

    def configure(self, round: int, sites: Sequence[str]) -> Settings:
        """The second phase of each round."""
        return LocalTerms(personal_mu=self.lam).to_config()
