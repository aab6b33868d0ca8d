"""FedBuff (Nguyen et al. 2022, "Federated Learning with Buffered Asynchronous Aggregation", Algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from fl_runtime.aggregation.base import WeightsStrategy, is_statistic
from fl_runtime.aggregation.fedavg import accumulator_dtype, blocks
from fl_runtime.aggregation.spec import choice, number
from fl_runtime.errors import ConfigError, UpdateRefusedError
from fl_runtime.types import Aggregator, Allocate, Array, Arrays, RoundPlan, ServerState, Settings, Update, is_floating


@dataclass(frozen=True)
class FedBuff(WeightsStrategy):
    """x' = x + lr sum_i w_i s(t_i) D_i / sum_i w_i over k updates,  D_i = x_i - x_(b_i),  s(t) = (1 + t)^-staleness.

    Sites never wait for each other: each gets the newest model as soon as it has sent an update, for `rounds` updates
    in all. b_i is the version that an update began with, and t_i how many versions have been made since. A version is
    made of every k updates, in the order in which they came, whoever sent them; the last of what is left. The run ends
    when all sites have sent their last or are gone.

    weights: w_i is 1 ("equal", as in the paper) or the site's number of "examples". Running statistics of normalisation
    layers step towards the sites', D_i = x_i - x; integers and booleans become the maximum. Results depend on the
    order of arrival: this is the one strategy whose runs do not repeat bit for bit.
    """

    name: ClassVar[str] = "fedbuff"
    k: int = number(2, least=1)
    lr: float = number(1.0, above=0)
    staleness: float = number(0.5, least=0)
    weights: Literal["equal", "examples"] = choice("equal", "examples")

    @property
    def buffer(self) -> int | None:
        """k."""
        return self.k

    def check(self, update: Update) -> None:
        """No extras: there is no round in which all have the same."""
        if update.extras:
            raise UpdateRefusedError(
                f"FedBuff takes no tensors beside the weights, such as {next(iter(update.extras))}",
                where=f"update of {update.site}, round {update.round}",
                fix='use optimizer_state="keep" or "reset"',
            )

    def plan_round(self, round: int, present: Sequence[str]) -> RoundPlan:
        """There are no rounds of all."""
        raise ConfigError("FedBuff has no rounds", fix="use it with a server that buffers")

    def aggregator(self, base: Arrays, allocate: Allocate, config: Settings, state: ServerState) -> Aggregator:
        """For updates of content "delta", D_i; config["version"] is that of `base`."""
        return _Buffered(self, base, allocate, int(config["version"]))

    def share(self, update: Update, version: int) -> tuple[float, float]:
        """(w_i, s(t_i)) of an update for the model that follows `version`."""
        weight = update.site_weight if self.weights == "equal" else update.weight
        return weight, (1.0 + max(version - update.base_version, 0)) ** -self.staleness


class _Buffered:
    """Holds the updates of a buffer, which lie in files of the server."""

    def __init__(self, strategy: FedBuff, base: Arrays, allocate: Allocate, version: int) -> None:
        self._strategy, self._base, self._allocate, self._version = strategy, base, allocate, version
        self._updates: list[Update] = []

    def add(self, update: Update) -> None:
        self._updates.append(update)

    def result(self) -> tuple[Arrays, Arrays]:
        out, extras = self._allocate(self._base, {})
        shares = [self._strategy.share(update, self._version) for update in self._updates]
        total = sum(weight for weight, _ in shares)
        factors = [self._strategy.lr * weight * fresh / total for weight, fresh in shares]
        for name, base in self._base.items():
            flat, target = base.reshape(-1), out[name].reshape(-1)
            deltas = [update.arrays[name].reshape(-1) for update in self._updates]
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
    """The maximum of each element."""
    return np.asarray(np.max(np.stack(parts), axis=0))


def difference(name: str, value: Array, began: Array, newest: Array) -> Array:
    """D_i of a tensor: `value` is what a site has sent, `began` what it began with. In float32 or wider."""
    if not is_floating(newest.dtype):
        return value
    wide = accumulator_dtype(newest.dtype)
    from_ = newest if is_statistic(name) else began
    found: Array = np.subtract(value, from_, dtype=wide, casting="unsafe")
    return found
