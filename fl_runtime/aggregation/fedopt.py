"""Optimizers at the server: the mean of the sites' weights is not the next model but points to it.

FedAdam, FedYogi and FedAdagrad are those of Reddi et al. 2021, "Adaptive Federated Optimization", Algorithm 2; FedAvgM
is that of Hsu et al. 2019, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
Classification". All take the pseudo-gradient D = mean - x, where x is the global model of the round and the mean is
that of FedAvg, weighted by the sites' numbers of examples; `weights="equal"` counts every site once.

Moments are in float32 (float64 for float64 tensors), whatever the model's dtype. They are committed together with the
model, so a server that is killed goes on with the same bits. Integers, booleans, complex tensors, extras and the
running statistics of normalisation layers become what FedAvg makes of them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from fl_runtime.aggregation.base import WeightsStrategy, is_statistic
from fl_runtime.aggregation.fedavg import WeightedMean, accumulator_dtype, blocks
from fl_runtime.aggregation.spec import choice, number
from fl_runtime.types import Aggregator, Allocate, Array, Arrays, ServerState, Settings, Update


@dataclass(frozen=True, kw_only=True)
class ServerOptimizer(WeightsStrategy):
    """What these strategies have in common: moments by name, how they begin, and a step."""

    weights: Literal["examples", "equal"] = choice("examples", "equal")

    @property
    @abstractmethod
    def moments(self) -> Mapping[str, float]:
        """The moments of a tensor, and the value that they begin with."""

    @abstractmethod
    def step(self, delta: Array, moments: Mapping[str, Array]) -> Array:
        """What is added to x. delta: D. All flat, of one dtype; moments are updated in place; delta may be, too."""

    def aggregator(self, base: Arrays, allocate: Allocate, config: Settings, state: ServerState) -> Aggregator:
        """The mean of the round, and then the step."""
        return _Stepping(self, base, WeightedMean(allocate, equal=self.weights == "equal"), state)


@dataclass(frozen=True)
class FedAvgM(ServerOptimizer):
    """m = momentum m + D;  x' = x + lr m.  With momentum 0 and lr 1 this is FedAvg."""

    name: ClassVar[str] = "fedavgm"
    lr: float = number(1.0, above=0)
    momentum: float = number(0.9, least=0, below=1)

    @property
    def moments(self) -> Mapping[str, float]:
        """One, which begins with zero."""
        return {"m": 0.0}

    def step(self, delta: Array, moments: Mapping[str, Array]) -> Array:
        """See the class."""
        m = moments["m"]
        m *= m.dtype.type(self.momentum)
        m += delta
        step: Array = m * m.dtype.type(self.lr)
        return step


@dataclass(frozen=True)
class _Adaptive(ServerOptimizer):
    """m = beta1 m + (1 - beta1) D;  v = (see the classes);  x' = x + lr m / (sqrt(v) + tau).  v begins with tau^2."""

    lr: float = number(0.01, above=0)
    beta1: float = number(0.9, least=0, below=1)
    tau: float = number(1e-3, above=0)

    @property
    def moments(self) -> Mapping[str, float]:
        """m and v."""
        return {"m": 0.0, "v": self.tau**2}

    def step(self, delta: Array, moments: Mapping[str, Array]) -> Array:
        """See the class."""
        m, v, number_of = moments["m"], moments["v"], delta.dtype.type
        square = delta * delta
        delta *= number_of(1 - self.beta1)
        m *= number_of(self.beta1)
        m += delta
        self.second_moment(v, square)
        divisor = np.sqrt(v)
        divisor += number_of(self.tau)
        step: Array = m * number_of(self.lr)
        step /= divisor
        return step

    @abstractmethod
    def second_moment(self, v: Array, square: Array) -> None:
        """Update v, in place, with D^2, which may be written to."""


@dataclass(frozen=True)
class FedAdam(_Adaptive):
    """m = beta1 m + (1 - beta1) D;  v = beta2 v + (1 - beta2) D^2;  x' = x + lr m / (sqrt(v) + tau).

    m begins with 0 and v with tau^2; there is no correction of their bias.
    """

    name: ClassVar[str] = "fedadam"
    beta2: float = number(0.99, least=0, below=1)

    def second_moment(self, v: Array, square: Array) -> None:
        """See the class."""
        v *= v.dtype.type(self.beta2)
        square *= v.dtype.type(1 - self.beta2)
        v += square


@dataclass(frozen=True)
class FedYogi(_Adaptive):
    """FedAdam with v = v - (1 - beta2) D^2 sign(v - D^2), which changes less when gradients are sparse."""

    name: ClassVar[str] = "fedyogi"
    beta2: float = number(0.99, least=0, below=1)

    def second_moment(self, v: Array, square: Array) -> None:
        """See the class."""
        sign = np.sign(v - square)
        square *= v.dtype.type(1 - self.beta2)
        square *= sign
        v -= square


@dataclass(frozen=True)
class FedAdagrad(_Adaptive):
    """m = beta1 m + (1 - beta1) D;  v = v + D^2;  x' = x + lr m / (sqrt(v) + tau).  v begins with tau^2."""

    name: ClassVar[str] = "fedadagrad"
    lr: float = number(0.1, above=0)
    beta1: float = number(0.0, least=0, below=1)

    def second_moment(self, v: Array, square: Array) -> None:
        """See the class."""
        v += square


class _Stepping:
    """Sums like FedAvg; the result is x and a step. Block by block, so that the step needs no memory of its own."""

    def __init__(self, optimizer: ServerOptimizer, base: Arrays, mean: WeightedMean, state: ServerState) -> None:
        self._optimizer, self._base, self._mean, self._state = optimizer, base, mean, state

    def add(self, update: Update) -> None:
        self._mean.add(update)

    def result(self) -> tuple[Arrays, Arrays]:
        means = self._mean.means()
        kept = self._kept()
        for tensor, base in self._base.items():
            if _steps(tensor, base):
                moments = {name: kept[f"{name}:{tensor}"].reshape(-1) for name in self._optimizer.moments}
                if tensor in means:
                    self._step(means[tensor].reshape(-1), base.reshape(-1), moments)
        return self._mean.result()

    def _step(self, mean: Array, base: Array, moments: Mapping[str, Array]) -> None:
        """`mean` becomes x and the step."""
        for block in blocks(mean.size):
            x = base[block].astype(mean.dtype)
            mean[block] -= x
            x += self._optimizer.step(mean[block], {name: moment[block] for name, moment in moments.items()})
            mean[block] = x

    def _kept(self) -> Arrays:
        """The moments, as the last round has left them, in buffers that this round may write to."""
        begin = {
            f"{name}:{tensor}": (value, base)
            for name, value in self._optimizer.moments.items()
            for tensor, base in self._base.items()
            if _steps(tensor, base)
        }
        shapes = {key: np.broadcast_to(accumulator_dtype(a.dtype).type(v), a.shape) for key, (v, a) in begin.items()}
        kept = self._state.keep(shapes)
        for key, shape in shapes.items():
            kept[key][...] = self._state.kept.get(key, shape)
        return kept


def _steps(name: str, base: Array) -> bool:
    return accumulator_dtype(base.dtype).kind == "f" and not is_statistic(name)
