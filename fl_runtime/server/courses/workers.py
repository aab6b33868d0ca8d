"""The contract of the workers that do the work of virtual sites: orders, outcomes, and a few processes for both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fl_runtime.errors import FederationError
from fl_runtime.types import Array, Metrics, Settings

TRIES = 3
"""How many workers may die of an order before its site fails. An order that kills three would kill them all."""


@dataclass(frozen=True)
class Order:
    """One site's task of one round, for any worker.

    Attributes:
        site: Name of the site.
        index: Its place in the job's list of sites.
        round: Number of the round.
        stage: Which try at the round this is.
        config: Settings of the strategy for this round; JSON values.
    """

    site: str
    index: int
    round: int
    stage: str
    config: Settings

    def to_json(self) -> dict[str, Any]:
        """The order as JSON values, for a worker in another process."""
        return {**vars(self), "config": dict(self.config)}


@dataclass(frozen=True)
class Done:
    """An order that was carried out.

    Attributes:
        order: The order.
        payload: The updated tensors as bytes (uint8), laid out as the model's. Borrowed until `Workers.release`.
        num_examples: Weight of the update in an average.
        local_steps: Optimizer steps that the site has done.
        metrics: Metrics of the training.
        scored: Metrics and number of examples of the model that the order began with, or None if it was not scored.
    """

    order: Order
    payload: Array
    num_examples: int
    local_steps: int
    metrics: Metrics
    scored: tuple[Metrics, int] | None = None

    @classmethod
    def of(cls, order: Order, payload: Array, facts: Mapping[str, Any]) -> Done:
        """The outcome of an order, from the JSON values that a worker sent.

        Args:
            order: The order.
            payload: The updated tensors, as in the attribute of this name.
            facts: The remaining fields, by name.
        """
        scored = facts["scored"]
        return cls(order, payload, **{**facts, "scored": (scored[0], scored[1]) if scored else None})


@dataclass(frozen=True)
class Failed:
    """An order that failed.

    Attributes:
        order: The order.
        error: Why it failed.
    """

    order: Order
    error: FederationError


class Workers(Protocol):
    """A few processes that carry out orders. Used by one thread."""

    @property
    def room(self) -> int:
        """How many more orders would be begun at once."""
        ...

    def publish(self, file: Path, payload: Array) -> None:
        """Set the model that all orders from now on begin with.

        Args:
            file: A file that ends with the model's tensors.
            payload: The same tensors as bytes (uint8), mapped from that file; borrowed until the next call.
        """
        ...

    def give(self, order: Order) -> None:
        """Have a worker carry out an order.

        Args:
            order: The order. It is begun at once if `room` is not 0.
        """
        ...

    def wait(self, timeout_s: float) -> Sequence[Done | Failed]:
        """Wait until at least one order has been carried out or has failed.

        Args:
            timeout_s: How long to wait, in seconds.

        Returns:
            The outcomes that have not been returned before; none after the timeout.
        """
        ...

    def release(self, done: Done) -> None:
        """Reuse the buffer of an outcome whose payload is not needed any more.

        Args:
            done: The outcome.
        """
        ...

    def drop(self) -> None:
        """Give up the orders under way; `wait` returns none of them."""
        ...
