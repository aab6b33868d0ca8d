"""The strategy `fedprox`: local training with a proximal term."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fl_runtime.aggregation.corrections.local_terms import LocalTerms
from fl_runtime.aggregation.fedavg import FedAvg
from fl_runtime.aggregation.spec import number
from fl_runtime.capabilities import GRADIENT_CORRECTION, WEIGHTS
from fl_runtime.types import Settings


@dataclass(frozen=True)
class FedProx(FedAvg):
    """FedAvg in which each site minimises F_i(w) + mu/2 ||w - w_global||^2 in place of F_i(w).

    At the site, every gradient g of the loss becomes g + mu (w - w_global) before the optimizer step. Parameters that
    do not travel keep their gradient. Sites need the capability "gradient-correction".

    Source: Li et al. 2020, "Federated Optimization in Heterogeneous Networks", algorithm 2, which samples sites by
    their numbers of examples instead of weighting the mean.

    Attributes:
        mu: Strength of the proximal term, at least 0; 0 is FedAvg. The paper tries 0.001, 0.01, 0.1 and 1.
        weights: The mean is weighted by numbers of "examples", or all sites count the same ("equal").

    Raises:
        ConfigError: If an argument is out of range.
    """

    name: ClassVar[str] = "fedprox"
    requires: ClassVar[frozenset[str]] = frozenset({WEIGHTS, GRADIENT_CORRECTION})
    mu: float = number(0.01, least=0)

    def configure(self, round: int, sites: Sequence[str]) -> Settings:
        """Return the setting that adds the proximal term at the sites."""
        return LocalTerms(proximal_mu=self.mu).to_config()
