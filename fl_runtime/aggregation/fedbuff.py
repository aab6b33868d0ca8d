"""The strategy `fedbuff`: buffered asynchronous aggregation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from fl_runtime.aggregation.base import WeightsStrategy
from fl_runtime.aggregation.fedavg import accumulator_dtype, blocks
from fl_runtime.aggregation.spec import choice, number
from fl_runtime.errors import ConfigError, UpdateRefusedError
from fl_runtime.types import Aggregator, Allocate, Array, Arrays, RoundPlan, ServerState, Settings, Update, is_floating
from fl_runtime.types.tensor_names import is_statistic


@dataclass(frozen=True)
class FedBuff(WeightsStrategy):
    """Buffered asynchronous aggregation: every k updates make a new global model, and sites never wait.

        x' = x + lr sum_i w_i s(t_i) D_i / sum_i w_i,   D_i = x_i - x_(b_i),   s(t) = (1 + t)^-staleness

    Sums are over the updates that have the tensor.

    b_i is the version of the global model that an update was trained from, and t_i the number of versions made since.
    Each site gets the newest model as soon as it has sent an update, and sends `rounds` updates in all. Updates count
    in the order of arrival, whichever site sent them; the last version is made of those that are left. The run ends
    when all sites have sent their last update or have left.

    For running statistics of normalisation layers D_i = x_i - x; integers and booleans become the maximum. Updates must
    not have extras. Results depend on the order of arrival, so runs do not repeat bit for bit. Sites need no special
    capability.

    Source: Nguyen et al. 2022, "Federated Learning with Buffered Asynchronous Aggregation", algorithm 1.

    Attributes:
        k: Number of updates that the server collects before it makes a new global model, at least 1.
        lr: Learning rate of the server, greater than 0.
        staleness: Exponent that discounts late updates, at least 0; 0 does not discount them.
        weights: w_i is 1 ("equal", as in the paper), or the site's number of "examples".

    Raises:
        ConfigError: If an argument is out of range.
    """

    name: ClassVar[str] = "fedbuff"
    partial: ClassVar[bool] = True
    k: int = number(2, least=1)
    lr: float = number(1.0, above=0)
    staleness: float = number(0.5, least=0)
    weights: Literal["equal", "examples"] = choice("equal", "examples")

    @property
    def buffer(self) -> int | None:
        """Number of updates the server collects before it makes a new global model."""
        return self.k

    def cohort(self, updates: int) -> int:
        """Return k, or the number of updates if it is less."""
        return min(self.k, updates)

    def check(self, update: Update) -> None:
        """Refuse extras, since sites' updates do not belong to a common round in which extras could be averaged."""
        if update.extras:
            raise UpdateRefusedError(
                f"FedBuff takes no tensors beside the weights, such as {next(iter(update.extras))}",
                where=f"update of {update.site}, round {update.round}",
                fix='use optimizer_state="keep" or "reset"',
            )

    def plan_round(self, round: int, present: Sequence[str]) -> RoundPlan:
        """Raise ConfigError, since FedBuff has no rounds."""
        raise ConfigError("FedBuff has no rounds", fix="use it with a server that buffers")

    def aggregator(self, base: Arrays, allocate: Allocate, config: Settings, state: ServerState) -> Aggregator:
        """Return an aggregator for updates with content "delta"; config["version"] is the version of `base`."""
        return _Buffered(self, base, allocate, int(config["version"]))

    def share(self, update: Update, version: int) -> tuple[float, float]:
        """Compute the weight of an update.

        Args:
            update: The update.
            version: Version of the newest global model.

        Returns:
            w_i and s(t_i).
        """
        weight = update.site_weight if self.weights == "equal" else update.weight
        return weight, (1.0 + max(version - update.base_version, 0)) ** -self.staleness


class _Buffered:
    """The aggregator of one buffer. Its updates lie in files of the server."""

    def __init__(self, strategy: FedBuff, base: Arrays, allocate: Allocate, version: int) -> None:
        self._strategy, self._base, self._allocate, self._version = strategy, base, allocate, version
        self._updates: list[Update] = []

    def add(self, update: Update) -> None:
        self._updates.append(update)

    def result(self) -> tuple[Arrays, Arrays]:
        out, extras = self._allocate(self._base, {})
        shares = [self._strategy.share(update, self._version) for update in self._updates]
        for name, base in self._base.items():
            flat, target = base.reshape(-1), out[name].reshape(-1)
            senders = [i for i, update in enumerate(self._updates) if name in update.arrays]
            if not senders:
                target[...] = flat
                continue
            total = sum(shares[i][0] for i in senders)
            factors = [self._strategy.lr * shares[i][0] * shares[i][1] / total for i in senders]
            deltas = [self._updates[i].arrays[name].reshape(-1) for i in senders]
            for block in blocks(flat.size):
                parts = [delta[block] for delta in deltas]
                target[block] = _stepped(flat[block], parts, factors) if is_floating(base.dtype) else max_of(parts)
        return out, extras


def _stepped(base: Array, deltas: list[Array], factors: list[float]) -> Array:
    total: Array = base.astype(accumulator_dtype(base.dtype))
    for factor, delta in zip(factors, deltas, strict=True):
        total += delta.astype(total.dtype) * total.dtype.type(factor)
    return total


def max_of(parts: list[Array]) -> Array:
    """Return the element-wise maximum of arrays of one shape."""
    return np.asarray(np.max(np.stack(parts), axis=0))


def difference(name: str, value: Array, start: Array, newest: Array) -> Array:
    """Compute D_i of one tensor.

    Args:
        name: Name of the tensor.
        value: The value that the site sent.
        start: The value that the site trained from.
        newest: The value in the newest global model.

    Returns:
        The difference, in float32 or wider; `value` itself for integers and booleans.
    """
    if not is_floating(newest.dtype):
        return value
    wide = accumulator_dtype(newest.dtype)
    reference = newest if is_statistic(name) else start
    delta: Array = np.subtract(value, reference, dtype=wide, casting="unsafe")
    return delta
