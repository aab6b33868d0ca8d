"""The strategy `fednova`: a mean that is not biased towards sites with more local steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np

from fl_runtime.aggregation.base import WeightsStrategy
from fl_runtime.aggregation.fedavg import WeightedMean, accumulator_dtype, blocks
from fl_runtime.aggregation.spec import choice, number
from fl_runtime.errors import UpdateRefusedError
from fl_runtime.types import Aggregator, Allocate, Array, Arrays, ServerState, Settings, Update, is_floating
from fl_runtime.types.tensor_names import is_statistic


@dataclass(frozen=True)
class FedNova(WeightsStrategy):
    """Normalised averaging: each site's change is divided by its number of local steps before averaging.

        d_i = (x_i - x) / a_i,   x' = x + (sum_i p_i a_i) sum_i p_i d_i,   p_i = n_i / sum n

    a_i is the effective number of local steps: the site's number of optimizer steps t_i (`local_steps` of the update),
    or with local momentum m, (t_i - m (1 - m^t_i) / (1 - m)) / (1 - m). With equal a_i this is FedAvg. Integers,
    booleans, extras and running statistics of normalisation layers are treated as by FedAvg. Updates must state their
    number of optimizer steps; sites need no special capability.

    Source: Wang et al. 2020, "Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization",
    section 4.

    Attributes:
        momentum: Momentum of the sites' SGD, at least 0 and below 1. Use 0 for SGD without momentum, and as an
            approximation for other optimizers.
        weights: n_i is the site's number of "examples", or 1 for every site ("equal").

    Raises:
        ConfigError: If an argument is out of range.
    """

    name: ClassVar[str] = "fednova"
    partial: ClassVar[bool] = True
    needs_steps: ClassVar[bool] = True
    momentum: float = number(0.0, least=0, below=1)
    weights: Literal["examples", "equal"] = choice("examples", "equal")

    def check(self, update: Update) -> None:
        """Refuse an update without its number of optimizer steps."""
        if update.round > 0 and update.local_steps < 1:
            raise UpdateRefusedError(
                "FedNova needs the number of local optimizer steps, but this update does not state it",
                where=f"update of {update.site}, round {update.round}",
                fix="pass it: task.submit(..., local_steps=...)",
            )

    def aggregator(self, base: Arrays, allocate: Allocate, config: Settings, state: ServerState) -> Aggregator:
        """Return an aggregator that keeps the running mean of d_i in memory, which takes the size of one model."""
        return _Normalised(self, base, allocate)

    def path(self, steps: int) -> float:
        """Return the effective number of steps a_i, by which an update is divided.

        Args:
            steps: Optimizer steps that a site made in the round.

        Returns:
            a_i; with momentum 0 it is `steps`.
        """
        m = self.momentum
        return (steps - m * (1 - m**steps) / (1 - m)) / (1 - m)


class _Normalised:
    """Averages d_i; the result is x plus the step."""

    def __init__(self, strategy: FedNova, base: Arrays, allocate: Allocate) -> None:
        self._strategy, self._base, self._allocate = strategy, base, allocate
        self._mean = WeightedMean(self._in_memory, equal=strategy.weights == "equal")
        # of every tensor, over the sites that have sent it: total weight, and weighted mean of a_i
        self._totals: dict[str, tuple[float, float]] = {}

    def add(self, update: Update) -> None:
        path = self._strategy.path(update.local_steps)
        weight = update.site_weight if self._strategy.weights == "equal" else update.weight
        for name in update.arrays:
            total, mean = self._totals.get(name, (0.0, 0.0))
            total += weight
            self._totals[name] = total, mean + (path - mean) * (weight / total)
        self._mean.add(replace(update, arrays=_Normal(update.arrays, self._base, path)))

    def result(self) -> tuple[Arrays, Arrays]:
        means, (_, extras) = self._mean.means(), self._mean.result()
        out, out_extras = self._allocate(self._base, extras)
        for name, target in out_extras.items():
            target[...] = extras[name]
        for name, mean in means.items():
            if not _is_normalised(name, mean):
                out[name][...] = mean
                continue
            target, base, flat = out[name].reshape(-1), self._base[name].reshape(-1), mean.reshape(-1)
            path = flat.dtype.type(self._totals[name][1])
            for block in blocks(flat.size):
                step = flat[block] * path
                target[block] = np.add(base[block], step, dtype=flat.dtype, casting="unsafe")
        return out, out_extras

    def _in_memory(self, arrays: Arrays, extras: Arrays) -> tuple[Arrays, Arrays]:
        wide = {name: np.empty(a.shape, accumulator_dtype(a.dtype)) for name, a in self._base.items()}
        return wide, {name: np.empty_like(a) for name, a in extras.items()}


class _Normal(Mapping[str, Array]):
    """Maps each float tensor to (x_i - x) / a_i, computed at access, and other tensors to themselves."""

    def __init__(self, arrays: Arrays, base: Arrays, path: float) -> None:
        self._arrays, self._base, self._path = arrays, base, path

    def __getitem__(self, name: str) -> Array:
        value, x = self._arrays[name], self._base[name]
        if not _is_normalised(name, x):
            return value
        wide = accumulator_dtype(x.dtype)
        step: Array = np.subtract(value, x, dtype=wide, casting="unsafe")
        step /= wide.type(self._path)
        return step

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


def _is_normalised(name: str, array: Array) -> bool:
    return is_floating(array.dtype) and not is_statistic(name)
