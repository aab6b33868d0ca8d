"""FedProx (Li et al. 2020, "Federated Optimization in Heterogeneous Networks", Algorithm 2)."""

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
    """Each site minimises F_i(w) + mu/2 ||w - w_global||^2 in place of F_i(w); the server averages as FedAvg does.

    At the site, every gradient g of the loss becomes g + mu (w - w_global) before the optimizer's step. Parameters
    that do not travel have no global counterpart and keep their gradient. mu: at least 0, which is FedAvg; the paper
    tries 0.001, 0.01, 0.1 and 1. Unlike the paper's sampling of sites, the mean is weighted by `weights`.
    """

    name: ClassVar[str] = "fedprox"
    requires: ClassVar[frozenset[str]] = frozenset({WEIGHTS, GRADIENT_CORRECTION})
    mu: float = number(0.01, least=0)

    def configure(self, round: int, sites: Sequence[str]) -> Settings:
        """The proximal term."""
        return LocalTerms(proximal_mu=self.mu).to_config()
