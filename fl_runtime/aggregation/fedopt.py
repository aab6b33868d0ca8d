"""Server optimizers: `fedavgm`, `fedadam`, `fedyogi` and `fedadagrad`.

The server treats D = mean - x as a gradient, with x the global model of the round and the mean that of FedAvg, and
takes an optimizer step from x.

Moments are kept in float32 (float64 for float64 tensors), whatever the model's dtype. They are committed together with
the model, so a killed server continues with the same bits. Integers, booleans, complex tensors, extras and running
statistics of normalisation layers are treated as by FedAvg.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from fl_runtime.aggregation.base import WeightsStrategy
from fl_runtime.aggregation.fedavg import WeightedMean, accumulator_dtype, blocks
from fl_runtime.aggregation.spec import choice, number
from fl_runtime.types import Aggregator, Allocate, Array, Arrays, ServerState, Settings, Update
from fl_runtime.types.tensor_names import is_statistic


@dataclass(frozen=True, kw_only=True)
class ServerOptimizer(WeightsStrategy):
    """Base of the server optimizers. A subclass adds `name`, `moments` and `change`.

    Attributes:
        weights: The mean is weighted by numbers of "examples", or all sites count the same ("equal").
    """

    partial: ClassVar[bool] = True
    summable: ClassVar[bool] = True
    weights: Literal["examples", "equal"] = choice("examples", "equal")

    @property
    @abstractmethod
    def moments(self) -> Mapping[str, float]:
        """Names of the moments of a tensor, and their initial values."""

    @abstractmethod
    def change(self, delta: Array, moments: Mapping[str, Array]) -> Array:
        """Compute the step of one block of a tensor.

        Args:
            delta: D, flat; may be written to.
            moments: The moments by name, flat and of the same dtype; updated in place.

        Returns:
            The array to add to x.
        """

    def aggregator(self, base: Arrays, allocate: Allocate, config: Settings, state: ServerState) -> Aggregator:
        """Return an aggregator that averages the updates and takes the step."""
        return _Stepping(self, base, WeightedMean(allocate, equal=self.weights == "equal"), state)


@dataclass(frozen=True)
class FedAvgM(ServerOptimizer):
    """Server momentum: m = momentum m + D;  x' = x + lr m.  With momentum 0 and lr 1 this is FedAvg.

    Sites need no special capability.

    Source: Hsu et al. 2019, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
    Classification".

    Attributes:
        lr: Learning rate of the server, greater than 0.
        momentum: At least 0 and below 1.
        weights: The mean is weighted by numbers of "examples", or all sites count the same ("equal").

    Raises:
        ConfigError: If an argument is out of range.
    """

    name: ClassVar[str] = "fedavgm"
    lr: float = number(1.0, above=0)
    momentum: float = number(0.9, least=0, below=1)

    @property
    def moments(self) -> Mapping[str, float]:
        """The momentum m, initially 0."""
        return {"m": 0.0}

    def change(self, delta: Array, moments: Mapping[str, Array]) -> Array:
        """Compute lr m, see `ServerOptimizer.change`."""
        m = moments["m"]
        m *= m.dtype.type(self.momentum)
        m += delta
        step: Array = m * m.dtype.type(self.lr)
        return step


@dataclass(frozen=True)
class _Adaptive(ServerOptimizer):
    """Base of the adaptive server optimizers: x' = x + lr m / (sqrt(v) + tau), with m = beta1 m + (1 - beta1) D."""

    lr: float = number(0.01, above=0)
    beta1: float = number(0.9, least=0, below=1)
    tau: float = number(1e-3, above=0)

    @property
    def moments(self) -> Mapping[str, float]:
        """The moments m, initially 0, and v, initially tau^2."""
        return {"m": 0.0, "v": self.tau**2}

    def change(self, delta: Array, moments: Mapping[str, Array]) -> Array:
        """Compute lr m / (sqrt(v) + tau), see `ServerOptimizer.change`."""
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
        """Update v in place.

        Args:
            v: The second moment of a block.
            square: D^2 of the block; may be written to.
        """


@dataclass(frozen=True)
class FedAdam(_Adaptive):
    """Adam at the server, without bias correction.

        m = beta1 m + (1 - beta1) D,   v = beta2 v + (1 - beta2) D^2,   x' = x + lr m / (sqrt(v) + tau)

    m is initially 0 and v tau^2. Sites need no special capability.

    Source: Reddi et al. 2021, "Adaptive Federated Optimization", algorithm 2.

    Attributes:
        lr: Learning rate of the server, greater than 0.
        beta1: Decay of the first moment, at least 0 and below 1.
        beta2: Decay of the second moment, at least 0 and below 1.
        tau: Degree of adaptivity, in the unit of the weights, greater than 0.
        weights: The mean is weighted by numbers of "examples", or all sites count the same ("equal").

    Raises:
        ConfigError: If an argument is out of range.
    """

    name: ClassVar[str] = "fedadam"
    beta2: float = number(0.99, least=0, below=1)

    def second_moment(self, v: Array, square: Array) -> None:
        """Update v, see the formula of the class."""
        v *= v.dtype.type(self.beta2)
        square *= v.dtype.type(1 - self.beta2)
        v += square


@dataclass(frozen=True)
class FedYogi(_Adaptive):
    """FedAdam with v = v - (1 - beta2) D^2 sign(v - D^2), which changes less when gradients are sparse.

    Sites need no special capability. Source: Reddi et al. 2021, "Adaptive Federated Optimization", algorithm 2.

    Attributes:
        lr: Learning rate of the server, greater than 0.
        beta1: Decay of the first moment, at least 0 and below 1.
        beta2: Rate of change of the second moment, at least 0 and below 1.
        tau: Degree of adaptivity, in the unit of the weights, greater than 0.
        weights: The mean is weighted by numbers of "examples", or all sites count the same ("equal").

    Raises:
        ConfigError: If an argument is out of range.
    """

    name: ClassVar[str] = "fedyogi"
    beta2: float = number(0.99, least=0, below=1)

    def second_moment(self, v: Array, square: Array) -> None:
        """Update v, see the formula of the class."""
        sign = np.sign(v - square)
        square *= v.dtype.type(1 - self.beta2)
        square *= sign
        v -= square


@dataclass(frozen=True)
class FedAdagrad(_Adaptive):
    """Adagrad at the server: m = beta1 m + (1 - beta1) D;  v = v + D^2;  x' = x + lr m / (sqrt(v) + tau).

    m is initially 0 and v tau^2. Sites need no special capability.

    Source: Reddi et al. 2021, "Adaptive Federated Optimization", algorithm 2.

    Attributes:
        lr: Learning rate of the server, greater than 0.
        beta1: Decay of the first moment, at least 0 and below 1.
        tau: Degree of adaptivity, in the unit of the weights, greater than 0.
        weights: The mean is weighted by numbers of "examples", or all sites count the same ("equal").

    Raises:
        ConfigError: If an argument is out of range.
    """

    name: ClassVar[str] = "fedadagrad"
    lr: float = number(0.1, above=0)
    beta1: float = number(0.0, least=0, below=1)

    def second_moment(self, v: Array, square: Array) -> None:
        """Update v, see the formula of the class."""
        v += square


class _Stepping:
    """Averages like FedAvg, then takes the step, block by block, so that it needs no further memory."""

    def __init__(self, optimizer: ServerOptimizer, base: Arrays, mean: WeightedMean, state: ServerState) -> None:
        self._optimizer, self._base, self._mean, self._state = optimizer, base, mean, state

    def add(self, update: Update) -> None:
        self._mean.add(update)

    def result(self) -> tuple[Arrays, Arrays]:
        means = self._mean.means()
        stored = self._moments()
        for tensor, base in self._base.items():
            if _steps(tensor, base):
                moments = {name: stored[f"{name}:{tensor}"].reshape(-1) for name in self._optimizer.moments}
                if tensor in means:
                    self._step(means[tensor].reshape(-1), base.reshape(-1), moments)
        return self._mean.result()

    def _step(self, mean: Array, base: Array, moments: Mapping[str, Array]) -> None:
        """Replace `mean` by x plus the step."""
        for block in blocks(mean.size):
            x = base[block].astype(mean.dtype)
            mean[block] -= x
            x += self._optimizer.change(mean[block], {name: moment[block] for name, moment in moments.items()})
            mean[block] = x

    def _moments(self) -> Arrays:
        """Return the moments of the last round, in arrays that are committed with the next model."""
        begin = {
            f"{name}:{tensor}": (value, base)
            for name, value in self._optimizer.moments.items()
            for tensor, base in self._base.items()
            if _steps(tensor, base)
        }
        shapes = {key: np.broadcast_to(accumulator_dtype(a.dtype).type(v), a.shape) for key, (v, a) in begin.items()}
        moments = self._state.allocate_next(shapes)
        for key, shape in shapes.items():
            moments[key][...] = self._state.previous.get(key, shape)
        return moments


def _steps(name: str, base: Array) -> bool:
    return accumulator_dtype(base.dtype).kind == "f" and not is_statistic(name)
