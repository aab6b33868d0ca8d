"""The workers of virtual sites as Ray actors, on this machine or on a cluster. Ray's object store carries the tensors.

Ray moves its own messages with pickle, between processes of the same user and cluster; a function that is given as an
object travels that way too. Nothing of it reaches a federation's wire.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fl_adapters.environments.virtual.function import First, Function, Place, Worker, first_weights, load
from fl_runtime.errors import ConfigError, FederationError, SiteFailedError
from fl_runtime.server.courses.virtual import TRIES, Done, Failed, Order
from fl_runtime.types import Array, Arrays
from fl_runtime.wire.manifest import Manifest


class _Actor:
    """In the worker."""

    def __init__(self, app: str, function: Function | None) -> None:
        self._app, self._function = app, function
        self._initial: First | None = None
        self._worker: Worker | None = None

    def ready(self) -> dict[str, str]:
        """The error of a function that cannot be had, else nothing."""
        try:
            if self._function is None:
                self._function, self._initial = load(self._app)
        except FederationError as error:
            return error.to_wire()
        return {}

    def initial(self) -> dict[str, Any]:
        try:
            return {"arrays": dict(first_weights(self._initial))}
        except FederationError as error:
            return {"failed": error.to_wire()}

    def begin(self, place: Place) -> None:
        assert self._function is not None
        self._worker = Worker(self._function, place)

    def work(self, order: dict[str, Any], model: Array) -> tuple[dict[str, Any], Array]:
        assert self._worker is not None
        out = np.empty_like(model)
        try:
            return self._worker.work(order, model, out), out
        except FederationError as error:
            return {"failed": error.to_wire()}, out[:0]


@dataclass
class _Under:
    """An order under way: whose it is, and where its tensors will be."""

    order: Order
    actor: Any
    tensors: Any


class RayWorkers:
    """See fl_runtime.server.courses.virtual.Workers. An actor that dies is replaced, and its order given out again."""

    def __init__(self, app: str, function: Function | None, count: int | None) -> None:
        """count: None takes a worker for every CPU that Ray has. Joins the cluster that Ray's own environment variables
        name, else starts one on this machine. ConfigError without Ray."""
        try:
            import ray
        except ImportError:
            raise ConfigError(
                'engine="ray" needs Ray', where="Simulation(engine=)", fix='pip install "fl-adapters[ray]"'
            ) from None
        self._ray: Any = ray
        self._ours = not ray.is_initialized()
        if self._ours:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a simulation calls nobody unasked
            ray.init(include_dashboard=False, log_to_driver=False)
        self._make: Callable[[], Any] = lambda: self._ray.remote(num_cpus=1)(_Actor).remote(app, function)
        self._place: Place | None = None
        self._model: Any = None
        self._under: dict[Any, _Under] = {}
        self._again: list[Order] = []
        self._deaths: Counter[tuple[str, int]] = Counter()
        self._starting: dict[Any, Any] = {}
        found = count or int(ray.cluster_resources().get("CPU", 1))
        self._free: list[Any] = [self._make() for _ in range(max(found, 1))]
        try:
            for actor in self._free:
                self._check(actor.ready.remote())
        except BaseException:
            self.close()
            raise

    def initial(self) -> Arrays:
        """The first weights, as the function's module gives them in a worker."""
        try:
            found = self._ray.get(self._free[0].initial.remote())
        except self._ray.exceptions.RayError as error:
            raise _explained(error, "before round 1") from error
        if "failed" in found:
            raise FederationError.from_wire(found["failed"])
        arrays: Arrays = found["arrays"]
        return arrays

    def begin(self, place: Place, manifest: Manifest) -> None:
        """Before the first order: what the workers need to know."""
        self._place = place
        for actor in self._free:
            actor.begin.remote(place)

    @property
    def room(self) -> int:
        return max(len(self._free) - len(self._again), 0)

    def publish(self, file: Path, payload: Array) -> None:
        self._model = self._ray.put(np.array(payload))

    def give(self, order: Order) -> None:
        actor = self._free.pop()
        facts, tensors = actor.work.options(num_returns=2).remote(order.to_json(), self._model)
        self._under[facts] = _Under(order, actor, tensors)

    def wait(self, timeout_s: float) -> list[Done | Failed]:
        ready, _ = self._ray.wait([*self._under, *self._starting], timeout=timeout_s)
        found: list[Done | Failed] = []
        for reference in ready:
            if reference in self._starting:
                actor = self._starting.pop(reference)
                self._check(reference)
                actor.begin.remote(self._place)
                self._free.append(actor)
            else:
                found += self._outcome(reference, self._under.pop(reference))
        while self._again and self._free:
            self.give(self._again.pop())
        return found

    def release(self, done: Done) -> None:
        """Ray counts references to it."""

    def drop(self) -> None:
        self._again.clear()
        for under in self._under.values():
            self._replace(under.actor)
        self._under.clear()

    def close(self) -> None:
        """End the actors, and Ray where it was started here."""
        for actor in [*self._free, *self._starting.values(), *(under.actor for under in self._under.values())]:
            self._ray.kill(actor)
        if self._ours:
            self._ray.shutdown()

    def _outcome(self, reference: Any, under: _Under) -> list[Done | Failed]:
        order = under.order
        try:
            facts = self._ray.get(reference)
            payload = self._ray.get(under.tensors)
        except self._ray.exceptions.RayError as error:
            return self._lost(under, error)
        self._free.append(under.actor)
        if "failed" in facts:
            return [Failed(order, FederationError.from_wire(facts["failed"]))]
        return [Done.of(order, payload, facts)]

    def _lost(self, under: _Under, error: Exception) -> list[Done | Failed]:
        order = under.order
        self._replace(under.actor)
        self._deaths[order.site, order.round] += 1
        if self._deaths[order.site, order.round] == TRIES:
            return [Failed(order, _explained(error, f"at {order.site} in round {order.round}, {TRIES} times"))]
        self._again.append(order)
        return []

    def _replace(self, actor: Any) -> None:
        self._ray.kill(actor)
        fresh = self._make()
        self._starting[fresh.ready.remote()] = fresh

    def _check(self, ready: Any) -> None:
        """Raises the error of an actor that cannot have the function."""
        try:
            error = self._ray.get(ready)
        except self._ray.exceptions.RayError as failed:
            raise _explained(failed, "before it was ready") from failed
        if error:
            raise FederationError.from_wire(error)


def _explained(error: Exception, when: str) -> SiteFailedError:
    return SiteFailedError(
        f"a worker of Ray died {when}: {type(error).__name__}",
        where=str(error).strip()[-1000:],
        fix="look at Ray's logs, and at what the function does there",
    )
