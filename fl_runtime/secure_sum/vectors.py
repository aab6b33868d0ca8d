"""What of an update is summed: its tensors and numbers as vectors of integers, and the mean that their totals give.

A site with n examples and a factor f of the job has the weight w = n f, or f where all sites count the same. It sends,
masked, w x for every tensor x, w m for every metric m, and w, n and its number of steps. The totals over the sites give
the weighted mean and nothing else. Tensors are summed in 64 bits, single numbers in 128.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from fl_runtime.errors import ConfigError, RoundFailedError, UpdateRefusedError
from fl_runtime.secure_sum.ring import Ring
from fl_runtime.types import Array, Arrays, Metrics, Report, Update, is_floating

NUMBERS = "#"
"""Start of the names of vectors that are not tensors of the model."""

COUNTS = "#counts"
"""Name of the vector of a site's weight, number of examples and number of steps. It is one, since each vector costs."""

_SCORED = "#scored"
_METRIC, _SCORE = "#metric:", "#score:"
_BOUND = 2.0**17
_MOST_WEIGHT = 2.0**24
_METRIC_BOUND = 2.0**30
_BLOCK = 2**14


@dataclass(frozen=True)
class Rings:
    """The rings in which the vectors of a run are summed.

    Attributes:
        tensors: The ring of tensors.
        numbers: The ring of single numbers.
    """

    tensors: Ring
    numbers: Ring

    @classmethod
    def for_sites(cls, sites: int) -> Rings:
        """Choose the rings in which the sum over so many sites cannot wrap around.

        Args:
            sites: Number of sites of the job.

        Returns:
            The rings. In that of tensors a mean is exact to 2^-20 or so divided by the number of examples.
        """
        return cls(
            Ring.for_sum(sites, _BOUND, sites * _MOST_WEIGHT, bits=64),
            Ring.for_sum(sites, _METRIC_BOUND, sites * _MOST_WEIGHT, bits=128),
        )

    def of(self, name: str) -> Ring:
        """Return the ring of the vector of this name."""
        return self.numbers if name.startswith(NUMBERS) else self.tensors

    def split(self, vectors: Arrays) -> tuple[dict[str, Array], dict[str, Array]]:
        """Return the tensors, and the single numbers, among vectors."""
        tensors = {name: vector for name, vector in vectors.items() if not name.startswith(NUMBERS)}
        return tensors, {name: vector for name, vector in vectors.items() if name not in tensors}


@dataclass(frozen=True)
class Mean:
    """The weighted mean of the updates of a round.

    Attributes:
        arrays: The tensors, in the dtypes of the global model.
        num_examples: Number of examples of all sites.
        local_steps: Number of optimizer steps of all sites.
        metrics: Means of the metrics that every site has.
        scores: Means of the scores of the global model of the round, weighted by validation examples; those that every
            site has.
        scored: Number of validation examples of all sites.
    """

    arrays: Arrays
    num_examples: int
    local_steps: int
    metrics: Metrics
    scores: Metrics
    scored: int


def vectors_of(
    update: Update, factor: float, rings: Rings, *, equal: bool, report: Report | None = None
) -> dict[str, Array]:
    """Return the vectors of an update, not masked yet.

    Args:
        update: The update; its arrays are weights, and borrowed.
        factor: The job's factor for the site.
        rings: The rings of the run.
        equal: Whether all sites count the same, whatever their numbers of examples.
        report: The site's scores of the global model of the round; None if it has not evaluated it.

    Returns:
        New arrays by name.

    Raises:
        UpdateRefusedError: A value or the weight is too large for the sum.
    """
    weight = factor * (1 if equal else update.num_examples)
    where = f"{update.site}, round {update.round}"
    if not 0 < weight <= _MOST_WEIGHT or update.num_examples > _MOST_WEIGHT:
        raise UpdateRefusedError(
            f"the secure sum takes at most {_MOST_WEIGHT:.0f} examples of a site, and there are {update.num_examples} "
            f"with the factor {factor:g}",
            where=where,
            fix="pass num_examples= in another unit, the same at all sites, such as batches",
        )
    vectors = {name: _encoded(name, array, weight, rings.tensors, where) for name, array in update.arrays.items()}
    counts = [weight, float(update.num_examples), float(update.local_steps)]
    numbers = {f"{_METRIC}{name}": value * weight for name, value in _summable(update.metrics).items()}
    if report is not None:
        scores = {name: value for name, value in report.metrics.items() if isinstance(value, int | float)}
        numbers |= {_SCORED: float(report.num_examples)}
        numbers |= {f"{_SCORE}{name}": value * report.num_examples for name, value in _summable(scores).items()}
    wide = {COUNTS: counts} | {name: [value] for name, value in numbers.items()}
    return vectors | {name: rings.numbers.encode(np.array(values, np.float64)) for name, values in wide.items()}


def shape_of_numbers(name: str) -> tuple[int, int]:
    """Return the shape of an encoded vector of single numbers, by its name."""
    return (3 if name == COUNTS else 1, 2)


def metric_of(name: str) -> str:
    """Return the metric whose values a vector holds, by the vector's name; "" if it is no metric."""
    return next((name[len(start) :] for start in (_METRIC, _SCORE) if name.startswith(start)), "")


def _summable(metrics: Metrics) -> Metrics:
    return {name: value for name, value in metrics.items() if abs(value) <= _METRIC_BOUND}  # neither is NaN


def _encoded(name: str, array: Array, weight: float, ring: Ring, where: str) -> Array:
    if array.dtype.kind == "c":
        raise ConfigError(
            f"{name} has complex numbers, which the secure sum does not take",
            where=where,
            fix="keep_local= leaves it out",
        )
    encoded, flat = ring.zeros(array.shape), array.reshape(-1)
    target, scale = encoded.reshape(-1).view(np.int64), weight * 2.0**ring.fraction_bits
    for start in range(0, flat.size, _BLOCK):  # a block stays in the cache for all of its steps
        wide = flat[start : start + _BLOCK].astype(np.float64)
        largest = max(wide.max(), -wide.min())
        if not largest <= _BOUND:  # True for NaN
            raise UpdateRefusedError(
                f"{name} has the value {largest:g}; the secure sum takes values up to {_BOUND:.0f}",
                where=where,
                fix="look whether the training diverges; keep_local= leaves a tensor out that is meant to be so large",
            )
        wide *= scale
        np.rint(wide, out=wide)
        np.copyto(target[start : start + _BLOCK], wide, casting="unsafe")  # it fits: `Rings.for_sites` has seen to it
    return encoded


def mean_of(totals: Arrays, like: Arrays, rings: Rings, sites: int) -> Mean:
    """Return the mean that unmasked totals give.

    Args:
        totals: The totals by name: those of the tensors, the weight, the examples and the steps.
        like: The global model, for shapes and dtypes.
        rings: The rings of the run.
        sites: Number of sites in the sum.

    Returns:
        The mean, in new arrays. Integers and booleans are the mean rounded up.

    Raises:
        RoundFailedError: The totals cannot be those of any sites.
    """
    numbers = {name: total for name, total in totals.items() if name.startswith(NUMBERS)}
    weight, examples, steps = map(float, rings.numbers.decode(numbers.pop(COUNTS)))
    decoded = {name: float(rings.numbers.decode(total)[0]) for name, total in numbers.items()}
    if not (0 < weight <= sites * _MOST_WEIGHT and 0 < examples <= sites * _MOST_WEIGHT and steps >= 0):
        raise RoundFailedError(
            f"the masked updates sum to a weight of {weight:g}, which no sites have",
            fix="a site has masked something else than it agreed on: look at the sites' logs",
        )
    arrays = {name: _mean(totals[name], array, weight, rings.tensors) for name, array in like.items() if name in totals}
    scored = decoded.get(_SCORED, 0.0)
    metrics = {metric_of(name): total / weight for name, total in decoded.items() if name.startswith(_METRIC)}
    scores = {metric_of(name): total / scored for name, total in decoded.items() if scored and name.startswith(_SCORE)}
    return Mean(arrays, round(examples), round(steps), metrics, scores, round(scored))


def _mean(total: Array, like: Array, weight: float, ring: Ring) -> Array:
    mean = ring.decode(total).reshape(like.shape) / weight
    if is_floating(like.dtype):
        return mean.astype(like.dtype)
    return np.ceil(mean - 1e-6).astype(like.dtype)


def in_all(names: Iterable[Mapping[str, object]]) -> list[str]:
    """Return the names that all of these have, in the order of the first."""
    first, *others = [list(item) for item in names]
    return [name for name in first if all(name in other for other in others)]
