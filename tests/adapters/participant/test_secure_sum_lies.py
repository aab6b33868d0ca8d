"""Steps of secure sums that a hostile server changes, over mutual TLS: the site that it lies to refuses, and leaves."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
from hostile_server import Hostile, train
from study import WAIT_S, Study, readdressed, until

from fl_runtime.errors import FederationError, PermissionDeniedError
from fl_runtime.secure_sum import Context, SiteSums, SumRules
from fl_runtime.secure_sum.primitives import SIGNATURE_BYTES
from fl_runtime.secure_sum.travelling import ANSWER, as_message, as_text
from fl_runtime.transport.base import Peer
from fl_runtime.trust.streams.kit_signatures import KitSignatures
from fl_runtime.wire import frames
from fl_runtime.wire.fl.v1 import federation_pb2 as pb

SITES = ("north", "south", "west")
ACCEPTED = pb.SubmitReply(accepted=pb.Accepted(status="used")).SerializeToString()

Task = tuple[int, str, dict[str, Any]]
"""Round, stage and settings of a task."""


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Study]:
    with Study(tmp_path_factory.mktemp("study"), SITES) as study:
        yield study


class Lying(Hostile):
    """A server that asks sites for steps of its own, and keeps their answers to itself.

    Attributes:
        seen: The tasks that the true server has sent: site -> those of each step.
        answers: What each site has answered to tasks of the liar.
    """

    def __init__(self, study: Study, lies: dict[str, Callable[[Lying, Task], list[Callable[[], Task]]]]) -> None:
        super().__init__(study, lambda method, message: message)
        self.study, self._lies = study, lies
        self._waiting: dict[str, list[Callable[[], Task]]] = {}
        self._captive: set[str] = set()
        self._job = ""
        self.seen: dict[str, list[Task]] = {name: [] for name in SITES}
        self.answers: dict[str, list[bytes]] = {name: [] for name in SITES}

    def handle(self, method: str, peer: Peer, requests: Iterator[bytes]) -> Iterator[bytes]:
        if method == "Next" and self._waiting.get(peer.name):
            yield self._told(peer.name)
        elif method == "Next":
            yield from (self._task(peer.name, message) for message in super().handle(method, peer, requests))
        elif method == "Submit":
            first = next(requests)
            update = pb.UpdatePart.FromString(first).update
            if update.encoding.startswith(ANSWER):
                answer = as_message(update.encoding.removeprefix(ANSWER), "an answer")
                if peer.name in self._captive:
                    self.answers[peer.name].append(answer)
                    self._captive.discard(peer.name)
                    yield ACCEPTED
                    return
            yield from super().handle(method, peer, _chained(first, requests))
        else:
            yield from super().handle(method, peer, requests)

    def _task(self, name: str, message: bytes) -> bytes:
        part = pb.TaskPart() if frames.is_frame(message) else pb.TaskPart.FromString(message)
        config = json.loads(part.task.config_json or "{}")
        if "secure_sum" not in (part.task.kind, *config):
            return message
        told = (part.task.round, part.task.stage, config)
        self.seen[name].append(told)
        lies = self._lies[name](self, told) if name in self._lies else []
        if not lies:
            return message
        if part.task.kind == "train":
            part.task.config_json = json.dumps(lies[0]()[2])
            return part.SerializeToString()
        self._job, self._waiting[name] = part.task.job, lies
        return self._told(name)

    def _told(self, name: str) -> bytes:
        """The next task of the liar for a site."""
        round, stage, config = self._waiting[name].pop(0)()
        self._captive.add(name)
        header = pb.TaskHeader(job=self._job, round=round, stage=stage, kind="secure_sum")
        header.config_json = json.dumps(config)
        return pb.TaskPart(task=header).SerializeToString()

    def signature_of(self, name: str) -> str:
        return as_text(until(lambda: self.answers[name], f"the signature of {name}")[0])


def _chained(first: bytes, others: Iterator[bytes]) -> Iterator[bytes]:
    yield first
    yield from others


def step(task: Task, name: str, round: int = 1) -> bool:
    return task[0] == round and task[2].get("step") == name


def other_keys(signed_for: str) -> Any:
    """Show other keys of south: unsigned ones, or those that it has signed for another job."""

    def lie(server: Lying, task: Task) -> list[Callable[[], Task]]:
        if not step(task, "shares"):
            return []
        signer = KitSignatures(server.study.kits / "south") if signed_for else None
        forged = SiteSums("south", Context(signed_for, signed_for, ""), SumRules(), signer).public
        keys = {**task[2]["keys"], "south": as_text(forged)}
        return [lambda: (task[0], task[1], {**task[2], "keys": keys})]

    return lie


def shares_withheld(server: Lying, task: Task) -> list[Callable[[], Task]]:
    if task[0] != 1 or "secure_sum" not in task[2]:
        return []
    received = {name: part for name, part in task[2]["secure_sum"]["received"].items() if name != "west"}
    return [lambda: (task[0], task[1], {**task[2], "secure_sum": {**task[2]["secure_sum"], "received": received}})]


def too_few_signatures(server: Lying, task: Task) -> list[Callable[[], Task]]:
    if not step(task, "reveal"):
        return []
    alone = {"north": task[2]["signatures"]["north"]}
    return [lambda: (task[0], task[1], {**task[2], "signatures": alone})]


def signatures_of_the_round_before(server: Lying, task: Task) -> list[Callable[[], Task]]:
    if not step(task, "reveal", round=2):
        return []
    old = next(each for each in server.seen["north"] if step(each, "reveal"))
    return [lambda: (task[0], task[1], {**task[2], "signatures": old[2]["signatures"]})]


def asked_again(server: Lying, task: Task) -> list[Callable[[], Task]]:
    if not step(task, "reveal", round=2):
        return []
    number, stage, _ = next(each for each in server.seen["north"] if step(each, "reveal"))
    return [lambda: (number, stage, {"step": "agree", "survivors": ["north", "south"]})]


def survivors(names: list[str], signed_by: list[str]) -> Any:
    """Ask for a signature of these survivors, and then for shares, with the signatures of other sites."""

    def lie(server: Lying, task: Task) -> list[Callable[[], Task]]:
        if not step(task, "reveal"):
            return []
        agree: dict[str, Any] = {"step": "agree", "survivors": names}
        return [
            lambda: (task[0], task[1], agree),
            lambda: (
                task[0],
                task[1],
                {"step": "reveal", "signatures": {name: server.signature_of(name) for name in signed_by}},
            ),
        ]

    return lie


LIES: dict[str, tuple[dict[str, Any], str]] = {
    "unsigned keys": ({"north": other_keys("")}, "the keys of south .* are not signed with a certificate"),
    "keys of another job": ({"north": other_keys("other")}, "the keys of south are not signed by that site"),
    "shares withheld": ({"north": shares_withheld}, "the signatures of south, west are of something else"),
    "too few signatures": ({"north": too_few_signatures}, "2 of its 3 holders must have signed the same survivors, 1 "),
    "an old list": ({"north": signatures_of_the_round_before}, "signatures of south, west are of something else"),
    "another list of an old round": ({"north": asked_again}, "one set of survivors a stage"),
    "other lists": (
        {
            "north": survivors(["north", "south"], ["north", "south", "west"]),
            "south": survivors(["south", "west"], ["north", "south", "west"]),
            "west": survivors(["north", "west"], ["north", "south", "west"]),
        },
        "the signatures of south, west are of something else",
    ),
    "a list of all, and a shorter one": (
        {"north": survivors(["north", "south"], ["north"])},
        "2 of its 3 holders must have signed the same survivors, 1 ",
    ),
}


@pytest.mark.parametrize("case", LIES)
def test_a_site_reveals_nothing_to_a_server_that_lies(study: Study, case: str) -> None:
    lies, refusal = LIES[case]
    server, kits = Lying(study, lies), {name: readdressed(study, name) for name in SITES}
    name = "-".join(case.replace(",", "").split())
    study.job(name=name, rounds=2, secure_sum=True, min_sites=3, rejoin_s=60)
    with ThreadPoolExecutor() as pool:
        running = {site: pool.submit(train, kits[site]) for site in SITES}
        refused = running["north"].exception(WAIT_S)
        with suppress(FederationError):  # it may be over
            study.admin().ask("AbortJob", job=name)
    assert isinstance(refused, PermissionDeniedError), refused
    assert re.search(refusal, str(refused))
    captured = [answer for site in lies for answer in server.answers[site]]
    assert all(len(answer) == SIGNATURE_BYTES for answer in captured), "it has signed, and revealed nothing"
