"""Workers for virtual sites as Ray actors, on this machine or on a cluster. Ray's object store carries the tensors.

Ray pickles the messages between its own processes, which belong to one user and cluster. A function that is passed as
an object travels that way too. None of this reaches the wire of a federation.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fl_adapters.environments.virtual.function import (
    InitialWeights,
    OrderRunner,
    RunInfo,
    SiteFunction,
    initial_weights,
    load,
)
from fl_runtime.errors import ConfigError, FederationError, SiteFailedError
from fl_runtime.server.courses.workers import TRIES, Done, Failed, Order
from fl_runtime.types import Array, Arrays
from fl_runtime.wire.manifest import Manifest


class _RayActor:
    """The Ray actor that runs in each worker."""

    def __init__(self, app: str, function: SiteFunction | None) -> None:
        self._app, self._function = app, function
        self._initial: InitialWeights | None = None
        self._worker: OrderRunner | None = None

    def ready(self) -> dict[str, str]:
        """Load the function. Returns the fields of the error if that fails, else an empty dict."""
        try:
            if self._function is None:
                self._function, self._initial = load(self._app)
        except FederationError as error:
            return error.to_wire()
        return {}

    def initial(self) -> dict[str, Any]:
        try:
            return {"arrays": dict(initial_weights(self._initial))}
        except FederationError as error:
            return {"failed": error.to_wire()}

    def begin(self, info: RunInfo) -> None:
        assert self._function is not None
        self._worker = OrderRunner(self._function, info)

    def work(self, order: dict[str, Any], model: Array) -> tuple[dict[str, Any], Array]:
        assert self._worker is not None
        out = np.empty_like(model)
        try:
            return self._worker.work(order, model, out), out
        except FederationError as error:
            return {"failed": error.to_wire()}, out[:0]


@dataclass
class _PendingOrder:
    """An order that an actor works on, and the reference to the tensors of its update."""

    order: Order
    actor: Any
    tensors: Any


class RayWorkers:
    """Ray actors as workers; implements `fl_runtime.server.courses.workers.Workers`.

    An actor that dies is replaced, and its order is run again. Joins the cluster that Ray's own environment variables
    name, else starts one on this machine.

    Args:
        app: Name of the function, such as `train.py:train`; unused with `function`.
        function: The function itself, or None to import `app` in each worker.
        count: Number of workers; None starts one for every CPU of the cluster.

    Raises:
        ConfigError: Ray is not installed.
        FederationError: A worker cannot load the function.
    """

    def __init__(self, app: str, function: SiteFunction | None, count: int | None) -> None:
        try:
            import ray
        except ImportError:
            raise ConfigError(
                'engine="ray" needs Ray', where="Simulation(engine=)", fix='pip install "fl-adapters[ray]"'
            ) from None
        self._ray: Any = ray
        self._ours = not ray.is_initialized()
        if self._ours:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a simulation must not send usage reports unasked
            ray.init(include_dashboard=False, log_to_driver=False)
        self._make: Callable[[], Any] = lambda: self._ray.remote(num_cpus=1)(_RayActor).remote(app, function)
        self._info: RunInfo | None = None
        self._model: Any = None
        self._pending: dict[Any, _PendingOrder] = {}
        self._again: list[Order] = []
        self._deaths: Counter[tuple[str, int]] = Counter()
        self._starting: dict[Any, Any] = {}
        workers = count or int(ray.cluster_resources().get("CPU", 1))
        self._free: list[Any] = [self._make() for _ in range(max(workers, 1))]
        try:
            for actor in self._free:
                self._check(actor.ready.remote())
        except BaseException:
            self.close()
            raise

    def initial(self) -> Arrays:
        """Initial weights as the function's module returns them in a worker. Raises the worker's error."""
        try:
            answer = self._ray.get(self._free[0].initial.remote())
        except self._ray.exceptions.RayError as error:
            raise _explained(error, "before round 1") from error
        if "failed" in answer:
            raise FederationError.from_wire(answer["failed"])
        arrays: Arrays = answer["arrays"]
        return arrays

    def begin(self, info: RunInfo, manifest: Manifest) -> None:
        """Tell all workers about the run, before the first order."""
        self._info = info
        for actor in self._free:
            actor.begin.remote(info)

    @property
    def room(self) -> int:
        return max(len(self._free) - len(self._again), 0)

    def publish(self, file: Path, payload: Array) -> None:
        self._model = self._ray.put(np.array(payload))

    def give(self, order: Order) -> None:
        actor = self._free.pop()
        facts, tensors = actor.work.options(num_returns=2).remote(order.to_json(), self._model)
        self._pending[facts] = _PendingOrder(order, actor, tensors)

    def wait(self, timeout_s: float) -> list[Done | Failed]:
        ready, _ = self._ray.wait([*self._pending, *self._starting], timeout=timeout_s)
        outcomes: list[Done | Failed] = []
        for reference in ready:
            if reference in self._starting:
                actor = self._starting.pop(reference)
                self._check(reference)
                actor.begin.remote(self._info)
                self._free.append(actor)
            else:
                outcomes += self._outcome(reference, self._pending.pop(reference))
        while self._again and self._free:
            self.give(self._again.pop())
        return outcomes

    def release(self, done: Done) -> None:
        """Do nothing: Ray frees a payload when the last reference to it is gone."""

    def drop(self) -> None:
        self._again.clear()
        for pending in self._pending.values():
            self._replace(pending.actor)
        self._pending.clear()

    def close(self) -> None:
        """End the actors, and the Ray cluster if this object started it."""
        for actor in [*self._free, *self._starting.values(), *(pending.actor for pending in self._pending.values())]:
            self._ray.kill(actor)
        if self._ours:
            self._ray.shutdown()

    def _outcome(self, reference: Any, pending: _PendingOrder) -> list[Done | Failed]:
        order = pending.order
        try:
            facts = self._ray.get(reference)
            payload = self._ray.get(pending.tensors)
        except self._ray.exceptions.RayError as error:
            return self._lost(pending, error)
        self._free.append(pending.actor)
        if "failed" in facts:
            return [Failed(order, FederationError.from_wire(facts["failed"]))]
        return [Done.of(order, payload, facts)]

    def _lost(self, pending: _PendingOrder, error: Exception) -> list[Done | Failed]:
        order = pending.order
        self._replace(pending.actor)
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
        """Raise the error of an actor that cannot load the function."""
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
        fix="see Ray's logs, and check the function for what ends its process",
    )
