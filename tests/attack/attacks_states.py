"""Hostile variants: calls out of order, of another time, and for somebody else."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from attack_client import Attacker, member
from attack_table import Attack

from fl_runtime.wire.fl.v1 import federation_pb2 as pb


def joined(send: Callable[[Attacker], object]) -> Callable[[Attacker], object]:
    """Let the attacker join without registering."""

    def work(attacker: Attacker) -> object:
        attacker.join()
        return send(attacker)

    return work


def left(send: Callable[[Attacker], object]) -> Callable[[Attacker], object]:
    """Let the attacker take part, and leave before it sends something."""

    def work(attacker: Attacker) -> object:
        attacker.leave()
        return send(attacker)

    return member(work)


def as_attempt(change: int, send: Callable[[Attacker], object]) -> Callable[[Attacker], object]:
    """Let the attacker speak as another process of its site."""

    def work(attacker: Attacker) -> object:
        attacker.attempt += change
        try:
            return send(attacker)
        finally:
            attacker.attempt -= change

    return member(work)


def of_another_job(attacker: Attacker) -> object:
    attacker.job, job = "another", attacker.job
    try:
        return attacker.update()
    finally:
        attacker.job = job


def later(rounds: int) -> Callable[[Attacker], object]:
    return member(lambda attacker: attacker.update(round=attacker.round + rounds))


def task_of(attacker: Attacker) -> object:
    request = pb.NextRequest(session=attacker.session, done="x" * 10**6)
    return attacker.call("Next", request.SerializeToString())


def left_alone(attacker: Attacker) -> str:
    """Leave with the attempt of an honest site, whose number is 1, and say where that site stands."""
    request = pb.LeaveRequest(session=pb.Session(job=attacker.job, attempt=1), early=True, reason="north")
    attacker.call("Leave", request.SerializeToString())
    return "left"


_A = partial(Attack, "states")
_OLD = "attempt [0-9]+ has taken over"
_NOT_REGISTERED, _LEFT = "evil has not registered", "evil has left this run"

ATTACKS = (
    _A("a score without an attempt", "evil", joined(lambda a: a.score(session=pb.Session(job=a.job))), _OLD),
    _A("an update before registering", "evil", joined(Attacker.update), _NOT_REGISTERED),
    _A("a score before registering", "evil", joined(Attacker.score), _NOT_REGISTERED),
    _A("an update after leaving", "evil", left(Attacker.update), _LEFT),
    _A("a score after leaving", "evil", left(Attacker.score), _LEFT),
    _A("an update for the next round", "evil", later(1), "but round [0-9]+ is open"),
    _A(
        "an update for round 4294967295",
        "evil",
        member(lambda a: a.update(round=2**32 - 1)),
        "but round [0-9]+ is open",
    ),
    _A("an update for the initial model", "evil", member(lambda a: a.update(round=0)), "the update is duplicate"),
    _A("an update for a past round", "evil", member(lambda a: a.update(round=1)), "the update is (late|duplicate)"),
    _A("an update for another stage", "evil", member(lambda a: a.update(stage="again")), "the update is late"),
    _A("an update of an earlier process", "evil", as_attempt(-1, Attacker.update), _OLD),
    _A("an update of a later process", "evil", as_attempt(1, Attacker.update), _OLD),
    _A("a task for another process", "evil", as_attempt(1, task_of), "characters long|" + _OLD),
    _A("an update for another job", "evil", member(of_another_job), "does not run here any more"),
    _A("a score of a model to come", "evil", member(lambda a: a.score(version=2**32 - 1)), "but the newest is"),
    _A("a stage of 1 MB with a request", "evil", member(task_of), "characters long"),
    _A("goodbye for another site", "evil", member(left_alone), _OLD),
)
