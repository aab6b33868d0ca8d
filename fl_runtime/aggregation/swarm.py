"""The strategy `swarm`: in each round another site aggregates, and the server relays encrypted updates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from fl_runtime.aggregation.fedavg import FedAvg
from fl_runtime.capabilities import SWARM, WEIGHTS
from fl_runtime.errors import ConfigError

RECEIPT = "swarm receipt"
"""`Update.encoding` of a receipt: what a site sends the server in place of an update, without tensors."""

_MISSING = "swarm missing "


@dataclass(frozen=True)
class Swarm(FedAvg):
    """FedAvg in which a site, not the server, aggregates each round. The result has the same bits as that of `fedavg`.

    The sites of a round send their updates to the round's aggregator, encrypted, through the server, which cannot read
    them. The aggregator sends the mean to the server as the next global model. So the server sees every global model,
    the initial one included, but no site's update. The aggregator of a round sees all updates of that round. The order
    of aggregators follows from the job's seed. A round needs at least two sites, since the mean of one is its update.
    Sites need the capability "swarm" and the package `cryptography`.

    Source: Warnat-Herresthal et al. 2021, "Swarm Learning for decentralized and confidential clinical machine
    learning", where a blockchain chooses the aggregator.

    Attributes:
        weights: n_i is the site's number of "examples", or 1 for every site ("equal").

    Raises:
        ConfigError: If `weights` is neither.
    """

    name: ClassVar[str] = "swarm"
    summable: ClassVar[bool] = False
    requires: ClassVar[frozenset[str]] = frozenset({WEIGHTS, SWARM})
    shows: ClassVar[Literal["", "trees", "updates"]] = "updates"

    @property
    def linear(self) -> bool:
        """Always false: no filter of the server may compute the mean."""
        return False

    @property
    def relayed(self) -> bool:
        """Always true: a site aggregates."""
        return True

    def check_sites(self, fewest: int) -> None:
        """Raise ConfigError for a quorum of fewer than two sites."""
        if fewest < 2:
            raise ConfigError(
                "swarm needs at least 2 sites in a round: the mean of one is that site's own update",
                where="min_sites",
                fix="raise min_sites to 2, or fraction",
            )


def in_turn(sites: Sequence[str], round: int, seed: int) -> list[str]:
    """Return the sites in the order in which they are asked to aggregate a round.

    Args:
        sites: The sites of the round.
        round: The round.
        seed: The job's seed, which determines one order; each round starts at the next place in it.

    Returns:
        All sites; the second is asked if the first does not aggregate, and so on.
    """
    order = [sites[index] for index in np.random.default_rng(seed).permutation(len(sites))]
    first = (round - 1) % len(order)
    return order[first:] + order[:first]


def missing(site: str) -> str:
    """Return the `Update.encoding` with which an aggregator reports that it did not get this site's update."""
    return _MISSING + site


def named_missing(encoding: str) -> str | None:
    """Return the site in an encoding that `missing` made, or None for any other encoding."""
    return encoding.removeprefix(_MISSING) if encoding.startswith(_MISSING) else None
