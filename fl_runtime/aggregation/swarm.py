"""Swarm learning: the aggregator's role moves among the sites; the server relays what they send each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fl_runtime.aggregation.fedavg import FedAvg
from fl_runtime.capabilities import SWARM, WEIGHTS
from fl_runtime.errors import ConfigError

RECEIPT = "swarm receipt"
"""The encoding of what a site sends the server in place of an update: all that an update says, without tensors."""

_MISSING = "swarm missing "


@dataclass(frozen=True)
class Swarm(FedAvg):
    """FedAvg, whose mean one of the sites forms: x_{r+1} = sum_i n_i x_i / sum_i n_i, with the bits that `fedavg` has.

    After Warnat-Herresthal et al. 2021, "Swarm Learning for decentralized and confidential clinical machine learning",
    whose leader of a round is a site that is chosen; there over a blockchain, here by the server, in an order that the
    job's seed decides. Each site of a round sends its update to the round's aggregator, sealed, through the server,
    which cannot read it; the aggregator sends the server the mean, which is the next global model. So the server holds
    every global model, the first one included, and no site's update. Each aggregator sees the updates of its rounds.

    A round needs two sites, since the mean of one is its own update.
    """

    name: ClassVar[str] = "swarm"
    requires: ClassVar[frozenset[str]] = frozenset({WEIGHTS, SWARM})

    @property
    def linear(self) -> bool:
        """Nobody else may form the mean."""
        return False

    @property
    def relayed(self) -> bool:
        return True

    def check_sites(self, fewest: int) -> None:
        if fewest < 2:
            raise ConfigError(
                "swarm needs at least 2 sites in a round: the mean of one is that site's own update",
                where="min_sites",
                fix="raise min_sites to 2, or fraction",
            )


def in_turn(sites: Sequence[str], round: int, seed: int) -> list[str]:
    """The sites in the order in which they are asked to be the aggregator of a round: a lap in an order that the seed
    draws, from another place in every round."""
    order = [sites[index] for index in np.random.default_rng(seed).permutation(len(sites))]
    first = (round - 1) % len(order)
    return order[first:] + order[:first]


def missing(site: str) -> str:
    """The encoding of what an aggregator sends that has not got this site's update."""
    return _MISSING + site


def named_missing(encoding: str) -> str | None:
    """The site that `missing` was given; None for another encoding."""
    return encoding.removeprefix(_MISSING) if encoding.startswith(_MISSING) else None
