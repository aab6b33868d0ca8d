"""Rounds for virtual sites: no process of a site calls the server; it hands each site's task to one of a few workers.

Journal, sampling, strategies, sums, events and results are those of every run. What differs: an update is summed as
soon as the fixed order of the sites allows, and is neither spooled nor journaled, since nobody has been told that it is
safe. A server that is killed in a round does that round again, from the same model and with the same seeds.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fl_runtime.errors import ConfigError, FederationError, StateMismatchError
from fl_runtime.filters import placed
from fl_runtime.server.courses import reports
from fl_runtime.server.courses.rounds import Summing, begin, check_deadline, commit, follow, last_scores, open_round
from fl_runtime.server.members import Registration, check_capabilities
from fl_runtime.server.run import Run
from fl_runtime.server.state import Accepted, OpenRound
from fl_runtime.store.blobs import Blob
from fl_runtime.types import Array, Arrays, Metrics, Report, RunSettings, Settings, Strategy, Terms, Update
from fl_runtime.wire.manifest import Manifest, differences

TRIES = 3
"""Of an order whose worker died: what kills one at the same site three times will kill every other."""
_BEAT_S = 0.2  # how soon it is noticed that the run was aborted
_NOT_SPOOLED = Blob("", Manifest(()), np.empty(0, np.uint8))


@dataclass(frozen=True)
class Order:
    """One site's task of one round, for any worker. config: what the strategy says to the sites."""

    site: str
    index: int
    round: int
    stage: str
    config: Settings

    def to_json(self) -> dict[str, Any]:
        """As it is told to a worker."""
        return {**vars(self), "config": dict(self.config)}


@dataclass(frozen=True)
class Done:
    """An order that was carried out. payload: the tensors, uint8, laid out as the model's; borrowed until `release`.

    scored: (metrics, number of examples) of the model that the order began with, where the site has scored it.
    """

    order: Order
    payload: Array
    num_examples: int
    local_steps: int
    metrics: Metrics
    scored: tuple[Metrics, int] | None = None

    @classmethod
    def of(cls, order: Order, payload: Array, facts: Mapping[str, Any]) -> Done:
        """facts: the other fields, as a worker tells them: JSON values."""
        scored = facts["scored"]
        return cls(order, payload, **{**facts, "scored": (scored[0], scored[1]) if scored else None})


@dataclass(frozen=True)
class Failed:
    """An order that came to nothing, and why."""

    order: Order
    error: FederationError


class Workers(Protocol):
    """A few processes that carry out orders. Used by one thread."""

    @property
    def room(self) -> int:
        """How many orders would be begun at once."""
        ...

    def publish(self, file: Path, payload: Array) -> None:
        """The model that all orders from now on begin with: a file that ends with the payload, and the payload."""
        ...

    def give(self, order: Order) -> None: ...

    def wait(self, timeout_s: float) -> Sequence[Done | Failed]:
        """What has come back; at the latest after `timeout_s`, and then perhaps nothing."""
        ...

    def release(self, done: Done) -> None:
        """Its payload is not needed any more."""
        ...

    def drop(self) -> None:
        """Orders under way are not needed any more; nothing of them will come back."""
        ...


def check_settings(settings: RunSettings, strategy: Strategy) -> None:
    """ConfigError for what a job wants of its sites and virtual ones do not have: a budget of their own, a memory, and
    each other."""
    if not settings.rounds:
        raise ConfigError("a function has no budget of rounds", where="rounds", fix="give --rounds R or Job(rounds=R)")
    wanted = {
        "cross_site": settings.cross_site,
        "keep_local": bool(settings.keep_local),
        "optimizer_state": settings.optimizer_state not in (None, "reset"),
        f"the strategy {strategy.spec}": strategy.relayed or bool(strategy.buffer) or strategy.content != "weights",
        **{f"the filter {f['name']} at {at}": at != "server_in" for f in settings.filters if (at := placed(f).at)},
    }
    for what, there in wanted.items():
        if there:
            raise ConfigError(
                f"{what} needs sites with a process and a memory of their own, which virtual sites are not",
                where="engine",
                fix="leave it out of the job, or leave engine out and run a script at every site",
            )


def course(initial: Arrays, workers: Workers) -> Callable[[Run], None]:
    """What drives a run of virtual sites, to be given to a Server. initial: the first model, where the journal holds
    none, and the measure of all updates."""
    return lambda run: follow(run, lambda run: _course(run, initial, workers))


def _course(run: Run, initial: Arrays, workers: Workers) -> None:
    manifest = Manifest.of(initial)
    _begin(run, manifest)
    if run.model is None:
        with run.lock:
            blob = run.blobs.create("model-0", manifest)
            for name, target in blob.views()[0].items():
                target[...] = initial[name]
            run.commit_initial(blob)
    assert run.model is not None
    lines = differences(manifest, run.model.blob.manifest)
    if lines:
        raise StateMismatchError("the first weights are not those that the run began with: " + "; ".join(lines[:8]))
    assert run.rounds is not None
    while run.model.version < run.rounds:  # patience may end the run before
        _round(run, run.model.version + 1, workers)
    last_scores(run)


def _begin(run: Run, manifest: Manifest) -> None:
    """What the handshake is where all sites are one function."""
    settings = run.settings
    with run.lock:
        registration = Registration(manifest.layout, {}, {}, frozenset(), 0, False, Terms())
        for member in run.members.values():
            member.attempt, member.known, member.registration, member.gone = 1, True, registration, ""
        run.add_layout(manifest)
        if run.rounds is not None:
            return
        run.agree(Terms())
        first = next(iter(run.members))
        check_capabilities({first: registration}, f"the strategy {run.strategy.spec}", run.strategy.requires)
        assert settings.rounds is not None
        begin(run, settings.rounds, list(run.members), manifest)


def _round(run: Run, number: int, workers: Workers) -> None:
    """One round: open, hand out, sum in fixed order, commit."""
    with run.lock:
        current = open_round(run, number)
        summing = Summing(run, current)
    collecting = _Collecting(run, current, summing, workers)
    try:
        collecting.all()
        with run.lock:
            if run.scores.reported(number - 1):  # scores of the model before came with the updates
                reports.settle(run, number - 1)
        if run.rounds is not None and number > run.rounds:
            summing.give_up()
            current.accepted.clear()
            run.drop_open()
            return
        blob = summing.finish()
    except FederationError:
        summing.give_up()
        raise
    finally:
        collecting.release()
    digests = blob.manifest.digests_of_payload(blob.buffer)
    with run.lock:
        commit(run, current, blob, digests, summing.kept)


class _Collecting:
    """One round's orders and what comes back. Updates are summed in the order of the sites; those of a strategy that
    needs only their running mean are released at once, so a few buffers do for any number of sites."""

    def __init__(self, run: Run, current: OpenRound, summing: Summing, workers: Workers) -> None:
        self._run, self._current, self._summing, self._workers = run, current, summing, workers
        self._order = deque(current.participants)  # whose update is summed next
        self._here: dict[str, Done] = {}
        self._out: set[str] = set()
        self._held: list[Done] = []
        self._streams = run.strategy.linear and not run.settings.filters

    def all(self) -> None:
        """Every participant's update has been summed, or it is out; or the deadline has come, with a quorum."""
        run, current, workers = self._run, self._current, self._workers
        assert run.model is not None
        model = run.model
        workers.publish(run.blobs.path(model.blob), model.blob.buffer)
        left = deque(self._orders())
        deadline = current.began + run.settings.deadline_s
        while self._order:
            if run.error is not None:
                raise run.error
            while left and workers.room:
                order = left.popleft()
                workers.give(order)
                run.count_bytes("train", current.round, order.site, model.blob.manifest.nbytes)
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                self._late()
                return
            for found in workers.wait(min(left_s, _BEAT_S)):
                self._take(found)
            self._sum()

    def release(self) -> None:
        """The round is over: nobody reads the updates any more."""
        for done in [*self._held, *self._here.values()]:
            self._workers.release(done)
        self._held, self._here = [], {}

    def _orders(self) -> list[Order]:
        current, members = self._current, self._run.members
        return [Order(n, members[n].index, current.round, current.stage, current.config) for n in current.participants]

    def _take(self, found: Done | Failed) -> None:
        site = found.order.site
        if isinstance(found, Done):
            self._here[site] = found
            return
        run = self._run
        self._out.add(site)
        run.gone(site, f"{found.error.what}", early=True)
        if len(self._current.participants) - len(self._out) < max(run.settings.min_sites, 1):
            raise found.error

    def _sum(self) -> None:
        """What has come, as far as the order allows."""
        while self._order and (self._order[0] in self._here or self._order[0] in self._out):
            site = self._order.popleft()
            if site in self._here:
                self._add(self._here.pop(site))

    def _add(self, done: Done) -> None:
        run, current, site = self._run, self._current, done.order.site
        assert run.model is not None
        arrays, extras = run.model.blob.manifest.views(done.payload)
        update = Update(
            job=run.settings.name,
            round=current.round,
            stage=current.stage,
            site=site,
            attempt=1,
            base_version=run.model.version,
            arrays=arrays,
            extras=extras,
            num_examples=done.num_examples,
            local_steps=done.local_steps,
            metrics=done.metrics,
        )
        if done.scored is not None:
            reports.score(run, Report(run.settings.name, run.model.version, site, *done.scored), 1)
        run.strategy.check(update)
        self._summing.add(Accepted(update, _NOT_SPOOLED, b""))
        if self._streams:
            self._workers.release(done)
        else:
            self._held.append(done)
        size = len(done.payload)
        with run.lock:
            current.accepted[site] = Accepted(replace(update, arrays={}, extras={}), _NOT_SPOOLED, b"")
            current.bytes_up[site] = size
            run.emit_update(update, "used", size, current.began, current)

    def _late(self) -> None:
        """The deadline: those that are there count, if they are enough."""
        for site in list(self._order):
            if site in self._here:
                self._add(self._here.pop(site))
        check_deadline(self._run, self._current)
        self._workers.drop()
