"""How much noise a privacy budget takes: from the rounds in which a site takes part, epsilon and delta."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fl_runtime.errors import PrivacyBudgetError
from fl_runtime.filters.ledger import Mechanism, PrivacyBudget, epsilon
from fl_runtime.types import Array, RunSettings, Strategy

_MOST_NOISE = 1e9
_EXACT, _SAMPLED = 1e-7, 2e-3  # how close epsilon comes to its target; distributions with sampling take long to compute


def draw_order(seed: int | None, round: int, count: int) -> Array:
    """Return the order in which the sites of a job are drawn for a round.

    Args:
        seed: The job's seed; None means 0.
        round: Number of the round.
        count: Number of sites.

    Returns:
        The sites' indices, shuffled. The first ones that are present are the sample.
    """
    return np.random.default_rng([seed or 0, round]).permutation(count)


@dataclass(frozen=True)
class Participation:
    """The rounds in which one site, or the server, is expected to release something.

    Attributes:
        rounds: Numbers of these rounds, ascending.
        most: Largest number of such rounds of any site of the job. Noise is computed for it, so that it is the same at
            all sites.
        trainings: Number of trainings of the job, each with these rounds, that share a budget.
    """

    rounds: tuple[int, ...]
    most: int
    trainings: int = 1

    @classmethod
    def every_round(cls, rounds: int, trainings: int = 1) -> Participation:
        """Return the participation in all rounds of a run.

        Args:
            rounds: Number of rounds.
            trainings: Number of trainings that share a budget.

        Returns:
            The participation.
        """
        return cls(tuple(range(1, rounds + 1)), rounds, trainings)

    def left(self, round: int) -> int:
        """Return how many releases are still to come.

        Args:
            round: The round that begins.

        Returns:
            Their number with this round, at least 1.
        """
        return max(1, sum(number >= round for number in self.rounds))


def participation(settings: RunSettings, strategy: Strategy | None = None) -> dict[str, Participation]:
    """Return the rounds in which each site takes part as long as all sites are present.

    Args:
        settings: The job's settings, with a number of rounds.
        strategy: The job's strategy; None if the sites' scripts choose it.

    Returns:
        Site name -> its participation.
    """
    rounds, sites = range(1, (settings.rounds or 0) + 1), settings.sites
    chosen: list[Sequence[str]]
    if settings.fraction < 1:
        orders = (draw_order(settings.seed, round, len(sites)) for round in rounds)
        chosen = [[sites[index] for index in order[: settings.sites_per_round]] for order in orders]
    elif strategy is None or strategy.buffer is not None:
        chosen = [sites] * len(rounds)
    else:
        chosen = [strategy.plan_round(round, sites).sites or sites for round in rounds]
    most = max(Counter(name for names in chosen for name in names).values(), default=0)
    own: dict[str, list[int]] = {name: [] for name in sites}
    for round, names in zip(rounds, chosen, strict=True):
        for name in names:
            own[name].append(round)
    return {name: Participation(tuple(numbers), most, settings.trainings or 1) for name, numbers in own.items()}


def rounded_up(value: float, digits: int = 4) -> float:
    """Round up, so that noise which a person copies is never too little.

    Args:
        value: A number above 0.
        digits: Number of significant digits.

    Returns:
        The least number of so many digits that is not below `value`.
    """
    unit = 10.0 ** (math.floor(math.log10(value)) - digits + 1)
    return float(f"{math.ceil(value / unit - 1e-9) * unit:.{digits}g}")


def noise_for(budget: PrivacyBudget, releases: int, kind: Mechanism, earlier: Sequence[Mechanism] = ()) -> float:
    """Compute the least noise with which releases stay within a budget.

    Args:
        budget: The budget.
        releases: Number of releases to come, at least 1.
        kind: The release, whose own noise does not matter.
        earlier: What has been released already, against the same budget.

    Returns:
        Standard deviation of the Gaussian noise, for a sensitivity of 1. It is too large by at most a thousandth.

    Raises:
        PrivacyBudgetError: If nothing is left of the budget.
        ConfigError: If the package `dp-accounting` is needed and not installed.
    """

    def excess(noise: float) -> float:
        """Return log(epsilon / target): at most 0 if this noise is enough."""
        coming = replace(kind, noise=noise, count=kind.count * releases)
        return math.log(max(epsilon([*earlier, coming], budget.delta), 1e-300) / budget.epsilon)

    high, above = 1.0, excess(1.0)
    low, below = high, above
    while above > 0:  # too little noise
        low, below = high, above
        high *= 2
        if high > _MOST_NOISE:
            raise PrivacyBudgetError(
                f"nothing is left of the privacy budget of epsilon {budget.epsilon:g} at delta {budget.delta:g}",
                fix="use a larger budget, or end the run here",
            )
        above = excess(high)
    while below <= 0:
        high, above = low, below
        low /= 2
        below = excess(low)
    accuracy = (
        _EXACT if kind.sampling == 1 and all(m.kind == "gaussian" and m.sampling == 1 for m in earlier) else _SAMPLED
    )
    while above < -accuracy and high - low > 1e-12 * high:
        # a line through both ends in log(noise), aimed half the accuracy beyond the target
        share = min(max((below + accuracy / 2) / (below - above), 0.1), 0.9)
        middle = math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
        if (found := excess(middle)) > 0:
            low, below = middle, found
        else:
            high, above = middle, found
    return high
