"""Where the time of a round goes: into training, exchange, waiting for other sites, and aggregation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean

from fl_adapters.environments.report.record import RoundRecord


@dataclass(frozen=True)
class Phases:
    """Seconds of a round as one site spends them, or means of these. They sum up to the duration of the round.

    Attributes:
        training: Seconds of training; None if not all sites have told, and then they count as exchange.
        exchange: Seconds in which model and update travel and are prepared for it.
        waiting: Seconds from the arrival of the site's update to that of the last one.
        aggregation: Seconds from the last update to the round's model.
    """

    training: float | None
    exchange: float
    waiting: float
    aggregation: float


def phases_by_site(record: RoundRecord) -> dict[str, Phases]:
    """Return where the time of a round went, for each site whose update is in the round's model.

    Args:
        record: The round.

    Returns:
        The phases by site. An update that was carried over is left out: its time began in an earlier round.
    """
    parts = {
        name: part for name, part in record.sites.items() if part.status == "used" and part.seconds <= record.seconds
    }
    last = max((part.seconds for part in parts.values()), default=0.0)
    return {
        name: Phases(part.train_s, part.seconds - (part.train_s or 0.0), last - part.seconds, record.seconds - last)
        for name, part in parts.items()
    }


def mean_phases(phases: Iterable[Phases]) -> Phases | None:
    """Return the mean of phases, or None without any.

    Args:
        phases: Phases of several sites, or of several rounds.
    """
    known = list(phases)
    if not known:
        return None
    told = [each.training for each in known if each.training is not None]
    training = fmean(told) if len(told) == len(known) else None
    rest = 0.0 if training is not None else sum(told) / len(known)
    return Phases(
        training,
        fmean(each.exchange for each in known) + rest,
        fmean(each.waiting for each in known),
        fmean(each.aggregation for each in known),
    )
