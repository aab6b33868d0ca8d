"""The round loop: handshake, initial model, rounds, the last scores. One thread drives one run through it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fl_runtime.aggregation.metrics.pooling import weighted_means
from fl_runtime.errors import ConfigError, FederationError, QuorumError, RoundFailedError, StateMismatchError
from fl_runtime.filters import check_cross_site
from fl_runtime.server.courses.buffered import Buffer, next_model
from fl_runtime.server.courses.reports import evaluators, settle
from fl_runtime.server.courses.sampling import asked, opened
from fl_runtime.server.courses.swarm import Relayed
from fl_runtime.server.filtering import hand_out
from fl_runtime.server.members import check_agreement, check_capabilities
from fl_runtime.server.records.results import RoundResult
from fl_runtime.server.run import Run
from fl_runtime.server.state import Accepted, Model, OpenRound, stage_of
from fl_runtime.store.blobs import Blob
from fl_runtime.store.journal import KeptEntry, ModelEntry
from fl_runtime.store.tensorfile import read_tensors
from fl_runtime.types import CROSS_EVALUATION, EXACT_RESTART, Arrays, ServerState
from fl_runtime.wire.manifest import Manifest, differences

log = logging.getLogger(__name__)

_TRIES = 4  # at a round that comes to nothing


def drive(run: Run) -> None:
    """From where the run stands to its end, with sites that call."""
    follow(run, _course)


def follow(run: Run, course: Callable[[Run], None]) -> None:
    """A run's course to its end. Errors end the run; every waiting site gets them."""
    try:
        course(run)
    except FederationError as error:
        run.fail(error)
    except Exception as error:
        log.exception("the round loop failed")
        run.fail(FederationError(f"the server failed: {error!r}", fix="see its log; the run can be continued"))
    finally:
        run.ended.set()


def _course(run: Run) -> None:
    _handshake(run)
    _initial_model(run)
    assert run.model is not None
    assert run.rounds is not None
    if run.buffer is not None:
        _without_rounds(run, run.buffer)
    else:
        while run.model.version < run.rounds:  # a round may find that the run ends before it
            _round(run, run.model.version + 1)
    last_scores(run)
    _cross_scores(run)
    _farewell(run)


def _handshake(run: Run) -> None:
    """Wait until all sites that are not gone have registered, then compare what they registered."""
    settings = run.settings
    with run.lock:
        if run.rounds is not None:  # a continued run: the sites come back in their own time
            return

        def settled() -> bool:
            check_quorum(run, [m.name for m in run.members.values() if not m.gone], "before round 1")
            return all(m.active for m in run.members.values() if not m.gone)

        if not run.wait_until(settled, settings.deadline_s):
            check_quorum(run, [m.name for m in run.members.values() if m.active], "at the start's deadline")
        registrations = {m.name: m.registration for m in run.members.values() if m.active and m.registration}
        check_agreement(registrations, run.manifests, run.strategy)
        run.agree(next(iter(registrations.values())).terms)
        if settings.fraction < 1 and run.strategy.content == "encoded":
            raise ConfigError(
                f"the strategy {settings.strategy or run.terms.strategy} needs all sites in every round",
                where="fraction",
                fix="leave fraction out of the job",
            )
        check_capabilities(
            registrations, f"the strategy {settings.strategy or run.terms.strategy}", run.strategy.requires
        )
        if settings.cross_site:
            check_cross_site(settings.filters, run.strategy)
            check_capabilities(registrations, "cross_site", frozenset({CROSS_EVALUATION}))
        if settings.exact_restart:
            check_capabilities(registrations, "exact_restart", frozenset({EXACT_RESTART}))
        rounds = settings.rounds or max(r.rounds for r in registrations.values())
        if not rounds:
            raise ConfigError(
                "nobody says how many rounds to run: neither the job nor the training loop has a budget",
                fix="give --rounds R or Job(rounds=R)",
            )
        first = next(iter(registrations.values()))
        begin(run, rounds, list(registrations), run.manifests[first.layout])
        run.phase = "initial"
        run.published.notify_all()


def begin(run: Run, rounds: int, sites: list[str], manifest: Manifest) -> None:
    """What was agreed on, first in the journal, then for everybody. Called under the lock."""
    run.journal.agreed(rounds, run.terms)
    run.rounds = rounds
    filters: dict[str, Any] = {"filters": list(run.settings.filters)} if run.settings.filters else {}
    run.events.emit(
        "started", rounds=rounds, sites=sites, tensors=len(manifest.tensors), bytes=manifest.nbytes, **filters
    )


def _initial_model(run: Run) -> None:
    with run.lock:
        if run.model is not None:
            return
        run.phase = "initial"
        if run.settings.initial:
            _initial_from_file(run, Path(run.settings.initial))
            return
    if run.strategy.initial == "all":
        _round(run, 0)
        return
    with run.lock:

        def ready() -> bool:
            here = [m.name for m in run.members.values() if m.known and not m.gone]  # or on their way back
            check_quorum(run, here, "waiting for the initial model")
            run.published.notify_all()  # the source may have changed: another site is asked
            return run.model is not None

        if not run.wait_until(ready, run.settings.deadline_s):
            raise QuorumError(
                f"{run.initial_source()} did not send the initial model within {run.settings.deadline_s:g} s",
                fix="raise deadline_s, or give the initial weights as a file with Job(initial=)",
            )


def _initial_from_file(run: Run, path: Path) -> None:
    arrays = read_tensors(path)
    registration = next(m.registration for m in run.members.values() if m.active)
    assert registration is not None
    expected = run.manifests[registration.layout]
    if run.strategy.initial == "all":
        raise ConfigError(
            "this strategy makes its initial model of all sites' data",
            where="initial",
            fix="leave initial out of the job",
        )
    lines = differences(expected, Manifest.of(arrays))
    if lines:
        raise StateMismatchError(
            f"the initial model differs from the sites' in {len(lines)} tensors (site != file):\n    "
            + "\n    ".join(lines[:8]),
            where=str(path),
            fix="give a file with exactly the tensors that the sites exchange",
        )
    blob = run.blobs.create("model-0", Manifest(tuple(t for t in expected.tensors if not t.extra)))
    for name, target in blob.views()[0].items():
        target[...] = arrays[name]
    run.commit_initial(blob)


def _without_rounds(run: Run, buffer: Buffer) -> None:
    """Models of what comes, until nobody has anything more to send."""
    with run.lock:
        run.phase, buffer.since = "training", time.monotonic()
        if run.model is not None and run.model.version == 0:
            run.events.emit("round_started", 1, sites=[])
        run.published.notify_all()

    def ready() -> bool:
        check_quorum(run, [m.name for m in run.members.values() if m.attempt and not m.gone], "in training")
        return bool(buffer.due(run)) or buffer.finished(run)

    while True:
        with run.lock:
            in_time = run.wait_until(ready, run.settings.deadline_s)
            due = buffer.due(run) if in_time else buffer.waiting[: buffer.size]
            if not due:
                return  # all are done; or nothing has come for so long that nobody is waited for any more
        next_model(run, buffer, due)


def _round(run: Run, number: int) -> None:
    """One round: open, collect in any order, sum in fixed order, commit, tell."""
    with run.lock:
        current = open_round(run, number)
        summing = Relayed(run, current) if run.strategy.relayed else Summing(run, current)
    blob = None
    try:
        while blob is None:
            while not _collected(run, current, summing):
                pass
            if _not_needed(run, current):
                summing.give_up()
                run.drop_open()
                return
            blob = summing.finish()
    except RoundFailedError as error:
        summing.give_up()
        _again(run, current, error)
        return
    digests = blob.manifest.digests_of_payload(blob.buffer)
    with run.lock:
        commit(run, current, blob, digests, summing.kept)
        for accepted in current.accepted.values():
            freed = run.cross_site.keep(accepted) if current.round > 0 else accepted.blob
            if freed is not None:
                run.blobs.free(freed)


def _again(run: Run, current: OpenRound, error: RoundFailedError) -> None:
    """The round is opened again, with whoever is there then and has not missed the deadline; a few times."""
    failed = run.journal.repeats(current.round) + 1
    log.warning("round %s has come to nothing: %s", current.round, error.what)
    if failed == _TRIES:
        raise RoundFailedError(f"round {current.round} failed {failed} times: {error.what}", fix=error.fix)
    with run.lock:
        run.silent |= set(current.participants) - set(current.accepted)
        run.drop_open(again=failed)


def open_round(run: Run, number: int) -> OpenRound:
    """The round that the journal knows as open, or a new one for all present sites."""
    run.phase = "training"
    if run.open is None:
        enough = run.settings.min_sites
        run.wait_until(lambda: _assembled(run, enough) or _none_can_come(run), run.settings.rejoin_s)
        participants = _present(run)
        check_quorum(run, participants, f"at the start of round {number}")
        punctual = [name for name in participants if name not in run.silent]
        participants = punctual if len(punctual) >= enough else participants
        participants = asked(run.settings, run.strategy, number, participants)
        run.open = opened(run.settings, run.strategy, number, participants, stage_of(run.journal.repeats(number)))
        run.journal.round_opened(number, tuple(participants), time.time())
    hand_out(run)
    if number > 0:
        run.events.emit("round_started", number, sites=list(run.open.participants))
    run.published.notify_all()
    return run.open


class Summing:
    """Sums updates as soon as the fixed order (that of the job's sites) allows; finish() takes the rest."""

    def __init__(self, run: Run, current: OpenRound) -> None:
        self._run, self._current = run, current
        self._blob: Blob | None = None
        self.kept: Blob | None = None
        self._begin()

    def _begin(self) -> None:
        self._order, self._added = list(self._run.members), 0
        model, config = self._run.model, self._current.config
        base, extras = model.blob.views() if model else ({}, {})
        state = ServerState(extras, model.kept.views()[0] if model and model.kept else {}, self._keep)
        self._aggregator = self._run.filters.aggregator(
            lambda allocate: self._run.strategy.aggregator(base, allocate, config, state),
            base,
            self._allocate,
            linear=self._run.strategy.linear,
        )

    def next_in_order(self) -> Accepted | None:
        """The update that can be summed now (call under the lock). An absent site holds back those after it."""
        current = self._current
        while self._order and self._order[0] not in current.participants and self._order[0] not in current.accepted:
            self._order.pop(0)
        return current.accepted.get(self._order[0]) if self._order else None

    def add(self, accepted: Accepted) -> None:
        self._order.remove(accepted.update.site)
        self._added += 1
        weight = self._run.settings.site_weights.get(accepted.update.site, 1.0)
        self._aggregator.add(replace(accepted.update, site_weight=weight))

    def finish(self) -> Blob:
        """The sum of all updates; the round takes no more of them."""
        if self._added + len(self._left()) < len(self._current.accepted):
            self._begin()  # a site came back to the round after its place in the order had been passed: sum again
        for accepted in self._left():
            self.add(accepted)
        self._aggregator.result()
        assert self._blob is not None
        return self._blob

    def give_up(self) -> None:
        """The sum is not needed."""
        with self._run.lock:
            for blob in filter(None, (self._blob, self.kept)):
                self._run.blobs.free(blob)

    def _left(self) -> list[Accepted]:
        return [self._current.accepted[name] for name in self._order if name in self._current.accepted]

    def _allocate(self, arrays: Arrays, extras: Arrays) -> tuple[Arrays, Arrays]:
        manifest = Manifest.of(arrays, extras)
        with self._run.lock:
            if self._blob is not None:
                self._run.blobs.free(self._blob)
            self._run.add_layout(manifest)
            self._blob = self._run.blobs.create(f"model-{self._current.round}", manifest)
        return self._blob.views()

    def _keep(self, arrays: Arrays) -> Arrays:
        manifest = Manifest.of(arrays)
        with self._run.lock:
            if self.kept is not None:
                self._run.blobs.free(self.kept)
            self._run.journal.layout(manifest)
            self.kept = self._run.blobs.create(f"kept-{self._current.round}", manifest)
        return self.kept.views()[0]


def _collected(run: Run, current: OpenRound, summing: Summing | Relayed) -> bool:
    """Wait for something to sum, and sum it without the lock; True when the round can close."""
    due = None

    def something() -> bool:
        nonlocal due
        due = summing.next_in_order()
        return due is not None or _not_needed(run, current) or _complete(run, current)

    with run.lock:
        left = current.began + run.settings.deadline_s - time.monotonic()
        in_time = run.wait_until(something, left)
        if due is None:
            if not in_time:
                check_deadline(run, current)
            current.closing = True
            return True
    summing.add(due)
    return False


def _not_needed(run: Run, current: OpenRound) -> bool:
    return run.rounds is not None and current.round > run.rounds


def _complete(run: Run, current: OpenRound) -> bool:
    """Every participant has answered or is gone, and the answers make a quorum; or there are as many as are wanted."""
    pending = [n for n in current.participants if n not in current.accepted and not run.members[n].gone]
    counted = [*current.accepted, *pending]
    if current.drawn and len(counted) < _needed(run, current):
        check_quorum(run, _present(run), f"in round {current.round}")
        raise RoundFailedError(f"{len(counted)} of the sites that were chosen are left", fix="look at their logs")
    if not current.drawn:
        check_quorum(run, counted, f"in round {current.round}")
    return not pending or (current.answers is not None and len(current.accepted) >= current.answers)


def _needed(run: Run, current: OpenRound) -> int:
    """How many updates the round cannot do without."""
    return max(min(run.settings.min_sites, len(current.participants)), 1)


def check_deadline(run: Run, current: OpenRound) -> None:
    if len(current.accepted) < _needed(run, current):
        late = [n for n in current.participants if n not in current.accepted]
        raise QuorumError(
            f"round {current.round} has {len(current.accepted)} of {_needed(run, current)} updates after "
            f"{run.settings.deadline_s:g} s; none came from {', '.join(late)}",
            fix="raise deadline_s, lower min_sites, or look at the logs of these sites",
        )


def commit(run: Run, current: OpenRound, blob: Blob, digests: bytes, kept: Blob | None) -> None:
    """The result becomes the global model, first in the journal, then for everybody. Called under the lock."""
    updates = [a.update for a in current.accepted.values()]
    metrics = weighted_means((u.metrics, u.num_examples) for u in sorted(updates, key=lambda u: u.site))
    sites = tuple(n for n in run.members if n in current.accepted)
    if run.results and run.results[-1].sites == sites:
        sites = run.results[-1].sites  # results are kept: thousands of rounds should not hold thousands of copies
    result = RoundResult(
        round=current.round,
        seconds=time.monotonic() - current.began,
        metrics=metrics,
        sites=sites,
        missing=tuple(n for n in current.participants if n not in current.accepted),
        bytes_up=sum(current.bytes_up.values()),
        bytes_down=sum(current.bytes_down.values()),
    )
    entry = ModelEntry(current.round, blob.name, blob.manifest.layout, digests)
    for made in filter(None, (blob, kept)):
        run.blobs.settle(made)
    kept_entry = KeptEntry(kept.name, kept.manifest.layout) if kept else None
    run.journal.committed(entry, current.round, result.to_json(), kept_entry)
    previous, run.model, run.open = run.model, Model(entry, blob, kept), None
    if current.round > 0:
        run.results.append(result)
        run.scores.trained(current.round, metrics)
        run.events.emit("round_finished", current.round, **_without_round(result))
    run.published.notify_all()
    if previous is not None:
        if previous.kept is not None:
            run.blobs.free(previous.kept)
            previous.kept = None
        _keep_better(run, previous)


def _keep_better(run: Run, model: Model) -> None:
    """A model that has been replaced as the newest: the best so far is kept, the other recycled."""
    if model.version == 0:
        run.retire(model)
        return
    settle(run, model.version)
    if run.scores.better(model.version, run.best.version if run.best else None):
        model, run.best = run.best or model, model
    if model is not run.best:
        run.retire(model)


def last_scores(run: Run) -> None:
    """Hand out the final model, wait for its scores, and decide which round was the best."""
    with run.lock:
        run.phase, run.exporter = "final", run.initial_source() or ""
        run.published.notify_all()
        assert run.model is not None
        last = run.model.version
        run.wait_until(
            lambda: evaluators(run, last) <= run.scores.reported(last) | run.without_score, run.settings.deadline_s
        )
        settle(run, last)
        if run.best is None or run.scores.better(last, run.best.version):
            run.best = run.model
        run.journal.ended(None)
        run.phase = "done"
        run.events.emit("finished", rounds=run.rounds, best_round=run.best.version)
        run.published.notify_all()


def _cross_scores(run: Run) -> None:
    """Wait for the sites' scores of each other's models, and tell them."""
    if run.settings.cross_site:
        with run.lock:
            run.wait_until(lambda: run.cross_site.complete(run), run.settings.deadline_s)
            run.events.emit("cross_site", run.rounds or 0, matrix=run.cross_site.matrix(run))


def _farewell(run: Run) -> None:
    """Serve until every site has taken what it wants and left."""
    with run.lock:
        run.wait_until(lambda: all(m.gone or not m.attempt for m in run.members.values()), run.settings.deadline_s)


def _present(run: Run) -> list[str]:
    return [m.name for m in run.members.values() if m.active]


def _assembled(run: Run, enough: int) -> bool:
    """Enough sites are there; for exact restarts none is on its way back either, since it could be drawn."""
    returning = any(m.known and not m.gone and not m.active for m in run.members.values())
    return len(_present(run)) >= enough and not (run.settings.exact_restart and returning)


def _none_can_come(run: Run) -> bool:
    return all(m.active or m.gone for m in run.members.values())


def check_quorum(run: Run, counted: list[str], when: str) -> None:
    if len(counted) < max(run.settings.min_sites, 1):
        reasons = [f"{m.name}: {m.gone}" for m in run.members.values() if m.gone]
        raise QuorumError(
            f"{len(counted)} of at least {run.settings.min_sites} sites are left {when}",
            where="; ".join(reasons),
            fix="look at the log of the site that left; lower min_sites to go on without it",
        )


def _without_round(result: RoundResult) -> dict[str, Any]:
    return {k: v for k, v in result.to_json().items() if k != "round"}
